"""The blocks of He et al. 2015 (arXiv:1512.03385), Fig. 5: ReLU follows the sum."""

from typing import Any, Generic

from torch import Tensor
from typing_extensions import NamedTuple

from fresnet.network.nodes.attention import Attention, NoAttention
from fresnet.network.nodes.layers import LAYERS, Layer, T
from fresnet.network.nodes.protocols import PLAIN, Drawer, Geometry, Grid, Names, Plan, Regime
from fresnet.network.nodes.shortcuts import Shortcut
from fresnet.network.nodes.stages import strided


class BasicBlock(NamedTuple, Generic[T]):
    """Two 3x3 convolutions, the stride in the first."""

    layer1: T
    layer2: T
    attention: Attention[T]
    shortcut: Shortcut[T]

    def run(self, x: Tensor, grid: Grid, do: Regime) -> tuple[Tensor, "BasicBlock[Any]"]:
        y, one = strided(self.layer1, x, grid, do, dilation=grid.dilation)
        add, shortcut = self.shortcut.run(x, grid.stride, channels_of(self.layer2), do)
        after = Geometry(dilation=grid.dilation_after)
        y, two, attention = self.attention.end(self.layer2, y, add, do, after)
        return y, BasicBlock(one, two, attention, shortcut)

    @staticmethod
    def draw(d: Drawer, plan: Plan) -> "BasicBlock[Layer]":
        shortcut = plan.shortcut.draw(d.layer, plan)
        return BasicBlock(
            d.layer(plan.channels, plan.inner, 3),
            d.layer(plan.inner, plan.out, 3, last=True),
            plan.attention.draw(d, plan),
            shortcut,
        )

    @staticmethod
    def names() -> Names:
        return Names({"layer1": ("conv1", "bn1"), "layer2": ("conv2", "bn2")})

    @staticmethod
    def expansion() -> int:
        """How many times as many channels a block puts out as it has inside."""
        return 1


class Bottleneck(NamedTuple, Generic[T]):
    """1x1, 3x3 and 1x1 convolutions, the stride in the 3x3 ("V1.5").

    So have it torchvision and nearly everyone since. The 3x3 is grouped if its weight has fewer
    input channels than the first convolution has output channels.
    """

    layer1: T
    layer2: T
    layer3: T
    attention: Attention[T]
    shortcut: Shortcut[T]

    def run(self, x: Tensor, grid: Grid, do: Regime) -> tuple[Tensor, "Bottleneck[Any]"]:
        y, one = do.layer(self.layer1, x, PLAIN)
        groups = groups_of(self.layer1, self.layer2)
        y, two = strided(self.layer2, y, grid, do, dilation=grid.dilation, groups=groups)
        add, shortcut = self.shortcut.run(x, grid.stride, channels_of(self.layer3), do)
        y, three, attention = self.attention.end(self.layer3, y, add, do, PLAIN)
        return y, Bottleneck(one, two, three, attention, shortcut)

    @staticmethod
    def draw(d: Drawer, plan: Plan) -> "Bottleneck[Layer]":
        return Bottleneck(*_drawn(d, plan))

    @staticmethod
    def names() -> Names:
        return Names({f"layer{i}": (f"conv{i}", f"bn{i}") for i in (1, 2, 3)})

    @staticmethod
    def expansion() -> int:
        return 4


class BottleneckV1(NamedTuple, Generic[T]):
    """The paper's own bottleneck: the stride in the first 1x1."""

    layer1: T
    layer2: T
    layer3: T
    attention: Attention[T]
    shortcut: Shortcut[T]

    def run(self, x: Tensor, grid: Grid, do: Regime) -> tuple[Tensor, "BottleneckV1[Any]"]:
        y, one = strided(self.layer1, x, grid, do, dilation=1)
        groups = groups_of(self.layer1, self.layer2)
        y, two = do.layer(self.layer2, y, Geometry(1, grid.dilation_after, groups))
        add, shortcut = self.shortcut.run(x, grid.stride, channels_of(self.layer3), do)
        y, three, attention = self.attention.end(self.layer3, y, add, do, PLAIN)
        return y, BottleneckV1(one, two, three, attention, shortcut)

    @staticmethod
    def draw(d: Drawer, plan: Plan) -> "BottleneckV1[Layer]":
        return BottleneckV1(*_drawn(d, plan))

    @staticmethod
    def names() -> Names:
        return Bottleneck.names()

    @staticmethod
    def expansion() -> int:
        return 4


def _drawn(d: Drawer, plan: Plan) -> Any:
    """The fields of either bottleneck."""
    shortcut = plan.shortcut.draw(d.layer, plan)
    first = plan.inner // plan.narrowing
    return (
        d.layer(plan.channels, first, 1),
        d.layer(first, plan.inner, 3, plan.groups),
        d.layer(plan.inner, plan.out, 1, last=True),
        plan.attention.draw(d, plan),
        shortcut,
    )


def last_layer(node: Any) -> str:
    """The field of the layer that a stem or a block ends with, and a block's adds the shortcut.

    By convention it is the last field that holds a layer.
    """
    *_, last = (field for field in node._fields if isinstance(getattr(node, field), LAYERS))
    return str(last)


def attention_of(block: Any) -> Any:
    """The attention of a block, of whatever type."""
    return getattr(block, "attention", NoAttention())


def channels_of(at: Any) -> int:
    """The channels that a layer puts out."""
    shape: tuple[int, ...] = at.unit.conv.shape
    return shape[0] if shape else 0  # what does not fit, the convolution refuses


def groups_of(first: Any, second: Any) -> int:
    """The groups of the second of two layers, told by the channels between them."""
    channels, weight = channels_of(first), second.unit.conv
    inputs = weight.shape[1] if weight.ndim == 4 else 0
    return channels // inputs if inputs else 1  # what does not fit, the convolution refuses
