"""Networks of `quantize` as graphs of ONNX, in the form that runtimes call QDQ.

All values are float32, and pairs of QuantizeLinear and DequantizeLinear say where they are rounded.
A runtime replaces an operator between such pairs by its kernel for int8.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fresnet import tree
from fresnet.errors import FresnetError, describe
from fresnet.network import ops
from fresnet.network.check import first_conv
from fresnet.network.levels import affine
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

LARGEST = 2.0**30
"""The largest bias in steps. With the products that are added to it, it fits in int32."""


class Levels(NamedTuple):
    """What the levels of activations stand for: scale, float32 `[]`; zero_point, uint8 `[]`."""

    scale: Tensor
    zero_point: Tensor


class Convolution(NamedTuple):
    """A layer in whole numbers.

    Args:
      weight: int8 `[o c/groups k k]`, in steps of weight_step `[o]`.
      bias: int32 `[o]`, in steps of bias_step `[o]`, which are those of the sum of products.
      branch: the levels before the shortcut is added, or `()` if there is none.
      result: the levels of what comes out.
    """

    weight: Tensor
    weight_step: Tensor
    bias: Tensor
    bias_step: Tensor
    branch: Levels | tuple[()]
    result: Levels


class Rescaling(NamedTuple):
    """A norm that no convolution precedes, each `[c]`, and the levels of what comes out."""

    scale: Tensor
    bias: Tensor
    result: Levels


class Activations(NamedTuple):
    """Values `[b c h w]`, and the levels that they are rounded to."""

    values: Tensor
    levels: Levels

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


class QuantizedGraph(nn.Module):
    """The network as a module for `torch.onnx.export`, which cannot be run."""

    def __init__(self, network: Quantized) -> None:
        super().__init__()
        self.weights, ranges, images = network
        ends = _filled(images, first_conv(self.weights).shape[1])
        layers = run_network(Params(self.weights, ranges), ends, _Counting()).seen
        numbers: dict[str, Any] = {
            "images": _levels(images),
            "layers": layers,
            "head": self.weights.head,
        }
        for name, leaf in tree.named(numbers).items():
            self.register_buffer(name.replace(".", "_"), leaf.clone())
        self.names = tree.unflatten(numbers, [name for name, _ in self.named_buffers()])

    def forward(self, x: Tensor) -> Tensor:
        numbers, do = tree.map(self.get_buffer, self.names), _Rounding()
        images: Any = _rounded(x, numbers["images"])
        y = run_network(Params(self.weights, numbers["layers"]), images, do).y
        logits: Tensor = numbers["head"].run(y, do)
        return logits


class _Counting(Floating):
    """Leaves behind each unit's numbers, and hands on the ends of its range, `[2 c 1 1]`."""

    def layer(
        self,
        at: Pair,
        x: Tensor,
        how: Geometry,
        *,
        add: Tensor | None = None,
        relu: bool = True,
    ) -> tuple[Tensor, Convolution]:
        match at:
            case Pair(Layer(conv, Rescale(scale, bias)), ends):
                source = _levels(x)
            case _:
                _refuse(at.unit)
        # Of tiny weights a bias may be more steps than int32 has, and weights of 0 have no steps.
        least = bias.abs() / (LARGEST * source.scale)
        step = torch.where(conv.flatten(1).any(1), scale, least).maximum(least)
        step = torch.where(step > 0, step, 1.0)
        weight = torch.round(conv * (scale / step)[:, None, None, None]).to(torch.int8)
        products = step * source.scale
        whole, result = torch.round(bias / products).to(torch.int32), _levels(ends)
        branch = () if add is None else _branch(result, _levels(add))
        numbers = Convolution(weight, step, whole, products, branch, result)
        return _filled(ends, len(conv)), numbers

    def normed(self, at: Pair, x: Tensor) -> tuple[Tensor, Rescaling]:
        match at:
            case Pair(Normed(Rescale(scale, bias)), ends):
                return _filled(ends, x.shape[1]), Rescaling(scale, bias, _levels(ends))
        _refuse(at.unit)


class _Rounding(Floating):
    """Rounds what each unit and each pooling puts out."""

    def layer(
        self,
        at: Pair,
        x: Any,
        how: Geometry,
        *,
        add: Any = None,
        relu: bool = True,
    ) -> tuple[Any, tuple[()]]:
        weight, weight_step, bias, bias_step, branch, result = at.beside
        kernel, shift = _by_channel(weight, weight_step), _by_channel(bias, bias_step)
        window = how.stride, how.padding(weight), how.dilation, how.groups
        y = F.conv2d(x.values, kernel, shift, *window)
        if add is not None:
            y = _rounded(y, branch).values + add.values
        return _rounded(y.relu() if relu else y, result), ()

    def normed(self, at: Pair, x: Any) -> tuple[Any, tuple[()]]:
        scale, bias, result = at.beside
        y = x.values * scale[:, None, None] + bias[:, None, None]
        return _rounded(y.relu(), result), ()

    def max_pool(self, x: Any, stride: int = 2, padding: int = 1) -> Any:
        return _again(ops.max_pool, x, stride, padding)

    def average_pool(self, x: Any) -> Any:
        return _again(ops.average_pool, x)

    def halve(self, x: Any) -> Any:
        return _again(ops.halve, x)

    def blur(self, x: Any) -> Any:
        return _again(ops.blur, x)

    def subsample(self, x: Any, stride: int) -> Any:
        return _again(ops.subsample, x, stride)

    def zero_pad(self, x: Any, before: int, after: int) -> Any:
        return _again(ops.zero_pad, x, before, after)

    def mean(self, x: Any) -> Tensor:
        return super().mean(x.values)


def _refuse(unit: Unit) -> NoReturn:
    raise FresnetError(f"QDQ has no form of a norm such as {describe(unit.norm)}")


def _levels(ends: Tensor) -> Levels:
    scale, zero_point = affine(ends)
    return Levels(ends.new_tensor(scale), ends.new_tensor(zero_point, dtype=torch.uint8))


def _filled(ends: Tensor, channels: int) -> Tensor:
    """Two images of one pixel, of which one has the least values and one the greatest."""
    return ends[:, None, None, None].expand(2, channels, 1, 1)


def _branch(total: Levels, shortcut: Levels) -> Levels:
    """Levels for all that tells in a sum: beyond them it is clipped, whatever the shortcut is."""
    step = total.scale + shortcut.scale
    below = total.zero_point * total.scale + (255 - shortcut.zero_point) * shortcut.scale
    return Levels(step, torch.round(below / step).to(torch.uint8))


def _again(function: Callable[..., Tensor], x: Activations, *how: int) -> Activations:
    return _rounded(function(x.values, *how), x.levels)


def _rounded(x: Tensor, levels: Levels) -> Activations:
    whole = _onnx("QuantizeLinear", x, *levels, dtype=torch.uint8)
    return Activations(_onnx("DequantizeLinear", whole, *levels, dtype=torch.float32), levels)


def _by_channel(whole: Tensor, step: Tensor) -> Tensor:
    return _onnx("DequantizeLinear", whole, step, dtype=torch.float32, axis=0)


def _onnx(name: str, x: Tensor, *rest: Tensor, dtype: torch.dtype, **attributes: Any) -> Tensor:
    """An operator of ONNX in place of one of PyTorch."""
    return torch.onnx.ops.symbolic(name, (x, *rest), attributes, dtype=dtype, shape=x.shape)
