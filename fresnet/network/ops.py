"""The operations without statistics. Each refuses shapes that do not fit, so none broadcasts.

`relu` and `add` write to their first argument, which saves over a quarter of the memory of a pass
forward. In a network that argument is always the result of a norm or a sum that nothing else reads,
and never a caller's tensor.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

from fresnet.errors import FresnetError
from fresnet.network.convolution import convolve
from fresnet.network.nodes import PLAIN, Geometry
from fresnet.pytorch import transform_stack
from fresnet.pytorch.compilers import is_exporting

SIDE = 3
"""Of max pooling's window."""


def conv2d(x: Tensor, weight: Tensor, how: Geometry = PLAIN) -> Tensor:
    """Convolve x `[b c h w]` with weight `[o c/groups k k]`, padded so that stride 1 keeps h and w.

    Raises:
      FresnetError: if the channels do not fit, or if k is not one odd number; a kernel may also be
        a single row.
    """
    groups, shape = how.groups, weight.shape
    fits = len(shape) == 4 and shape[1] * groups == x.shape[1] and shape[0] % groups == 0
    if not fits or shape[2] not in (1, shape[3]) or shape[3] % 2 == 0:
        channels = x.shape[1] if groups == 1 else f"{x.shape[1]}/{groups}"
        raise FresnetError(
            f"a convolution of activations {tuple(x.shape)} expects a weight "
            f"[o {channels} k k], k odd; got {tuple(shape)}"
        )
    return convolve(x, weight, how)


def max_pool(x: Tensor, stride: int = 2, padding: int = 1) -> Tensor:
    """3x3 max pooling. Padded by one: `[b c h w]` -> `[b c ceil(h/stride) ceil(w/stride)]`.

    Where several derivatives are to come, it takes the values at the places of the maxima. All
    derivatives of that have rules for every transform.
    """
    if torch.compiler.is_compiling():
        return F.max_pool2d(x, SIDE, stride, padding)
    if not transform_stack.one_derivative(x):
        y, places = _pooled(x.detach(), stride, padding)
        return x.flatten(2).gather(2, places.flatten(2)).view(y.shape)
    if transform_stack.active() or not (torch.is_grad_enabled() and x.requires_grad):
        return F.max_pool2d(x, SIDE, stride, padding)
    pooled: Tensor = _MaxPool.apply(x, stride, padding)
    return pooled


