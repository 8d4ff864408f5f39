"""The nodes of a network's tree. Sizes come from shapes, behaviour comes from node types.

Every node is a NamedTuple, so it is a pytree node for `torch.func` without registration, and its
type is part of the tree's structure: a block's behaviour cannot come loose from its weights.
A network is two such trees, `weights` and `stats`, in parallel: where the one has
`norm1.scale` and `norm1.bias`, the other has `norm1.mean` and `norm1.var`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor


class Norm(NamedTuple):
    """A batch normalisation's trained part; each `[c]`."""

    scale: Tensor
    bias: Tensor


class FrozenNorm(NamedTuple):
    """A batch normalisation that uses its running moments in training too; each `[c]`."""

    scale: Tensor
    bias: Tensor


class NormStats(NamedTuple):
    """A batch normalisation's running moments (the variance unbiased); each `[c]`."""

    mean: Tensor
    var: Tensor


class Moments(NamedTuple):
    """How many values there were, n `[]`, and their mean and sum of squared deviations, each `[c]`.

    Stands in place of `NormStats` in what `forward_moments` returns.
    """

    n: Tensor
    mean: Tensor
    m2: Tensor


class Identity(NamedTuple):
    """The parameter-free shortcut: y = x. Stands in both trees."""


class Projection(NamedTuple):
    """The shortcut that changes channels or size: a 1x1 convolution `[o c 1 1]` and its norm."""

    conv: Tensor
    norm: Norm | FrozenNorm


class ProjectionStats(NamedTuple):
    norm: NormStats


Shortcut: TypeAlias = Identity | Projection
ShortcutStats: TypeAlias = Identity | ProjectionStats


class BasicBlock(NamedTuple):
    """Two 3x3 convolutions, the stride in the first (the paper's Fig. 5, left)."""

    conv1: Tensor
    norm1: Norm | FrozenNorm
    conv2: Tensor
    norm2: Norm | FrozenNorm
    shortcut: Shortcut


class BasicBlockStats(NamedTuple):
    norm1: NormStats
    norm2: NormStats
    shortcut: ShortcutStats


class Bottleneck(NamedTuple):
    """1x1, 3x3 and 1x1 convolutions (the paper's Fig. 5, right), the stride in the 3x3.

    The paper strides in the first 1x1; torchvision, and nearly everyone since, in the 3x3 ("V1.5").
    """

    conv1: Tensor
    norm1: Norm | FrozenNorm
    conv2: Tensor
    norm2: Norm | FrozenNorm
    conv3: Tensor
    norm3: Norm | FrozenNorm
    shortcut: Shortcut


class BottleneckStats(NamedTuple):
    norm1: NormStats
    norm2: NormStats
    norm3: NormStats
    shortcut: ShortcutStats


Block: TypeAlias = BasicBlock | Bottleneck
BlockStats: TypeAlias = BasicBlockStats | BottleneckStats


class Stem7x7(NamedTuple):
    """A 7x7 convolution of stride 2 and its norm; a 3x3 max pooling of stride 2 follows."""

    conv: Tensor
    norm: Norm | FrozenNorm


class Stem7x7Stats(NamedTuple):
    norm: NormStats


class Head(NamedTuple):
    """The classifier: weight `[k c]`, bias `[k]`."""

    weight: Tensor
    bias: Tensor


class Weights(NamedTuple):
    """Everything that is trained: what gradients, optimizers and weight decay see."""

    stem: Stem7x7
    stages: tuple[tuple[Block, ...], ...]
    head: Head


class Stats(NamedTuple):
    """Everything that training carries along: the running moments of every norm."""

    stem: Stem7x7Stats
    stages: tuple[tuple[BlockStats, ...], ...]


class Params(NamedTuple):
    """A whole network."""

    weights: Weights
    stats: Stats


STEMS: tuple[type, ...] = (Stem7x7,)
BLOCKS: tuple[type, ...] = (BasicBlock, Bottleneck)
NORMS: tuple[type, ...] = (Norm, FrozenNorm)
SHORTCUTS: tuple[type, ...] = (Identity, Projection)

NODES: Mapping[str, tuple[type, ...]] = {
    "norm": NORMS,
    "norm1": NORMS,
    "norm2": NORMS,
    "norm3": NORMS,
    "shortcut": SHORTCUTS,
}
"""Which fields of a block, a stem or a shortcut hold nodes, and of which types; others, leaves."""

STATS_OF: Mapping[type, Any] = {
    Stem7x7: Stem7x7Stats,
    BasicBlock: BasicBlockStats,
    Bottleneck: BottleneckStats,
    Identity: Identity,
    Projection: ProjectionStats,
    Norm: NormStats,
    FrozenNorm: NormStats,
    Head: tuple,
}
"""Which node stands in `stats` where this one stands in `weights`; a head has no statistics."""
