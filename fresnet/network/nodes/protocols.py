"""What nodes are asked, and what they are handed to answer it.

A node says how it runs, how it is drawn and what checkpoints call it. It runs by a `Regime`, and it
is drawn by a `Drawer`.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from fresnet.network.nodes.layers import Layer, Normed


@dataclass(frozen=True)  # not a tuple, which `torch.func` would take apart on every call
class Geometry:
    """How a kernel is laid over a map. Padding is such that stride 1 keeps height and width."""

    stride: int = 1
    dilation: int = 1
    groups: int = 1

    def padding(self, weight: Tensor) -> list[int]:
        """The rows and the columns of zeros on each side, for a kernel `[o c/groups k k]`."""
        return [self.dilation * (side // 2) for side in weight.shape[2:]]


PLAIN = Geometry()


class Regime(Protocol):
    """How a network computes: inference, training, calibration, and each backend is a regime.

    The nodes say what follows what. A regime says how each step is done, and what a unit leaves
    behind, which stands in the unit's place in the tree that a run returns. `at` is a `Pair`, for a
    network runs as a tree of pairs.
    """

    @abstractmethod
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

    @abstractmethod
    def normed(self, at: Any, x: Tensor) -> tuple[Tensor, Any]:
        """relu(norm(x)), and what the norm leaves behind."""

    def dropping(self, keep: Tensor) -> "Regime":
        """The same, but that a block's branch counts keep times, `[b]`, in the sum."""

    def join(self, y: Tensor, add: Tensor | None) -> Tensor:
        """relu(y + add), where a node stands between the last layer and the sum."""

    def max_pool(self, x: Tensor, stride: int = 2, padding: int = 1) -> Tensor:
        """3x3 max pooling."""

    def frame(self, x: Tensor) -> Tensor:
        """x with a zero before and after each row and each column."""

    def average_pool(self, x: Tensor) -> Tensor:
        """2x2 average pooling of stride 2."""

    def halve(self, x: Tensor) -> Tensor:
        """2x2 average pooling of stride 2, which drops an odd last row or column."""

    def blur(self, x: Tensor) -> Tensor:
        """x at every second place, smoothed by a binomial kernel of side 3."""

    def subsample(self, x: Tensor, stride: int) -> Tensor:
        """x at every `stride`-th place."""

    def zero_pad(self, x: Tensor, before: int, after: int) -> Tensor:
        """x with so many channels of zeros before and after its own."""

    def mean(self, x: Tensor) -> Tensor:
        """The mean of each map: `[b c h w]` -> `[b c]`."""

    def gate(self, x: Tensor, gates: Tensor) -> Tensor:
        """x times the sigmoid of gates `[b c 1 1]`."""

    def drop(self, x: Tensor, keep: Tensor) -> Tensor:
        """Means x `[b c]` times keep `[b c]`."""

    def head(self, at: Any, x: Tensor) -> Tensor:
        """The logits `[b k]` of a `Head` on means x `[b c]`."""


class Grid(NamedTuple):
    """How a block reads activations.

    stride: from one of its results to the next.
    dilation, dilation_after: before and after the stride.
    pooled: the stage that pools after a convolution, which then has no stride; None otherwise.
    """

    stride: int = 1
    dilation: int = 1
    dilation_after: int = 1
    pooled: "PooledStage | None" = None


class PooledStage(Protocol):
    """A stage whose first block pools."""

    @staticmethod
    def pool(x: Tensor, do: Regime) -> Tensor:
        """x at every second place in some way."""

    @staticmethod
    def note() -> str:
        """What a layer table says of it."""


class Plan(NamedTuple):
    """What `draw` needs to know of a block: sizes, and the types of what is in it.

    `narrowing`, `side` and `reduction` are `Spec`'s; `side` is that of a projection's kernel.
    """

    channels: int
    inner: int
    out: int
    groups: int
    shortcut: type[Any]
    attention: type[Any]
    narrowing: int = 1
    side: int = 1
    reduction: int = 16


class Drawer(Protocol):
    """What `draw` makes nodes of: first values, or places for values."""

    def layer(
        self, channels: int, out: int, side: int, groups: int = 1, *, last: bool = False
    ) -> Layer:
        """A convolution and a norm. Of the last layer of a block the scale may start at 0."""

    def biased(self, channels: int, out: int) -> Layer:
        """A 1x1 convolution and a `Bias`."""

    def bare(self, channels: int, out: int, side: int, *, last: bool = False) -> Layer:
        """A convolution and `NoNorm`. Of the last layer of a block the weight may start at 0."""

    def row(self, length: int) -> Layer:
        """A convolution of one channel and one row, and `NoNorm`."""

    def normed(self, channels: int) -> Normed:
        """A norm that no convolution precedes."""


class Names(NamedTuple):
    """What checkpoints call a node.

    units: for each field that holds a unit, the names of its convolution and of its norm.
    libraries: those that have such a node, by the names of `to_state_dict`'s layouts.
    """

    units: Mapping[str, tuple[str, str]] = {}
    libraries: tuple[str, ...] = ("torchvision", "timm", "huggingface")


class Stem(Protocol):
    """What makes the first activations of images."""

    def run(self, x: Tensor, do: Regime) -> tuple[Tensor, Any]:
        """The activations, and the stem of what its units left behind."""

    @staticmethod
    def draw(d: Drawer, channels: int, *widths: int) -> Any:
        """A stem of so many channels in, and out of each layer, or out of the last."""

    @staticmethod
    def names() -> Names: ...

    @staticmethod
    def note() -> str:
        """What a layer table says besides its convolutions."""

    @staticmethod
    def stride() -> int:
        """Pixels from one activation to the next."""


class Block(Protocol):
    """What stages are made of."""

    def run(self, x: Tensor, grid: Grid, do: Regime) -> tuple[Tensor, Any]:
        """The activations, and the block of what its units left behind."""

    @staticmethod
    def draw(d: Drawer, plan: Plan) -> Any:
        """A block of this plan."""

    @staticmethod
    def names() -> Names: ...

    @staticmethod
    def expansion() -> int:
        """How many times as many channels it puts out as it has inside."""


class Last(Protocol):
    """What stands between the last block and the head."""

    def run(self, x: Tensor, do: Regime) -> tuple[Tensor, Any]:
        """The activations, and the node of what its units left behind."""

    @staticmethod
    def draw(d: Drawer, channels: int) -> Any:
        """A node for so many channels."""

    @staticmethod
    def names() -> Names: ...

    @staticmethod
    def note() -> str:
        """What a layer table says."""
