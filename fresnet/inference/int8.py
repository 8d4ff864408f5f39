"""Networks of `quantize`, run by oneDNN's kernels for int8.

PyTorch has these operators for its compilers alone. No other file here touches them.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError, describe
from fresnet.inference.fused import FusedLayer, Inference, with_columns
from fresnet.network import ops
from fresnet.network.faults import missing_columns
from fresnet.network.net import run_network
from fresnet.network.nodes import (
    PLAIN,
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

OPERATORS = (
    (torch.ops.onednn, "qconv_prepack"),
    (torch.ops.onednn, "qconv2d_pointwise"),
    (torch.ops.onednn, "qlinear_prepack"),
    (torch.ops.onednn, "qlinear_pointwise"),
    (torch.ops.quantized, "max_pool2d"),
)


class Affine(NamedTuple):
    """The values that levels of uint8 stand for: scale * (level - zero_point)."""

    scale: float
    zero_point: int


def affine(x: Tensor) -> Affine:
    """The levels for values like these, in equal steps, with zero among them."""
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (high - low) / 255 or 1.0
    return Affine(scale, round(-low / scale))


def to_levels(x: Tensor, levels: Affine) -> Tensor:
    """x in uint8, rounded and clipped, channels last."""
    scale, zero_point = levels
    rounded = (x / scale).round_().add_(zero_point).clamp_(0, 255)
    return rounded.to(torch.uint8, memory_format=torch.channels_last)


def from_levels(x: Tensor, levels: Affine) -> Tensor:
    scale, zero_point = levels
    return (x.float() - zero_point) * scale


@cache
def is_supported() -> bool:
    """Whether the kernels are there and their sums are exact.

    On processors without VNNI, pairs of products saturate at 16 bits.
    """
    if not torch.backends.mkldnn.is_available() or not all(
        hasattr(namespace, name) for namespace, name in OPERATORS
    ):
        return False
    with torch.device("cpu"):
        x = torch.full((1, 64, 3, 3), 255, dtype=torch.uint8, device="cpu")
        weight = torch.full((1, 64, 3, 3), 127, dtype=torch.int8, device="cpu")
        one, none = (torch.tensor([n], dtype=torch.float32, device="cpu") for n in (1.0, 0.0))
    source, result = Affine(1.0, 0), Affine(255 * 127 * weight.numel() / 200, 0)
    layer = convolution(x.shape, weight, one, none, source=source, result=result, relu=False)
    return bool(layer(x, None)[0, 0, 1, 1] == 200)


def check_quantized(caller: str, network: Quantized) -> None:
    """Refuse a quantised network that has been cast or moved, and a machine without kernels for it.

    Raises:
      FresnetError: saying what was expected and what came.
    """
    for leaf in tree.leaves(network):
        if leaf.dtype not in (torch.int8, torch.float32) or leaf.device.type != "cpu":
            raise FresnetError(
                f"{caller} expects a network as quantize returns it, in int8 and float32 on the "
                f"CPU; got {leaf.dtype} on {leaf.device}"
            )
    if not is_supported():
        raise FresnetError(
            f"{caller} expects oneDNN for int8, on a processor with exact sums (VNNI); got none"
        )


def prepare(network: Quantized, x: Tensor) -> Inference:
    """Prepare the network for images of this shape.

    Two images run in floating point to tell what the levels of each layer stand for. One has the
    least value everywhere, and the other the greatest. Every step between layers hands these on.
    """
    weights, images = network.weights, affine(network.images)
    ends = _filled(network.images, *x.shape[1:])
    _, last, packed = run_network(Params(weights, network.ranges), ends, _Packing(len(x)))
    do, params = _Levels(affine(last)), Params(weights, packed)

    def infer(x: Tensor) -> Tensor:
        y: Tensor = weights.head.run(run_network(params, to_levels(x, images), do).y, do)
        return y

    return infer


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
    ) -> tuple[Tensor, FusedLayer]:
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
        """PyTorch's public function for this refuses uint8."""
        window = ([side] * 2 for side in (ops.SIDE, stride, padding, 1))
        y: Tensor = torch.ops.quantized.max_pool2d(x, *window, False)
        return y

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
    return function(x.float()).round_().to(torch.uint8)


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


def convolution(
    shape: torch.Size,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    how: Geometry = PLAIN,
    *,
    source: Affine,
    result: Affine,
    added: Affine | None = None,
    relu: bool = True,
) -> FusedLayer:
    """`fused.convolution` from uint8 to uint8.

    Sums are taken in int32, go on in float32, and are rounded once. With a summand, a 1x1 kernel is
    a product of matrices: oneDNN has the same kernel for it, but PyTorch's operator for
    convolutions makes a copy of such results.

    Args:
      shape: the shape of the activations, `[b c h w]`.
      weight: int8 `[o c/groups k k]`.
      scale: what one step of the weight is worth, `[o]`.
      bias: `[o]`.
      source: what the levels of the activations stand for.
      result: what the levels of the results stand for.
      added: what the levels of the summand stand for, if there is one.
    """
    if added is not None and weight.shape[2:] == (1, 1) and how == PLAIN:
        ends = {"source": source, "result": result, "added": added}
        return _product(weight, scale, bias, **ends, relu=relu)
    missing = missing_columns(shape, weight, how.stride)
    window = ([how.stride] * 2, how.padding(weight), [how.dilation] * 2, how.groups)
    packed = torch.ops.onednn.qconv_prepack(
        weight, scale, *source, *window, [*shape[:3], shape[3] + missing]
    )
    alone = torch.ops.onednn.qconv2d_pointwise.default
    over = torch.ops.onednn.qconv2d_pointwise.binary
    symmetric = torch.zeros_like(scale, dtype=torch.int32)
    to, name = (*result, torch.uint8), "relu" if relu else "none"

    def run(x: Tensor, levels: Tensor | None = None) -> Tensor:
        y: Tensor
        arguments = (x, *source, packed, scale, symmetric)
        if added is None:
            y = alone(*arguments, bias, *window, *to, name, [], "")
        else:
            assert levels is not None
            levels = levels.contiguous(memory_format=torch.channels_last)
            y = over(*arguments, levels, bias, *window, *to, *added, "sum", 1.0, name, [], "")
        return y

    return with_columns(run, missing, source.zero_point)


def _product(
    *weights: Tensor, source: Affine, result: Affine, added: Affine, relu: bool
) -> FusedLayer:
    """The convolution by a 1x1 kernel, written over its summand."""
    weight, scale, bias = weights
    packed = torch.ops.onednn.qlinear_prepack(weight.flatten(1), None)
    product = torch.ops.onednn.qlinear_pointwise.binary
    symmetric = torch.zeros_like(scale, dtype=torch.int32)
    after = (*result, torch.uint8, *added, "sum", 1.0, "relu" if relu else "none", [], "")

    def run(x: Tensor, levels: Tensor | None = None) -> Tensor:
        assert levels is not None
        rows, sums = (maps.permute(0, 2, 3, 1).flatten(0, 2).contiguous() for maps in (x, levels))
        y: Tensor = product(rows, *source, packed, scale, symmetric, sums, bias, *after)
        return y.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)

    return run
