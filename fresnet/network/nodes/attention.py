"""Attention: what a block does to its last layer's result before the sum."""

from math import log2
from typing import Any, Generic, TypeAlias

from torch import Tensor
from typing_extensions import NamedTuple

from fresnet.network.nodes.layers import Layer, T
from fresnet.network.nodes.protocols import PLAIN, Drawer, Geometry, Names, Plan, Regime


class NoAttention(NamedTuple):
    """Nothing: the last layer ends with the sum."""

    def end(
        self, last: Any, y: Tensor, add: Tensor | None, do: Regime, how: Geometry
    ) -> tuple[Tensor, Any, "NoAttention"]:
        y, seen = do.layer(last, y, how, add=add)
        return y, seen, self

    @staticmethod
    def draw(d: Drawer, plan: Plan) -> "NoAttention":
        return NoAttention()

    @staticmethod
    def names() -> Names:
        return Names()

    @staticmethod
    def note() -> str:
        return ""


class SqueezeExcite(NamedTuple, Generic[T]):
    """Each map is scaled by a function of the means of all.

        y <- y * sigmoid(excite(relu(squeeze(mean(y)))))

    Two 1x1 convolutions, each with a bias; a part of the channels, in multiples of 8, is between
    them, as timm has it.

    Source: Hu et al. 2018, arXiv:1709.01507, Sec. 3.
    """

    squeeze: T
    excite: T

    def end(
        self,
        last: Any,
        y: Tensor,
        add: Tensor | None,
        do: Regime,
        how: Geometry,
    ) -> tuple[Tensor, Any, "SqueezeExcite[Any]"]:
        y, seen = do.layer(last, y, how, relu=False)
        gates, squeeze = do.layer(self.squeeze, do.mean(y)[:, :, None, None], PLAIN)
        gates, excite = do.layer(self.excite, gates, PLAIN, relu=False)
        return do.join(do.gate(y, gates), add), seen, SqueezeExcite(squeeze, excite)

    @staticmethod
    def draw(d: Drawer, plan: Plan) -> "SqueezeExcite[Layer]":
        between = max(8, (plan.out // plan.reduction + 4) // 8 * 8)
        return SqueezeExcite(d.biased(plan.out, between), d.biased(between, plan.out))

    @staticmethod
    def names() -> Names:
        units = {"squeeze": ("se.fc1", "se.fc1"), "excite": ("se.fc2", "se.fc2")}
        return Names(units, ("timm",))

    @staticmethod
    def note() -> str:
        return "squeeze and excitation"


class EfficientAttention(NamedTuple, Generic[T]):
    """Each map is scaled by a function of its own mean and of those of its neighbours.

        y <- y * sigmoid(conv(mean(y)))

    The convolution goes along the channels, `[1 1 1 k]`. It has no norm.

    Source: Wang et al. 2020 ("ECA-Net"), arXiv:1910.03151, Sec. 3.2 and Eq. 12 for k.
    """

    along: T

    def end(
        self, last: Any, y: Tensor, add: Tensor | None, do: Regime, how: Geometry
    ) -> tuple[Tensor, Any, "EfficientAttention[Any]"]:
        y, seen = do.layer(last, y, how, relu=False)
        row = do.mean(y)[:, None, None]
        gates, along = do.layer(self.along, row, PLAIN, relu=False)
        return do.join(do.gate(y, gates.permute(0, 3, 1, 2)), add), seen, EfficientAttention(along)

    @staticmethod
    def draw(d: Drawer, plan: Plan) -> "EfficientAttention[Layer]":
        nearest = int(abs(log2(max(plan.out, 1)) + 1) / 2)
        return EfficientAttention(d.row(max(3, nearest + 1 - nearest % 2)))

    @staticmethod
    def names() -> Names:
        return Names({"along": ("se.conv", "se.conv")}, ("timm",))

    @staticmethod
    def note() -> str:
        return "efficient channel attention"


Attention: TypeAlias = NoAttention | SqueezeExcite[T] | EfficientAttention[T]
