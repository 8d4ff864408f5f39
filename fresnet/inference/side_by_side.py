"""Narrow maps of several images side by side, for matrix units.

AMX takes sixteen places of a line at once, so on a map seven wide more than half of it idles. Here
n images are laid out as one, with their columns in turn:

    [n*b c h w] -> [b c h w*n]

Neighbouring columns of an image are then n places apart, so a convolution becomes a dilated one,
with as many products as before. On 7x7 maps it takes 0.65 of the time with 3x3 kernels, and 0.7
with 1x1 kernels. With a stride of 2 these are 0.6 and 0.8.
"""

from collections.abc import Callable
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from fresnet.inference import fused
from fresnet.inference.fused import FusedLayer
from fresnet.network.nodes import Geometry

IMAGES = 4
"""The most images that lie side by side. Eight are no faster than four."""

NARROW = 8
"""The most columns of a map for which it pays. With 14 columns nothing is gained."""


def images_together(shape: torch.Size, dtype: torch.dtype, stride: int) -> int:
    """How many images' results should lie side by side for such activations; 1 if none should."""
    n, _, _, w = shape
    narrow = dtype is torch.bfloat16 and -(-w // stride) <= NARROW
    return gcd(n, IMAGES) if narrow and _has_tiles() else 1


def _has_tiles() -> bool:
    capabilities: Callable[[], dict[str, object]] = getattr(torch.cpu, "get_capabilities", dict)
    return bool(capabilities().get("amx_bf16", False))


def convolution(
    n: int, shape: torch.Size, weight: Tensor, bias: Tensor | None, how: Geometry, *, relu: bool
) -> FusedLayer:
    """`fused.convolution` with the results of n images side by side.

    Activations of this shape lie side by side too, unless there is a stride. The summand may lie
    either way.
    """
    convolve = _convolution(n, shape, weight, bias, how)

    def run(x: Tensor, added: Tensor | None = None) -> Tensor:
        y = convolve(x)
        if added is not None:
            y = y + (added if len(added) == len(y) else side_by_side(added, n))
        return F.relu(y) if relu else y

    return run


def _convolution(
    n: int, shape: torch.Size, weight: Tensor, bias: Tensor | None, how: Geometry
) -> Callable[[Tensor], Tensor]:
    k, (_, padding) = weight.shape[-1], how.padding(weight)
    if how.stride == 1:
        laid = (padding, n * padding), (how.dilation, n * how.dilation), how.groups
        return lambda x: F.conv2d(x, weight, bias, 1, *laid)
    if k == 1:
        return lambda x: F.conv2d(
            side_by_side(x[:, :, :: how.stride, :: how.stride], n), weight, bias, groups=how.groups
        )
    if (k, how.stride, how.dilation) == (3, 2, 1):
        middle, outer = weight[..., 1:2].clone(), weight[..., ::2].clone()

        def by_columns(x: Tensor) -> Tensor:
            """The kernel sees an even column, and the odd ones beside it."""
            even = side_by_side(x[..., ::2], n)
            odd = side_by_side(F.pad(x, (1, 1))[..., ::2], n)
            y = F.conv2d(even, middle, bias, (2, 1), (1, 0), 1, how.groups)
            return y + F.conv2d(odd, outer, None, (2, 1), (1, 0), (1, n), how.groups)

        return by_columns
    apart = fused.convolution(shape, weight, bias, how, relu=False)
    return lambda x: side_by_side(apart(x, None), n)


def side_by_side(x: Tensor, n: int) -> Tensor:
    """`[n*b c h w]` -> `[b c h w*n]`."""
    columns = torch.unflatten(x.movedim(1, 3), 0, (-1, n)).movedim(1, 3)  # b h w n c
    return columns.flatten(2, 3).movedim(3, 1)


def average(x: Tensor, n: int) -> Tensor:
    """The mean of each map of x `[b c h w*n]`: `[n*b c]`. PyTorch's takes three times as long."""
    maps = torch.unflatten(x.movedim(1, 3), 2, (-1, n))  # b h w n c
    return maps.sum((1, 2)).flatten(0, 1) / maps.shape[1:3].numel()


def gate(x: Tensor, gates: Tensor, n: int) -> Tensor:
    """Each map of x `[b c h w*n]` times the sigmoid of its gate `[n*b c 1 1]`."""
    maps = torch.unflatten(x.movedim(1, 3), 2, (-1, n))  # b h w n c
    each = torch.unflatten(gates.flatten(1).sigmoid(), 0, (-1, n))[:, None, None]
    return (maps * each).flatten(2, 3).movedim(3, 1)
