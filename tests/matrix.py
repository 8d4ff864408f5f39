"""The matrix of transforms: what is promised of each, and how it is rendered in the documents.

    python tests/matrix.py            # writes the table into docs/transforms.md

`tests/test_matrix.py` runs every cell and holds it against this promise and the document.
"""

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import (
    functionalize,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx

from fresnet import tree
from fresnet.types import Weights

DOCUMENT = Path(__file__).parent.parent / "docs" / "transforms.md"

Loss = Callable[[Weights, Tensor], Tensor]
"""Of the weights and the images `[b 3 h w]`: the mean loss of the batch."""


def _head_bias(loss: Loss, w: Weights, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss as a function of few numbers, for whole Jacobians and Hessians: two norms' biases
    and the scale of the stem's norm, all of which pass through later norms.
    """
    bias, block = w.stem.norm.bias, w.stages[0][0]

    def of_vector(v: Tensor) -> Tensor:
        stem_bias, scale = v.chunk(2)
        stem = w.stem._replace(norm=w.stem.norm._replace(bias=stem_bias))
        first = block._replace(norm1=block.norm1._replace(scale=scale))
        return loss(w._replace(stem=stem, stages=((first,), *w.stages[1:])), x)

    assert bias.shape == block.norm1.scale.shape
    return of_vector


def _vector(w: Weights) -> Tensor:
    return torch.cat([w.stem.norm.bias, w.stages[0][0].norm1.scale])


def _along(w: Weights) -> Weights:
    """A direction that is not aligned with the weights."""
    return tree.map(lambda leaf: torch.cos(3 * leaf) * 0.1, w)


def _dot(a: Weights, b: Weights) -> Tensor:
    return torch.stack(
        [(p * q).sum() for p, q in zip(*map(tree.leaves, (a, b)), strict=True)]
    ).sum()


def _gradient_along(loss: Loss, x: Tensor, v: Weights) -> Callable[[Weights], Tensor]:
    return lambda w: _dot(grad(loss)(w, x), v)


def _slope(loss: Loss, x: Tensor, v: Weights) -> Callable[[Weights], Tensor]:
    return lambda w: jvp(lambda w: loss(w, x), (w,), (v,))[1]


def _stacked(w: Weights) -> Weights:
    return tree.stack([w, tree.map(lambda leaf: 1.1 * leaf, w)])


def _pulled(loss: Loss, w: Weights, x: Tensor) -> Any:
    value, pull, *_ = vjp(loss, w, x)
    return pull(2 * value)


def _linearized(loss: Loss, w: Weights, x: Tensor) -> Any:
    value, slope = linearize(lambda w: loss(w, x), w)
    return value, slope(_along(w))


TRANSFORMS: dict[str, Callable[[Loss, Weights, Tensor], Any]] = {
    "grad": lambda f, w, x: grad(f)(w, x),
    "grad_and_value": lambda f, w, x: grad_and_value(f)(w, x),
    "grad by x": lambda f, w, x: grad(f, argnums=1)(w, x),
    "vjp": _pulled,
    "jvp": lambda f, w, x: tuple(jvp(lambda w: f(w, x), (w,), (_along(w),))),
    "jacrev": lambda f, w, x: jacrev(_head_bias(f, w, x))(_vector(w)),
    "jacfwd": lambda f, w, x: jacfwd(_head_bias(f, w, x))(_vector(w)),
    "hessian": lambda f, w, x: hessian(_head_bias(f, w, x))(_vector(w)),
    "jacfwd of jacfwd": lambda f, w, x: jacfwd(jacfwd(_head_bias(f, w, x)))(_vector(w)),
    "vmap over images": lambda f, w, x: vmap(f, (None, 0))(w, x.unflatten(0, (2, -1))),
    "vmap over networks": lambda f, w, x: vmap(f, (0, None))(_stacked(w), x),
    "vmap of grad": lambda f, w, x: vmap(grad(f), (None, 0))(w, x.unflatten(0, (2, -1))),
    "jvp of grad": lambda f, w, x: tuple(jvp(lambda w: grad(f)(w, x), (w,), (_along(w),))),
    "grad of jvp": lambda f, w, x: grad(_slope(f, x, _along(w)))(w),
    "vjp of grad": lambda f, w, x: grad(_gradient_along(f, x, _along(w)))(w),
    "third order": lambda f, w, x: jvp(
        lambda w: grad(_gradient_along(f, x, _along(w)))(w), (w,), (_along(w),)
    )[1],
    "linearize": _linearized,
    "functionalize": lambda f, w, x: functionalize(grad(f))(w, x),
    "make_fx": lambda f, w, x: make_fx(grad(f))(w, x)(w, x),
}


class Cell(NamedTuple):
    transform: str
    forward: str
    mode: str
    dtype: str


FORWARDS = ("forward", "forward_train")
COLUMNS = (
    ("eager", "float64"),
    ("eager", "float32"),
    ("eager", "bfloat16"),
    ("aot_eager", "float64"),
    ("inductor", "float64"),
)
IN_BFLOAT16 = ("grad", "grad_and_value", "vjp", "jvp", "vmap over images", "vmap over networks")
"""Where so few digits mean something."""

CELLS = [
    Cell(transform, forward, mode, dtype)
    for transform, forward, (mode, dtype) in product(TRANSFORMS, FORWARDS, COLUMNS)
    if dtype != "bfloat16" or transform in IN_BFLOAT16
]

BOUNDS = {"float64": 1e-10, "float32": 1e-3, "bfloat16": 0.3}
"""The largest error allowed, relative to the norm of the true result in float64."""

_SKIPPED = "Attempted to call function marked as skipped"
LIMITS = {
    ("linearize", "aot_eager"): _SKIPPED,
    ("linearize", "inductor"): _SKIPPED,
    ("functionalize", "aot_eager"): "Failed to convert args/kwargs to proxy",
    ("functionalize", "inductor"): "Failed to convert args/kwargs to proxy",
    ("make_fx", "aot_eager"): _SKIPPED,
    ("make_fx", "inductor"): _SKIPPED,
}
"""Where PyTorch itself refuses, and what it says: these are ways of tracing, not to be traced."""


def table() -> str:
    """The matrix in Markdown."""
    header = ["transform", *(f"{mode} {dtype}" for mode, dtype in COLUMNS)]
    rows = [header, ["---"] * len(header)]
    for transform in TRANSFORMS:
        marks = [_mark(transform, *column) for column in COLUMNS]
        rows.append([transform, *marks])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _mark(transform: str, mode: str, dtype: str) -> str:
    if (transform, mode) in LIMITS:
        return "refused"
    held = all(Cell(transform, forward, mode, dtype) in CELLS for forward in FORWARDS)
    return f"{BOUNDS[dtype]:.0e}" if held else ""


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(
        re.sub(r"\| transform \|.*?\n(?=\n|\Z)", lambda _: table(), text, flags=re.S)
    )
