"""Stems: what makes the first activations of images."""

from typing import Any, Generic, TypeAlias

from torch import Tensor
from typing_extensions import NamedTuple

from fresnet.network.nodes.layers import Layer, T
from fresnet.network.nodes.protocols import PLAIN, Drawer, Geometry, Names, Regime


class Stem7x7(NamedTuple, Generic[T]):
    """A 7x7 convolution of stride 2 and its norm; a 3x3 max pooling of stride 2 follows."""

    layer: T

    def run(self, x: Tensor, do: Regime) -> tuple[Tensor, "Stem7x7[Any]"]:
        y, stem = self.convolve(x, do)
        return do.max_pool(y), stem

    def convolve(self, x: Tensor, do: Regime) -> tuple[Tensor, "Stem7x7[Any]"]:
        y, layer = do.layer(self.layer, x, Geometry(2))
        return y, Stem7x7(layer)

    @staticmethod
    def draw(d: Drawer, channels: int, *widths: int) -> "Stem7x7[Layer]":
        return Stem7x7(d.layer(channels, widths[-1], 7))

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
        y, stem = self.convolve(x, do)
        return do.max_pool(y), stem

    def convolve(self, x: Tensor, do: Regime) -> tuple[Tensor, "DeepStem[Any]"]:
        return deep(self, x, do)

    @staticmethod
    def draw(d: Drawer, channels: int, *widths: int) -> "DeepStem[Layer]":
        one, two, width = deep_widths(*widths)
        return DeepStem(d.layer(channels, one, 3), d.layer(one, two, 3), d.layer(two, width, 3))

    @staticmethod
    def names() -> Names:
        return deep_names("bn1")

    @staticmethod
    def note() -> str:
        return "the first stride 2; 3x3 max pool, stride 2"

    @staticmethod
    def stride() -> int:
        return 4


def deep(stem: Any, x: Tensor, do: Regime, *, relu: bool = True) -> tuple[Tensor, Any]:
    """What the convolutions of a deep stem put out, and the stem of what they left behind."""
    y, one = do.layer(stem.layer1, x, Geometry(2))
    y, two = do.layer(stem.layer2, y, PLAIN)
    y, three = do.layer(stem.layer3, y, PLAIN, relu=relu)
    return y, type(stem)(one, two, three)


def deep_widths(*widths: int) -> tuple[int, int, int]:
    """The channels that each of the three puts out; half of the last's if one number is given."""
    *before, last = widths
    one, two = before or (last // 2, last // 2)
    return one, two, last


def deep_names(last_norm: str) -> Names:
    """What timm calls its entries."""
    units = {
        "layer1": ("conv1.0", "conv1.1"),
        "layer2": ("conv1.3", "conv1.4"),
        "layer3": ("conv1.6", last_norm),
    }
    return Names(units, ("timm",))


class Stem3x3(NamedTuple, Generic[T]):
    """The paper's for CIFAR: one 3x3 convolution of stride 1 and its norm, without pooling."""

    layer: T

    def run(self, x: Tensor, do: Regime) -> tuple[Tensor, "Stem3x3[Any]"]:
        y, layer = do.layer(self.layer, x, PLAIN)
        return y, Stem3x3(layer)

    @staticmethod
    def draw(d: Drawer, channels: int, *widths: int) -> "Stem3x3[Layer]":
        return Stem3x3(d.layer(channels, widths[-1], 3))

    @staticmethod
    def names() -> Names:
        return Names({"layer": ("conv1", "bn1")}, ())

    @staticmethod
    def note() -> str:
        return ""

    @staticmethod
    def stride() -> int:
        return 1


Convolutions: TypeAlias = Stem7x7[T] | DeepStem[T]
"""The stems of which another pooling may follow the convolutions."""


class AveragedStem(NamedTuple, Generic[T]):
    """A stem with a 2x2 average pooling instead of the maximum, as timm's resnetaa has it."""

    stem: Convolutions[T]

    def run(self, x: Tensor, do: Regime) -> tuple[Tensor, "AveragedStem[Any]"]:
        y, stem = self.stem.convolve(x, do)
        return do.halve(y), AveragedStem(stem)

    def draw(self, d: Drawer, channels: int, *widths: int) -> "AveragedStem[Layer]":
        return AveragedStem.around(self.stem.draw(d, channels, *widths), d, widths[-1])

    @staticmethod
    def around(stem: Any, d: Drawer, width: int) -> "AveragedStem[Layer]":
        return AveragedStem(stem)

    @staticmethod
    def names() -> Names:
        return Names(libraries=("timm",))

    @staticmethod
    def note() -> str:
        return "stride 2 at first; 2x2 average pool, stride 2"

    @staticmethod
    def stride() -> int:
        return 4


class BlurredStem(NamedTuple, Generic[T]):
    """A stem whose 3x3 max pooling has no stride, and a blur with a stride of 2 after it.

    Source: Zhang 2019, arXiv:1904.11486, Sec. 3.
    """

    stem: Convolutions[T]

    def run(self, x: Tensor, do: Regime) -> tuple[Tensor, "BlurredStem[Any]"]:
        y, stem = self.stem.convolve(x, do)
        return do.blur(do.max_pool(y, stride=1)), BlurredStem(stem)

    def draw(self, d: Drawer, channels: int, *widths: int) -> "BlurredStem[Layer]":
        return BlurredStem.around(self.stem.draw(d, channels, *widths), d, widths[-1])

    @staticmethod
    def around(stem: Any, d: Drawer, width: int) -> "BlurredStem[Layer]":
        return BlurredStem(stem)

    @staticmethod
    def names() -> Names:
        return Names(libraries=("timm",))

    @staticmethod
    def note() -> str:
        return "stride 2 at first; 3x3 max pool; blur, stride 2"

    @staticmethod
    def stride() -> int:
        return 4


class StridedStem(NamedTuple, Generic[T]):
    """A stem with a 3x3 convolution of stride 2 instead of the maximum: ResNet-RS's.

    Source: Bello et al. 2021, arXiv:2103.07579, App. B.
    """

    stem: Convolutions[T]
    pool: T

    def run(self, x: Tensor, do: Regime) -> tuple[Tensor, "StridedStem[Any]"]:
        y, stem = self.stem.convolve(x, do)
        y, pool = do.layer(self.pool, y, Geometry(2))
        return y, StridedStem(stem, pool)

    def draw(self, d: Drawer, channels: int, *widths: int) -> "StridedStem[Layer]":
        return StridedStem.around(self.stem.draw(d, channels, *widths), d, widths[-1])

    @staticmethod
    def around(stem: Any, d: Drawer, width: int) -> "StridedStem[Layer]":
        return StridedStem(stem, d.layer(width, width, 3))

    @staticmethod
    def names() -> Names:
        return Names({"pool": ("maxpool.0", "maxpool.1")}, ("timm",))

    @staticmethod
    def note() -> str:
        return "stride 2 at first and at last"

    @staticmethod
    def stride() -> int:
        return 4
