"""The nodes of a network's tree. Sizes come from shapes, behaviour comes from node types.

Every node is a NamedTuple, so it is a pytree node for `torch.func` without registration, and its
type is part of the tree's structure: a block's behaviour cannot come loose from its weights.
A network is two such trees, `weights` and `stats`, in parallel: where the one has
`norm1.scale` and `norm1.bias`, the other has `norm1.mean` and `norm1.var`.
"""

from collections.abc import Callable, Mapping
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


class Bias(NamedTuple):
    """What a batch normalisation is once folded into its convolution: y = x + bias; `[c]`.

    It has no statistics: `()` stands beside it.
    """

    bias: Tensor


class Rescale(NamedTuple):
    """What a folded norm is once its convolution is of int8: y = x * scale + bias; each `[c]`."""

    scale: Tensor
    bias: Tensor


AnyNorm: TypeAlias = Norm | FrozenNorm | Bias


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


class Affine(NamedTuple):
    """What a level of uint8 stands for: scale * (level - zero_point)."""

    scale: float
    zero_point: int


FusedLayer: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]
"""Of activations and what is to be added to the result, over which it may be written."""


class Identity(NamedTuple):
    """The parameter-free shortcut: y = x. Stands in both trees."""


class Projection(NamedTuple):
    """The shortcut that changes channels or size: a 1x1 convolution `[o c 1 1]` and its norm."""

    conv: Tensor
    norm: AnyNorm


class ProjectionStats(NamedTuple):
    norm: NormStats | tuple[()]


class PooledProjection(NamedTuple):
    """A 2x2 average pooling where the block strides, then a 1x1 convolution and its norm.

    ResNet-D's (He et al. 2018, arXiv:1812.01187, Fig. 2c): no activation goes unread.
    """

    conv: Tensor
    norm: AnyNorm


class ZeroPad(NamedTuple):
    """The paper's option A: x at every second place, its new channels zero. In both trees."""


class NoShortcut(NamedTuple):
    """Nothing is added: a block of a plain network, the paper's counterexample. In both trees."""


Shortcut: TypeAlias = Identity | Projection | PooledProjection | ZeroPad | NoShortcut
ShortcutStats: TypeAlias = Identity | ProjectionStats | ZeroPad | NoShortcut


class BasicBlock(NamedTuple):
    """Two 3x3 convolutions, the stride in the first (the paper's Fig. 5, left)."""

    conv1: Tensor
    norm1: AnyNorm
    conv2: Tensor
    norm2: AnyNorm
    shortcut: Shortcut


class BasicBlockStats(NamedTuple):
    norm1: NormStats | tuple[()]
    norm2: NormStats | tuple[()]
    shortcut: ShortcutStats


class Bottleneck(NamedTuple):
    """1x1, 3x3 and 1x1 convolutions (the paper's Fig. 5, right), the stride in the 3x3 ("V1.5").

    So have it torchvision and nearly everyone since. The 3x3 is grouped if its weight has fewer
    input channels than the first convolution has output channels.
    """

    conv1: Tensor
    norm1: AnyNorm
    conv2: Tensor
    norm2: AnyNorm
    conv3: Tensor
    norm3: AnyNorm
    shortcut: Shortcut


class BottleneckStats(NamedTuple):
    norm1: NormStats | tuple[()]
    norm2: NormStats | tuple[()]
    norm3: NormStats | tuple[()]
    shortcut: ShortcutStats


class BottleneckV1(NamedTuple):
    """The paper's own bottleneck: the stride in the first 1x1."""

    conv1: Tensor
    norm1: AnyNorm
    conv2: Tensor
    norm2: AnyNorm
    conv3: Tensor
    norm3: AnyNorm
    shortcut: Shortcut


Block: TypeAlias = BasicBlock | Bottleneck | BottleneckV1
BlockStats: TypeAlias = BasicBlockStats | BottleneckStats


class DilatedStage(NamedTuple):
    """Blocks that double the dilation of what follows instead of striding; else a bare tuple."""

    blocks: tuple[Block, ...]


Stage: TypeAlias = tuple[Block, ...] | DilatedStage


def blocks_of(stage: Stage) -> tuple[Block, ...]:
    return stage.blocks if isinstance(stage, DilatedStage) else stage


class Stem7x7(NamedTuple):
    """A 7x7 convolution of stride 2 and its norm; a 3x3 max pooling of stride 2 follows."""

    conv: Tensor
    norm: AnyNorm


class Stem7x7Stats(NamedTuple):
    norm: NormStats | tuple[()]


class DeepStem(NamedTuple):
    """ResNet-D's: three 3x3 convolutions, the first of stride 2, and the same pooling."""

    conv1: Tensor
    norm1: AnyNorm
    conv2: Tensor
    norm2: AnyNorm
    conv3: Tensor
    norm3: AnyNorm


class DeepStemStats(NamedTuple):
    norm1: NormStats | tuple[()]
    norm2: NormStats | tuple[()]
    norm3: NormStats | tuple[()]


class Stem3x3(NamedTuple):
    """The paper's for CIFAR: one 3x3 convolution of stride 1 and its norm, without pooling."""

    conv: Tensor
    norm: AnyNorm


class Stem3x3Stats(NamedTuple):
    norm: NormStats | tuple[()]


Stem: TypeAlias = Stem7x7 | DeepStem | Stem3x3
StemStats: TypeAlias = Stem7x7Stats | DeepStemStats | Stem3x3Stats


class Head(NamedTuple):
    """The classifier: weight `[k c]`, bias `[k]`."""

    weight: Tensor
    bias: Tensor


class Weights(NamedTuple):
    """Everything that is trained: what gradients, optimizers and weight decay see."""

    stem: Any  # Stem: not said, so that whoever knows which may take its fields
    stages: tuple[Any, ...]  # Stage
    head: Head


class Stats(NamedTuple):
    """Everything that training carries along: the running moments of every norm."""

    stem: Any  # StemStats
    stages: tuple[tuple[Any, ...], ...]  # BlockStats


class Params(NamedTuple):
    """A whole network."""

    weights: Weights
    stats: Stats


class Quantized(NamedTuple):
    """A network in int8: for inference alone.

    weights: folded; convolutions are int8 `[o c/groups k k]`, each beside its `Rescale`; the head
      is as it was.
    ranges: the least and the greatest of each layer's results, `[2]`, where `Stats` has a norm's.
    images: the same of what the network is given.
    """

    weights: Weights
    ranges: Stats
    images: Tensor


STEMS: tuple[type, ...] = (Stem7x7, DeepStem, Stem3x3)
BLOCKS: tuple[type, ...] = (BasicBlock, Bottleneck, BottleneckV1)
NORMS: tuple[type, ...] = (Norm, FrozenNorm, Bias)
SHORTCUTS: tuple[type, ...] = (Identity, Projection, PooledProjection, ZeroPad, NoShortcut)

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
    DeepStem: DeepStemStats,
    Stem3x3: Stem3x3Stats,
    BasicBlock: BasicBlockStats,
    Bottleneck: BottleneckStats,
    BottleneckV1: BottleneckStats,
    Identity: Identity,
    Projection: ProjectionStats,
    PooledProjection: ProjectionStats,
    ZeroPad: ZeroPad,
    NoShortcut: NoShortcut,
    Norm: NormStats,
    FrozenNorm: NormStats,
    Bias: tuple,
    Head: tuple,
}
"""Which node stands in `stats` where this one stands in `weights`: `()` beside a head or a bias."""
