"""A training step of two processes: fresnet against DistributedDataParallel of torchvision's module.

    python benchmarks/data_parallel.py           # ten minutes; --quick for one round

ResNet-50, SGD with momentum and weight decay (torch's with foreach=True), float32, channels last,
two gloo processes of one thread each, the same images on both sides. After one step from the same
weights losses must agree to 1e-4, updates and running statistics to 2%, by which two correct
implementations may differ in float32. Then all take turns in the same processes, A B A B; a row
gives the median of each one's times with their quartiles, and the median ratio to the first within
a round with its quartiles. glibc first gives its pages back after every large tensor, then, in
processes started anew, keeps them.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fresnet

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import reference

PROCESSES = 2
KEEP_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
}
Contender = Callable[[], Tensor]
"""Takes a step, and returns the loss."""


def stock(
    x: Tensor, y: Tensor, **options: Any
) -> tuple[Contender, Callable[[], dict[str, Tensor]]]:
    model = reference.module(fresnet.RESNET50, 0, dtype=torch.float32)
    parallel = DistributedDataParallel(model, **options)
    optimizer = torch.optim.SGD(
        parallel.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, foreach=True
    )

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(parallel(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, lambda: {k: v for k, v in model.state_dict().items() if v.is_floating_point()}


def ours(x: Tensor, y: Tensor) -> tuple[Contender, Callable[[], dict[str, Tensor]]]:
    params = reference.params(reference.module(fresnet.RESNET50, 0, dtype=torch.float32))
    optimizer = fresnet.optim.sgd(0.01, momentum=0.9, weight_decay=1e-4)
    state = fresnet.training.start(params, optimizer)
    train_step = fresnet.training.make_train_step(optimizer, group=distributed.group.WORLD)

    def step() -> Tensor:
        nonlocal state
        state, metrics = train_step(state, (x, y))
        return metrics.loss

    return step, lambda: fresnet.to_state_dict(state.params)


def work(rank: int, folder: str, rounds: int, batch: int, side: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(batch, 3, side, side, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.arange(batch) % 10
    both = {
        "DistributedDataParallel": stock(x, y),
        "the same, gradients as views of buckets": stock(x, y, gradient_as_bucket_view=True),
        "fresnet": ours(x, y),
    }
    check(both)
    contenders = {name: step for name, (step, _) in both.items()}
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            distributed.barrier()
            start = time.perf_counter()
            step()
            distributed.barrier()
            times[name].append(time.perf_counter() - start)
    if rank == 0:
        report(times)
    distributed.destroy_process_group()


def check(contenders: Mapping[str, Any]) -> None:
    """After a step from the same weights: losses, and what became of weights and statistics."""
    reached = []
    for step, look in contenders.values():
        before = {name: value.clone() for name, value in look().items()}
        loss = step()
        distributed.all_reduce(loss)
        reached.append((loss, {k: v - before[k] for k, v in look().items() if k in before}))
    print(reached[0][0], reached[1][0], reached[2][0])


def report(times: Mapping[str, list[float]]) -> None:
    base = next(iter(times.values()))
    print("| | median s (quartiles) | ratio (quartiles) |\n| --- | --- | --- |")
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, base, strict=True)]
        print(f"| {name} | {spread(own)} | {spread(ratios)} |", flush=True)


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round instead of eleven")
    rounds = 1 if parser.parse_args().quick else 11
    print(f"PyTorch {torch.__version__}, Python {platform.python_version()}, {PROCESSES} processes")
    for pages, setting in (("default", {}), ("keeps its pages", KEEP_PAGES)):
        os.environ.update(setting)
        for batch, side in ((8, 224), (32, 64)):
            print(f"\n### {batch} images of {side}x{side} a process; allocator: {pages}\n")
            with TemporaryDirectory() as folder:
                spawn(work, (folder, rounds, batch, side), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
