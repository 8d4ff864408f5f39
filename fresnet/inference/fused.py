"""What backends that prepare layers for images of one shape have in common."""

from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fresnet.errors import FresnetError, describe
from fresnet.network.faults import missing_columns
from fresnet.network.nodes import (
    Bias,
    Geometry,
    Layer,
    NoNorm,
    Normed,
    Pair,
    Rescale,
    Unit,
)
from fresnet.network.norm import WITHOUT_STATISTICS, norm_without_statistics
from fresnet.network.regimes import Floating

Inference: TypeAlias = Callable[[Tensor], Tensor]
"""From images to logits."""

FusedLayer: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]
"""From activations and what is to be added to the result, over which it may be written."""


def convolution(
    shape: torch.Size, weight: Tensor, bias: Tensor | None, how: Geometry, *, relu: bool
) -> FusedLayer:
    """A convolution, then the sum, then ReLU, by PyTorch's functions, for a compiler to make one.

    Args:
      shape: of the activations, `[b c h w]`.
      weight: `[o c/groups k k]`, detached.
      bias: `[o]`, detached.
    """
    window = how.stride, how.padding(weight), how.dilation, how.groups

    def run(x: Tensor, added: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, weight, bias, *window)
        y = y if added is None else y + added
        return F.relu(y) if relu else y

    return with_columns(run, missing_columns(shape, weight, how.stride))


def with_columns(layer: FusedLayer, missing: int, zero: int = 0) -> FusedLayer:
    """The layer for activations without the columns that it needs beside them."""
    if not missing:
        return layer

    def run(x: Tensor, added: Tensor | None = None) -> Tensor:
        x = F.pad(x, (0, missing), value=zero).contiguous(memory_format=torch.channels_last)
        y = layer(x, None if added is None else F.pad(added, (0, 1)))
        return y[..., :-1].contiguous(memory_format=torch.channels_last)

    return run


class Fused(Floating):
    """A regime in which each layer is prepared at the first run and left behind.

    A network with prepared layers beside its units runs those.
    """

    def convolution(
        self, shape: torch.Size, weight: Tensor, bias: Tensor | None, how: Geometry, *, relu: bool
    ) -> FusedLayer:
        """As the function of this name, prepared by this backend."""
        return convolution(shape, weight, bias, how, relu=relu)

    def layer(
        self,
        at: Pair,
        x: Tensor,
        how: Geometry,
        *,
        add: Tensor | None = None,
        relu: bool = True,
    ) -> tuple[Tensor, Any]:
        run = at.beside
        if not callable(run):
            run = self._prepared(at.unit, x.shape, how, relu=relu)
        return run(x, add), run

    def _prepared(self, unit: Unit, shape: torch.Size, how: Geometry, *, relu: bool) -> FusedLayer:
        match unit:
            case Layer(conv, Bias(bias)):
                return self.convolution(shape, conv, bias, how, relu=relu)
            case Layer(conv, NoNorm()):
                return self.convolution(shape, conv, None, how, relu=relu)
            case Layer(conv, norm) if type(norm) in WITHOUT_STATISTICS:
                convolve = self.convolution(shape, conv, None, how, relu=False)

                def run(x: Tensor, added: Tensor | None = None) -> Tensor:
                    y = norm_without_statistics(norm, convolve(x, None))
                    y = y if added is None else y + added
                    return F.relu(y) if relu else y

                return run
        _refuse(unit)

    def normed(self, at: Pair, x: Tensor) -> tuple[Tensor, Any]:
        run = at.beside if callable(at.beside) else _rescaling(at.unit)
        return run(x, None), run

    def join(self, y: Tensor, add: Tensor | None) -> Tensor:
        # Not written over y, for oneDNN's compiler refuses such a function in bfloat16.
        return F.relu(y if add is None else y + add)


def _rescaling(unit: Unit) -> FusedLayer:
    match unit:
        case Normed(Rescale(scale, bias)):
            factor, shift = scale[:, None, None].clone(), bias[:, None, None].clone()
            # oneDNN's compiler would write a product and a sum over x, which the shortcut reads. It
            # leaves this one operation to PyTorch.
            return lambda x, _: F.relu(torch.addcmul(shift, x, factor))
        case Normed(norm) if type(norm) in WITHOUT_STATISTICS:
            return lambda x, _: F.relu(norm_without_statistics(norm, x))
    _refuse(unit)


def _refuse(unit: Unit) -> NoReturn:
    raise FresnetError(
        "compiled inference expects layers as fold leaves them, whose norms have no statistics; "
        f"got {type(unit).__name__} with {describe(unit.norm)}"
    )
