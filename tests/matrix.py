"""The matrix of transforms: every cell is run, compared with a textbook network, and tabulated.

    python tests/matrix.py            # runs all of it (ten minutes), writes docs/transforms.md

`tests/test_matrix.py` runs the same cells.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import textbook
import torch
from torch import Tensor
from torch._inductor import config as inductor
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
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import Params, tree
from fresnet.network.nodes import (
    AveragedStage,
    AveragedStem,
    BareStem7x7,
    BasicBlock,
    BlurredStage,
    BlurredStem,
    Bottleneck,
    EfficientAttention,
    FramedStem7x7,
    GroupNorm,
    LastNorm,
    PreActivation,
    SqueezeExcite,
    StandardisedLayer,
    Weights,
)
from fresnet.training import Masks, draw_masks, masked

DOCUMENT = Path(__file__).parent.parent / "docs" / "transforms.md"

Loss = Callable[[Weights, Tensor], Tensor]
"""The mean loss of a batch, from the weights and the images `[b 3 h w]`."""


def _of_two_norms(loss: Loss, w: Weights, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss as a function of few numbers, for whole Jacobians and Hessians.

    They are the bias of the first block's first norm and the scale of its second norm. Both pass
    through later norms.
    """
    block = w.stages[0][0]

    def of_vector(v: Tensor) -> Tensor:
        bias, scale = v.chunk(2)
        one, two = block.layer1.norm._replace(bias=bias), block.layer2.norm._replace(scale=scale)
        first = block._replace(
            layer1=block.layer1._replace(norm=one), layer2=block.layer2._replace(norm=two)
        )
        return loss(w._replace(stages=((first,), *w.stages[1:])), x)

    return of_vector


def _vector(w: Weights) -> Tensor:
    block = w.stages[0][0]
    return torch.cat([block.layer1.norm.bias, block.layer2.norm.scale])


def _along(w: Weights) -> Weights:
    """A direction in weight space that is not aligned with the weights."""
    return tree.map(lambda leaf: torch.cos(3 * leaf) * 0.1, w)


def _dot(a: Weights, b: Weights) -> Tensor:
    return tree.ravel(a) @ tree.ravel(b)


def _gradient_along(loss: Loss, x: Tensor, v: Weights) -> Callable[[Weights], Tensor]:
    return lambda w: _dot(grad(loss)(w, x), v)


def _slope(loss: Loss, x: Tensor, v: Weights) -> Callable[[Weights], Tensor]:
    return lambda w: jvp(lambda w: loss(w, x), (w,), (v,))[1]


def _stacked(w: Weights) -> Weights:
    return tree.stack([w, tree.map(lambda leaf: 1.1 * leaf, w)])


def _pulled(loss: Loss, w: Weights, x: Tensor) -> Any:
    value, pull, *_ = vjp(loss, w, x)
    return pull(2 * value)


def _pulled_twice(loss: Loss, w: Weights, x: Tensor) -> Any:
    """Two products with the Hessian at once, in reverse over reverse."""

    def gradient(w: Weights) -> Weights:
        of_weights: Weights = grad(loss)(w, x)
        return of_weights

    _, pull, *_ = vjp(gradient, w)
    return vmap(pull)(tree.stack([_along(w), tree.map(torch.sin, w)]))


def _over_tasks(loss: Loss, w: Weights, x: Tensor) -> Any:
    """The derivative of a step for each of two tasks, as in meta-learning."""

    def after(w: Weights, part: Tensor) -> Tensor:
        grads = grad(loss)(w, part)
        return loss(tree.map(lambda leaf, g: leaf - 0.1 * g, w, grads), part)

    return grad(lambda w: vmap(after, (None, 0))(w, x.unflatten(0, (2, -1))).sum())(w)


def _linearized(loss: Loss, w: Weights, x: Tensor) -> Any:
    value, slope = linearize(lambda w: loss(w, x), w)
    return value, slope(_along(w))


