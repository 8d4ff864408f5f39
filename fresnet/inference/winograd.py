"""3x3 convolutions of stride 1 with a quarter of the multiplications: Winograd's F(4x4, 3x3).

A tile of 4x4 outputs depends on a window of 6x6 inputs. Kernel and window are evaluated at six
points along each side: 0, 1, -1, 2, -2 and infinity. A tile then takes one multiplication for each
of the 36 pairs of points,

    y = A [(G w G') * (B x B')] A'

With the sum over channels these are 36 products of matrices, which run as one grouped 1x1
convolution of oneDNN. The transforms from windows to values, and from products to tiles, are in
`winograd.cpp`.

Source: Lavin & Gray 2015, arXiv:1509.09308, Sec. 4.3.
"""

import warnings
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from fresnet.errors import FresnetError
from fresnet.inference import native
from fresnet.inference.fused import FusedLayer
from fresnet.network.nodes import PLAIN, Geometry

TILE, WINDOW = 4, 6
POINTS = WINDOW**2
TRANSFORMS = Path(__file__).with_name("winograd.cpp")

G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)

NARROW = 128
"""With fewer channels the transforms take as long as the multiplications that they save."""

FEW = 2**14
"""With fewer values at a point, more calls and kernels four times as large outweigh the gain."""

CACHED = 2**21
"""Bytes of values that are made at once, unless kernels are larger. A cache still holds them."""


def is_faster(shape: torch.Size, weight: Tensor, how: Geometry) -> bool:
    """Whether this is the faster algorithm for a convolution of such activations in float32."""
    b, c, h, w = shape
    return (
        weight.shape[2:] == (3, 3)
        and how == PLAIN
        and weight.dtype is torch.float32
        and weight.device.type == "cpu"
        and min(weight.shape[:2]) >= NARROW
        and b * _tiles(h) * _tiles(w) * c >= FEW
        and _can_compile()
    )


def convolution(shape: torch.Size, weight: Tensor, bias: Tensor, *, relu: bool) -> FusedLayer:
    """`fused.convolution` of a 3x3 weight, padded by 1, with several times its rounding error."""
    b, c, h, w = shape
    kernel = _kernel(weight)
    per_image = weight.element_size() * POINTS * c * _tiles(h) * _tiles(w)
    at_once = max(CACHED, kernel.numel() * kernel.element_size(), per_image) // per_image
    parts = -(-b // at_once)

    def run(x: Tensor, added: Tensor | None = None) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        y = x.new_empty(b, h, w, len(bias))
        plus = [None] * b if added is None else added.permute(0, 2, 3, 1).chunk(parts)
        for part, out, more in zip(x.chunk(parts), y.chunk(parts), plus, strict=False):
            values = torch.ops.fresnet.winograd_values(part).permute(0, 3, 1, 2)
            products = F.conv2d(values, kernel, groups=POINTS).permute(0, 2, 3, 1)
            torch.ops.fresnet.winograd_tiles(out, products, bias, more, relu)
        return y.permute(0, 3, 1, 2)

    return run


def _tiles(side: int) -> int:
    return -(-side // TILE)


def _kernel(weight: Tensor) -> Tensor:
    """G w G' for weight `[o c 3 3]`, as a grouped convolution takes it: `[36 o, c, 1, 1]`."""
    g = torch.tensor(G, dtype=torch.float64, device=weight.device)
    values = einsum(g, weight.double(), g, "i r, o c r s, j s -> i j o c")
    return rearrange(values, "i j o c -> (i j o) c 1 1").to(weight.dtype)


def _run_values(x: Tensor) -> Tensor:
    """B x B' of each window of x `[b h w c]`: `[1, 1, tiles, 36 c]`."""
    b, h, w, c = x.shape
    values = x.new_empty(1, 1, b * _tiles(h) * _tiles(w), POINTS * c)
    native.call(TRANSFORMS, "winograd_values", x.contiguous(), values, b, h, w, c)
    return values


def _run_tiles(y: Tensor, products: Tensor, bias: Tensor, added: Tensor | None, relu: bool) -> None:
    """Write A products A', with bias, sum and ReLU, into y `[b h w o]`."""
    added = None if added is None else added.contiguous()
    tensors = products.contiguous(), bias, added, y
    native.call(TRANSFORMS, "winograd_tiles", *tensors, *y.shape, relu)


_OPERATORS = torch.library.Library("fresnet", "DEF")
"""The transforms as operators, which `onednn.fuse` can call."""

_OPERATORS.define("winograd_values(Tensor x) -> Tensor")
_OPERATORS.define(
    "winograd_tiles(Tensor(a!) y, Tensor products, Tensor bias, Tensor? added, bool relu) -> ()"
)
_OPERATORS.impl("winograd_values", _run_values, "CPU")
_OPERATORS.impl("winograd_tiles", _run_tiles, "CPU")


@cache
def _can_compile() -> bool:
    """Whether the transforms can be compiled here. If not, a warning says once why."""
    try:
        native.library(TRANSFORMS)
    except FresnetError as error:
        warnings.warn(f"{error}, so 3x3 convolutions in float32 take longer", stacklevel=2)
        return False
    return True
