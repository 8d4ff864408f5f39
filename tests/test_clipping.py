"""Norms of per-sample gradients and their clipped sum equal those of the gradients themselves."""

import gc
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from assertions import assert_close, assert_same, assert_trees_close, unmutated
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, labels, targets, tiny_params, training_images
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import FresnetError, Params, tree
from fresnet.gradients.listening import Listening, _narrowed
from fresnet.network import convolution
from fresnet.network.nodes import BasicBlock, Bias, Bottleneck, NoNorm, Weights

MEANINGS = st.sampled_from(["running", "batch"])
REGIMES = st.sampled_from(
    [
        lambda params: params,
        lambda params: (
            fresnet.freeze(params, lambda path: path[-2] == "layer1")
            if tree.leaves(params.stats)
            else params
        ),
        fresnet.fold,
    ]
)
NETWORK = fresnet.init(0, fresnet.Spec(Bottleneck, (1, 1), width=4), num_classes=5)
X = torch.randn(3, 3, 40, 36, generator=torch.Generator().manual_seed(0))
Y = labels(X, 5)


def norms_of(grads: Weights) -> Tensor:
    return torch.stack([tree.ravel(one).norm() for one in tree.unstack(grads)])


def clipped(grads: Weights, max_norm: float) -> Weights:
    """Abadi et al. 2016, Alg. 1, image by image."""
    factors = [1 / max(1.0, float(norm) / max_norm) for norm in norms_of(grads)]
    return tree.map(lambda g: sum(f * one for f, one in zip(factors, g, strict=True)), grads)


def assert_near(actual: Weights, expected: Weights, relative: float) -> None:
    """The trees are near in the norm of the whole. With one class that is zero, up to rounding."""
    assert tree.map(lambda leaf: leaf.shape, actual) == tree.map(lambda leaf: leaf.shape, expected)
    error, norm = (tree.ravel(actual) - tree.ravel(expected)).norm(), tree.ravel(expected).norm()
    assert error <= relative * norm + 1e-14


@pytest.mark.parametrize("small", [0, convolution.SMALL])
@examples(25)
@given(params=tiny_params(), x=training_images(), norms=MEANINGS, regime=REGIMES)
def test_they_are_those_of_the_gradients(
    small: int, params: Params, x: Tensor, norms: str, regime: Callable[[Params], Params]
) -> None:
    """This holds for every node type, and for clipping none, some or all.

    Small networks have few positions or small weights, so both ways to a norm are taken.
    """
    params = regime(params)
    y = targets(params, x)
    grads = fresnet.per_sample_grads(cross_entropy, params, x, y, norms=norms)
    expected = norms_of(grads)
    with pytest.MonkeyPatch.context() as patch, unmutated(params, x, y):
        patch.setattr(convolution, "SMALL", small)
        found = fresnet.per_sample_norms(cross_entropy, params, x, y, norms=norms)
        assert_close(found, expected, 1e-10)
        for max_norm in (1e-12 + float(expected.min()) / 2, 1e-12 + float(expected.mean()), 1e9):
            total, found = fresnet.clipped_grads(
                cross_entropy, params, x, y, max_norm=max_norm, norms=norms
            )
            assert_close(found, expected, 1e-10)
            assert_near(total, clipped(grads, max_norm), 1e-10)


def test_each_leaf_is_summed_by_its_own_kernel() -> None:
    """Every leaf is near in its own norm, in float64. Tied leaves are too, each in its place."""
    params = tree.map(Tensor.double, NETWORK)
    block = params.weights.stages[0][0]
    tied = block.layer2._replace(norm=block.layer1.norm)
    block = block._replace(layer2=tied)
    params = params._replace(
        weights=params.weights._replace(stages=((block,), params.weights.stages[1]))
    )
    grads = fresnet.per_sample_grads(cross_entropy, params, X.double(), Y, norms="running")
    max_norm = float(norms_of(grads).median())
    total, _ = fresnet.clipped_grads(cross_entropy, params, X.double(), Y, max_norm=max_norm)
    assert_trees_close(total, clipped(grads, max_norm), 1e-9)


def test_a_tensor_as_max_norm() -> None:
    by_number = fresnet.clipped_grads(cross_entropy, NETWORK, X, Y, max_norm=0.5)
    assert_same(
        fresnet.clipped_grads(cross_entropy, NETWORK, X, Y, max_norm=torch.tensor(0.5)), by_number
    )


