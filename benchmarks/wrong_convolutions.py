"""A search for geometries in which convolutions are wrong: PyTorch's own, and fresnet's.

    python benchmarks/wrong_convolutions.py --minutes 10

It draws geometries such as networks have, and compares the result and both gradients with float64.
oneDNN has other kernels for each kind of processor, and can be told to use those of an older one.
The search goes over all kinds that this machine can be, and over the dtypes. Each runs in a process
of its own, because some kernels end the process.

It prints how many geometries are wrong. `--record FILE` writes those of PyTorch's. Where a process
ended, an earlier geometry may have written past its buffer. What is known of them stands in
`fresnet/network/faults.py`; fresnet's own column has to be 0.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fresnet.network.convolution import convolve
from fresnet.network.nodes import Geometry

KINDS = ("AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_AMX")
"""What oneDNN can be told to run on by `ONEDNN_MAX_CPU_ISA`, if the machine has as much."""

TOLERANCE = {"bfloat16": 3e-2, "float16": 5e-3, "float32": 1e-4}
LARGEST = 5e7
"""The most multiplications of one convolution, so that many are tried in a minute."""

OPERATIONS = ("result", "gradient of x", "gradient of the weight")


class Drawn(NamedTuple):
    """A convolution: its sizes, and whether x and the weight lie channels last."""

    images: int
    inputs: int
    outputs: int
    groups: int
    side: int
    stride: int
    dilation: int
    height: int
    width: int
    x_last: bool
    weight_last: bool


def drawn(seed: int) -> Drawn:
    """A geometry such as networks have: 7x7 in stems, 3x3 dilated, 1x1 with a stride or without."""
    random = Random(seed)
    side = random.choice([1, 1, 3, 3, 3, 7])
    groups = random.choice([1, 1, 2, 4, 8, 32]) if side == 3 else 1

    def channels() -> int:
        few, many = random.randint(1, 24), random.randint(1, 300)
        return random.choice([few, few, many, random.choice([16, 32, 64, 128, 256, 512])])

    def length() -> int:
        return random.randint(1, random.choice([5, 9, 24, 80]))

    stride = 2 if side == 7 else random.choice([1, 1, 2])
    dilation = random.choice([1, 1, 2, 4]) if side == 3 and stride == 1 else 1
    inputs, outputs = (groups * max(1, channels() // groups) for _ in range(2))
    last = random.random() < 0.8, random.random() < 0.8
    return Drawn(
        random.choice([1, 2, 4]),
        inputs,
        outputs,
        groups,
        side,
        stride,
        dilation,
        length(),
        length(),
        *last,
    )


def errors(one: Drawn, dtype: torch.dtype, ours: bool, seed: int) -> Iterator[float]:
    """The error of the result and of both gradients, relative to their norms."""
    generator = torch.Generator().manual_seed(seed)
    geometry = Geometry(one.stride, one.dilation, one.groups)

    def noise(*shape: int, last: bool) -> Tensor:
        layout = torch.channels_last if last else torch.contiguous_format
        return torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout)

    x = noise(one.images, one.inputs, one.height, one.width, last=one.x_last)
    shape = one.outputs, one.inputs // one.groups, one.side, one.side
    inputs = x, noise(*shape, last=one.weight_last)
    window = one.stride, geometry.padding(inputs[1]), one.dilation, one.groups

    def run(cotangent: Tensor | None, ours: bool, x: Tensor, weight: Tensor) -> list[Tensor]:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = convolve(x, weight, geometry) if ours else F.conv2d(x, weight, None, *window)
        seen = noise(*y.shape, last=one.x_last) if cotangent is None else cotangent.to(y.dtype)
        return [seen, y.detach(), *torch.autograd.grad(y, (x, weight), seen)]

    # Freed memory that kernels may take for their own holds no zeros.
    for size in (x.numel(), inputs[1].numel(), 1 << 16):
        torch.full((size,), torch.nan, dtype=dtype)
    cotangent, *found = run(None, ours, *inputs)
    _, *exact = run(cotangent, False, *(v.double() for v in inputs))
    for a, b in zip(found, exact, strict=True):
        error = float((a.double() - b).norm())
        yield error / float(b.norm()) if isfinite(error) else torch.inf


def work(dtype: str, whose: str, start: int, seconds: float) -> None:
    """Try one geometry after the other, and print a line before and after each."""
    end = time.monotonic() + seconds
    seed = start
    while time.monotonic() < end:
        one = drawn(seed)
        if work_of(one) < LARGEST:
            torch.set_num_threads(1 + seed % 2)
            print(json.dumps({"seed": seed}), flush=True)
            found = list(errors(one, getattr(torch, dtype), whose == "fresnet", seed))
            if not max(found) < TOLERANCE[dtype]:
                print(json.dumps({"seed": seed, "errors": found}), flush=True)
        seed += 1


def work_of(one: Drawn) -> float:
    kernel = one.outputs * one.inputs // one.groups * one.side**2
    return one.images * kernel * one.height * one.width / one.stride**2


def search(
    kind: str, dtype: str, whose: str, seconds: float, start: int
) -> tuple[int, list[Mapping[str, Any]]]:
    """How many geometries were tried, and those that are wrong or end the process."""
    # Threads that spin while they wait would slow each other down.
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": kind, "GOMP_SPINCOUNT": "0"}
    end, tried = time.monotonic() + seconds, 0
    wrong: list[Mapping[str, Any]] = []
    while (left := end - time.monotonic()) > 0:
        command = [sys.executable, __file__, "--work", dtype, whose, str(start), str(left)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        tried += sum("errors" not in line for line in lines)
        found = [line for line in lines if "errors" in line]
        if done.returncode > 0 or not lines:
            raise RuntimeError(done.stderr)
        start = lines[-1]["seed"] + 1
        if done.returncode < 0:
            found.append({"seed": start - 1, "ended by signal": -done.returncode})
        wrong += [{"kind": kind, "dtype": dtype, **drawn(f["seed"])._asdict(), **f} for f in found]
    return tried, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--start", type=int, default=0, help="the first seed; default 0")
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="of processors")
    parser.add_argument("--dtypes", nargs="+", default=list(TOLERANCE), choices=TOLERANCE)
    parser.add_argument("--record", type=Path, help="a file for what PyTorch does wrong")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        dtype, whose, start, seconds = args.work
        work(dtype, whose, int(start), float(seconds))
        return
    seconds = 60 * args.minutes / (2 * len(args.kinds) * len(args.dtypes))
    recorded = []
    print(f"{'kind':18}{'dtype':10}{'PyTorch':>22}{'fresnet':>22}")
    for kind in args.kinds:
        for dtype in args.dtypes:
            cells = []
            for whose in ("PyTorch", "fresnet"):
                tried, wrong = search(kind, dtype, whose, seconds, args.start)
                cells.append(f"{len(wrong)} of {tried:,} wrong")
                if whose == "PyTorch":
                    recorded += wrong
                else:
                    for one in wrong:
                        print(json.dumps(one))
            print(f"{kind:18}{dtype:10}{cells[0]:>22}{cells[1]:>22}", flush=True)
    if args.record:
        args.record.write_text("".join(json.dumps(one) + "\n" for one in recorded))


if __name__ == "__main__":
    main()
