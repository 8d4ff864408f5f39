"""Batch normalisation as two pure functions of one signature.

    (norm, stats, x) -> (y, stats or moments)

`inference_norm` normalises by the running statistics and hands them back as they came;
`training_norm` normalises by the batch and returns the batch's moments. The network takes either
one as an argument and is otherwise the same.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fresnet.errors import FresnetError
from fresnet.network.check import stats_dtype
from fresnet.network.moments import merge_across
from fresnet.network.nodes import AnyNorm, Bias, FrozenNorm, Moments, Norm, NormStats
from fresnet.network.ops import add
from fresnet.pytorch import transform_stack
from fresnet.pytorch.collectives import Group

EPS = 1e-5

NormFunction: TypeAlias = Callable[[AnyNorm, Any, Tensor], tuple[Tensor, Any]]


def inference_norm(
    norm: AnyNorm, stats: NormStats | tuple[()], x: Tensor
) -> tuple[Tensor, NormStats | tuple[()]]:
    """Normalise each channel by its running moments.

        y = (x - mean) / sqrt(var + eps) * scale + bias

    as one multiply-add per value: y = shift + x * factor. In float32 on CPU it rounds as
    PyTorch's fused kernel does, to the bit, and unlike that kernel it is differentiable in
    `stats`.

    Args:
      norm: scale and bias, each `[c]`; or a bias alone, which is added.
      stats: mean and var, each `[c]`; beside a bias alone, ().
      x: activations `[b c h w]`.
    Returns:
      `(y, stats)`: y `[b c h w]` in x's dtype; stats is the argument itself.
    Raises:
      FresnetError: if the channels differ.
    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, Alg. 2.
    """
    if isinstance(norm, Bias) or not stats:
        return _add_bias(x, norm.bias), ()
    _check_channels(norm, stats, x)
    return _affine(x, norm.scale, norm.bias, *stats), stats


def training_norm(
    norm: AnyNorm,
    stats: NormStats | tuple[()],
    x: Tensor,
    *,
    group: Group | None = None,
    once: bool = False,
) -> tuple[Tensor, Moments | tuple[()]]:
    """Normalise each channel by the batch's moments, or a frozen norm's by its running ones.

        y = (x - E[x]) / sqrt(Var[x] + eps) * scale + bias

    The moments are constants with respect to x and norm.

    Args:
      norm: scale and bias, each `[c]`; or a bias alone, which is added.
      stats: mean and var, each `[c]`: read where the norm is frozen; beside a bias alone, ().
      x: activations `[b c h w]`.
      group: the processes whose batches are normalised as one, by default this process alone.
      once: whether `torch.autograd` differentiates this at most once. The kernel's own derivative
        is right then, and quicker where values are few.
    Returns:
      `(y, moments)`: y `[b c h w]` in x's dtype; moments of all b h w values, of none from a
      frozen norm, () from a bias alone.
    Raises:
      FresnetError: if the channels differ, or if b h w == 1 (the unbiased variance is undefined).
    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, Alg. 1.
    """
    if isinstance(norm, Bias) or not stats:
        return _add_bias(x, norm.bias), ()
    _check_channels(norm, stats, x)
    if isinstance(norm, FrozenNorm):
        y = _affine(x, norm.scale, norm.bias, *stats)
        return y, Moments(stats.mean.new_zeros(()), *map(torch.zeros_like, stats))
    if x.numel() == x.shape[1] and (group is None or group.size() == 1):
        raise FresnetError(
            "training expects more than one value per channel at every norm; got activations "
            f"{tuple(x.shape)}: use a larger batch or larger images"
        )
    scale, bias = (v.to(stats_dtype(x.dtype)) for v in norm)
    y, moments = _batch_norm(x, scale, bias, group, once)
    return y, Moments(*(moment.detach() for moment in moments))


def _batch_norm(
    x: Tensor, scale: Tensor, bias: Tensor, group: Group | None = None, once: bool = False
) -> tuple[Tensor, Moments]:
    """One function in two forms.

    PyTorch's fused kernel is several times as fast where it runs eagerly; the composed form is
    right under every derivative, merges moments across processes, and compiles to as fast code.
    """
    if (
        torch.compiler.is_compiling()
        or group is not None
        or not transform_stack.fused_norm_is_exact(x, scale, bias)
    ):
        return _composed_norm(x, scale, bias, group)
    fused = _fused_norm if once or transform_stack.active() else _FusedNorm.apply
    y, mean, inverse_std = fused(x, scale, bias)
    n = mean.new_full((), x.numel() // x.shape[1])
    return y, Moments(n, mean, (inverse_std**-2 - EPS).clamp(min=0) * n)


def _composed_norm(
    x: Tensor, scale: Tensor, bias: Tensor, group: Group | None = None
) -> tuple[Tensor, Moments]:
    wide = x.to(scale.dtype)
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    n = mean.new_full((), x.numel() // x.shape[1])
    moments = Moments(n, mean, var * n)
    if group is not None:
        moments = merge_across(moments, group)
        mean, var = moments.mean, moments.m2 / moments.n
    return _affine(wide, scale, bias, mean, var).to(x.dtype), moments


def _fused_norm(x: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fused kernel: `(y, mean, 1 / std)`.

    Beside a scale of a wider dtype than x it takes the moments in that, but has no rule for vmap,
    which under a transform may still come.
    """
    wide = x.to(scale.dtype) if transform_stack.active() else x
    y, mean, inverse_std = torch.native_batch_norm(wide, scale, bias, None, None, True, 0.0, EPS)
    return y.to(x.dtype), mean, inverse_std


