"""`forward_train` equals torchvision's network in training mode: values, statistics, gradients."""

import pytest
import reference
import torch
from assertions import assert_all_close, assert_close, assert_same
from hypothesis import given
from hypothesis import strategies as st
from strategies import class_counts, examples, labels, seeds, small_specs, training_images
from torch import Tensor
from torch.func import grad_and_value
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import Params, tree
from fresnet.network.nodes import Stats, Weights


def loss_fn(
    weights: Weights, stats: Stats, x: Tensor, y: Tensor
) -> tuple[Tensor, tuple[Tensor, Stats]]:
    logits, stats = fresnet.forward_train(Params(weights, stats), x)
    return cross_entropy(logits, y), (logits, stats)


def parameters(model: reference.ResNet) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def running(model: reference.ResNet) -> dict[str, Tensor]:
    return {name: b for name, b in model.named_buffers() if "running" in name}


def check_one_step(model: reference.ResNet, x: Tensor, y: Tensor) -> None:
    """Logits, loss, gradients and new statistics are equal to torchvision's."""
    params = reference.params(model)
    grads, (loss, (logits, stats)) = grad_and_value(loss_fn, has_aux=True)(*params, x, y)
    expected_logits = model(x)
    expected_loss = cross_entropy(expected_logits, y)
    expected_loss.backward()
    assert_close(logits, expected_logits, 1e-12, "logits")
    assert_close(loss, expected_loss, 1e-12, "loss")
    state = fresnet.to_state_dict(Params(grads, stats))
    assert_all_close({n: state[n] for n in running(model)}, running(model), 1e-12)
    gradients = reference.gradients(model)
    assert_all_close({n: state[n] for n in gradients}, gradients, 1e-10)
    assert len(gradients) == len(tree.leaves(params.weights))


@pytest.mark.slow
@reference.every_member
@examples(2)
@given(x=training_images(), seed=seeds, classes=class_counts)
def test_one_step_equals_torchvision(name: str, x: Tensor, seed: int, classes: int) -> None:
    model = reference.module(fresnet.SPECS[name], seed, classes).train()
    check_one_step(model, x, labels(x, classes))


@examples(10)
@given(x=training_images(), seed=seeds, classes=class_counts, spec=small_specs())
def test_one_step_of_any_depths_equals_torchvision(
    x: Tensor, seed: int, classes: int, spec: fresnet.Spec
) -> None:
    model = reference.module(spec, seed, classes).train()
    check_one_step(model, x, labels(x, classes))


@pytest.mark.slow
@examples(10)
@given(
    batches=st.lists(training_images(), min_size=2, max_size=4),
    seed=seeds,
    spec=small_specs(),
    momentum=st.floats(0, 1),
)
def test_statistics_after_several_steps_equal_torchvision(
    batches: list[Tensor], seed: int, spec: fresnet.Spec, momentum: float
) -> None:
    model = reference.module(spec, seed).train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = momentum
    params = reference.params(model)
    for x in batches:
        with torch.no_grad():
            model(x)
            _, stats = fresnet.forward_train(params, x, momentum=momentum)
        params = params._replace(stats=stats)
    state = fresnet.to_state_dict(params)
    assert_all_close({n: state[n] for n in running(model)}, running(model), 1e-12)


def check_ten_steps_of_sgd(model: reference.ResNet, x: Tensor) -> None:
    """Losses and weights are equal to the bit. In deep nets rounding grows tenfold each step."""
    y, rate, momentum, decay = labels(x, 10), 0.01, 0.9, 1e-3
    (weights, stats), model = reference.params(model), model.train()
    velocity = tree.map(torch.zeros_like, weights)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum, weight_decay=decay)
    for _ in range(10):
        optimizer.zero_grad()
        expected_loss = cross_entropy(model(x), y)
        expected_loss.backward()
        optimizer.step()
        grads, (loss, (_, stats)) = grad_and_value(loss_fn, has_aux=True)(weights, stats, x, y)
        velocity = tree.map(
            lambda v, g, w: v.mul(momentum).add(g.add(w, alpha=decay)), velocity, grads, weights
        )
        weights = tree.map(lambda w, v: w.add(v, alpha=-rate), weights, velocity)
        assert_same(loss, expected_loss.detach())
    state = fresnet.to_state_dict(Params(weights, stats))
    assert_same({n: state[n] for n, _ in model.named_parameters()}, parameters(model))
    assert_all_close({n: state[n] for n in running(model)}, running(model), 1e-12)


@pytest.mark.slow
@examples(3)
@given(x=training_images(), seed=seeds, spec=small_specs())
def test_ten_steps_of_sgd_equal_torch_optim(x: Tensor, seed: int, spec: fresnet.Spec) -> None:
    check_ten_steps_of_sgd(reference.module(spec, seed), x)


@pytest.mark.slow
@reference.every_member
@examples(1)
@given(x=training_images(), seed=seeds)
def test_ten_steps_of_sgd_of_the_family_equal_torch_optim(name: str, x: Tensor, seed: int) -> None:
    check_ten_steps_of_sgd(reference.module(fresnet.SPECS[name], seed), x)
