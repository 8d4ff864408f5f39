"""3x3 convolutions of stride 1 with a quarter of the multiplications: Winograd's F(4x4, 3x3).

A tile of 4x4 outputs depends on a window of 6x6 inputs. Kernel and window are evaluated at six
points along each side: 0, 1, -1, 2, -2 and infinity. A tile then takes one multiplication for each
of the 36 pairs of points,

    y = A [(G w G') * (B x B')] A'

With the sum over channels these are 36 products of matrices, which run as one grouped 1x1
convolution of oneDNN. PyTorch compiles the transforms from windows to values, and from products to
tiles.

Source: Lavin & Gray 2015, arXiv:1509.09308, Sec. 4.3.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from operator import add
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from fresnet.inference.fused import FusedLayer
from fresnet.network.nodes import PLAIN, Geometry

TILE, WINDOW = 4, 6
POINTS = WINDOW**2

Matrix = Sequence[Sequence[float]]
Result = TypeVar("Result")

A: Matrix = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)
B: Matrix = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
G: Matrix = (
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
        and _has_compiler()
    )


def convolution(shape: torch.Size, weight: Tensor, bias: Tensor, *, relu: bool) -> FusedLayer:
    """`fused.convolution` of a 3x3 weight, padded by 1, with several times its rounding error."""
    b, c, h, w = shape
    o, rows, columns = len(bias), _tiles(h), _tiles(w)
    kernel = _kernel(weight)
    per_image = weight.element_size() * POINTS * c * rows * columns
    at_once = max(CACHED, kernel.numel() * kernel.element_size()) // per_image
    sizes = [len(part) for part in _empty(b).chunk(-(-b // max(at_once, 1)))]

    def run(x: Tensor, added: Tensor | None = None) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        y = x.new_empty(b, h, w, o)
        plus = [None] * len(sizes) if added is None else added.permute(0, 2, 3, 1).split(sizes)
        for part, out, more in zip(x.split(sizes), y.split(sizes), plus, strict=True):
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


def _values(x: Tensor) -> Tensor:
    """B x B' of each window of x `[b h w c]`: `[1, 1, tiles, 36 c]`."""
    b, h, w, c = x.shape
    rows, columns = _tiles(h), _tiles(w)
    x = F.pad(x, (0, 0, 1, TILE * columns + 1 - w, 1, TILE * rows + 1 - h))
    height, width = x.shape[1:3]
    strides = (height * width, width, TILE, 1)
    x = x.as_strided((b, height, columns, WINDOW, c), [*(c * n for n in strides), 1])
    x = torch.stack(_times(B, x.unbind(3)), 3)
    line = columns * WINDOW
    strides = (height * line, TILE * line, WINDOW, line)
    x = x.as_strided((b, rows, columns, WINDOW, WINDOW * c), [*(c * n for n in strides), 1])
    x = torch.stack(_times(B, x.unbind(3)), 3)
    return x.view(1, 1, b * rows * columns, POINTS * c)


def _tiles_of(
    out: Tensor, products: Tensor, bias: Tensor, added: Tensor | None = None, *, relu: bool
) -> None:
    """Write A products A', with bias, sum and ReLU, into out `[b h w o]`."""
    _, h, w, _ = out.shape
    rows, columns = _tiles(h), _tiles(w)
    tiles = {"r": rows, "c": columns, "i": WINDOW, "j": WINDOW}
    y = rearrange(products, "1 1 (b r c) (i j o) -> b r c i j o", **tiles)
    y = torch.stack(_times(A, y.unbind(3)), 3)
    y = y.as_strided(y.shape, y.stride())
    y = torch.stack(_times(A, y.unbind(4)), 4)
    y = rearrange(y, "b r c i j o -> b (r i) (c j) o")[:, :h, :w] + bias
    y = y if added is None else y + added
    out.copy_(torch.relu(y) if relu else y)


def _times(matrix: Matrix, along: Sequence[Tensor]) -> list[Tensor]:
    return [reduce(add, (n * x for n, x in zip(row, along, strict=True) if n)) for row in matrix]


@cache
def _compiled_values(b: int, h: int, w: int, c: int) -> Callable[..., Tensor]:
    return _compiled(_values, _empty(b, h, w, c))


@cache
def _compiled_tiles(
    b: int, h: int, w: int, o: int, with_sum: bool, relu: bool
) -> Callable[..., None]:
    products = _empty(1, 1, b * _tiles(h) * _tiles(w), POINTS * o)
    out, bias = _empty(b, h, w, o), _empty(o)
    added = [torch.empty_like(out)] if with_sum else []
    return _compiled(partial(_tiles_of, relu=relu), out, products, bias, *added)


def _run_values(x: Tensor) -> Tensor:
    values: Tensor = _compiled_values(*x.shape)(x.contiguous())
    return values


def _run_tiles(
    out: Tensor, products: Tensor, bias: Tensor, added: Tensor | None, relu: bool
) -> None:
    plus = () if added is None else (added.contiguous(),)
    run = _compiled_tiles(*out.shape, bool(plus), relu)
    run(out, products.contiguous(), bias, *plus)


_OPERATORS = torch.library.Library("fresnet", "DEF")
"""The transforms as operators, which `onednn.fuse` can call."""

_OPERATORS.define("winograd_values(Tensor x) -> Tensor")
_OPERATORS.define(
    "winograd_tiles(Tensor(a!) y, Tensor products, Tensor bias, Tensor? added, bool relu) -> ()"
)
_OPERATORS.impl("winograd_values", _run_values, "CPU")
_OPERATORS.impl("winograd_tiles", _run_tiles, "CPU")


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever the defaults are


def _compiled(function: Callable[..., Result], *arguments: Tensor) -> Callable[..., Result]:
    """The function compiled for arguments of these shapes alone, without a check of later shapes.

    Each shape has a compiled function of its own, because `torch.compile` gives up on a function
    that it meets in many shapes.
    """
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    whole: Any = torch.compile(function, fullgraph=True, dynamic=False, options=options)
    compiled: Callable[..., Result] = whole.aot_compile((arguments, {}))
    return compiled


@cache
def _has_compiler() -> bool:
    """Whether there is a C++ compiler, and PyTorch has all that `_compiled` needs.

    If not, a warning says once what is missing.
    """
    missing = _missing()
    if missing:
        warnings.warn(f"{missing}, so 3x3 convolutions in float32 take longer", stacklevel=2)
    return not missing


def _missing() -> str:
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler
    except ImportError:  # they are private
        return f"PyTorch {torch.__version__} has no C++ compiler that fresnet knows"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler"
    there = hasattr(torch.compile(_times), "aot_compile")
    if there and hasattr(torch.compiler, "skip_all_guards_unsafe"):
        return ""
    return f"PyTorch {torch.__version__} compiles no single functions ahead of time"
