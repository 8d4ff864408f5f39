"""A training step of ResNet-50: fresnet against torchvision's module with `torch.optim.SGD`.

    python benchmarks/training_step.py            # eager; --compiled: both compiled whole

Contenders take the same step, which is checked first; then turns, A B A B, in one process. A row
gives the median of the times, the median ratio to the first within a round with its quartiles, and
the peak of the memory above weights and velocity: resident, and what PyTorch has allocated, which
does not count the holes that a heap has. Run it a second time with

    MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184

for glibc to keep its pages, which otherwise come fresh from the system for every large tensor.
"""

import argparse
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile, record_function
from transforms import images, peak_memory

import fresnet
from fresnet import optim, training

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import reference

RATE, MOMENTUM, DECAY = 0.01, 0.9, 1e-4


def torchvision(x: Tensor, y: Tensor, compiled: bool) -> Callable[[], Tensor]:
    model = reference.module(fresnet.RESNET50, 0, dtype=torch.float32).train()
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), RATE, MOMENTUM, weight_decay=DECAY, foreach=True
    )

    def step() -> Tensor:
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # here, so that what is above weights and velocity is the step's
        return loss.detach()

    return torch.compile(step) if compiled else step


def ours(x: Tensor, y: Tensor, compiled: bool, *, recompute: bool = False) -> Callable[[], Tensor]:
    params = reference.params(reference.module(fresnet.RESNET50, 0, dtype=torch.float32))
    optimizer = optim.sgd(RATE, momentum=MOMENTUM, weight_decay=DECAY)
    state = training.start(params, optimizer)
    train_step = training.make_train_step(optimizer, recompute=recompute)
    if compiled:
        train_step = torch.compile(train_step, fullgraph=True)

    def step() -> Tensor:
        nonlocal state
        state, metrics = train_step(state, (x, y))
        return metrics.loss

    return step


def compare(batch: int, side: int, rounds: int, compiled: bool) -> None:
    x, y = images(batch, side)
    builds = {
        "torchvision": partial(torchvision, x, y, compiled),
        "fresnet": partial(ours, x, y, compiled),
    }
    if not compiled:
        builds["fresnet, recompute"] = partial(ours, x, y, compiled, recompute=True)
    contenders = {name: build() for name, build in builds.items()}
    for _ in range(2):  # the second step sees what the first one did
        losses = [step() for step in contenders.values()]
    for loss in losses:
        assert abs(loss - losses[0]) <= 0.02 * losses[0], "contenders disagree"
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    print(
        f"\n### {batch} images of {side}x{side}{', compiled' * compiled}\n\n"
        "| | median s | ratio (quartiles) | resident MiB | allocated MiB |\n"
        "| --- | --- | --- | --- | --- |"
    )
    for name, step in contenders.items():
        ratios = [a / b for a, b in zip(times[name], times["torchvision"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        spread = f"{middle:.3f} ({low:.3f} to {high:.3f})"
        median = statistics.median(times[name])
        peak = statistics.median(peak_memory(step) for _ in range(3))
        allocated = "" if compiled else f"{peak_allocated(builds[name]):.0f}"
        print(f"| {name} | {median:.3f} | {spread} | {peak:.0f} | {allocated} |", flush=True)


def peak_allocated(build: Callable[[], Callable[[], Tensor]]) -> float:
    """MiB that PyTorch has allocated at most within a second step, above what is there before.

    The whole life of a contender is traced, so that what is freed is known.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step = build()
        step()
        gc.collect()
        with record_function("second step"):
            step()
    assert trace.profiler is not None
    events = sorted(trace.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    now = before = peak = 0
    for event in events:
        if event.name() == "second step":
            before = peak = now
        elif event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return float(peak - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compiled", action="store_true", help="both compiled whole")
    parser.add_argument("--rounds", type=int, default=9, help="default 9")
    parser.add_argument("--batch", type=int, default=16, help="default 16")
    parser.add_argument("--side", type=int, default=224, help="default 224")
    args = parser.parse_args()
    pages = "keeps its pages" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "default"
    print(
        f"PyTorch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, float32, channels last; allocator: {pages}"
    )
    compare(args.batch, args.side, args.rounds, args.compiled)


if __name__ == "__main__":
    main()
