"""A training step of ResNet-50: fresnet beside torchvision's module with `torch.optim.SGD`.

    python benchmarks/training_step.py           # prints tables; --full for all sizes

Both take the same step: eagerly, in bfloat16, and compiled whole. Peak memory is resident memory
above weights and velocity.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Comparison, Run, main, peak
from torch import Tensor
from torch.nn.functional import cross_entropy
from transforms import images

import fresnet
from fresnet import optim, training
from fresnet.nodes import Stats, Weights

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import reference

RATE, MOMENTUM, DECAY = 0.01, 0.9, 1e-4


def torchvision(
    x: Tensor, y: Tensor, *, compiled: bool = False, precision: torch.dtype | None = None
) -> Run:
    model = reference.module(fresnet.RESNET50, 0, dtype=torch.float32).train()
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), RATE, MOMENTUM, weight_decay=DECAY, foreach=True
    )

    def step() -> Tensor:
        with torch.autocast("cpu", precision, enabled=precision is not None):
            loss = cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # here, so that all above weights and velocity is the step's
        return loss.detach()

    return torch.compile(step, dynamic=False) if compiled else step


def ours(
    x: Tensor,
    y: Tensor,
    *,
    compiled: bool = False,
    recompute: bool = False,
    precision: torch.dtype | None = None,
) -> Run:
    params = reference.params(reference.module(fresnet.RESNET50, 0, dtype=torch.float32))
    optimizer = optim.sgd(RATE, momentum=MOMENTUM, weight_decay=DECAY)
    state = training.start(params, optimizer)
    train_step = training.make_train_step(optimizer, recompute=recompute, precision=precision)
    if compiled:
        train_step = torch.compile(train_step, fullgraph=True, dynamic=False)

    def step() -> Tensor:
        nonlocal state
        state, metrics = train_step(state, (x, y))
        return metrics.loss

    return step


def gradient_of_torchvision(x: Tensor, y: Tensor) -> Run:
    model = reference.module(fresnet.RESNET50, 0, dtype=torch.float32).train()
    model = model.to(memory_format=torch.channels_last)

    def gradient() -> Tensor:
        loss = cross_entropy(model(x), y)
        loss.backward()
        model.zero_grad()
        return loss.detach()

    return gradient


def gradient_of_ours(x: Tensor, y: Tensor, take: Callable[..., Any]) -> Run:
    params = reference.params(reference.module(fresnet.RESNET50, 0, dtype=torch.float32))

    def loss_fn(weights: Weights, stats: Stats, x: Tensor, y: Tensor) -> tuple[Tensor, Stats]:
        logits, stats = fresnet.forward_train(fresnet.Params(weights, stats), x)
        return cross_entropy(logits, y), stats

    def gradient() -> Tensor:
        nonlocal params
        loss: Tensor
        _, (loss, stats) = take(loss_fn, has_aux=True)(*params, x, y)
        params = params._replace(stats=stats)
        return loss

    return gradient


def comparisons(full: bool) -> Iterator[Comparison]:
    params = fresnet.init(0, num_classes=10, device="meta")
    for batch, side in ((16, 224), (32, 64)) if full else ((8, 112),):
        x, y = images(batch, side)
        size = f"{batch} images of {side} px"
        flops = 6.0 * batch * fresnet.summary(params, side).multiply_adds
        least = flops / peak(torch.float32)
        eager = {
            "torchvision": partial(torchvision, x, y),
            "fresnet": partial(ours, x, y),
            "fresnet, recomputing": partial(ours, x, y, recompute=True),
            "torchvision in bfloat16": partial(torchvision, x, y, precision=torch.bfloat16),
            "fresnet in bfloat16": partial(ours, x, y, precision=torch.bfloat16),
        }
        compiled = {
            "torchvision": partial(torchvision, x, y, compiled=True),
            "fresnet": partial(ours, x, y, compiled=True),
        }
        yield Comparison(f"Training step, {size}", eager, batch, least, agree=0.05)
        gradients = {
            "torchvision, backward()": partial(gradient_of_torchvision, x, y),
            "fresnet.grad_and_value": partial(gradient_of_ours, x, y, fresnet.grad_and_value),
            "torch.func.grad_and_value": partial(gradient_of_ours, x, y, torch.func.grad_and_value),
        }
        yield Comparison(f"Loss and gradient, {size}", gradients, batch, least, agree=0.05)
        if full or side <= 112:
            yield Comparison(f"Training step compiled, {size}", compiled, batch, least, agree=0.05)


if __name__ == "__main__":
    main(__doc__, comparisons)
