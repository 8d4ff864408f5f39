"""Contenders measured side by side: agreement, time, memory and share of the machine's peak.

All take turns in one process, A B A B. A turn is two runs, and only the second is timed. The first
lets caches and threads settle after the contender before. Ratios are taken within a round, and
reported as median and quartiles. A machine that slows down therefore slows all contenders down.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from math import inf, isnan, nan
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
"""The settings of `fresnet.keep_pages`, for all libraries of a process from its start."""

Run = Callable[[], Any]


class Comparison(NamedTuple):
    """Contenders for one job.

    Args:
      title: the name of the job.
      contenders: for each name, what prepares the contender. The others are compared with the
        first.
      images: how many images one run takes.
      least: the seconds that one run would need at the measured peak, if that is known.
      agree: the largest error allowed, relative to the first one's result.
      bounds: the errors allowed to contenders with a bound of their own. Those with an infinite
        bound are not compared.
      view: from a result to what is compared: a tensor, or tensors by name.
      rounds: how many turns each contender takes.
      device: the device of the runs. A run ends when the device has finished, and memory is the
        device's.
    """

    title: str
    contenders: Mapping[str, Callable[[], Run]]
    images: int
    least: float = 0.0
    agree: float = 1e-4
    bounds: Mapping[str, float] = {}
    view: Callable[[Any], Any] = lambda result: result
    rounds: int = 7
    device: str = "cpu"


class Measured(NamedTuple):
    """What was measured of one contender.

    prepare: the seconds that it took to prepare.
    seconds: those of each timed run.
    peak: the most memory of a run, in MiB above what there was before; the median of three runs.
    error: the error relative to the first contender's result.
    """

    name: str
    prepare: float
    seconds: list[float]
    peak: float
    error: float


def measure(comparison: Comparison) -> list[Measured]:
    """Prepare all contenders, check that they agree, and let them take turns."""
    runs, prepare = {}, {}
    for name, build in comparison.contenders.items():
        start = time.perf_counter()
        runs[name] = build()
        runs[name]()
        prepare[name] = time.perf_counter() - start
    errors = errors_of(comparison, runs)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(comparison.rounds):
        for name, run in runs.items():
            time.sleep(0.02)
            run()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    memory = device_memory if comparison.device == "cuda" else peak_memory
    peaks: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(3):  # where glibc finds room differs from run to run
        for name, run in runs.items():
            peaks[name].append(memory(run))
    return [
        Measured(name, prepare[name], seconds[name], statistics.median(peaks[name]), errors[name])
        for name in runs
    ]


def errors_of(comparison: Comparison, runs: Mapping[str, Run]) -> dict[str, float]:
    """The error of each contender, none of which is beyond its bound."""
    first, errors = None, {}
    for name, run in runs.items():
        bound, result = comparison.bounds.get(name, comparison.agree), run()
        if bound == inf:
            errors[name] = nan
            continue
        result = comparison.view(result)
        first = result if first is None else first
        errors[name] = _distance(result, first)
        assert errors[name] <= bound, f"{comparison.title}: {name} is off by {errors[name]:.1e}"
    return errors


def _distance(result: Any, expected: Any) -> float:
    """The largest relative error among tensors of the same name, and NaN if any is."""
    if isinstance(result, Tensor):
        result, expected = {"": result}, {"": expected}
    assert result.keys() == expected.keys()
    with torch.no_grad():
        errors = [
            (result[name] - value).norm() / (value.norm() + 1e-3)
            for name, value in expected.items()
        ]
        return float(torch.stack(errors).max())


def ratios(rows: list[Measured], name: str, against: str) -> list[float]:
    """How many times as fast one contender is as another, round by round."""
    seconds = {row.name: row.seconds for row in rows}
    return [b / a for a, b in zip(seconds[name], seconds[against], strict=True)]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return low, middle, high


@cache
def peak(dtype: torch.dtype, device: str = "cpu") -> float:
    """The most operations per second, in a product of matrices or in a convolution."""
    n, b = (8192, 256) if device == "cuda" else (2048, 8)
    a = torch.randn(n, n, device=device).to(dtype)
    x, w = torch.randn(b, 256, 28, 28, device=device), torch.randn(256, 256, 3, 3, device=device)
    x, w = (v.to(dtype).contiguous(memory_format=torch.channels_last) for v in (x, w))
    jobs: list[tuple[float, Run]] = [
        (2.0 * n**3, lambda: a @ a),
        (2.0 * x.numel() * w[:, 0].numel(), lambda: torch.conv2d(x, w, padding=1)),
    ]
    return max(flops / timed(job, device) for flops, job in jobs)


def timed(run: Run, device: str) -> float:
    """The seconds of the fastest of several runs."""
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def table(entry: Mapping[str, Any]) -> str:
    """The table of a recorded comparison, in Markdown."""
    rows = [Measured(**row) for row in entry["rows"]]
    first = rows[0].name
    lines = [
        f"### {entry['title']}\n",
        f"| | images/s | times {first} (quartiles) | peak MiB | prepared in | of peak | error |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        low, middle, high = quartiles(ratios(rows, row.name, first))
        seconds = statistics.median(row.seconds)
        share = f"{entry['least'] / seconds:.0%}" if entry["least"] else ""
        error = "" if isnan(row.error) else f"{row.error:.0e}"
        lines.append(
            f"| {row.name} | {entry['images'] / seconds:.1f} "
            f"| {middle:.3f} ({low:.3f} to {high:.3f}) | {row.peak:.0f} | {row.prepare:.1f} s "
            f"| {share} | {error} |"
        )
    return "\n".join(lines)


def peak_memory(run: Run) -> float:
    """The most resident memory while this runs, in MiB above what is resident before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident("VmRSS")
    run()
    return (_resident("VmHWM") - before) / 1024