def test_a_loss_that_forgets_the_logits_has_no_gradient() -> None:
    total, norms = fresnet.clipped_grads(
        lambda logits, target: target.float(), NETWORK, X, Y, max_norm=1.0
    )
    assert_same((total, norms), tree.map(torch.zeros_like, (NETWORK.weights, norms)))


def test_an_image_without_gradient_is_not_divided_by_zero() -> None:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, target) * (target > 0)

    total, norms = fresnet.clipped_grads(loss, NETWORK, X, Y, max_norm=1.0)
    assert norms[0] == 0
    assert (norms[1:] > 0).all()
    assert tree.ravel(total).isfinite().all()


def test_bfloat16_weights() -> None:
    """Norms are float32, near those of the gradients to bfloat16's digits. Sums are bfloat16."""
    params = Params(tree.map(Tensor.bfloat16, NETWORK.weights), NETWORK.stats)
    exact = tree.map(Tensor.float, params)
    total, norms = fresnet.clipped_grads(cross_entropy, params, X.bfloat16(), Y, max_norm=1.0)
    expected, expected_norms = fresnet.clipped_grads(
        cross_entropy, exact, X.bfloat16().float(), Y, max_norm=1.0
    )
    assert {leaf.dtype for leaf in tree.leaves(total)} == {torch.bfloat16}
    assert_close(norms, expected_norms, 0.05)
    assert_near(tree.map(Tensor.float, total), expected, 0.1)


@pytest.mark.parametrize("regime", [lambda params: params, fresnet.fold])
def test_gradients_of_norms_and_head_are_summed_wider_than_bfloat16(
    regime: Callable[[Params], Params],
) -> None:
    """Of one image's g, and another's -2 g clipped to -1.001 g, a thousandth is left."""
    network = regime(NETWORK)
    params = Params(tree.map(Tensor.bfloat16, network.weights), network.stats)
    x = X[:1].bfloat16().expand(2, -1, -1, -1)

    def loss(logits: Tensor, factor: Tensor) -> Tensor:
        return cross_entropy(logits.float(), Y[0]) * factor

    clipped_sum = partial(fresnet.clipped_grads, loss, params)
    one, (norm,) = clipped_sum(x[:1], torch.ones(1), max_norm=1e9)
    total, _ = clipped_sum(x, torch.tensor([1.0, -2.0]), max_norm=1.001 * norm)
    for path, left, whole in zip(
        tree.paths(one), tree.leaves(total), tree.leaves(one), strict=True
    ):
        if "norm" in path or "head" in path:
            assert_close(left.float(), -0.001 * whole.float(), 1e-2, str(path))


def test_factors_are_not_rounded_up_to_bfloat16() -> None:
    """A clipped gradient would be longer than `max_norm`, by up to 1 part in 256."""
    params = Params(tree.map(Tensor.bfloat16, NETWORK.weights), NETWORK.stats)
    clipped_sum = partial(fresnet.clipped_grads, cross_entropy, params, X[:1].bfloat16(), Y[:1])

    def length(max_norm: float) -> tuple[float, float]:
        total, (norm,) = clipped_sum(max_norm=max_norm)
        return float(tree.ravel(tree.map(Tensor.double, total)).norm()), float(norm)

    whole, norm = length(1e9)
    for factor in (0.501, 0.503, 0.602, 0.7495, 2.0):  # each but the last between two of bfloat16
        clipped, _ = length(factor * norm)
        expected = min(factor, 1)
        assert 0.99 * expected < clipped / whole <= (1 + 2e-4) * expected


def test_factors_are_rounded_down_even_where_numbers_are_few() -> None:
    factors = torch.logspace(-8, 0, 5000)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = _narrowed(factors, dtype)
        above = (narrow.view(torch.int16) + 1).view(dtype)
        assert (narrow.float() <= factors).all()
        assert (above.float() > factors).all()
    assert torch.equal(_narrowed(factors, torch.float32), factors)


def test_in_inference_mode() -> None:
    expected = fresnet.clipped_grads(cross_entropy, NETWORK, X, Y, max_norm=1.0, norms="running")
    with torch.inference_mode():
        found = fresnet.clipped_grads(cross_entropy, NETWORK, X, Y, max_norm=1.0, norms="running")
    assert_trees_close(found, expected, 1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_squares_of_float16_neither_overflow_nor_vanish(scale: float) -> None:
    narrow = tree.map(Tensor.half, NETWORK.weights)
    params, x = NETWORK._replace(weights=narrow), X.half()

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits.float(), target) * scale

    norms = fresnet.per_sample_norms(loss, params, x, Y, norms="running")
    grads = fresnet.per_sample_grads(loss, params, x, Y, norms="running")
    assert_close(norms, norms_of(tree.map(Tensor.float, grads)), 2e-2)


