"""Group normalisation, right under every derivative and transform."""

from math import prod
from typing import Any

import torch
from torch import Tensor

from fresnet.errors import FresnetError
from fresnet.network.check import stats_dtype
from fresnet.network.nodes import EPS, GroupNorm
from fresnet.pytorch import transform_stack

IS_FUSED_THERE = hasattr(torch, "native_group_norm") and hasattr(
    torch.ops.aten, "native_group_norm_backward"
)
"""Whether this PyTorch has the fused kernel and its derivative; neither is documented."""


def group_norm(norm: GroupNorm, x: Tensor) -> Tensor:
    """Normalise each image's channels in g groups, by the moments of all values of a group.

        y = (x - E[x]) / sqrt(Var[x] + eps) * scale + bias

    Args:
      norm: scale and bias, each `[g c/g]`.
      x: activations `[b c h w]`.
    Returns:
      y `[b c h w]` in x's dtype. A group of one value becomes its bias.
    Raises:
      FresnetError: if scale and bias are not of that shape.
    Source: Wu & He 2018, arXiv:1803.08494, Eq. 7.
    """
    shapes = [tuple(leaf.shape) for leaf in norm]
    if len(shapes[0]) != 2 or shapes[0] != shapes[1] or prod(shapes[0]) != x.shape[1]:
        raise FresnetError(
            f"a norm in groups of activations {tuple(x.shape)} expects scale and bias [g c/g] of "
            f"{x.shape[1]} channels; got {shapes[0]} and {shapes[1]}"
        )
    scale, bias = (leaf.to(stats_dtype(x.dtype)) for leaf in norm)
    inputs = x.to(scale.dtype), scale, bias
    composed = (
        torch.compiler.is_compiling()
        or not IS_FUSED_THERE
        or transform_stack.active()
        or transform_stack.forward_mode(*inputs)
    )
    if composed:
        return _composed(*inputs).to(x.dtype)
    # Of maps in channels last the kernel takes variances as differences of large numbers.
    y: Tensor = _Fused.apply(*(v.contiguous() for v in inputs))
    last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return y.to(x.dtype, memory_format=layout)


def _composed(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    var, mean = torch.var_mean(x.unflatten(1, scale.shape), (2, 3, 4), correction=0)
    factor = scale * torch.rsqrt(var + EPS)[..., None]
    shift = bias - mean[..., None] * factor
    factor, shift = (v.flatten(1)[..., None, None] for v in (factor, shift))
    return torch.addcmul(shift, x, factor)


class _Fused(torch.autograd.Function):
    """PyTorch's kernel for `torch.autograd`, several times as fast as what is composed.

    It refuses a strided x, and reads a strided scale as if it were not. So what it is given is
    contiguous, and not only what it computes with: else a second derivative would end there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        sizes = batch, channels, height * width, len(scale)
        kernel: Any = torch.native_group_norm
        y: Tensor
        y, *moments = kernel(x, scale.flatten(), bias.flatten(), *sizes, EPS)
        ctx.sizes = sizes
        ctx.save_for_backward(x, scale, *moments)
        return y

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, *moments = ctx.saved_tensors
        if torch.is_grad_enabled() or transform_stack.active():
            return _derivative(cotangent, x, scale)
        kernel = torch.ops.aten.native_group_norm_backward
        wanted = ctx.needs_input_grad
        found = kernel(cotangent.contiguous(), x, *moments, scale.flatten(), *ctx.sizes, wanted)
        return tuple(v if i == 0 or v is None else v.view(scale.shape) for i, v in enumerate(found))


def _derivative(cotangent: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """The cotangents of x, scale and bias, in operations that can be differentiated again."""
    grouped, cotangent = (v.unflatten(1, scale.shape) for v in (x, cotangent))
    var, mean = torch.var_mean(grouped, (2, 3, 4), correction=0, keepdim=True)
    inverse_std = torch.rsqrt(var + EPS)
    normalised = (grouped - mean) * inverse_std
    scaled = cotangent * scale[..., None, None]
    along = (scaled * normalised).mean((2, 3, 4), keepdim=True) * normalised
    of_x = (scaled - scaled.mean((2, 3, 4), keepdim=True) - along) * inverse_std
    of_scale = (cotangent * normalised).sum((0, 3, 4))
    return of_x.flatten(1, 2), of_scale, cotangent.sum((0, 3, 4))
