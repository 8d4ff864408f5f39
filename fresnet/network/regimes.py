"""Regimes in floating point: inference, training, and what others build on."""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor

from fresnet.errors import FresnetError
from fresnet.network import ops
from fresnet.network.nodes import Geometry, Head, Pair, Regime
from fresnet.network.norm import fused_norm, inference_norm, training_norm
from fresnet.pytorch.collectives import Group

Normalise: TypeAlias = Callable[[Any, Any, Tensor], tuple[Tensor, Any]]
"""From a norm, what is beside it, and x, to y and what the norm leaves behind."""


class Floating(Regime):
    """A regime whose steps between the layers are those of `ops`."""

    def dropping(self, keep: Tensor) -> Regime:
        raise FresnetError(f"{type(self).__name__} runs networks without masks")

    def add(self, y: Tensor, add: Tensor) -> Tensor:
        """The sum of a branch and its shortcut."""
        return ops.add(y, add)

    def join(self, y: Tensor, add: Tensor | None) -> Tensor:
        return ops.relu(y if add is None else self.add(y, add))

    def max_pool(self, x: Tensor, stride: int = 2, padding: int = 1) -> Tensor:
        return ops.max_pool(x, stride, padding)

    def frame(self, x: Tensor) -> Tensor:
        return ops.frame(x)

    def average_pool(self, x: Tensor) -> Tensor:
        return ops.average_pool(x)

    def halve(self, x: Tensor) -> Tensor:
        return ops.halve(x)

    def blur(self, x: Tensor) -> Tensor:
        return ops.blur(x)

    def subsample(self, x: Tensor, stride: int) -> Tensor:
        return ops.subsample(x, stride)

    def zero_pad(self, x: Tensor, before: int, after: int) -> Tensor:
        return ops.zero_pad(x, before, after)

    def mean(self, x: Tensor) -> Tensor:
        return ops.global_average_pool(x)

    def gate(self, x: Tensor, gates: Tensor) -> Tensor:
        return ops.gate(x, gates)

    def drop(self, x: Tensor, keep: Tensor) -> Tensor:
        return ops.drop(x, keep)

    def head(self, at: Head, x: Tensor) -> Tensor:
        return ops.linear(x, *at)


class Composed(Floating):
    """Convolution, norm, sum and ReLU one after the other, with the norm handed in.

    If there is a `keep`, `[b]`, branches count so many times in sums.
    """

    def __init__(self, normalise: Normalise, keep: Tensor | None = None) -> None:
        self.normalise, self.keep = normalise, keep

    def dropping(self, keep: Tensor) -> Regime:
        dropping = copy(self)
        dropping.keep = keep
        return dropping

    def add(self, y: Tensor, add: Tensor) -> Tensor:
        return ops.add(y if self.keep is None else ops.drop(y, self.keep), add)

    def layer(
        self,
        at: Pair,
        x: Tensor,
        how: Geometry,
        *,
        add: Tensor | None = None,
        relu: bool = True,
    ) -> tuple[Tensor, Any]:
        kernel = at.unit.kernel()
        if kernel.dtype != x.dtype:
            # Rounded here, not all in advance: so each gradient is widened as soon as it is there.
            kernel = kernel.to(x.dtype)
        y = ops.conv2d(x, kernel, how)
        y, seen = self.normalise(at.unit.norm, at.beside, y)
        y = y if add is None else self.add(y, add)
        return (ops.relu(y) if relu else y), seen

    def normed(self, at: Pair, x: Tensor) -> tuple[Tensor, Any]:
        y, seen = self.normalise(at.unit.norm, at.beside, x)
        return ops.relu(y), seen


INFERENCE = Composed(inference_norm)
"""By the running statistics, which are left behind as they are."""


TRAINING = Composed(training_norm)
"""By the batch, whose moments are left behind."""


def training(group: Group | None) -> Regime:
    """Training that normalises the batches of a group of processes as one, or each by itself."""
    return TRAINING if group is None else Composed(partial(training_norm, group=group))


def training_once(group: Group | None) -> Regime:
    """The same, where `torch.autograd` differentiates at most once.

    The derivative of PyTorch's fused kernel is right then, and quicker where values are few.
    """
    return Composed(partial(training_norm, group=group, kernel=fused_norm))
