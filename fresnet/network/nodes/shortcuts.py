"""Shortcuts: what is added to a block's result."""

from collections.abc import Callable
from typing import Any, Generic, TypeAlias

from torch import Tensor
from typing_extensions import NamedTuple

from fresnet.network.nodes.layers import Layer, T
from fresnet.network.nodes.protocols import PLAIN, Geometry, Names, Plan, Regime

DrawLayer: TypeAlias = Callable[[int, int, int], Layer]
"""Of channels in, channels out and the kernel's side: a layer with a norm, or without."""


class Identity(NamedTuple):
    """y = x."""

    def run(
        self, x: Tensor, stride: int, channels: int, do: Regime
    ) -> tuple[Tensor | None, "Identity"]:
        return x, self

    @staticmethod
    def draw(layer: DrawLayer, plan: Plan) -> "Identity":
        return Identity()

    @staticmethod
    def names() -> Names:
        return Names()

    @staticmethod
    def note() -> str:
        return ""


class Projection(NamedTuple, Generic[T]):
    """A 1x1 convolution and its norm, for a change of channels or size: the paper's option B."""

    layer: T

    def run(
        self, x: Tensor, stride: int, channels: int, do: Regime
    ) -> tuple[Tensor | None, "Projection[Any]"]:
        y, layer = do.layer(self.layer, x, Geometry(stride), relu=False)
        return y, Projection(layer)

    @staticmethod
    def draw(layer: DrawLayer, plan: Plan) -> "Projection[Layer]":
        return Projection(layer(plan.channels, plan.out, plan.side))

    @staticmethod
    def names() -> Names:
        return Names({"layer": ("downsample.0", "downsample.1")})

    @staticmethod
    def note() -> str:
        return "projection"


class PooledProjection(NamedTuple, Generic[T]):
    """A 2x2 average pooling where the block strides, then a 1x1 convolution and its norm.

    ResNet-D's (He et al. 2018, arXiv:1812.01187, Fig. 2c): no activation goes unread.
    """

    layer: T

    def run(
        self, x: Tensor, stride: int, channels: int, do: Regime
    ) -> tuple[Tensor | None, "PooledProjection[Any]"]:
        x = do.average_pool(x) if stride == 2 else x
        y, layer = do.layer(self.layer, x, PLAIN, relu=False)
        return y, PooledProjection(layer)

    @staticmethod
    def draw(layer: DrawLayer, plan: Plan) -> "PooledProjection[Layer]":
        return PooledProjection(layer(plan.channels, plan.out, 1))

    @staticmethod
    def names() -> Names:
        return Names({"layer": ("downsample.1", "downsample.2")}, ("timm",))

    @staticmethod
    def note() -> str:
        return "pooled projection"


class ZeroPad(NamedTuple):
    """The paper's option A: x at every second place, and zeros for the new channels, after its own.

    The authors' own code does so (fb.resnet.torch); the paper does not say where the zeros are.
    """

    def run(
        self, x: Tensor, stride: int, channels: int, do: Regime
    ) -> tuple[Tensor | None, "ZeroPad"]:
        return do.zero_pad(do.subsample(x, stride), 0, channels - x.shape[1]), self

    @staticmethod
    def draw(layer: DrawLayer, plan: Plan) -> "ZeroPad":
        return ZeroPad()

    @staticmethod
    def names() -> Names:
        return Names(libraries=())

    @staticmethod
    def note() -> str:
        return "zero padding"


class CentredZeroPad(NamedTuple):
    """Option A with half of the zeros before x's channels and half after them.

    Source: github.com/akamaster/pytorch_resnet_cifar10, whose checkpoints are computed so.
    """

    def run(
        self, x: Tensor, stride: int, channels: int, do: Regime
    ) -> tuple[Tensor | None, "CentredZeroPad"]:
        new = channels - x.shape[1]
        return do.zero_pad(do.subsample(x, stride), new // 2, new - new // 2), self

    @staticmethod
    def draw(layer: DrawLayer, plan: Plan) -> "CentredZeroPad":
        return CentredZeroPad()

    @staticmethod
    def names() -> Names:
        return Names(libraries=())

    @staticmethod
    def note() -> str:
        return "zero padding, centred"


class NoShortcut(NamedTuple):
    """Nothing is added: a block of a plain network, the paper's counterexample."""

    def run(
        self, x: Tensor, stride: int, channels: int, do: Regime
    ) -> tuple[Tensor | None, "NoShortcut"]:
        return None, self

    @staticmethod
    def draw(layer: DrawLayer, plan: Plan) -> "NoShortcut":
        return NoShortcut()

    @staticmethod
    def names() -> Names:
        return Names(libraries=())

    @staticmethod
    def note() -> str:
        return "no shortcut"


Shortcut: TypeAlias = (
    Identity | Projection[T] | PooledProjection[T] | ZeroPad | CentredZeroPad | NoShortcut
)