def device_memory(run: Run) -> float:
    """The most memory on the GPU while this runs, in MiB above what is allocated before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def setting(device: str) -> str:
    if device == "cuda":
        return "on a GPU"
    return "pages kept" if os.environ.get("MALLOC_TRIM_THRESHOLD_") else "default allocator"


def environment() -> dict[str, str]:
    """What the figures depend on: the date, the machine and the versions."""
    cpu = Path("/proc/cpuinfo").read_text()
    model = next((line.split(": ")[1] for line in cpu.splitlines() if "model name" in line), "")
    packages = ["torch", "torchvision"]
    found = {"date": time.strftime("%Y-%m-%d")}
    found["processor"] = f"{model}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cudnn": str(torch.backends.cudnn.version())}
    else:
        packages += ["onnxruntime", "openvino", "opacus", "jax", "flax"]
    found["python"] = platform.python_version()
    return found | {name: version(name) for name in packages if find_spec(name)}


def entry_of(comparison: Comparison, rows: list[Measured]) -> dict[str, Any]:
    """All that `table`, and the judge in run.py, need of a comparison, as JSON takes it."""
    return {
        "title": comparison.title,
        "setting": setting(comparison.device),
        "environment": environment(),
        "images": comparison.images,
        "least": comparison.least,
        "rows": [row._asdict() for row in rows],
    }


def main(
    description: str | None,
    comparisons: Callable[[bool], Iterable[Comparison]],
    measure: Callable[[Comparison], list[Measured]] = measure,
) -> None:
    """Measure the comparisons of a benchmark, and print their tables."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="every size and contender")
    parser.add_argument("--record", type=Path, help="a file of JSON lines to append to")
    parser.add_argument("--only", default="", help="comparisons whose title has this in it")
    args = parser.parse_args()
    print(
        f"{setting('cpu')}; {', '.join(f'{k} {v}' for k, v in environment().items())}\n", flush=True
    )
    for comparison in comparisons(args.full):
        if args.only in comparison.title:
            entry = entry_of(comparison, measure(comparison))
            print(table(entry), end="\n\n", flush=True)
            if args.record:
                with args.record.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
