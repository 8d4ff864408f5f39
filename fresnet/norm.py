"""Batch normalisation as two pure functions of one signature.

    (norm, stats, x) -> (y, stats)

`inference_norm` normalises by the running statistics and hands them back as they came;
`training_norm` normalises by the batch and returns new running statistics.
The network takes either one as an argument and is otherwise the same.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from fresnet.errors import FresnetError
from fresnet.types import Norm, NormStats

EPS = 1e-5

NormFunction: TypeAlias = Callable[[Norm, NormStats, Tensor], tuple[Tensor, NormStats]]


def inference_norm(norm: Norm, stats: NormStats, x: Tensor) -> tuple[Tensor, NormStats]:
    """Normalise each channel by its running moments.

        y = (x - mean) / sqrt(var + eps) * scale + bias

    as one multiply-add per value: y = shift + x * factor. In float32 on CPU it rounds as
    PyTorch's fused kernel does, to the bit, and unlike that kernel it is differentiable in
    `stats`.

    Args:
      norm: scale and bias, each `[c]`.
      stats: mean and var, each `[c]`.
      x: activations `[b c h w]`.
    Returns:
      `(y, stats)`: y `[b c h w]` in x's dtype; stats is the argument itself.
    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, Alg. 2.
    """
    _check_channels(norm, stats, x)
    factor = norm.scale * torch.rsqrt(stats.var + EPS)
    shift = torch.addcmul(norm.bias, stats.mean, factor, value=-1)
    y = torch.addcmul(shift[:, None, None], x, factor[:, None, None])
    return y.to(x.dtype), stats


def training_norm(
    norm: Norm, stats: NormStats, x: Tensor, *, momentum: float | Tensor = 0.1
) -> tuple[Tensor, NormStats]:
    """Normalise each channel by its batch moments and move the running moments towards them.

        y = (x - E[x]) / sqrt(Var[x] + eps) * scale + bias
        mean <- (1 - momentum) mean + momentum E[x]
        var  <- (1 - momentum) var  + momentum Var[x] n / (n - 1),    n = b h w

    The new statistics are constants of differentiation.

    Args:
      norm: scale and bias, each `[c]`.
      stats: mean and var, each `[c]`.
      x: activations `[b c h w]`.
      momentum: the weight of the new value.
    Returns:
      `(y, stats)`: y `[b c h w]` in x's dtype; new stats, mean and var each `[c]`.
    Raises:
      FresnetError: if b h w == 1 (the unbiased variance is undefined).
    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, Alg. 1.
    """
    _check_channels(norm, stats, x)
    count = x.shape[0] * x.shape[2] * x.shape[3]
    if count == 1:
        raise FresnetError(
            "forward_train expects more than one value per channel at every norm; got activations "
            f"{tuple(x.shape)}: use a larger batch or larger images"
        )
    # Scale and bias in the statistics' dtype keep the moments in float32 when x is narrower.
    scale, bias = norm.scale.to(stats.mean.dtype), norm.bias.to(stats.mean.dtype)
    y, mean, inverse_std = torch.native_batch_norm(x, scale, bias, None, None, True, 0.0, EPS)
    mean, var = mean.detach(), (inverse_std.detach() ** -2 - EPS).clamp(min=0)
    return y, NormStats(
        mean=_move(stats.mean, mean, momentum),
        var=_move(stats.var, var * (count / (count - 1)), momentum),
    )


def _move(old: Tensor, new: Tensor, momentum: float | Tensor) -> Tensor:
    return (1 - momentum) * old.detach() + momentum * new


def _check_channels(norm: Norm, stats: NormStats, x: Tensor) -> None:
    shapes = {norm.scale.shape, norm.bias.shape, stats.mean.shape, stats.var.shape}
    if shapes != {x.shape[1:2]}:
        raise FresnetError(
            f"a norm of activations {tuple(x.shape)} expects scale, bias, mean and var "
            f"[{x.shape[1]}] each; got {', '.join(str(tuple(v.shape)) for v in (*norm, *stats))}"
        )