TRANSFORMS: dict[str, Callable[[Loss, Weights, Tensor], Any]] = {
    "grad": lambda f, w, x: grad(f)(w, x),
    "grad_and_value": lambda f, w, x: grad_and_value(f)(w, x),
    "grad by x": lambda f, w, x: grad(f, argnums=1)(w, x),
    "vjp": _pulled,
    "jvp": lambda f, w, x: tuple(jvp(lambda w: f(w, x), (w,), (_along(w),))),
    "jacrev": lambda f, w, x: jacrev(_of_two_norms(f, w, x))(_vector(w)),
    "jacfwd": lambda f, w, x: jacfwd(_of_two_norms(f, w, x))(_vector(w)),
    "hessian": lambda f, w, x: hessian(_of_two_norms(f, w, x))(_vector(w)),
    "jvp of jvp": lambda f, w, x: jvp(_slope(f, x, _along(w)), (w,), (_along(w),))[1],
    "vmap over images": lambda f, w, x: vmap(f, (None, 0))(w, x.unflatten(0, (2, -1))),
    "vmap over networks": lambda f, w, x: vmap(f, (0, None))(_stacked(w), x),
    "vmap of grad": lambda f, w, x: vmap(grad(f), (None, 0))(w, x.unflatten(0, (2, -1))),
    "jvp of grad": lambda f, w, x: tuple(jvp(lambda w: grad(f)(w, x), (w,), (_along(w),))),
    "grad of jvp": lambda f, w, x: grad(_slope(f, x, _along(w)))(w),
    "vjp of grad": lambda f, w, x: grad(_gradient_along(f, x, _along(w)))(w),
    "third order": lambda f, w, x: jvp(
        lambda w: grad(_gradient_along(f, x, _along(w)))(w), (w,), (_along(w),)
    )[1],
    "vmap of vjp of grad": _pulled_twice,
    "grad of vmap of grad": _over_tasks,
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
DTYPES = ("float64", "float32", "bfloat16")
COLUMNS = tuple(product(("eager", "aot_eager", "inductor"), DTYPES))

BOUNDS = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 0.3}
"""The largest error allowed, relative to the norm of the true result in float64.

bfloat16 has three digits, and gradients of a small network in training lose most of them. The
textbook network itself is off by up to 0.2 when it runs in bfloat16.
"""

FIRST_ORDER = (
    *("grad", "grad_and_value", "grad by x", "vjp", "jvp", "jacrev", "jacfwd"),
    *("vmap over images", "vmap over networks", "vmap of grad"),
)
"""The transforms after which bfloat16 still has digits that mean something."""

COMPILED_NARROW = ("grad", "jvp", "vmap of grad")
"""The transforms that are compiled in float32 and bfloat16 too; inductor takes ten seconds each."""

REFUSED = ("linearize", "functionalize", "make_fx", "vmap of vjp of grad")
"""The transforms that PyTorch does not compile.

The first three trace themselves. For the last it has no rule for max pooling in channels last.
"""

REFUSAL = "function marked as skipped|Failed to convert args/kwargs to proxy|is_contiguous inside"
"""What PyTorch then says. Which of the two it is depends on what was compiled before."""

CRASHES = ("jvp of jvp",)
"""The transforms that PyTorch compiles to code that crashes, if it compiles them at all."""


def is_tested(transform: str, mode: str, dtype: str) -> bool:
    if mode == "eager":
        return dtype != "bfloat16" or transform in FIRST_ORDER
    if transform in CRASHES:
        return False
    return dtype == "float64" or transform in COMPILED_NARROW


def is_long(cell: Cell) -> bool:
    """Whether other cells show the same in a tenth of the time, such as those that run eagerly."""
    if cell.mode == "eager":
        return False
    if cell.mode == "aot_eager":
        seen = (*COMPILED_NARROW, "vjp of grad") if cell.forward == "forward_train" else ("grad",)
        return cell.dtype != "float64" or cell.transform not in seen
    if cell.forward == "forward" or cell.dtype == "float64":
        return True
    return cell.dtype == "bfloat16" and cell.transform != "grad"


CELLS = [
    Cell(transform, forward, mode, dtype)
    for transform, forward, (mode, dtype) in product(TRANSFORMS, FORWARDS, COLUMNS)
    if is_tested(transform, mode, dtype)
]


def network(*depths: int, block: type = BasicBlock, width: int = 4, **types: type) -> Params:
    spec = fresnet.Spec(block, depths, width, **types)  # type: ignore[arg-type]
    params = fresnet.init(0, spec, num_classes=5, dtype=torch.float64)
    return params._replace(stats=tree.map(lambda s: 0.7 * s + 0.2, params.stats))


NETWORKS = {"eager": network(1, 1), "aot_eager": network(1, 1), "inductor": network(1)}
"""The network of each mode. Inductor's is smaller: it compiles each convolution for seconds."""

OTHERS = {
    "V2": network(1, 1, block=PreActivation, stem=BareStem7x7, last=LastNorm),
    "excited": network(1, 1, attention=SqueezeExcite),
    "averaged": network(1, 1, block=Bottleneck, stage=AveragedStage, stem_pool=AveragedStem),
    "blurred, ECA": network(
        1, 1, stage=BlurredStage, stem_pool=BlurredStem, attention=EfficientAttention
    ),
    "groups": network(1, 1, width=6, norm=GroupNorm),
    "BiT": network(
        *(1, 1),
        block=PreActivation,
        width=6,
        stem=FramedStem7x7,
        last=LastNorm,
        layer=StandardisedLayer,
        norm=GroupNorm,
    ),
}
"""Networks of other nodes, which go through the same transforms."""

