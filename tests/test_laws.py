"""Laws that hold for every network: purity, independence and invariance."""

import pytest
import torch
from assertions import assert_close, assert_same, unmutated
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, images, targets, tiny_params, training_images
from torch import Tensor
from torch.func import grad, jvp
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import Params, tree
from fresnet.network.nodes import (
    BasicBlock,
    Layer,
    Norm,
    Normed,
    StandardisedLayer,
    Stats,
    Weights,
    kinds,
    replaced,
)


@examples(25)
@given(params=tiny_params(), x=training_images())
def test_arguments_are_never_written_to(params: Params, x: Tensor) -> None:
    def loss(params: Params, x: Tensor) -> Tensor:
        logits, _ = fresnet.forward_train(params, x)
        return logits.square().sum()

    with unmutated(params, x):
        fresnet.forward(params, x)
        fresnet.forward_train(params, x)
        fresnet.features(params, x)
        grad(loss)(params, x)


@examples(25)
@given(params=tiny_params(), x=training_images())
def test_results_share_no_memory_with_arguments(params: Params, x: Tensor) -> None:
    """So writing to a result cannot reach an argument."""
    results = tree.leaves((fresnet.forward_train(params, x), fresnet.features(params, x)))
    memory = {leaf.untyped_storage().data_ptr() for leaf in tree.leaves((params, x))}
    assert memory.isdisjoint(leaf.untyped_storage().data_ptr() for leaf in results)


@examples(25)
@given(params=tiny_params(), x=images())
def test_calls_repeat_to_the_bit_and_leave_the_global_generator_alone(
    params: Params, x: Tensor
) -> None:
    state = torch.get_rng_state()
    assert_same(fresnet.forward(params, x), fresnet.forward(params, x))
    fresnet.init(0, fresnet.Spec(fresnet.RESNET18.block, (1,), width=4))
    assert torch.equal(torch.get_rng_state(), state)


@examples(25)
@given(params=tiny_params(), x=images(batch=st.integers(2, 6)), data=st.data())
def test_logits_in_forward_do_not_depend_on_the_rest_of_the_batch(
    params: Params, x: Tensor, data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(x) - 1), min_size=1, unique=True))
    whole = fresnet.forward(params, x)
    for i, logits in zip(chosen, fresnet.forward(params, x[chosen]), strict=True):
        assert_close(logits, whole[i], 1e-12)


@examples(25)
@given(params=tiny_params(), x=training_images())
def test_gradients_of_training_with_respect_to_stats_are_exactly_zero(
    params: Params, x: Tensor
) -> None:
    """This holds even for a loss of the returned statistics, because they are constants."""
    y = targets(params, x)

    def loss(stats: Stats) -> Tensor:
        logits, stats = fresnet.forward_train(params._replace(stats=stats), x)
        return cross_entropy(logits, y) + sum(s.sum() for s in tree.leaves(stats))

    grads = grad(loss)(params.stats)
    assert_same(grads, tree.map(torch.zeros_like, params.stats))


@examples(25)
@given(params=tiny_params(grouped=False), x=training_images())
def test_returned_statistics_are_constants_on_every_path(params: Params, x: Tensor) -> None:
    """The paths are fused and composed, by func.grad, func.jvp, both nested, and autograd."""

    def total(weights: Weights) -> Tensor:
        _, stats = fresnet.forward_train(params._replace(weights=weights), x)
        return tree.ravel(stats).sum()

    zeros = tree.map(torch.zeros_like, params.weights)
    direction = tree.map(torch.cos, params.weights)
    assert_same(grad(total)(params.weights), zeros)
    for slope in (total, lambda weights: jvp(total, (weights,), (direction,))[1]):
        assert jvp(slope, (params.weights,), (direction,))[1] == 0
    followed = tree.map(torch.nn.Parameter, params.weights)
    assert not total(followed).requires_grad


@pytest.mark.slow
def test_returned_statistics_are_constants_when_compiled() -> None:
    params = fresnet.init(0, fresnet.Spec(BasicBlock, (1,), width=4), dtype=torch.float64)
    x = torch.randn(2, 3, 24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def total(weights: Weights) -> Tensor:
        return tree.ravel(fresnet.forward_train(params._replace(weights=weights), x)[1]).sum()

    slope = torch.compile(lambda w: jvp(total, (w,), (w,))[1], backend="aot_eager", fullgraph=True)
    assert slope(params.weights) == 0
    gradient = torch.compile(grad(total), backend="aot_eager", fullgraph=True)
    assert_same(gradient(params.weights), tree.map(torch.zeros_like, params.weights))


def scale_convolutions(weights: Weights, factor: float) -> Weights:
    """The network with every convolution that a norm follows scaled by this factor."""

    def scaled(unit: Layer | Normed) -> Layer | Normed:
        if isinstance(unit, Layer) and isinstance(unit.norm, Norm):
            return unit._replace(conv=unit.conv * factor)
        return unit  # a standardised kernel has no scale

    return replaced(scaled, weights)


@examples(15)
@given(params=tiny_params(grouped=False), x=training_images(), factor=st.floats(0.1, 10.0))
def test_training_does_not_see_the_scale_of_a_convolution_as_eps_vanishes(
    params: Params, x: Tensor, factor: float
) -> None:
    """Scaling each convolution by a is exactly eps -> eps / a^2, so it vanishes with eps."""

    def logits(params: Params, eps: float) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fresnet.network.norm.EPS", eps)
            return fresnet.forward_train(params, x)[0]

    scaled = params._replace(weights=scale_convolutions(params.weights, factor))
    # V2's norms see unscaled sums, and those after standardised kernels see unscaled ones.
    if kinds(params.weights).isdisjoint((Normed, StandardisedLayer)):
        assert_close(logits(scaled, 1e-3 * factor**2), logits(params, 1e-3), 1e-9)
    assert_close(logits(scaled, 1e-18), logits(params, 1e-18), 1e-6)
