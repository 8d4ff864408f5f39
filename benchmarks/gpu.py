"""Inference and training of a ResNet-50 on a GPU: fresnet beside torchvision, both compiled.

    python benchmarks/gpu.py                     # prints tables; --full for all batch sizes
    make bench-gpu                               # all of them, and into docs/performance.md

Both run in bfloat16, channels last, with cuDNN's search for the fastest algorithms. For inference
both record CUDA graphs. "Of peak" is the share of the roofline, where a layer needs the longer of
two times: that of its operations at the peak of a matrix product or a convolution, and that of what
it reads and writes at the rate of a copy.
"""

import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from harness import Comparison, Run, main, peak, timed
from torch import Tensor
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import optim, training
from fresnet.network.net import run_network
from fresnet.network.nodes import Geometry, Pair
from fresnet.network.norm import inference_norm
from fresnet.network.regimes import Composed

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import reference

DEVICE, SIDE, ROUNDS = "cuda", 224, 15


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
    run = torch.compile(network, mode="reduce-overhead", dynamic=False) if compiled else network
    return finished(torch.no_grad()(lambda: run(x).float()))


def ours(x: Tensor) -> Run:
    folded = fresnet.fold(reference.params(model(torch.float32)))
    infer = fresnet.compile_inference(fresnet.cast(folded, x.dtype), x)
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

    return finished(torch.compile(step, dynamic=False))


def our_step(x: Tensor, y: Tensor) -> Run:
    optimizer = optim.sgd(0.01, momentum=0.9, weight_decay=1e-4)
    state = training.start(reference.params(model(torch.float32)), optimizer)
    train_step = torch.compile(
        training.make_train_step(optimizer, precision=torch.bfloat16),
        fullgraph=True,
        dynamic=False,
    )

    def step() -> Tensor:
        nonlocal state
        state, metrics = train_step(state, (x.float(), y))
        return metrics.loss

    return finished(step)


@cache
def bandwidth() -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * len(source) / timed(lambda: target.copy_(source), DEVICE)


def roofline(x: Tensor, *, training: bool = False) -> float:
    """The least seconds that a ResNet-50 needs.

    A training step has three convolutions where inference has one. In addition, a norm reads or
    writes each value seven times, because it must see all values of the batch before it changes the
    first. Forward it reads one and writes one. Its derivative reads two twice and writes one.
    """
    params = fresnet.fold(fresnet.init(0, device="meta", dtype=x.dtype))
    count = _Counting(peak(x.dtype, DEVICE), bandwidth(), training=training)
    run_network(params, x.to("meta"), count)
    return count.seconds


class _Counting(Composed):
    """Inference that adds up the least seconds that each layer needs."""

    def __init__(self, operations: float, speed: float, *, training: bool) -> None:
        super().__init__(inference_norm)
        self.seconds = 0.0
        self._operations, self._speed, self._training = operations, speed, training

    def layer(
        self,
        at: Pair,
        x: Tensor,
        how: Geometry,
        *,
        add: Tensor | None = None,
        relu: bool = True,
    ) -> tuple[Tensor, Any]:
        y, seen = super().layer(at, x, how, add=add, relu=relu)
        conv = at.unit.conv
        added = 0 if add is None else add.numel()
        moved = (x.numel() + conv.numel() + y.numel() + added) * x.itemsize
        least = max(2 * y.numel() * conv[0].numel() / self._operations, moved / self._speed)
        self.seconds += 3 * least + 7 * y.nbytes / self._speed if self._training else least
        return y, seen


def comparisons(full: bool) -> Iterator[Comparison]:
    for batch in (1, 8, 32, 128, 256) if full else (1, 32):
        x = images(batch)
        contenders = {
            "torchvision compiled": partial(torchvision, x),
            "torchvision": partial(torchvision, x, compiled=False),
            "fresnet": partial(ours, x),
        }
        title = f"Inference on a GPU, {batch} image{'s' * (batch > 1)}"
        yield Comparison(title, contenders, batch, roofline(x), 3e-2, rounds=ROUNDS, device=DEVICE)
    for batch in (32, 128, 256) if full else (32,):
        x, y = images(batch), torch.arange(batch, device=DEVICE)
        steps = {
            "torchvision compiled": partial(torchvision_step, x, y),
            "fresnet compiled": partial(our_step, x, y),
        }
        title, least = f"Training step on a GPU, {batch} images", roofline(x, training=True)
        yield Comparison(title, steps, batch, least, 0.05, rounds=ROUNDS, device=DEVICE)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here")
    torch.backends.cudnn.benchmark = True
    main(__doc__, comparisons)
