"""Per-sample gradients in their three meanings, and ensembles trained at once."""

import re
from typing import Any

import pytest
import torch
from assertions import assert_same
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, labels, tiny_params, training_images
from torch import Tensor
from torch.func import grad, jacrev, vmap
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import FresnetError, Params, moments, tree
from fresnet.types import BasicBlock, Weights


def batch_gradient(run: Any, params: Params, x: Tensor, y: Tensor) -> Weights:
    def loss(weights: Weights) -> Tensor:
        return cross_entropy(run(params._replace(weights=weights), x), y)

    gradient: Weights = grad(loss)(params.weights)
    return gradient


def train_logits(params: Params, x: Tensor) -> Tensor:
    return fresnet.forward_train(params, x)[0]


def assert_near(actual: Weights, expected: Weights, relative: float = 1e-8) -> None:
    """Leaf by leaf, in the norm of the whole tree: some leaves are zero but for rounding."""
    scale = torch.stack([leaf.norm() for leaf in tree.leaves(expected)]).norm()
    for a, b in zip(tree.leaves(actual), tree.leaves(expected), strict=True):
        assert (a - b).norm() <= relative * scale


@examples(10)
@given(params=tiny_params(), x=training_images(), chunk_size=st.integers(1, 6) | st.none())
def test_by_running_statistics_and_by_the_batchs_they_are_a_loop(
    params: Params, x: Tensor, chunk_size: int | None
) -> None:
    y = labels(x, params.weights.head.bias.numel())
    by_batch = params._replace(stats=moments.statistics(fresnet.forward_moments(params, x)[1]))
    for norms, network in {"running": params, "batch": by_batch}.items():
        grads = fresnet.per_sample_grads(
            cross_entropy, params, x, y, norms=norms, chunk_size=chunk_size
        )
        for i, one in enumerate(tree.unstack(grads)):
            rows = slice(i, i + 1)
            assert_near(one, batch_gradient(fresnet.forward, network, x[rows], y[rows]))


@examples(10)
@given(params=tiny_params(), x=training_images(), chunk_size=st.integers(1, 6) | st.none())
def test_coupled_they_are_the_jacobian_and_their_mean_the_gradient_of_training(
    params: Params, x: Tensor, chunk_size: int | None
) -> None:
    y = labels(x, params.weights.head.bias.numel())
    grads = fresnet.per_sample_grads(
        cross_entropy, params, x, y, norms="coupled", chunk_size=chunk_size
    )
    mean = tree.map(lambda leaf: leaf.mean(0), grads)
    assert_near(mean, batch_gradient(train_logits, params, x, y))

    def losses(weights: Weights) -> Tensor:
        logits = train_logits(params._replace(weights=weights), x)
        return cross_entropy(logits, y, reduction="none")

    assert_near(grads, jacrev(losses)(params.weights))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "'running', 'batch', 'coupled'; got None"),
        ({"norms": "train"}, "'running', 'batch', 'coupled'; got 'train'"),
        ({"norms": "running", "chunk_size": 0}, "expects a positive chunk_size; got 0"),
        ({"norms": "running", "y": torch.zeros(3)}, "expects 2 targets, one an image; got 3"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    params = fresnet.init(0, fresnet.Spec(BasicBlock, (1,), width=2))
    given = {"x": torch.zeros(2, 3, 16, 16), "y": torch.zeros(2, dtype=torch.int64), **arguments}
    with pytest.raises(FresnetError, match=re.escape(message)):
        fresnet.per_sample_grads(cross_entropy, params, **given)


def test_vmap_over_the_wrong_axis_is_told() -> None:
    params = fresnet.init(0, fresnet.Spec(BasicBlock, (1,), width=2), num_classes=2)
    x = torch.zeros(5, 3, 16, 16)
    with pytest.raises(FresnetError, match=re.escape("expects x [b 3 h w]; got (5, 16, 16)")):
        vmap(fresnet.forward, (None, 1))(params, x)
    unstacked = re.escape("expects weights.stem.conv to be a float tensor [o c k k]")
    with pytest.raises(FresnetError, match=unstacked):
        vmap(fresnet.forward, (0, None))(params, x)


@examples(10)
@given(params=tiny_params())
def test_stack_and_unstack(params: Params) -> None:
    members = [params, tree.map(torch.neg, params), tree.map(torch.zeros_like, params)]
    for member, back in zip(members, tree.unstack(tree.stack(members)), strict=True):
        assert_same(back, member)
    with pytest.raises(FresnetError, match="at least one tree"):
        tree.stack([])
    wider = fresnet.init(0, fresnet.Spec(BasicBlock, (1,), width=7), dtype=torch.float64)
    with pytest.raises(FresnetError, match=r"expects (leaves of one shape|trees of one structure)"):
        tree.stack([params, wider])
    with pytest.raises(FresnetError, match="expects leaves of one first dimension"):
        tree.unstack((torch.zeros(2), torch.zeros(3)))


@examples(5)
@given(x=training_images(), depth=st.integers(1, 2))
def test_models_trained_at_once_are_models_trained_apart(x: Tensor, depth: int) -> None:
    """Three seeds, three learning rates, four steps, one vmapped step."""
    spec, y = fresnet.Spec(BasicBlock, (depth,), width=4), labels(x, 5)

    def step(params: Params, rate: Tensor) -> Params:
        def loss(weights: Weights, stats: fresnet.types.Stats) -> Any:
            logits, stats = fresnet.forward_train(Params(weights, stats), x)
            return cross_entropy(logits, y), stats

        grads, stats = grad(loss, has_aux=True)(*params)
        weights = tree.map(lambda w, g: w - rate * g, params.weights, grads)
        return Params(weights, stats)

    members = [fresnet.init(s, spec, num_classes=5, dtype=torch.float64) for s in range(3)]
    rates = torch.tensor([0.1, 0.03, 0.01], dtype=torch.float64)
    together = tree.stack(members)
    for _ in range(4):
        together = vmap(step)(together, rates)
        members = [step(member, rate) for member, rate in zip(members, rates, strict=True)]
    for a, b in zip(tree.unstack(together), members, strict=True):
        assert_near(a.weights, b.weights)
        assert_near(a.stats, b.stats)  # type: ignore[arg-type]
