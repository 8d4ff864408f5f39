"""Norms as two pure functions of one signature, by the type of the norm.

    (norm, stats, x) -> (y, stats or moments)

`inference_norm` normalises by the running statistics and hands them back as they came;
`training_norm` normalises by the batch and returns the batch's moments.
"""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from fresnet.errors import FresnetError, describe
from fresnet.network.across import merge_at_once
from fresnet.network.check import stats_dtype
from fresnet.network.group_norm import group_norm
from fresnet.network.nodes import (
    AFFINE,
    BATCH_NORMS,
    EPS,
    AnyNorm,
    Bias,
    FrozenNorm,
    GroupNorm,
    Moments,
    NoNorm,
    Norm,
    NormStats,
    Rescale,
)
from fresnet.network.ops import add_over
from fresnet.pytorch import transform_stack
from fresnet.pytorch.collectives import Group

Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""From x, scale and bias to `(y, mean, 1 / std)`."""


def inference_norm(
    norm: AnyNorm, stats: NormStats | tuple[()], x: Tensor
) -> tuple[Tensor, NormStats | tuple[()]]:
    """Normalise each channel by its running moments.

        y = (x - mean) / sqrt(var + eps) * scale + bias

    as one multiply-add per value: y = shift + x * factor. PyTorch's fused kernel takes a third of
    the time where maps are small, and is taken where nothing is differentiated or compiled. The
    composed form is differentiable in `stats` too. On a CPU both round alike, to the bit, for maps
    in channels first or last.

    Args:
      norm: scale and bias, each `[c]`; or another type of norm, which has no statistics.
      stats: mean and var, each `[c]`; () beside a norm without statistics.
      x: activations `[b c h w]`, over which a bias alone is written.
    Returns:
      `(y, stats)`: y `[b c h w]` in x's dtype; stats is the argument itself, or () from a norm
      without statistics.
    Raises:
      FresnetError: if the channels differ, or if the type is none of `fresnet.nodes.NORMS`.
    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, Alg. 2.
    """
    if isinstance(norm, BATCH_NORMS) and isinstance(stats, NormStats):
        _check_channels(x, norm, stats)
        return _by_given_moments(norm, stats, x), stats
    if type(norm) in WITHOUT_STATISTICS:
        return norm_without_statistics(norm, x), ()
    _refuse("inference", norm, stats)


def training_norm(
    norm: AnyNorm,
    stats: NormStats | tuple[()],
    x: Tensor,
    *,
    group: Group | None = None,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Moments | tuple[()]]:
    """Normalise each channel by the batch's moments, or a frozen norm's by its running ones.

        y = (x - E[x]) / sqrt(Var[x] + eps) * scale + bias

    The moments are constants with respect to x and norm. PyTorch's fused kernel is several times
    as fast where it runs eagerly; the composed form is right under every derivative, merges moments
    across processes, and compiles to as fast code. Which of the two is taken changes no result.

    Args:
      norm: scale and bias, each `[c]`; or another type of norm, which has no statistics.
      stats: mean and var, each `[c]`, read where the norm is frozen; () beside a norm without
        statistics.
      x: activations `[b c h w]`, over which a bias alone is written.
      group: the processes whose batches are normalised as one, by default this process alone.
      kernel: the fused kernel to take where `torch.autograd` alone may differentiate; by default
        the one that is right however often it does.
    Returns:
      `(y, moments)`: y `[b c h w]` in x's dtype; the moments of all b h w values, of no values
      from a frozen norm, () from a norm without statistics.
    Raises:
      FresnetError: if the channels differ, if b h w == 1 (the unbiased variance is undefined), or
        if the type is none of `fresnet.nodes.NORMS`.
    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, Alg. 1.
    """
    if type(norm) in WITHOUT_STATISTICS:
        return norm_without_statistics(norm, x), ()
    if not isinstance(norm, BATCH_NORMS) or not isinstance(stats, NormStats):
        _refuse("training", norm, stats)
    _check_channels(x, norm, stats)
    if isinstance(norm, FrozenNorm):
        y = _by_given_moments(norm, stats, x)
        return y, Moments(stats.mean.new_zeros(()), *map(torch.zeros_like, stats))
    if x.numel() == x.shape[1] and (group is None or group.size() == 1):
        raise FresnetError(
            "training expects more than one value per channel at every norm; got activations "
            f"{tuple(x.shape)}: use a larger batch or larger images"
        )
    scale, bias = (v.to(stats_dtype(x.dtype)) for v in norm)
    y, moments = _batch_norm(x, scale, bias, group, kernel or _FusedNorm.apply)
    return y, Moments(*(moment.detach() for moment in moments))


def _batch_norm(
    x: Tensor, scale: Tensor, bias: Tensor, group: Group | None, kernel: Kernel
) -> tuple[Tensor, Moments]:
    if (
        torch.compiler.is_compiling()
        or group is not None
        or not _is_fused_there()
        or not transform_stack.one_derivative(x, scale, bias)
    ):
        return _composed_norm(x, scale, bias, group)
    fused = fused_norm if transform_stack.active() else kernel
    # Where maps are of one pixel, the kernel's derivative reads a strided scale as if it were not.
    y, mean, inverse_std = fused(x, scale.contiguous(), bias.contiguous())
    n = mean.new_full((), x.numel() // x.shape[1])
    return y, Moments(n, mean, (inverse_std**-2 - EPS).clamp(min=0) * n)


def _is_fused_there() -> bool:
    """Whether this PyTorch has the fused kernel and its derivative; neither is documented."""
    derivative = hasattr(torch.ops.aten, "native_batch_norm_backward")
    return derivative and hasattr(torch, "native_batch_norm")


def _composed_norm(
    x: Tensor, scale: Tensor, bias: Tensor, group: Group | None = None
) -> tuple[Tensor, Moments]:
    wide = x.to(scale.dtype)
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    n = mean.new_full((), x.numel() // x.shape[1])
    moments = Moments(n, mean, var * n)
    if group is not None:
        moments = merge_at_once(moments, group)
        mean, var = moments.mean, moments.m2 / moments.n
    return _affine(wide, scale, bias, mean, var).to(x.dtype), moments


def fused_norm(x: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own kernel, whose first derivative in reverse mode alone is right.

    Where the scale is wider than x, the kernel takes moments in the wider dtype, but its derivative
    has no rule for vmap, which may still come under a transform: there it is given a wider x.
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
        y, *moments = fused_norm(*inputs)
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


def _by_given_moments(norm: Norm | FrozenNorm, stats: NormStats, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or transform_stack.differentiated(x, *norm, *stats):
        return _affine(x, norm.scale, norm.bias, *stats)
    wide = stats.mean.dtype
    scale, bias = norm if norm.scale.dtype == wide else (v.to(wide) for v in norm)
    return torch.batch_norm(x, scale, bias, *stats, False, 0.0, EPS, True)


def _affine(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + eps) * scale + bias in x's dtype."""
    factor = scale * torch.rsqrt(var + EPS)
    shift = torch.addcmul(bias, -mean, factor)  # with value=-1, torch.func.linearize crashes
    return torch.addcmul(shift[:, None, None], x, factor[:, None, None]).to(x.dtype)


