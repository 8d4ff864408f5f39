"""A checkpoint begins in torchvision, is trained further here, and goes back."""

from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from assertions import assert_close, assert_same
from digits import load
from torch import Tensor
from torch.func import grad_and_value
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import Params, tree
from fresnet.network.nodes import BasicBlock, Bottleneck, Stats, Weights

RATE, MOMENTUM, DECAY, STEPS = 0.05, 0.9, 1e-3, 3


def batch(step: int) -> tuple[Tensor, Tensor]:
    digits, _ = load()
    chosen = slice(8 * step, 8 * (step + 1))
    return digits.images[chosen].double(), digits.labels[chosen]


def optimizer_of(model: reference.ResNet) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), RATE, MOMENTUM, weight_decay=DECAY)


def train_module(model: reference.ResNet, optimizer: torch.optim.SGD, steps: range) -> list[Tensor]:
    losses = []
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        loss = cross_entropy(model.train()(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def train_functions(
    params: Params, velocity: Weights, steps: range
) -> tuple[Params, Weights, list[Tensor]]:
    def loss_fn(weights: Weights, stats: Stats, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        logits, stats = fresnet.forward_train(Params(weights, stats), x)
        return cross_entropy(logits, y), stats

    losses = []
    for step in steps:
        grads, (loss, stats) = grad_and_value(loss_fn, has_aux=True)(*params, *batch(step))
        velocity = tree.map(
            lambda v, g, w: MOMENTUM * v + g + DECAY * w, velocity, grads, params.weights
        )
        weights = tree.map(lambda w, v: w - RATE * v, params.weights, velocity)
        params = Params(weights, stats)
        losses.append(loss)
    return params, velocity, losses


@pytest.mark.slow
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_training_here_in_between_is_training_there_straight_through(
    block: type, tmp_path: Path
) -> None:
    spec = fresnet.Spec(block, (1, 1, 1, 1))
    first, middle, last = (range(i * STEPS, (i + 1) * STEPS) for i in range(3))
    straight = reference.module(spec, seed=0)
    expected = train_module(straight, optimizer_of(straight), range(3 * STEPS))

    model = reference.module(spec, seed=0)
    optimizer = optimizer_of(model)
    losses = train_module(model, optimizer, first)
    names = [name for name, _ in model.named_parameters()]
    torch.save({"epoch": 1, "model": model.state_dict()}, tmp_path / "first.pth")
    state = optimizer.state_dict()["state"]
    momenta = {name: state[i]["momentum_buffer"] for i, name in enumerate(names)}

    params = fresnet.load(tmp_path / "first.pth")
    velocity = fresnet.from_state_dict({**model.state_dict(), **momenta}).weights
    params, velocity, here = train_functions(params, velocity, middle)
    losses += here
    fresnet.save(params, tmp_path / "second.safetensors")
    torch.save(fresnet.to_state_dict(params), tmp_path / "second.pth")

    back = reference.module(spec, seed=1)
    back.load_state_dict(torch.load(tmp_path / "second.pth", weights_only=True), strict=True)
    assert_same(reference.params(back), fresnet.load(tmp_path / "second.safetensors"))
    optimizer = optimizer_of(back)
    momenta = fresnet.to_state_dict(params._replace(weights=velocity))
    for name, parameter in back.named_parameters():
        optimizer.state[parameter]["momentum_buffer"] = momenta[name]
    losses += train_module(back, optimizer, last)
    for actual, loss in zip(losses, expected, strict=True):
        assert_close(actual, loss, 1e-9)
    for (name, actual), value in zip(back.named_parameters(), straight.parameters(), strict=True):
        assert_close(actual.detach(), value.detach(), 1e-9, name)
