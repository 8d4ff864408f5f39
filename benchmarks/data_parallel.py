"""A training step of two processes: fresnet against torchvision in DistributedDataParallel.

    python benchmarks/data_parallel.py           # five minutes; --quick for one round

Both train a ResNet-50 by SGD with momentum and weight decay (torch's with foreach=True) in float32
and channels last. There are two gloo processes of one thread each, and both sides see the same
images. After one step from the same weights, losses must agree to 1e-4. Updates and running
statistics must agree to 2%, because two correct implementations may differ so much in float32.

Then both take turns in the same processes, A B A B, for four rounds that fill their heaps and
eleven that count. A row gives the median time of a step with its quartiles, and the processor time
likewise, on which other work of the machine has little effect. Beside each is its ratio to the
first row's in the same round. At first glibc gives pages back after large tensors. Then new
processes start in which it keeps them. `docs/scaling.md` has the results.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

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


class Contender(NamedTuple):
    step: Callable[[], Tensor]
    """Trains, and returns the loss of all images."""

    look: Callable[[], Mapping[str, Tensor]]
    """Weights and running statistics under torchvision's names."""


def stock(x: Tensor, y: Tensor) -> Contender:
    model = reference.module(fresnet.RESNET50, 0, dtype=torch.float32)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(
        parallel.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, foreach=True
    )

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(parallel(x), y)
        loss.backward()
        optimizer.step()
        loss = loss.detach() / PROCESSES
        distributed.all_reduce(loss)
        return loss

    return Contender(step, model.state_dict)


def ours(x: Tensor, y: Tensor) -> Contender:
    params = reference.params(reference.module(fresnet.RESNET50, 0, dtype=torch.float32))
    optimizer = fresnet.optim.sgd(0.01, momentum=0.9, weight_decay=1e-4)
    state = fresnet.training.start(params, optimizer)
    train_step = fresnet.training.make_train_step(optimizer, group=distributed.group.WORLD)

    def step() -> Tensor:
        nonlocal state
        state, metrics = train_step(state, (x, y))
        return metrics.loss

    return Contender(step, lambda: fresnet.to_state_dict(state.params))


def work(rank: int, folder: str, rounds: int, batch: int, side: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    # Both processes get the same images: DistributedDataParallel keeps the first one's statistics.
    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.arange(batch) % 10
    contenders = {"DistributedDataParallel": stock(x, y), "fresnet": ours(x, y)}
    check_agreement(*contenders.values())
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(4 + rounds):
        for name, contender in contenders.items():
            distributed.barrier()
            start, start_processor = time.perf_counter(), time.process_time()
            contender.step()
            distributed.barrier()
            own = time.perf_counter() - start, time.process_time() - start_processor
            times[name].append(own)
    if rank == 0:
        report({name: own[-rounds:] for name, own in times.items()})
    distributed.destroy_process_group()


def check_agreement(a: Contender, b: Contender) -> None:
    """Take one step with each from the same weights, and compare what they do."""
    before = {name: value.clone() for name, value in a.look().items()}
    losses = [contender.step() for contender in (a, b)]
    assert abs(losses[1] / losses[0] - 1) < 1e-4, losses
    first, second = a.look(), b.look()
    for name, value in before.items():
        if value.is_floating_point():
            moved, other = first[name] - value, second[name] - value
            assert (moved - other).norm() <= 0.02 * moved.norm() + 1e-5, name


def report(times: Mapping[str, list[tuple[float, float]]]) -> None:
    print("| | step, s | ratio | processor, s | ratio |\n| --- | --- | --- | --- | --- |")
    base = next(iter(times.values()))
    for name, own in times.items():
        columns = []
        for of_own, of_base in zip(zip(*own, strict=True), zip(*base, strict=True), strict=True):
            ratios = [a / b for a, b in zip(of_own, of_base, strict=True)]
            columns += [spread(of_own), spread(ratios)]
        print(f"| {name} | {' | '.join(columns)} |", flush=True)


def spread(values: Sequence[float]) -> str:
    """The median and the quartiles, as text."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round instead of eleven")
    rounds = 1 if parser.parse_args().quick else 11
    print(f"PyTorch {torch.__version__}, Python {platform.python_version()}, {PROCESSES} processes")
    settings: dict[str, dict[str, str]] = {"default": {}, "keeps its pages": KEEP_PAGES}
    for pages, setting in settings.items():
        os.environ.update(setting)
        for batch, side in ((8, 224), (32, 64)):
            print(f"\n### {batch} images of {side}x{side} a process; allocator: {pages}\n")
            with TemporaryDirectory() as folder:
                spawn(work, (folder, rounds, batch, side), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