MASKED = ("V2", "excited")
"""Those of which paths and features are dropped."""

X = torch.randn(6, 3, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 4, 0])


def error(cell: Cell, other: str | None = None) -> float:
    """The error of the transform of fresnet's network, relative to the norm of the true result.

    Args:
      other: a name in `OTHERS`; by default the network is the one of the cell's mode.
    Raises:
      Exception: what PyTorch raises where it refuses.
    """
    dtype = getattr(torch, cell.dtype)
    network = OTHERS[other] if other else NETWORKS[cell.mode]
    images = X[..., :16, :16] if other else X  # what averages takes even sides alone
    weights, stats = network
    wide = torch.promote_types(dtype, torch.float32)
    params = Params(tree.map(lambda w: w.to(dtype), weights), tree.map(lambda s: s.to(wide), stats))
    masks = _masks(params) if other in MASKED else None
    loss = _loss(FORWARD[cell.forward], params, masks)

    def call(weights: Weights, x: Tensor) -> Any:
        return TRANSFORMS[cell.transform](loss, weights, x)

    if cell.mode != "eager":
        torch.compiler.reset()
        call = torch.compile(call, backend=cell.mode, fullgraph=True)
    # Scalar code compiles in half the time. Inductor vectorises what is narrower than float64.
    with inductor.patch({"cpp.simdlen": 1 if cell.dtype == "float64" else None}):
        actual = _flat(call(params.weights, images.to(dtype)))
    expected = _truth(cell.transform, cell.forward, network, images, masks)
    return float((actual - expected).norm() / expected.norm())


FORWARD: Mapping[str, Callable[[Params, Tensor], Tensor]] = {
    "forward": fresnet.forward,
    "forward_train": lambda params, x: fresnet.forward_train(params, x)[0],
}


def _masks(params: Params) -> Masks:
    generator = torch.Generator().manual_seed(2)
    return draw_masks(generator, params.weights, len(X), drop_path=0.5, dropout=0.3)


def _truth(
    transform: str, forward: str, params: Params, x: Tensor, masks: Masks | None = None
) -> Tensor:
    train = forward == "forward_train"
    loss = _loss(lambda params, x: textbook.logits(params, x, train), params, masks)
    # PyTorch's max pooling, in the textbook, has no rule for all of them in channels last.
    plain = tree.map(torch.Tensor.contiguous, params.weights)
    return _flat(TRANSFORMS[transform](loss, plain, x))


def _loss(
    run: Callable[[Params, Tensor], Tensor], params: Params, masks: Masks | None = None
) -> Loss:
    def loss(weights: Weights, x: Tensor) -> Tensor:
        if masks is not None:
            weights = masked(weights, tree.map(lambda mask: mask[: len(x)], masks))
        return cross_entropy(run(Params(weights, params.stats), x), Y[: len(x)])

    return loss


def _flat(result: Any) -> Tensor:
    return tree.ravel(result).double()


def table(mark: Callable[[str, str, str], str]) -> str:
    """The matrix in Markdown. `mark` gives the text for a transform, mode and dtype."""
    header = ["transform", *(f"{mode} {dtype}" for mode, dtype in COLUMNS)]
    rows = [header, ["---"] * len(header)]
    rows += [
        [transform, *(mark(transform, *column) for column in COLUMNS)] for transform in TRANSFORMS
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def note(transform: str, mode: str, dtype: str) -> str | None:
    """What stands in a place where nothing was measured, or None where something was."""
    if mode != "eager" and transform in CRASHES:
        return "crash"
    if mode != "eager" and transform in REFUSED:
        return "refused"
    return None if is_tested(transform, mode, dtype) else ""


def main() -> None:
    def measured(transform: str, mode: str, dtype: str) -> str:
        told = note(transform, mode, dtype)
        if told is not None:
            return told
        errors = [error(Cell(transform, forward, mode, dtype)) for forward in FORWARDS]
        print(transform, mode, dtype, *errors, flush=True)
        return f"{max(errors):.0e}"

    warnings.simplefilter("ignore")
    found, text = table(measured), DOCUMENT.read_text()
    DOCUMENT.write_text(re.sub(r"\| transform \|.*?\n(?=\n|\Z)", lambda _: found, text, flags=re.S))


if __name__ == "__main__":
    main()
