"""A network in int8, quantised after training: weights have 255 levels, activations 256."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError, describe
from fresnet.network.check import check_call, check_params, check_values, first_conv
from fresnet.network.net import run_network
from fresnet.network.nodes import (
    Bias,
    Geometry,
    Layer,
    Normed,
    Pair,
    Params,
    Quantized,
    Rescale,
    Stats,
    Unit,
    replaced,
)
from fresnet.network.norm import inference_norm
from fresnet.network.regimes import Composed
from fresnet.network.rewrites import fold, merge_over


def quantize(params: Params, batches: Iterable[Tensor | Sequence[object]]) -> Quantized:
    """The network in int8, for `compile_inference` and `export`: post-training static quantisation.

    Norms are folded. Each output channel's weights are rounded to -127, ..., 127 steps of 1/127 of
    the largest. The batches are run in float32 to find the range of each layer's results. uint8
    has 256 levels in this range, and zero is one of them:

        x = scale * (level - zero_point),  scale = (high - low) / 255

    A range is that of all images, whatever their order and batches. Some tens of images suffice, if
    they are like those to come and of the same size. Values outside the range are clipped.

    >>> import torch, fresnet
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> quantized = fresnet.quantize(params, [x])
    >>> quantized.weights.stem.layer.conv.dtype, quantized.ranges.stem.layer.shape
    (torch.int8, torch.Size([2]))

    Args:
      params: the network, in float32.
      batches: at least one batch of images, each float32 `[b c h w]`, or what a loader gives:
        images and their targets, of which only the images are taken. They are read once, one at a
        time.
    Returns:
      `Quantized(weights, ranges, images)`: the folded network, each convolution in int8 beside a
      `Rescale(scale [o], bias [o])`, and the head as it was; the lowest and the highest `[2]` of
      each layer's results, where `params.stats` has its norm's statistics; and the range `[2]` of
      the images.
    Raises:
      FresnetError: if params is not a network in float32, or is on meta, if batches is a tensor or
        holds none, if blocks have attention, if activations are not finite, or as `forward` does.
    Source: Jacob et al. 2017, arXiv:1712.05877, Sec. 2.1; Krishnamoorthi 2018, arXiv:1806.08342,
    Sec. 3.1, per channel.
    """
    check_params("quantize", params)
    conv = first_conv(params.weights)
    if conv.dtype is not torch.float32:
        raise FresnetError(f"quantize expects weights in torch.float32; got {conv.dtype}")
    check_values("quantize", params)
    with torch.no_grad(), torch.autocast(conv.device.type, enabled=False):
        folded = fold(params)
        seen = merge_over("quantize", batches, partial(_ranges, folded), _merge)
        if not all(leaf.isfinite().all() for leaf in tree.leaves(seen)):
            raise FresnetError("quantize expects finite activations; got infinity or NaN")
        weights = tree.map(torch.clone, replaced(_narrowed, folded.weights))
    return Quantized(weights, *seen)


Ranges: TypeAlias = tuple[Stats, Tensor]
"""The ranges of each layer's results, and the range of the images."""


class _Watching(Composed):
    """Inference that leaves behind the range of each unit's results."""

    def layer(
        self,
        at: Pair,
        x: Tensor,
        how: Geometry,
        *,
        add: Tensor | None = None,
        relu: bool = True,
    ) -> tuple[Tensor, Tensor]:
        y, _ = super().layer(at, x, how, add=add, relu=relu)
        return y, _range(y)

    def normed(self, at: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = super().normed(at, x)
        return y, _range(y)

    def frame(self, x: Tensor) -> Tensor:
        raise FresnetError(
            "quantize expects a stem without a frame of zeros, for which int8 has no level where "
            "activations may be negative; compile_inference runs it in bfloat16"
        )

    def gate(self, x: Tensor, gates: Tensor) -> Tensor:
        raise FresnetError(
            "quantize expects blocks without attention: int8 has no kernel for its product; "
            "compile_inference runs them in bfloat16"
        )


def _ranges(params: Params, x: Tensor) -> Ranges:
    check_call("quantize", params, x)
    return run_network(params, x, _Watching(inference_norm)).seen, _range(x)


def _merge(one: Ranges, other: Ranges) -> Ranges:
    return tree.map(lambda *ranges: _range(torch.cat(ranges)), one, other)


def _range(x: Tensor) -> Tensor:
    return torch.stack(x.aminmax())


def _narrowed(unit: Unit) -> Unit:
    """The folded layer with its convolution in int8."""
    match unit:
        case Layer(conv, Bias(bias)):
            largest = conv.abs().amax((1, 2, 3))
            scale = torch.where(largest > 0, largest / 127, 1.0)
            levels = torch.round(conv / scale[:, None, None, None]).to(torch.int8)
            return Layer(levels, Rescale(scale, bias))
        case Normed(Rescale()):
            return unit
    raise FresnetError(
        f"quantize expects norms that fold into convolutions; got {describe(unit.norm)}: "
        "compile_inference runs it in bfloat16"
    )
