"""A network in int8: weights of 255 levels, and activations of 256, chosen after training."""

from collections.abc import Iterable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError
from fresnet.network.check import check_call, check_params
from fresnet.network.net import inference_layer, run_network
from fresnet.network.nodes import Affine, Bias, Params, Quantized, Rescale, Stats
from fresnet.network.rewrites import fold, merge_over


def quantize(params: Params, batches: Iterable[Tensor]) -> Quantized:
    """The network in int8, for `compile_inference`: post-training static quantisation.

    Norms are folded, and each output channel's weights are rounded to -127, ..., 127 steps of
    1/127 of the largest. The batches are run in float32 to see what range each layer's results
    have, of which uint8 will have 256 levels, with zero among them:

        x = scale * (level - zero_point),  scale = (high - low) / 255

    Ranges are those of all images, whatever their order and batches. Some tens of images like those
    to come, and of their size, will do; what lies outside is clipped.

    >>> import torch, fresnet
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> quantized = fresnet.quantize(params, [x])
    >>> quantized.weights.stem.conv.dtype, quantized.ranges.stem.norm.shape
    (torch.int8, torch.Size([2]))

    Args:
      params: the network, in float32.
      batches: images, each float32 `[b c h w]`, at least one batch; read once, one at a time.
    Returns:
      `Quantized(weights, ranges, images)`: weights with each convolution in int8, folded, beside
      a `Rescale(scale [o], bias [o])`, the head as it was; ranges `[2]`, of low and high, of each
      layer's results where `params.stats` has its norm's statistics; the range of the images.
    Raises:
      FresnetError: if params is not a network in float32, if batches is a tensor or holds none,
        if activations are not finite, or as `forward` does.
    Source: Jacob et al. 2017, arXiv:1712.05877, Sec. 2.1; Krishnamoorthi 2018, arXiv:1806.08342,
      Sec. 3.1, per channel.
    """
    check_params("quantize", params)
    dtype = params.weights.head.weight.dtype
    if dtype is not torch.float32:
        raise FresnetError(f"quantize expects weights in torch.float32; got {dtype}")
    with torch.no_grad(), torch.autocast(params.weights.head.weight.device.type, enabled=False):
        folded = fold(params)
        seen = merge_over("quantize", batches, partial(_ranges, folded), _merge)
        if not all(leaf.isfinite().all() for leaf in tree.leaves(seen)):
            raise FresnetError("quantize expects finite activations; got infinity or NaN")
        weights = tree.map(torch.clone, _narrow(folded.weights))
    return Quantized(weights, *seen)


def affine(x: Tensor) -> Affine:
    """The levels for values like these, in equal steps, of which one is zero."""
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (high - low) / 255 or 1.0
    return Affine(scale, round(-low / scale))


def to_levels(x: Tensor, levels: Affine) -> Tensor:
    """x in uint8, rounded and clipped, channels last."""
    scale, zero_point = levels
    rounded = torch.round(x / scale).add_(zero_point).clamp_(0, 255)
    return rounded.to(torch.uint8, memory_format=torch.channels_last)


def from_levels(x: Tensor, levels: Affine) -> Tensor:
    scale, zero_point = levels
    return (x.float() - zero_point) * scale


Ranges: TypeAlias = tuple[Stats, Tensor]
"""Of each layer's results, and of the images."""


def _ranges(params: Params, x: Tensor) -> Ranges:
    check_call("quantize", params, x)

    def layer(*arguments: Any, **how: Any) -> tuple[Tensor, Tensor]:
        y, _ = inference_layer(*arguments, **how)
        return y, _range(y)

    _, ranges = run_network(params, x, layer)
    return ranges, _range(x)


def _merge(one: Ranges, other: Ranges) -> Ranges:
    return tree.map(lambda *ranges: _range(torch.cat(ranges)), one, other)


def _range(x: Tensor) -> Tensor:
    return torch.stack(x.aminmax())


def _narrow(node: Any) -> Any:
    """The folded tree with its convolutions in int8."""
    if not isinstance(node, tuple):
        return node
    narrowed: Any = tree.rebuild(node, map(_narrow, node))
    for field, child in zip(getattr(node, "_fields", ()), node, strict=False):
        if isinstance(child, Bias):
            conv = field.replace("norm", "conv")
            weight = getattr(node, conv)
            largest = weight.abs().amax((1, 2, 3))
            scale = torch.where(largest > 0, largest / 127, 1.0)
            levels = torch.round(weight / scale[:, None, None, None]).to(torch.int8)
            narrowed = narrowed._replace(**{conv: levels, field: Rescale(scale, child.bias)})
    return narrowed
