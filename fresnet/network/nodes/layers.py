"""Layers, of which all nodes are made; what stands in their place; and the regimes that run them.

A tree of nodes is a functor of its layers. The same node types hold `Layer`s in `weights`, running
moments in `stats`, a batch's moments in what a training run returns, and ranges in an int8 network.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from torch import Tensor

from fresnet.tree import rebuild

T = TypeVar("T")
"""What stands in a `Layer`'s place."""

N = TypeVar("N")
"""What stands in a `Normed`'s place."""


class Norm(NamedTuple):
    """The trained part of a batch normalisation; each `[c]`."""

    scale: Tensor
    bias: Tensor


class FrozenNorm(NamedTuple):
    """A batch normalisation that uses its running moments in training too; each `[c]`."""

    scale: Tensor
    bias: Tensor


class Bias(NamedTuple):
    """y = x + bias, `[c]`: a convolution's own bias, or a norm once folded into its convolution."""

    bias: Tensor


class Rescale(NamedTuple):
    """y = x * scale + bias, each `[c]`: a folded norm that no convolution can take in."""

    scale: Tensor
    bias: Tensor


class NoNorm(NamedTuple):
    """y = x. It stands after a convolution that has neither norm nor bias."""


AnyNorm: TypeAlias = Norm | FrozenNorm | Bias | Rescale | NoNorm


class NormStats(NamedTuple):
    """The running moments of a batch normalisation (the variance is unbiased); each `[c]`."""

    mean: Tensor
    var: Tensor


class Moments(NamedTuple):
    """The number of values n `[]`, their mean and their sum of squared deviations, each `[c]`.

    They stand in the place of `NormStats` in what `forward_moments` returns.
    """

    n: Tensor
    mean: Tensor
    m2: Tensor


class Layer(NamedTuple):
    """The unit of a network: a convolution `[o c/groups k k]` and the norm that follows it."""

    conv: Tensor
    norm: AnyNorm


class Normed(NamedTuple):
    """A norm that no convolution precedes, and ReLU, as in ResNet V2."""

    norm: AnyNorm


Unit: TypeAlias = Layer | Normed
UNITS = (Layer, Normed)


class Pair(NamedTuple):
    """A unit, and what stands beside it in another tree. A network runs as a tree of pairs."""

    unit: Any  # Layer or Normed
    beside: Any


def over(
    function: Callable[..., Any], node: Any, *rest: Any, units: tuple[type, ...] = UNITS
) -> Any:
    """The tree with each unit replaced by what the function makes of it and of what is beside it.

    >>> over(lambda unit: len(unit), (Normed(NoNorm()), (Normed(NoNorm()),)))
    (1, (1,))
    """
    if isinstance(node, units):
        return function(node, *rest)
    if not isinstance(node, tuple):
        return node
    below = zip(node, *rest, strict=True)
    return rebuild(node, [over(function, *at, units=units) for at in below])


@dataclass(frozen=True)  # not a tuple, which `torch.func` would take apart on every call
class Geometry:
    """How a kernel is laid over a map. Padding is such that stride 1 keeps height and width."""

    stride: int = 1
    dilation: int = 1
    groups: int = 1

    def padding(self, side: int) -> int:
        """The padding of a kernel of this side."""
        return self.dilation * (side // 2)


PLAIN = Geometry()


class Regime(Protocol):
    """How a network computes: inference, training, calibration, and each backend is a regime.

    The nodes say what follows what. A regime says how each step is done, and what a unit leaves
    behind, which stands in the unit's place in the tree that a run returns. `at` is a `Pair`, for a
    network runs as a tree of pairs.
    """

    def layer(
        self,
        at: Any,
        x: Tensor,
        how: Geometry,
        *,
        add: Tensor | None = None,
        relu: bool = True,
    ) -> tuple[Tensor, Any]:
        """relu(norm(conv(x)) + add), and what the layer leaves behind."""

    def normed(self, at: Any, x: Tensor) -> tuple[Tensor, Any]:
        """relu(norm(x)), and what the norm leaves behind."""

    def join(self, y: Tensor, add: Tensor | None) -> Tensor:
        """relu(y + add), where a node stands between the last layer and the sum."""

    def max_pool(self, x: Tensor) -> Tensor:
        """3x3 max pooling of stride 2."""

    def average_pool(self, x: Tensor) -> Tensor:
        """2x2 average pooling of stride 2."""

    def subsample(self, x: Tensor, stride: int) -> Tensor:
        """x at every `stride`-th place."""

    def zero_pad(self, x: Tensor, channels: int) -> Tensor:
        """x with channels of zeros after its own."""

    def mean(self, x: Tensor) -> Tensor:
        """The mean of each map: `[b c h w]` -> `[b c 1 1]`."""

    def gate(self, x: Tensor, gates: Tensor) -> Tensor:
        """x times the sigmoid of gates `[b c 1 1]`."""

    def head(self, at: Any, x: Tensor) -> Tensor:
        """The logits `[b k]` of a `Head` on x `[b c h w]`."""


class Grid(NamedTuple):
    """How a block reads activations: its stride, and the dilation before and after the stride."""

    stride: int = 1
    dilation: int = 1
    dilation_after: int = 1


class Plan(NamedTuple):
    """What `draw` needs to know of a block."""

    channels: int
    inner: int
    out: int
    groups: int
    shortcut: Any  # the types of its nodes
    attention: Any


class Drawer(Protocol):
    """What `draw` makes nodes of: first values, or places for values."""

    def layer(
        self, channels: int, out: int, side: int, groups: int = 1, *, last: bool = False
    ) -> Layer:
        """A convolution and a `Norm`. Of the last layer of a block the scale may start at 0."""

    def biased(self, channels: int, out: int) -> Layer:
        """A 1x1 convolution and a `Bias`."""

    def bare(self, channels: int, out: int, side: int) -> Layer:
        """A convolution and `NoNorm`."""

    def normed(self, channels: int) -> Normed:
        """A `Norm` that no convolution precedes."""


class Names(NamedTuple):
    """What checkpoints call a node.

    units: for each field that holds a unit, the names of its convolution and of its norm.
    libraries: those that have such a node, by the names of `to_state_dict`'s layouts.
    """

    units: Mapping[str, tuple[str, str]] = {}
    libraries: tuple[str, ...] = ("torchvision", "timm", "huggingface")
