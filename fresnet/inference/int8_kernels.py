"""Layers from levels of uint8 to levels of uint8, by oneDNN's operators for int8.

PyTorch has these operators for its compilers alone. No other file here touches them.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fresnet.inference.fused import FusedLayer, with_columns
from fresnet.network import ops
from fresnet.network.faults import missing_columns
from fresnet.network.levels import Affine
from fresnet.network.nodes import PLAIN, Geometry

OPERATORS = (
    (torch.ops.onednn, "qconv_prepack"),
    (torch.ops.onednn, "qconv2d_pointwise"),
    (torch.ops.onednn, "qlinear_prepack"),
    (torch.ops.onednn, "qlinear_pointwise"),
    (torch.ops.quantized, "max_pool2d"),
)

CALLS = """
def convolution(x, x_scale: float, x_zero: int, weight, scale, zero, bias, window: List[List[int]],
        groups: int, y_scale: float, y_zero: int, relu: str):
    stride, padding, dilation = window
    return torch.ops.onednn.qconv2d_pointwise(
        x, x_scale, x_zero, weight, scale, zero, bias, stride, padding, dilation, groups,
        y_scale, y_zero, torch.uint8, relu, [], "")

def convolution_and_sum(x, x_scale: float, x_zero: int, weight, scale, zero, bias,
        window: List[List[int]], groups: int, y_scale: float, y_zero: int, relu: str,
        sum, sum_scale: float, sum_zero: int):
    stride, padding, dilation = window
    return torch.ops.onednn.qconv2d_pointwise(
        x, x_scale, x_zero, weight, scale, zero, sum, bias, stride, padding, dilation, groups,
        y_scale, y_zero, torch.uint8, sum_scale, sum_zero, "sum", 1.0, relu, [], "")

def product_and_sum(x, x_scale: float, x_zero: int, weight, scale, zero, bias,
        y_scale: float, y_zero: int, relu: str, sum, sum_scale: float, sum_zero: int):
    return torch.ops.onednn.qlinear_pointwise(
        x, x_scale, x_zero, weight, scale, zero, sum, bias,
        y_scale, y_zero, torch.uint8, sum_scale, sum_zero, "sum", 1.0, relu, [], "")
"""
"""The operators in TorchScript, for they have lists among their arguments that no trace takes."""


class Packed(NamedTuple):
    """A layer, and the weight that it closes over, which a trace takes for an argument alone."""

    run: FusedLayer
    weight: Tensor

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        return self.run(x, added)


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
    return bool(layer(x)[0, 0, 1, 1] == 200)


@cache
def _calls() -> Any:
    return torch.jit.CompilationUnit(CALLS)


def max_pool(x: Tensor, stride: int, padding: int) -> Tensor:
    """PyTorch's public function for this refuses uint8."""
    window = ([side] * 2 for side in (ops.SIDE, stride, padding, 1))
    y: Tensor = torch.ops.quantized.max_pool2d(x, *window, False)
    return y


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
) -> Packed:
    """`fused.convolution` from uint8 to uint8.

    Sums are taken in int32, go on in float32, and are rounded once. A 1x1 kernel with a summand is
    a product of matrices: oneDNN has one kernel for both, but PyTorch's operator for convolutions
    returns a copy of what it has written over the summand.

    Args:
      shape: the shape of the activations, `[b c h w]`.
      weight: int8 `[o c/groups k k]`.
      scale: what one step of the weight is worth, `[o]`.
      bias: `[o]`.
      source: what the levels of the activations stand for.
      result: what the levels of the results stand for.
      added: what the levels of the summand stand for, if there is one.
    """
    symmetric, name = torch.zeros_like(scale, dtype=torch.int32), "relu" if relu else "none"
    calls = _calls()
    if added is not None and weight.shape[2:] == (1, 1) and how == PLAIN:
        packed = torch.ops.onednn.qlinear_prepack(weight.flatten(1), None)
        b, _, h, w = shape

        def multiply(x: Tensor, levels: Tensor | None = None) -> Tensor:
            assert levels is not None
            x, levels = (y.permute(0, 2, 3, 1).flatten(0, 2).contiguous() for y in (x, levels))
            weights = (packed, scale, symmetric, bias)
            y: Tensor = calls.product_and_sum(x, *source, *weights, *result, name, levels, *added)
            return y.view(b, h, w, -1).permute(0, 3, 1, 2)

        return Packed(multiply, packed)
    missing = missing_columns(shape, weight, how.stride)
    window = [how.stride] * 2, how.padding(weight), [how.dilation] * 2
    padded = [*shape[:3], shape[3] + missing]
    packed = torch.ops.onednn.qconv_prepack(weight, scale, *source, *window, how.groups, padded)

    def run(x: Tensor, levels: Tensor | None = None) -> Tensor:
        y: Tensor
        weights = (packed, scale, symmetric, bias)
        arguments = (x, *source, *weights, list(window), how.groups, *result, name)
        if added is None:
            y = calls.convolution(*arguments)
        else:
            assert levels is not None
            levels = levels.contiguous(memory_format=torch.channels_last)
            y = calls.convolution_and_sum(*arguments, levels, *added)
        return y

    return Packed(with_columns(run, missing, source.zero_point), packed)