def _pooled(x: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """The maxima and their places, as numbers of the values in each map."""
    y, places = F.max_pool2d_with_indices(x, [SIDE] * 2, [stride] * 2, [padding] * 2)
    return y, places


class _MaxPool(torch.autograd.Function):
    """PyTorch's kernel for `torch.autograd`, with a derivative that can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int, padding: int) -> Tensor:
        y, places = _pooled(x, stride, padding)
        ctx.save_for_backward(x, places)
        ctx.window = [SIDE] * 2, [stride] * 2, [padding] * 2, [1, 1]
        return y

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        x, places = ctx.saved_tensors
        kernel = getattr(torch.ops.aten, "max_pool2d_with_indices_backward", None)
        if torch.is_grad_enabled() or kernel is None:
            zeros = torch.zeros_like(x).flatten(2)
            flat = zeros.scatter_add(2, places.flatten(2), cotangent.flatten(2))
            return flat.view(x.shape), None, None
        return kernel(cotangent, x, *ctx.window, False, places), None, None


def frame(x: Tensor) -> Tensor:
    """x `[b c h w]` with a zero before and after each row and each column: `[b c h+2 w+2]`."""
    return F.pad(x, (1, 1, 1, 1))


def average_pool(x: Tensor) -> Tensor:
    """2x2 average pooling of stride 2: `[b c h w]` -> `[b c ceil(h/2) ceil(w/2)]`."""
    return F.avg_pool2d(x, kernel_size=2, stride=2, ceil_mode=True, count_include_pad=False)


def halve(x: Tensor) -> Tensor:
    """2x2 average pooling of stride 2: `[b c h w]` -> `[b c floor(h/2) floor(w/2)]`.

    A single row or column is kept.
    """
    window = [2 if _several(x, dim) else 1 for dim in (2, 3)]
    return F.avg_pool2d(x, kernel_size=window, stride=window)


def blur(x: Tensor) -> Tensor:
    """x `[b c h w]` smoothed, at every second place: `[b c ceil(h/2) ceil(w/2)]`.

    The kernel is 1/4, 1/2, 1/4 in both directions, which is the average of 2x2 values, twice. Maps
    are reflected at their edges; a single row or column stands beside itself.

    Source: Zhang 2019, arXiv:1904.11486, Sec. 3.3.
    """
    for dim, edge in ((3, (1, 1, 0, 0)), (2, (0, 0, 1, 1))):
        x = F.pad(x, edge, "reflect" if _several(x, dim) else "replicate")
    return F.avg_pool2d(F.avg_pool2d(x, kernel_size=2, stride=1), kernel_size=2, stride=2)


def _several(x: Tensor, dim: int) -> bool:
    """Whether a map has several rows or columns, which an exported program takes for granted."""
    return is_exporting() or x.shape[dim] > 1


def subsample(x: Tensor, stride: int) -> Tensor:
    """x `[b c h w]` at every `stride`-th place: `[b c ceil(h/stride) ceil(w/stride)]`.

    This is a pooling of single values, because its sizes follow a convolution's formula. Exporters
    cannot tell that the sizes of a slice are the same.
    """
    return x if stride == 1 else F.avg_pool2d(x, kernel_size=1, stride=stride)


def zero_pad(x: Tensor, before: int, after: int) -> Tensor:
    """x `[b c h w]` with channels of zeros around its own: `[b before+c+after h w]`.

    Raises:
      FresnetError: if one of the numbers is negative.
    """
    if before < 0 or after < 0:
        raise FresnetError(
            f"a shortcut of zeros expects at least as many channels as activations "
            f"{tuple(x.shape)} have; got {x.shape[1] + before + after}"
        )
    return F.pad(x, (0, 0, 0, 0, before, after))


def relu(x: Tensor) -> Tensor:
    """max(x, 0), written over x."""
    return torch.relu_(x)


def add(y: Tensor, shortcut: Tensor) -> Tensor:
    """y + shortcut, each `[b c h w]`, written over y. This sum makes a block residual.

    Raises:
      FresnetError: if the shapes differ.
    """
    if y.shape != shortcut.shape:
        raise FresnetError(
            f"a block with output {tuple(y.shape)} expects a shortcut of the same shape; "
            f"got {tuple(shortcut.shape)}"
        )
    return add_over(y, shortcut)


def add_over(y: Tensor, term: Tensor) -> Tensor:
    """y + term, broadcast to y's shape and written over y."""
    return y.add_(term) if _can_be_written_over(y, term) else y + term


def _can_be_written_over(y: Tensor, other: Tensor) -> bool:
    return not torch.compiler.is_compiling() and transform_stack.can_be_written_over(y, other)


def drop(x: Tensor, keep: Tensor) -> Tensor:
    """Maps `[b c h w]` times keep `[b]`, or means `[b c]` times keep `[b c]`, written over x.

    Raises:
      FresnetError: if the sizes differ.
    """
    expected = x.shape[:1] if x.ndim == 4 else x.shape
    if keep.shape != expected:
        raise FresnetError(
            f"a mask of activations {tuple(x.shape)} is {tuple(expected)}; got "
            f"{tuple(keep.shape)}: draw one for these images"
        )
    factors = keep.to(x.dtype)[(..., *[None] * (x.ndim - keep.ndim))]
    return x.mul_(factors) if _can_be_written_over(x, factors) else x * factors


def gate(x: Tensor, gates: Tensor) -> Tensor:
    """x `[b c h w]` times the sigmoid of gates `[b c 1 1]`.

    Raises:
      FresnetError: if the channels differ.
    """
    if gates.shape != (*x.shape[:2], 1, 1):
        raise FresnetError(
            f"a gate of activations {tuple(x.shape)} is ({len(x)}, {x.shape[1]}, 1, 1); "
            f"got {tuple(gates.shape)}"
        )
    return x * gates.sigmoid()


def global_average_pool(x: Tensor) -> Tensor:
    """The mean of each map: `[b c h w]` -> `[b c]`."""
    return reduce(x, "b c h w -> b c", "mean")


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x `[b c]` times weight `[k c]` plus bias `[k]`.

    Raises:
      FresnetError: if the shapes do not fit.
    """
    if weight.ndim != 2 or weight.shape[1] != x.shape[1] or bias.shape != weight.shape[:1]:
        raise FresnetError(
            f"a head on activations {tuple(x.shape)} expects a weight [k {x.shape[1]}] and a "
            f"bias [k]; got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    return F.linear(x, weight, bias)
