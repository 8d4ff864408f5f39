"""`fresnet.grad_and_value` is `torch.func.grad_and_value`, and frees its graph where it may."""

import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from assertions import assert_identical, assert_trees_close, unmutated
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import grad, jvp, vmap
from torch.nn.functional import cross_entropy
from torch.utils._pytree import register_pytree_node

import fresnet
from fresnet import FresnetError, Params, tree
from fresnet.gradients.reverse import grad_and_value

SPEC = fresnet.Spec(fresnet.nodes.BasicBlock, (1, 1), width=4)
PARAMS = fresnet.init(0, SPEC, num_classes=3, dtype=torch.float64)
X = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0])
VECTOR = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

Transform = Callable[..., Callable[..., Any]]


def loss_fn(weights: Any, stats: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
    logits, stats = fresnet.forward_train(Params(weights, stats), x)
    return cross_entropy(logits, y), stats


def test_a_step_has_the_gradient_of_torch_func() -> None:
    """In float64 to rounding: the two take the same kernels in another order."""
    arguments = (*PARAMS, X, Y)
    with unmutated(arguments):
        found = grad_and_value(loss_fn, has_aux=True)(*arguments)
    assert_trees_close(found, torch.func.grad_and_value(loss_fn, has_aux=True)(*arguments), 1e-12)
    assert not any(leaf.requires_grad for leaf in tree.leaves(found))


def of_three(a: Tensor, b: dict[str, Tensor], *, c: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return (a**3 * b["b"] ** 2 * c).sum(), {"a": 2 * a, "c": c}


@pytest.mark.parametrize("argnums", [0, 1, -1, (0,), (1, 0), (0, -1)])
@pytest.mark.parametrize("has_aux", [True, False])
def test_arguments_and_results_are_those_of_torch_func(argnums: Any, has_aux: bool) -> None:
    def function(*args: Any, **kwargs: Any) -> Any:
        return of_three(*args, **kwargs) if has_aux else of_three(*args, **kwargs)[0]

    arguments = VECTOR, OrderedDict(b=VECTOR + 1)
    expected = torch.func.grad_and_value(function, argnums, has_aux)(*arguments, c=VECTOR)
    found = grad_and_value(function, argnums, has_aux)(*arguments, c=VECTOR)
    assert_identical(found, expected)


def _hyper(take: Transform, a: Tensor) -> Any:
    def after(a: Tensor) -> Tensor:
        grads, loss = take(lambda v: (v**4).sum())(a)
        total: Tensor = (grads**2).sum() + loss
        return total

    return grad(after)(a)


TRANSFORMS: dict[str, Callable[[Transform, Tensor], Any]] = {
    "vmap": lambda take, a: vmap(take(lambda v: (v**3).sum()))(torch.stack([a, 2 * a])),
    "grad": _hyper,
    "jvp": lambda take, a: tuple(jvp(take(lambda v: (v**3).sum()), (a,), (2 * a,))),
    "within": lambda take, a: take(lambda v: take(lambda w: (w**3).sum())(v)[0].sum())(a),
    "vmap within": lambda take, a: take(lambda v: vmap(take(lambda w: w**3))(v)[0].sum())(a),
    "no_grad": lambda take, a: torch.no_grad()(take(lambda v: (v**3).sum()))(a),
    "unused": lambda take, a: take(lambda v, w: w.sum(), (0, 1))(a, a),
    "constant": lambda take, a: take(lambda v: torch.ones((), dtype=v.dtype))(a),
    "itself": lambda take, a: take(lambda v: v)(a.sum()),
    "inference mode": lambda take, a: torch.inference_mode()(take(lambda v: (v**3).sum()))(a),
    "no leaves": lambda take, a: take(lambda v: a.sum())({}),
    "integer aux": lambda take, a: take(lambda v: (v.sum(), {"n": v.argmax()}), has_aux=True)(a),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_under_transforms_and_without_it_is_that_of_torch_func(transform: str) -> None:
    expected = TRANSFORMS[transform](torch.func.grad_and_value, VECTOR)
    found = TRANSFORMS[transform](grad_and_value, VECTOR)
    assert_identical(found, expected)


def test_autograd_goes_on_through_arguments_and_through_what_the_loss_reads() -> None:
    """An argument may require a gradient, and so may what the loss takes from around it."""

    def around(take: Transform, a: Tensor, scale: Tensor, *, as_argument: bool) -> tuple[Any, ...]:
        a, scale = (v.clone().requires_grad_() for v in (a, scale))

        def function(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            s = s if as_argument else scale
            return (v**3 * s**2).sum(), (v * s).sum()

        by = a if as_argument else a.detach()
        grads, (loss, aux) = take(function, has_aux=True)(by, scale if as_argument else by)
        total = (grads**2).sum() + loss + aux
        wanted = (a, scale) if as_argument else (scale,)
        return torch.autograd.grad(total, wanted)

    for as_argument in (True, False):
        check = partial(around, a=VECTOR, scale=VECTOR + 1, as_argument=as_argument)
        assert_identical(check(grad_and_value), check(torch.func.grad_and_value))


def test_tensors_of_inference_mode_stand_beside() -> None:
    """As cached features do in a linear probe."""
    with torch.inference_mode():
        features = VECTOR * 2
    found, expected = (
        take(lambda v, x: (v**2 * x).sum())(VECTOR, features)
        for take in (grad_and_value, torch.func.grad_and_value)
    )
    assert_identical(found, expected)


def test_what_the_loss_reads_may_have_a_tangent() -> None:
    """Forward mode goes on through gradient, loss and aux."""
    with dual_level():
        scale = make_dual(VECTOR, VECTOR + 1)

        def function(v: Tensor) -> tuple[Tensor, Tensor]:
            return (v * scale).sum() ** 2, (v * scale).sum()

        each = [
            [
                unpack_dual(leaf).tangent
                for leaf in tree.leaves(take(function, has_aux=True)(VECTOR))
            ]
            for take in (grad_and_value, torch.func.grad_and_value)
        ]
    assert_identical(*each)


class Record:
    """A container of which only torch.func knows."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def test_aux_in_containers_that_torch_func_knows() -> None:
    register_pytree_node(Record, lambda r: ([r.value], None), lambda children, _: Record(*children))
    _, (_, record) = grad_and_value(lambda v: (v.sum(), Record(2 * v)), has_aux=True)(VECTOR)
    assert not record.value.requires_grad
    assert torch.equal(record.value, 2 * VECTOR)


@pytest.mark.parametrize("reads_in_loss", [True, False])
def test_what_depends_on_others_alone_goes_on(reads_in_loss: bool) -> None:
    scale = VECTOR.clone().requires_grad_()

    def function(v: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return (v * (scale if reads_in_loss else 1)).sum(), (2 * v, 3 * scale)

    found = (
        [leaf.requires_grad for leaf in tree.leaves(take(function, has_aux=True)(VECTOR))]
        for take in (grad_and_value, torch.func.grad_and_value)
    )
    assert [*found] == 2 * [[reads_in_loss, reads_in_loss, False, True]]


def test_aux_alone_may_depend_on_what_requires_a_gradient() -> None:
    scale = VECTOR.clone().requires_grad_()
    for aux in (lambda v: scale, lambda v: (scale * v).sum()):
        _, (_, kept) = grad_and_value(lambda v, aux=aux: ((v**2).sum(), aux(v)), has_aux=True)(
            VECTOR
        )
        assert kept.requires_grad


class Watched(torch.autograd.Function):
    """The identity, which tells in its derivative whether the result behind it is still kept."""

    behind: "weakref.ref[Tensor] | None" = None
    alive: bool | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        assert Watched.behind is not None
        Watched.alive = Watched.behind() is not None
        return cotangent


def test_the_graph_is_freed_on_the_way_back() -> None:
    def function(v: Tensor) -> Tensor:
        first: Any = Watched.apply(v)
        kept: Tensor = first.exp()  # whose derivative keeps it
        Watched.behind = weakref.ref(kept)
        return kept.sin().sum()

    grad_and_value(function)(VECTOR)
    assert Watched.alive is False


def test_it_runs_where_everything_is_compiled() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def step(a: Tensor) -> Any:
        return fresnet.grad_and_value(lambda v: (v**3).sum())(a)

    assert_identical(step(VECTOR), torch.func.grad_and_value(lambda v: (v**3).sum())(VECTOR))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grad_and_value(torch.sum, 1)(VECTOR), "different numbers from -1 to 0, .* got 1"),
        (lambda: grad_and_value(torch.sum, ())(VECTOR), "different numbers from -1 to 0"),
        (lambda: grad_and_value(torch.sum, (0, -1))(VECTOR), r"different .*; got \(0, -1\)"),
        (lambda: grad_and_value(torch.sum)(input=VECTOR), "called with 0 arguments by position"),
        (lambda: vmap(grad_and_value(torch.exp))(VECTOR[None]), r"a float tensor \[\]"),
        (lambda: grad_and_value(torch.exp)(VECTOR), r"a float tensor \[\]; got float64 \(3,\)"),
        (lambda: grad_and_value(lambda v: (v.sum(), v))(VECTOR), "or has_aux=True if it"),
        (lambda: grad_and_value(torch.sum, has_aux=True)(VECTOR), r"return \(loss, aux\); got"),
        (lambda: grad_and_value(torch.argmax)(VECTOR), r"a float tensor \[\]; got int64"),
    ],
)
def test_what_is_no_loss_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(FresnetError, match=message):
        call()