def norm_without_statistics(norm: AnyNorm, x: Tensor) -> Tensor:
    """What a norm makes of x, by the type of the norm: one of `WITHOUT_STATISTICS`."""
    return WITHOUT_STATISTICS[type(norm)](norm, x)


def _affine_norm(norm: Bias | Rescale | NoNorm, x: Tensor) -> Tensor:
    check_width(norm, x)
    if isinstance(norm, NoNorm):
        return x
    *scale, bias = (leaf.to(x.dtype)[:, None, None] for leaf in norm)
    return torch.addcmul(bias, x, *scale) if scale else add_over(x, bias)


WITHOUT_STATISTICS: Mapping[type, Callable[[Any, Tensor], Tensor]] = {
    GroupNorm: group_norm,
    **dict.fromkeys(AFFINE, _affine_norm),
}
"""What each norm without statistics computes. Inference, training and backends look here."""


def check_width(norm: Bias | Rescale | NoNorm, x: Tensor) -> None:
    """Refuse a norm without statistics whose leaves are not one value to a channel.

    Raises:
      FresnetError: if the channels differ.
    """
    if any(leaf.shape != x.shape[1:2] for leaf in norm):
        got = ", ".join(str(tuple(leaf.shape)) for leaf in norm)
        what = "bias" if isinstance(norm, Bias) else "scale and bias"
        raise FresnetError(f"a {what} of activations {tuple(x.shape)} is [{x.shape[1]}]; got {got}")


def _check_channels(x: Tensor, norm: Norm | FrozenNorm, stats: NormStats) -> None:
    # Not by a set: where a call is traced, sizes are tensors, and each differs from all others.
    channels = x.shape[1:2]
    if any(leaf.shape != channels for leaf in (*norm, *stats)):
        raise FresnetError(
            f"a norm of activations {tuple(x.shape)} expects scale, bias, mean and var "
            f"[{x.shape[1]}] each; got {', '.join(str(tuple(v.shape)) for v in (*norm, *stats))}"
        )


def _refuse(regime: str, norm: Any, stats: Any) -> NoReturn:
    batch, other = (
        ", ".join(kind.__name__ for kind in kinds) for kinds in (BATCH_NORMS, WITHOUT_STATISTICS)
    )
    raise FresnetError(
        f"{regime} knows no norm such as {describe(norm)} beside {describe(stats)}; it has "
        f"{batch} beside NormStats, and {other} beside ()"
    )
