"""Networks of `quantize`, run on levels of uint8."""

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError, describe
from fresnet.inference.fused import FusedLayer, Inference
from fresnet.inference.int8_kernels import Packed, convolution, is_supported, max_pool
from fresnet.inference.onednn import traced
from fresnet.network import ops
from fresnet.network.levels import Affine, affine, check_quantized
from fresnet.network.net import run_network
from fresnet.network.nodes import (
    Geometry,
    Layer,
    Normed,
    Pair,
    Params,
    Quantized,
    Rescale,
    Unit,
)
from fresnet.network.regimes import Floating


def to_levels(x: Tensor, levels: Affine) -> Tensor:
    """x in uint8, rounded and clipped, channels last."""
    scale, zero_point = levels
    rounded = (x / scale).round_().add_(zero_point).clamp_(0, 255)
    return _narrowed(rounded).contiguous(memory_format=torch.channels_last)


def from_levels(x: Tensor, levels: Affine) -> Tensor:
    scale, zero_point = levels
    return (x.float() - zero_point) * scale


def check_runnable(caller: str, network: Quantized) -> None:
    """Refuse a quantised network that has been cast or moved, and a machine without kernels for it.

    Raises:
      FresnetError: saying what was expected and what came.
    """
    check_quantized(caller, network)
    if not is_supported():
        raise FresnetError(
            f"{caller} expects oneDNN for int8, on a processor with exact sums (VNNI); got none"
        )


def prepare(network: Quantized, x: Tensor) -> Inference:
    """Prepare the network for images of this shape.

    Two images run in floating point to tell what the levels of each layer stand for. One has the
    least value everywhere, and the other the greatest. Every step between layers hands these on.

    The prepared network runs in TorchScript, which calls one layer after the other without Python.
    """
    weights, images = network.weights, affine(network.images)
    ends = _filled(network.images, *x.shape[1:])
    _, last, packed = run_network(Params(weights, network.ranges), ends, _Packing(len(x)))
    do, params = _Levels(affine(last)), Params(weights, packed)

    def infer(x: Tensor, *_: Tensor) -> Tensor:
        y: Tensor = weights.head.run(run_network(params, to_levels(x, images), do).y, do)
        return y

    leaves = [leaf for leaf in tree.leaves(packed) if isinstance(leaf, Tensor)]
    run = traced(infer, x, *leaves)
    return lambda x: run(x, *leaves)


class _Packing(Floating):
    """Packs each unit, and hands on the ends of its range.

    Args:
      images: how many images there will be.
    """

    def __init__(self, images: int) -> None:
        self.images = images

    def layer(
        self,
        at: Pair,
        x: Tensor,
        how: Geometry,
        *,
        add: Tensor | None = None,
        relu: bool = True,
    ) -> tuple[Tensor, Packed]:
        match at.unit:
            case Layer(conv, Rescale(scale, bias)):
                layer = convolution(
                    torch.Size((self.images, *x.shape[1:])),
                    *(conv, scale, bias, how),
                    source=affine(x),
                    result=affine(at.beside),
                    added=None if add is None else affine(add),
                    relu=relu,
                )
            case _:
                _refuse(at.unit)
        height, width = (-(-side // how.stride) for side in x.shape[2:])
        return _filled(at.beside, len(conv), height, width), layer

    def normed(self, at: Pair, x: Tensor) -> tuple[Tensor, FusedLayer]:
        match at.unit:
            case Normed(Rescale(scale, bias)):
                layer = _rescaling(scale, bias, affine(x), affine(at.beside))
            case _:
                _refuse(at.unit)
        return _filled(at.beside, *x.shape[1:]), layer

    def zero_pad(self, x: Tensor, before: int, after: int) -> Tensor:
        if x.min() < 0:  # then the level 0 does not stand for zero
            raise FresnetError("int8 pads with zeros activations after ReLU alone")
        return super().zero_pad(x, before, after)


class _Levels(Floating):
    """Runs the packed units on levels of uint8.

    Args:
      last: what the levels of the last activations stand for. No others are averaged over a map,
        for `quantize` refuses attention.
    """

    def __init__(self, last: Affine) -> None:
        self.last = last

    def layer(
        self,
        at: Pair,
        x: Tensor,
        how: Geometry,
        *,
        add: Tensor | None = None,
        relu: bool = True,
    ) -> tuple[Tensor, tuple[()]]:
        return at.beside(x, add), ()

    def normed(self, at: Pair, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return at.beside(x, None), ()

    def max_pool(self, x: Tensor, stride: int = 2, padding: int = 1) -> Tensor:
        return max_pool(x, stride, padding)

    def average_pool(self, x: Tensor) -> Tensor:
        return _rounded(ops.average_pool, x)

    def halve(self, x: Tensor) -> Tensor:
        return _rounded(ops.halve, x)

    def blur(self, x: Tensor) -> Tensor:
        return _rounded(ops.blur, x)

    def subsample(self, x: Tensor, stride: int) -> Tensor:
        return x[:, :, ::stride, ::stride]

    def mean(self, x: Tensor) -> Tensor:
        return from_levels(super().mean(x.float()), self.last)


def _rounded(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A mean of levels, which is between levels."""
    return _narrowed(function(x.float()).round_())


def _narrowed(x: Tensor) -> Tensor:
    """Whole numbers in uint8: PyTorch takes five times as long if int16 is not between."""
    return x.to(torch.int16).to(torch.uint8)


def _refuse(unit: Unit) -> NoReturn:
    raise FresnetError(f"int8 has no kernel for a norm such as {describe(unit.norm)}")


def _filled(ends: Tensor, c: int, h: int, w: int) -> Tensor:
    """Two images `[2 c h w]`, one with the least value everywhere, one with the greatest."""
    return ends[:, None, None, None].expand(2, c, h, w)


def _rescaling(scale: Tensor, bias: Tensor, source: Affine, result: Affine) -> FusedLayer:
    factor, shift = scale[:, None, None].clone(), bias[:, None, None].clone()

    def run(x: Tensor, _: Tensor | None) -> Tensor:
        y = torch.addcmul(shift, from_levels(x, source), factor)
        return to_levels(ops.relu(y), result)

    return run
