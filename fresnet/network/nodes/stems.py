"""Stems: what makes the first activations of images."""

from typing import Any, Generic, NamedTuple

from torch import Tensor

from fresnet.network.nodes.layers import Layer, T
from fresnet.network.nodes.protocols import PLAIN, Drawer, Geometry, Names, Regime


class Stem7x7(NamedTuple, Generic[T]):
    """A 7x7 convolution of stride 2 and its norm; a 3x3 max pooling of stride 2 follows."""

    layer: T

    def run(self, x: Tensor, do: Regime) -> tuple[Tensor, "Stem7x7[Any]"]:
        y, layer = do.layer(self.layer, x, Geometry(2))
        return do.max_pool(y), Stem7x7(layer)

    @staticmethod
    def draw(d: Drawer, channels: int, width: int) -> "Stem7x7[Layer]":
        return Stem7x7(d.layer(channels, width, 7))

    @staticmethod
    def names() -> Names:
        return Names({"layer": ("conv1", "bn1")})

    @staticmethod
    def note() -> str:
        return "stride 2; 3x3 max pool, stride 2"

    @staticmethod
    def stride() -> int:
        """Pixels from one activation to the next."""
        return 4


class DeepStem(NamedTuple, Generic[T]):
    """ResNet-D's: three 3x3 convolutions, the first of stride 2, and the same pooling."""

    layer1: T
    layer2: T
    layer3: T

    def run(self, x: Tensor, do: Regime) -> tuple[Tensor, "DeepStem[Any]"]:
        y, one = do.layer(self.layer1, x, Geometry(2))
        y, two = do.layer(self.layer2, y, PLAIN)
        y, three = do.layer(self.layer3, y, PLAIN)
        return do.max_pool(y), DeepStem(one, two, three)

    @staticmethod
    def draw(d: Drawer, channels: int, width: int) -> "DeepStem[Layer]":
        half = width // 2
        return DeepStem(d.layer(channels, half, 3), d.layer(half, half, 3), d.layer(half, width, 3))

    @staticmethod
    def names() -> Names:
        units = {
            "layer1": ("conv1.0", "conv1.1"),
            "layer2": ("conv1.3", "conv1.4"),
            "layer3": ("conv1.6", "bn1"),
        }
        return Names(units, ("timm",))

    @staticmethod
    def note() -> str:
        return "the first stride 2; 3x3 max pool, stride 2"

    @staticmethod
    def stride() -> int:
        return 4


class Stem3x3(NamedTuple, Generic[T]):
    """The paper's for CIFAR: one 3x3 convolution of stride 1 and its norm, without pooling."""

    layer: T

    def run(self, x: Tensor, do: Regime) -> tuple[Tensor, "Stem3x3[Any]"]:
        y, layer = do.layer(self.layer, x, PLAIN)
        return y, Stem3x3(layer)

    @staticmethod
    def draw(d: Drawer, channels: int, width: int) -> "Stem3x3[Layer]":
        return Stem3x3(d.layer(channels, width, 3))

    @staticmethod
    def names() -> Names:
        return Names({"layer": ("conv1", "bn1")}, ())

    @staticmethod
    def note() -> str:
        return ""

    @staticmethod
    def stride() -> int:
        return 1
