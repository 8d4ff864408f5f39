"""ResNet V2: norm and ReLU come before each convolution, and nothing follows the sum.

Source: He et al. 2016, arXiv:1603.05027, Fig. 4e.
"""

from typing import Any, Generic

from torch import Tensor
from typing_extensions import NamedTuple

from fresnet.network.nodes.blocks import channels_of, groups_of
from fresnet.network.nodes.layers import Layer, N, Normed, T
from fresnet.network.nodes.protocols import PLAIN, Drawer, Geometry, Grid, Names, Plan, Regime
from fresnet.network.nodes.shortcuts import Identity, Shortcut
from fresnet.network.nodes.stages import strided
from fresnet.network.nodes.stems import DeepStem, deep, deep_names, deep_widths


class PreActivation(NamedTuple, Generic[T, N]):
    """The bottleneck of V2, the stride in its 3x3 convolution.

    A layer is a convolution and the norm of the next one. The last has none, nor has a projection.
    """

    before: N
    layer1: T
    layer2: T
    layer3: T
    shortcut: Shortcut[T]

    def run(self, x: Tensor, grid: Grid, do: Regime) -> tuple[Tensor, "PreActivation[Any, Any]"]:
        active, before = do.normed(self.before, x)
        source = x if isinstance(self.shortcut, Identity) else active
        add, shortcut = self.shortcut.run(source, grid.stride, channels_of(self.layer3), do)
        y, one = do.layer(self.layer1, active, PLAIN)
        groups = groups_of(self.layer1, self.layer2)
        y, two = strided(self.layer2, y, grid, do, dilation=grid.dilation, groups=groups)
        y, three = do.layer(self.layer3, y, PLAIN, add=add, relu=False)
        return y, PreActivation(before, one, two, three, shortcut)

    @staticmethod
    def draw(d: Drawer, plan: Plan) -> "PreActivation[Layer, Normed]":
        first = plan.inner // plan.narrowing
        return PreActivation(
            d.normed(plan.channels),
            d.layer(plan.channels, first, 1),
            d.layer(first, plan.inner, 3, plan.groups),
            d.bare(plan.inner, plan.out, 1, last=True),
            plan.shortcut.draw(d.bare, plan),
        )

    @staticmethod
    def names() -> Names:
        units = {
            "before": ("", "norm1"),
            "layer1": ("conv1", "norm2"),
            "layer2": ("conv2", "norm3"),
            "layer3": ("conv3", "conv3"),
        }
        return Names(units, ("timm",))

    @staticmethod
    def expansion() -> int:
        return 4


class PreActivationBasic(NamedTuple, Generic[T, N]):
    """Two 3x3 convolutions, the stride in the first, and norms as in the bottleneck of V2."""

    before: N
    layer1: T
    layer2: T
    shortcut: Shortcut[T]

    def run(
        self, x: Tensor, grid: Grid, do: Regime
    ) -> tuple[Tensor, "PreActivationBasic[Any, Any]"]:
        active, before = do.normed(self.before, x)
        source = x if isinstance(self.shortcut, Identity) else active
        add, shortcut = self.shortcut.run(source, grid.stride, channels_of(self.layer2), do)
        y, one = strided(self.layer1, active, grid, do, dilation=grid.dilation)
        y, two = do.layer(self.layer2, y, Geometry(1, grid.dilation_after), add=add, relu=False)
        return y, PreActivationBasic(before, one, two, shortcut)

    @staticmethod
    def draw(d: Drawer, plan: Plan) -> "PreActivationBasic[Layer, Normed]":
        return PreActivationBasic(
            d.normed(plan.channels),
            d.layer(plan.channels, plan.inner, 3),
            d.bare(plan.inner, plan.out, 3, last=True),
            plan.shortcut.draw(d.bare, plan),
        )

    @staticmethod
    def names() -> Names:
        units = {
            "before": ("", "norm1"),
            "layer1": ("conv1", "norm2"),
            "layer2": ("conv2", "conv2"),
        }
        return Names(units, ("timm",))

    @staticmethod
    def expansion() -> int:
        return 1


class BareStem7x7(NamedTuple, Generic[T]):
    """V2's stem: a 7x7 convolution of stride 2, then a 3x3 max pooling of stride 2."""

    layer: T

    def run(self, x: Tensor, do: Regime) -> tuple[Tensor, "BareStem7x7[Any]"]:
        y, layer = do.layer(self.layer, x, Geometry(2), relu=False)
        return do.max_pool(y), BareStem7x7(layer)

    @staticmethod
    def draw(d: Drawer, channels: int, *widths: int) -> "BareStem7x7[Layer]":
        return BareStem7x7(d.bare(channels, widths[-1], 7))

    @staticmethod
    def names() -> Names:
        return Names({"layer": ("conv1", "conv1")}, ("timm",))

    @staticmethod
    def note() -> str:
        return "stride 2; 3x3 max pool, stride 2"

    @staticmethod
    def stride() -> int:
        return 4


class FramedStem7x7(NamedTuple, Generic[T]):
    """BiT's stem: as V2's, with a frame of zeros around the maps that are pooled.

    Without ReLU before it, a maximum of negative values is then zero at the edges.
    """

    layer: T

    def run(self, x: Tensor, do: Regime) -> tuple[Tensor, "FramedStem7x7[Any]"]:
        y, layer = do.layer(self.layer, x, Geometry(2), relu=False)
        return do.max_pool(do.frame(y), padding=0), FramedStem7x7(layer)

    @staticmethod
    def draw(d: Drawer, channels: int, *widths: int) -> "FramedStem7x7[Layer]":
        return FramedStem7x7(d.bare(channels, widths[-1], 7))

    @staticmethod
    def names() -> Names:
        return BareStem7x7.names()

    @staticmethod
    def note() -> str:
        return "stride 2; 3x3 max pool within zeros, stride 2"

    @staticmethod
    def stride() -> int:
        return 4


class BareDeepStem(NamedTuple, Generic[T]):
    """ResNet-D's stem in V2: no norm follows its last convolution."""

    layer1: T
    layer2: T
    layer3: T

    def run(self, x: Tensor, do: Regime) -> tuple[Tensor, "BareDeepStem[Any]"]:
        y, stem = deep(self, x, do, relu=False)
        return do.max_pool(y), stem

    @staticmethod
    def draw(d: Drawer, channels: int, *widths: int) -> "BareDeepStem[Layer]":
        one, two, width = deep_widths(*widths)
        return BareDeepStem(d.layer(channels, one, 3), d.layer(one, two, 3), d.bare(two, width, 3))

    @staticmethod
    def names() -> Names:
        return deep_names("conv1.6")

    @staticmethod
    def note() -> str:
        return DeepStem.note()

    @staticmethod
    def stride() -> int:
        return DeepStem.stride()


class LastNorm(NamedTuple, Generic[N]):
    """V2's last norm and ReLU, between the last block and the head."""

    normed: N

    def run(self, x: Tensor, do: Regime) -> tuple[Tensor, "LastNorm[Any]"]:
        y, normed = do.normed(self.normed, x)
        return y, LastNorm(normed)

    @staticmethod
    def draw(d: Drawer, channels: int) -> "LastNorm[Normed]":
        return LastNorm(d.normed(channels))

    @staticmethod
    def names() -> Names:
        return Names({"normed": ("", "norm")}, ("timm",))

    @staticmethod
    def note() -> str:
        return "norm and ReLU"