class _FusedNorm(torch.autograd.Function):
    """The fused kernel for `torch.autograd`, with derivatives of every order.

    The kernel's own are wrong from the third on; beyond the first these are the composed form's.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        y, *moments = _fused_norm(*inputs)
        ctx.mark_non_differentiable(*moments)
        ctx.save_for_backward(*inputs, *moments)
        return y, *moments

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, bias, mean, inverse_std = ctx.saved_tensors
        if not torch.is_grad_enabled():
            moments = (mean, inverse_std)
            grads: tuple[Tensor | None, ...] = torch.ops.aten.native_batch_norm_backward(
                cotangent, x, scale, None, None, *moments, True, EPS, ctx.needs_input_grad
            )
            return grads
        # Aliases, so that these are partial derivatives even where scale is computed from x.
        inputs = [v.view_as(v) for v in (x, scale, bias)]
        wanted = [v for v, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
        y = _composed_norm(*inputs)[0]
        found = iter(torch.autograd.grad(y, wanted, cotangent, create_graph=True))
        return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


def _affine(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + eps) * scale + bias in x's dtype."""
    factor = scale * torch.rsqrt(var + EPS)
    shift = torch.addcmul(bias, -mean, factor)  # with value=-1, torch.func.linearize crashes
    return torch.addcmul(shift[:, None, None], x, factor[:, None, None]).to(x.dtype)


def _add_bias(x: Tensor, bias: Tensor) -> Tensor:
    if bias.shape != x.shape[1:2]:
        raise FresnetError(
            f"a bias of activations {tuple(x.shape)} is [{x.shape[1]}]; got {tuple(bias.shape)}"
        )
    return add(x, bias.to(x.dtype)[:, None, None].expand_as(x))


def _check_channels(norm: Norm | FrozenNorm, stats: NormStats, x: Tensor) -> None:
    shapes = {norm.scale.shape, norm.bias.shape, stats.mean.shape, stats.var.shape}
    if shapes != {x.shape[1:2]}:
        raise FresnetError(
            f"a norm of activations {tuple(x.shape)} expects scale, bias, mean and var "
            f"[{x.shape[1]}] each; got {', '.join(str(tuple(v.shape)) for v in (*norm, *stats))}"
        )
