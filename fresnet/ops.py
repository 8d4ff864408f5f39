"""The operations without statistics. Each refuses shapes that do not fit, so none broadcasts."""

import torch.nn.functional as F
from einops import reduce
from torch import Tensor

from fresnet.errors import FresnetError


def conv2d(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Convolve x `[b c h w]` with weight `[o c k k]`, padded so that stride 1 keeps h and w.

    Raises:
      FresnetError: if the channels differ, or if k is not one odd number.
    """
    fits = weight.ndim == 4 and weight.shape[1] == x.shape[1]
    if not fits or weight.shape[2] != weight.shape[3] or weight.shape[3] % 2 == 0:
        raise FresnetError(
            f"a convolution of activations {tuple(x.shape)} expects a weight "
            f"[o {x.shape[1]} k k], k odd; got {tuple(weight.shape)}"
        )
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[3] // 2)


def max_pool(x: Tensor) -> Tensor:
    """3x3 max pooling of stride 2, padded by one: `[b c h w]` -> `[b c ceil(h/2) ceil(w/2)]`."""
    return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


def add_relu(y: Tensor, shortcut: Tensor) -> Tensor:
    """relu(y + shortcut), each `[b c h w]`: how a residual block ends.

    Raises:
      FresnetError: if the shapes differ.
    """
    if y.shape != shortcut.shape:
        raise FresnetError(
            f"a block with output {tuple(y.shape)} expects a shortcut of the same shape; "
            f"got {tuple(shortcut.shape)}"
        )
    return F.relu(y + shortcut)


def global_average_pool(x: Tensor) -> Tensor:
    """`[b c h w]` -> `[b c]`."""
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