@pytest.mark.parametrize("norms", ["running", "batch"])
def test_mapped_over_networks_they_are_a_loop(norms: str) -> None:
    def both(params: Params) -> Any:
        found = fresnet.per_sample_norms(cross_entropy, params, x, Y, norms=norms)
        return found, fresnet.clipped_grads(cross_entropy, params, x, Y, max_norm=1.0, norms=norms)

    params, x = tree.map(Tensor.double, (NETWORK, X))
    networks = [params, tree.map(lambda leaf: 1.1 * leaf, params)]
    together = tree.unstack(vmap(both)(tree.stack(networks)))
    for one, network in zip(together, networks, strict=True):
        assert_trees_close(one, both(network), 1e-8)


def test_they_have_gradients() -> None:
    """Both `torch.func` and `torch.autograd` can take them."""
    params, x = tree.map(Tensor.double, (NETWORK, X))

    def total(scale: Tensor) -> Tensor:
        network = params._replace(weights=tree.map(lambda w: w * scale, params.weights))
        norms = fresnet.per_sample_norms(cross_entropy, network, x, Y)
        _, again = fresnet.clipped_grads(cross_entropy, network, x, Y, max_norm=1.0)
        return norms.sum() + again.sum()

    step, one = 1e-5, torch.tensor(1.0, dtype=torch.float64)
    expected = (total(one + step) - total(one - step)) / (2 * step)
    assert_close(grad(total)(one), expected, 1e-6)
    one.requires_grad_()
    assert_close(torch.autograd.grad(total(one), one)[0], expected, 1e-6)


@pytest.mark.parametrize("function", [fresnet.per_sample_norms, fresnet.clipped_grads])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norms": "coupled"}, "expects norms to say what BatchNorm is to one image"),
        ({"norms": "coupled"}, "one of 'running', 'batch'; got 'coupled'"),
        ({"norms": None}, "one of 'running', 'batch'; got None"),
        ({"y": torch.zeros(3)}, "one for each image; got float32 (3,)"),
        ({"x": torch.zeros(3, 8, 8)}, "expects x [b 3 h w]; got (3, 8, 8)"),
        ({"params": (1, 2)}, "expects Params(weights, stats)"),
        ({"loss_fn": lambda logits, target: logits}, "to return a 0-d tensor; got float32 (5,)"),
    ],
)
def test_wrong_arguments(function: Any, arguments: dict[str, Any], message: str) -> None:
    params = fresnet.init(0, fresnet.Spec(BasicBlock, (1,), width=2), num_classes=5)
    given: dict[str, Any] = {
        "loss_fn": cross_entropy,
        "params": params,
        "x": torch.zeros(2, 3, 16, 16),
        "y": torch.zeros(2, dtype=torch.int64),
    }
    if function is fresnet.clipped_grads:
        given["max_norm"] = 1.0
    with pytest.raises(FresnetError, match=re.escape(message)) as caught:
        function(**given | arguments)
    assert str(caught.value).startswith(function.__name__)


def test_a_stem_without_a_norm_is_clipped_too() -> None:
    """Its ReLU must not write over what the gradients start from."""
    stem = NETWORK.weights.stem
    bare = stem._replace(layer=stem.layer._replace(norm=NoNorm()))
    weights = NETWORK.weights._replace(stem=bare)
    stats = NETWORK.stats._replace(stem=NETWORK.stats.stem._replace(layer=()))
    params = Params(weights, stats)
    grads = fresnet.per_sample_grads(cross_entropy, params, X, Y, norms="running")
    norms = fresnet.per_sample_norms(cross_entropy, params, X, Y, norms="running")
    assert_close(norms, norms_of(grads), 1e-4)


@pytest.mark.parametrize("width", [1, 3])
def test_a_bias_of_another_width_is_refused(width: int) -> None:
    """A bias of one value would otherwise be added to every channel."""
    folded = fresnet.fold(NETWORK)
    stem = folded.weights.stem
    unfit = stem._replace(layer=stem.layer._replace(norm=Bias(torch.zeros(width))))
    params = folded._replace(weights=folded.weights._replace(stem=unfit))
    with pytest.raises(FresnetError, match=r"a bias of activations .* is \[4\]; got"):
        fresnet.per_sample_norms(cross_entropy, params, X, Y)


