"""Transforms of `torch.func` over both forwards equal independent truths."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from assertions import assert_close, assert_same
from hypothesis import assume, given
from strategies import examples, targets, tiny_params, training_images
from torch import Tensor
from torch.func import functionalize, grad, jacfwd, jacrev, jvp, vmap
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import Params, tree
from fresnet.network import ops
from fresnet.network.nodes import Weights
from fresnet.network.norm import _batch_norm, _FusedNorm

Function = Callable[[Tensor], Tensor]


def textbook_norm(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Ioffe & Szegedy 2015, Alg. 1, word for word."""
    mean = x.mean((0, 2, 3), keepdim=True)
    var = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * scale[:, None, None] + bias[:, None, None]


def by_func_grad(f: Function, v: Tensor) -> Function:
    return lambda x: (grad(f)(x) * v).sum()


def by_jvp(f: Function, v: Tensor) -> Function:
    return lambda x: jvp(f, (x,), (v,))[1]


def by_autograd(f: Function, v: Tensor) -> Function:
    def derivative(x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(f(x), x, create_graph=True)
        return (gradient * v).sum()

    return derivative


MODES = {"r": by_func_grad, "f": by_jvp, "a": by_autograd}
ORDERS = [
    "".join(order)
    for n in (1, 2, 3, 4)
    for order in product(MODES, repeat=n)
    if "a" not in "".join(order).rstrip("a")  # autograd inside a transform is not allowed
]


@pytest.mark.parametrize("order", ORDERS)
def test_training_norm_in_every_order_of_differentiation(order: str) -> None:
    """An order reads from the inside out: r is func.grad, f is func.jvp, a is autograd.grad."""
    generator = torch.Generator().manual_seed(0)
    x, weight, *directions = torch.randn(
        6, 3, 2, 2, 2, generator=generator, dtype=torch.float64
    ).unbind()
    scale, bias = torch.tensor([[0.7, 1.3], [0.2, -0.4]], dtype=torch.float64)

    def loss(norm: Callable[..., Tensor]) -> Function:
        f: Function = lambda x: (norm(x, scale * x.mean(), bias).pow(3) * weight).sum()  # noqa: E731
        for mode, v in zip(order, directions, strict=False):
            f = MODES[mode](f, v)
        return f

    actual = loss(lambda x, scale, bias: _batch_norm(x, scale, bias, None, _FusedNorm.apply)[0])(x)
    assert_close(actual.detach(), loss(textbook_norm)(x).detach(), 1e-9)


def loss_of(params: Params, x: Tensor, *, train: bool) -> Callable[[Weights], Tensor]:
    y = targets(params, x)

    def loss(weights: Weights) -> Tensor:
        changed = Params(weights, params.stats)
        logits = fresnet.forward_train(changed, x)[0] if train else fresnet.forward(changed, x)
        return cross_entropy(logits, y)

    return loss


def direction(weights: Weights, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda w: torch.randn(w.shape, generator=generator, dtype=w.dtype), weights)


def dot(a: Weights, b: Weights) -> Tensor:
    return tree.ravel(a) @ tree.ravel(b)


@pytest.mark.parametrize("train", [False, True])
@examples(8)
@given(params=tiny_params(), x=training_images())
def test_hessian_products_agree_in_all_four_orders(train: bool, params: Params, x: Tensor) -> None:
    loss, weights = loss_of(params, x, train=train), params.weights
    u, v = direction(weights, 1), direction(weights, 2)

    def along(f: Callable[[Weights], Tensor], v: Weights) -> Callable[[Weights], Tensor]:
        return lambda w: jvp(f, (w,), (v,))[1]

    def against(f: Callable[[Weights], Tensor], v: Weights) -> Callable[[Weights], Tensor]:
        return lambda w: dot(grad(f)(w), v)

    products = [
        outer(inner(loss, u), v)(weights) for inner, outer in product((along, against), repeat=2)
    ]
    scale = dot(u, u).sqrt() * torch.stack([p.abs() for p in products]).max()
    for other in products[1:]:
        assert (other - products[0]).abs() <= 1e-11 * scale


@pytest.mark.parametrize("train", [False, True])
@examples(8)
@given(params=tiny_params(headed=True), x=training_images())
def test_first_derivatives_agree_with_each_other(train: bool, params: Params, x: Tensor) -> None:
    loss, weights = loss_of(params, x, train=train), params.weights
    v, gradient = direction(weights, 1), grad(loss)(weights)
    forward = jvp(loss, (weights,), (v,))[1]
    assert_close(forward, dot(gradient, v), 1e-9)
    assert_close(jacrev(loss)(weights).head.weight, gradient.head.weight, 1e-12)
    bias = jacfwd(lambda b: loss(weights._replace(head=weights.head._replace(bias=b))))
    assert_close(bias(weights.head.bias), gradient.head.bias, 1e-9)


def by_backward(f: Callable[[Weights], Tensor], weights: Weights) -> Weights:
    leaves = [leaf.detach().requires_grad_() for leaf in tree.leaves(weights)]
    f(tree.unflatten(weights, leaves)).backward()
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return tree.unflatten(weights, grads)


@pytest.mark.parametrize("outer", [lambda f, w: grad(f)(w), by_backward], ids=["grad", "backward"])
@pytest.mark.parametrize("train", [False, True])
@examples(6)
@given(params=tiny_params(), x=training_images())
def test_a_gradient_over_tasks_by_vmap_is_one_over_a_loop(
    train: bool,
    outer: Callable[[Callable[[Weights], Tensor], Weights], Weights],
    params: Params,
    x: Tensor,
) -> None:
    """As in MAML. PyTorch's own batch norm takes its moments for constants there."""
    tasks = torch.stack([x, x.flip(0).cos(), x.square()])

    def after_a_step(weights: Weights, x: Tensor) -> Tensor:
        loss = loss_of(params, x, train=train)
        return loss(tree.map(lambda w, g: w - 0.1 * g, weights, grad(loss)(weights)))

    mapped = outer(lambda w: vmap(after_a_step, (None, 0))(w, tasks).sum(), params.weights)
    looped = outer(lambda w: torch.stack([after_a_step(w, x) for x in tasks]).sum(), params.weights)
    scale = tree.ravel(looped).norm()
    assume(scale.isfinite())  # a step of standardised weights beside random statistics may be huge
    assert (tree.ravel(mapped) - tree.ravel(looped)).norm() <= 1e-9 * scale + 1e-12


def test_sums_are_written_over_where_pytorch_takes_it() -> None:
    """It refuses to write over a tensor that is a constant to the derivative of what is added."""
    written: list[bool] = []

    def total(v: Tensor, w: Tensor) -> Tensor:
        y = 2 * v
        written.append(ops.add(y, w) is y)
        return y.sum()

    v = torch.ones(2, 3)
    total(v, v)
    grad(total)(v, v)
    grad(lambda w: grad(total)(v, w).sum())(v)
    jvp(total, (v, v), (v, v))
    vmap(total)(v, v)
    assert written == [True, True, True, True, False]
    grad(lambda w: ops.add(v, w).sum())(v)
    assert torch.equal(v, torch.ones(2, 3))


def test_functionalised_gradients_by_some_of_the_weights() -> None:
    """PyTorch refuses to write a functional tensor over one that is not."""
    spec = fresnet.Spec(fresnet.nodes.BasicBlock, (1, 1), width=4)
    params = fresnet.fold(fresnet.init(0, spec, num_classes=3, dtype=torch.float64))
    x = torch.ones(2, 3, 16, 16, dtype=torch.float64)
    biases, rest = tree.partition(params.weights, lambda path: path[-1] == "bias")

    def loss(biases: Weights) -> Tensor:
        weights = tree.combine(biases, rest)
        return fresnet.forward(params._replace(weights=weights), x).square().sum()

    assert_same(functionalize(grad(loss))(biases), grad(loss)(biases))


@examples(8)
@given(params=tiny_params(), x=training_images())
def test_an_ensemble_by_vmap_is_a_loop(params: Params, x: Tensor) -> None:
    members = [params, tree.map(lambda p: p * 1.1, params), tree.map(lambda p: p * 0.7, params)]
    stacked = tree.stack(members)
    for i, logits in enumerate(vmap(fresnet.forward, (0, None))(stacked, x)):
        assert_close(logits, fresnet.forward(members[i], x), 1e-12)
    logits, stats = vmap(fresnet.forward_train, (0, None))(stacked, x)
    for i, member in enumerate(members):
        expected, expected_stats = fresnet.forward_train(member, x)
        assert_close(logits[i], expected, 1e-9)
        for a, b in zip(tree.leaves(stats), tree.leaves(expected_stats), strict=True):
            assert_close(a[i], b, 1e-10)

    def gradient(params: Params) -> Weights:
        gradient: Weights = grad(loss_of(params, x, train=True))(params.weights)
        return gradient

    together = vmap(gradient)(stacked)
    for i, member in enumerate(members):
        for a, b in zip(tree.leaves(together), tree.leaves(gradient(member)), strict=True):
            assert (a[i] - b).norm() <= 1e-7 * b.norm() + 1e-12


@examples(8)
@given(params=tiny_params(), x=training_images())
def test_per_sample_gradients_through_forward_are_a_loop(params: Params, x: Tensor) -> None:
    def gradient(image: Tensor) -> Weights:
        gradient: Weights = grad(loss_of(params, image[None], train=False))(params.weights)
        return gradient

    together = vmap(gradient)(x)
    for i, image in enumerate(x):
        alone = gradient(image)
        rounding = 1e-13 * tree.ravel(alone).norm() + 1e-14  # where hardly any of a leaf is left
        for a, b in zip(tree.leaves(together), tree.leaves(alone), strict=True):
            assert (a[i] - b).norm() <= 1e-10 * b.norm() + rounding


BFLOAT16 = fresnet.init(
    0, fresnet.Spec(fresnet.nodes.Bottleneck, (1, 1), width=8), num_classes=5, dtype=torch.bfloat16
)


@pytest.mark.slow
def test_bfloat16_keeps_float32_statistics_under_every_transform() -> None:
    """The stem's moments, far from 0, equal float64's. In bfloat16 they would be off by 2e-3."""
    x = torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(0)).bfloat16() + 3
    activations = torch.nn.functional.conv2d(
        x, BFLOAT16.weights.stem.layer.conv, stride=2, padding=3
    )
    mean = activations.double().mean((0, 2, 3))

    def stem_mean(params: Params) -> Tensor:
        logits, stats = fresnet.forward_train(params, x, momentum=1.0)
        assert logits.dtype == torch.bfloat16
        assert {leaf.dtype for leaf in tree.leaves(stats)} == {torch.float32}
        mean: Tensor = stats.stem.layer.mean
        return mean

    def through_grad(weights: Weights) -> tuple[Tensor, Tensor]:
        logits, stats = fresnet.forward_train(Params(weights, BFLOAT16.stats), x, momentum=1.0)
        return logits.float().sum(), stats.stem.layer.mean

    batched = tree.map(lambda leaf: leaf[None], BFLOAT16)
    results = {
        "plain": stem_mean(BFLOAT16),
        "vmap": vmap(stem_mean)(batched)[0],
        "grad": grad(through_grad, has_aux=True)(BFLOAT16.weights)[1],
        "jvp": list(jvp(through_grad, (BFLOAT16.weights,), (BFLOAT16.weights,), has_aux=True))[2],
        "compiled": torch.compile(stem_mean, backend="aot_eager", fullgraph=True)(BFLOAT16),
    }
    for name, result in results.items():
        assert (result.double() - mean).norm() <= 1e-5 * mean.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("forward", "forward_train", "features", "grad"),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("jvp", "vmap")),
    ],
)
def test_compiled_in_one_graph_is_eager(name: str) -> None:
    params = fresnet.init(
        0, fresnet.Spec(fresnet.nodes.BasicBlock, (1, 1), width=4), dtype=torch.float64
    )
    x = torch.randn(4, 3, 33, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stacked = tree.stack([params, tree.map(lambda leaf: 2 * leaf, params)])
    v = direction(params.weights, 1)
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: fresnet.forward(params, x),
        "forward_train": lambda: fresnet.forward_train(params, x),
        "features": lambda: fresnet.features(params, x),
        "grad": lambda: grad(loss_of(params, x, train=True))(params.weights),
        "jvp": lambda: jvp(loss_of(params, x, train=True), (params.weights,), (v,)),
        "vmap": lambda: vmap(fresnet.forward_train, (0, None))(stacked, x),
    }
    torch.compiler.reset()
    actual = torch.compile(calls[name], backend="aot_eager", fullgraph=True)()
    expected = calls[name]()
    assert tree.paths(actual) == tree.paths(expected)
    for a, b in zip(tree.leaves(actual), tree.leaves(expected), strict=True):
        assert_close(a, b, 1e-10)


def test_parameters_that_autograd_follows() -> None:
    """`loss.backward()` on leaves that require gradients is `torch.func.grad`."""
    params = fresnet.init(
        0, fresnet.Spec(fresnet.nodes.Bottleneck, (1, 1), width=4), dtype=torch.float64
    )
    x = torch.randn(4, 3, 33, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = grad(loss_of(params, x, train=True))(params.weights)
    weights = tree.map(torch.nn.Parameter, params.weights)
    loss_of(params, x, train=True)(weights).backward()
    assert_same(tree.map(lambda w: w.grad, weights), expected)
