"""Inference and training of a ResNet-50 on a GPU: fresnet beside torchvision, both compiled.

    python benchmarks/gpu.py                     # prints tables; --full for all batch sizes

In bfloat16 and channels last; for inference both record CUDA graphs. "Of peak" is the share of
the fastest of a matrix product and a convolution on the same device. Nothing here has been run on a
GPU yet: `docs/performance.md` has no figures of one.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Comparison, Run, main
from torch import Tensor
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import optim, training, tree

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import reference

DEVICE, SIDE = "cuda", 224


def images(batch: int) -> Tensor:
    x = torch.randn(batch, 3, SIDE, SIDE, device=DEVICE, dtype=torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last)


def model(dtype: torch.dtype) -> Any:
    network = reference.module(fresnet.RESNET50, 0, num_classes=1000, dtype=torch.float32)
    return network.to(DEVICE, dtype, memory_format=torch.channels_last)


def finished(run: Run) -> Run:
    """A run that ends when the device has done it."""

    def whole() -> Any:
        result = run()
        torch.cuda.synchronize()
        return result

    return whole


def torchvision(x: Tensor, *, compiled: bool = True) -> Run:
    network = model(x.dtype).eval()
    run = torch.compile(network, mode="reduce-overhead") if compiled else network
    return finished(torch.no_grad()(lambda: run(x).float()))


def ours(x: Tensor) -> Run:
    folded = fresnet.fold(reference.params(model(torch.float32)))
    infer = fresnet.compile_inference(tree.map(lambda leaf: leaf.to(x.dtype), folded), x)
    return finished(lambda: infer(x).float())


def torchvision_step(x: Tensor, y: Tensor) -> Run:
    network = model(torch.float32).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.9, weight_decay=1e-4, fused=True)

    def step() -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = cross_entropy(network(x.float()), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return finished(torch.compile(step))


def our_step(x: Tensor, y: Tensor) -> Run:
    optimizer = optim.sgd(0.01, momentum=0.9, weight_decay=1e-4)
    state = training.start(reference.params(model(torch.float32)), optimizer)
    train_step = torch.compile(
        training.make_train_step(optimizer, precision=torch.bfloat16), fullgraph=True
    )

    def step() -> Tensor:
        nonlocal state
        state, metrics = train_step(state, (x.float(), y))
        return metrics.loss

    return finished(step)


def comparisons(full: bool) -> Iterator[Comparison]:
    params = fresnet.init(0, device="meta")
    macs = fresnet.summary(params, SIDE).multiply_adds
    for batch in (1, 8, 32, 128, 256) if full else (1, 32):
        x = images(batch)
        y = torch.arange(batch, device=DEVICE)
        contenders = {
            "torchvision compiled": partial(torchvision, x),
            "torchvision": partial(torchvision, x, compiled=False),
            "fresnet": partial(ours, x),
        }
        title, flops = f"on a GPU, {batch} images", 2.0 * macs * batch
        yield Comparison(
            f"Inference {title}", contenders, batch, flops, x.dtype, 3e-2, device=DEVICE
        )
        if batch > 1:
            steps = {
                "torchvision compiled": partial(torchvision_step, x, y),
                "fresnet compiled": partial(our_step, x, y),
            }
            yield Comparison(
                f"Training step {title}", steps, batch, 3 * flops, x.dtype, 0.05, device=DEVICE
            )


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here")
    main(__doc__, comparisons)