@pytest.mark.parametrize(
    ("max_norm", "got"),
    [
        *[(0, "0"), (-1.0, "-1.0"), (float("nan"), "nan"), (True, "True"), (None, "None")],
        *[(torch.ones(2), "float32 (2,)"), (torch.tensor(1), "int64 ()")],
    ],
)
def test_wrong_max_norm(max_norm: Any, got: str) -> None:
    message = f"expects max_norm to be a number above 0 or a 0-d float tensor; got {got}"
    with pytest.raises(FresnetError, match=re.escape(message)):
        fresnet.clipped_grads(cross_entropy, NETWORK, X, Y, max_norm=max_norm)


def test_a_batch_without_images_has_a_gradient_of_zeros() -> None:
    """Poisson sampling draws one now and then."""
    x, y = X[:0], Y[:0]
    grads, norms = fresnet.clipped_grads(cross_entropy, NETWORK, x, y, max_norm=1.0)
    assert_same(grads, tree.map(torch.zeros_like, NETWORK.weights))
    assert norms.shape == fresnet.per_sample_norms(cross_entropy, NETWORK, x, y).shape == (0,)


@pytest.mark.parametrize("norms", ["running", "batch"])
def test_under_autocast_they_are_those_of_the_gradients(norms: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        each = fresnet.per_sample_grads(cross_entropy, NETWORK, X, Y, norms=norms)
        found = fresnet.per_sample_norms(cross_entropy, NETWORK, X, Y, norms=norms)
        bound = float(found.min())
        grads, again = fresnet.clipped_grads(
            cross_entropy, NETWORK, X, Y, max_norm=bound, norms=norms
        )
    assert_close(found, norms_of(each), 1e-5)
    assert_close(again, found, 1e-6)
    assert_near(grads, clipped(each, bound), 1e-5)


def test_a_loss_may_draw() -> None:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(torch.nn.functional.dropout(logits, 0.5), target)

    x, y = X[:1].expand(6, -1, -1, -1), Y[:1].expand(6)
    same = fresnet.per_sample_norms(loss, NETWORK, x, y, randomness="same")
    assert_close(same, same[:1].expand(6), 1e-5)
    different = fresnet.per_sample_norms(loss, NETWORK, x, y, randomness="different")
    assert len(set(different.tolist())) > 1
    _, norms = fresnet.clipped_grads(loss, NETWORK, x, y, max_norm=1.0, randomness="different")
    assert len(set(norms.tolist())) > 1


@pytest.mark.parametrize("depth", ["leaf", "computed"])
def test_a_losss_own_parameters_have_derivatives(depth: str) -> None:
    """As through `per_sample_grads`: by autograd and by `torch.func`."""

    def scaled(u: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        s = u if depth == "leaf" else u.exp()
        return lambda logits, target: s * cross_entropy(logits, target)

    def of_grads(u: Tensor) -> Tensor:
        each = fresnet.per_sample_grads(scaled(u), NETWORK, X, Y, norms="running")
        return norms_of(each).sum()

    def of_norms(u: Tensor) -> Tensor:
        return fresnet.per_sample_norms(scaled(u), NETWORK, X, Y).sum()

    def of_sum(u: Tensor) -> Tensor:
        grads, _ = fresnet.clipped_grads(scaled(u), NETWORK, X, Y, max_norm=1e6)
        return tree.ravel(grads).square().sum()

    u = torch.tensor(0.3, requires_grad=True)
    expected = torch.autograd.grad(of_grads(u), u)[0]
    assert_close(torch.autograd.grad(of_norms(u), u)[0], expected, 1e-4)
    assert_close(grad(of_norms)(torch.tensor(0.3)), expected, 1e-4)
    by_autograd = torch.autograd.grad(of_sum(u), u)[0]
    assert_close(by_autograd, grad(of_sum)(torch.tensor(0.3)), 1e-4)
    with torch.no_grad():
        assert_close(of_norms(u), of_norms(u.detach()), 1e-6)


def test_a_pass_leaves_nothing_alive() -> None:
    """A hook that kept itself alive would keep the first activations until the next collection."""
    gc.collect()
    gc.disable()
    try:
        fresnet.per_sample_norms(cross_entropy, NETWORK, X, Y)
        assert not [one for one in gc.get_objects() if type(one) is Listening]
    finally:
        gc.enable()
