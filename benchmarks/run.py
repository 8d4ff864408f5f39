"""Everything that `docs/performance.md` says, measured and written.

    make bench                # a few sizes with pages kept, printed: python benchmarks/run.py
    make bench-full           # half an hour or more: all sizes, both settings of the allocator

Each benchmark runs in a process of its own for each setting; with the default allocator only
inference in all sizes. A full run leaves `docs/performance.json`, every time of it, and from that
writes the measured part of `docs/performance.md` and its picture; --report does so without
measuring. Of a GPU, it writes what `make bench-gpu` left in `docs/performance_gpu.json`.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from harness import KEPT, Measured, quartiles, ratios, table
from matplotlib.figure import Figure

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "performance.md"
RESULTS = DOCUMENT.with_suffix(".json")
GPU_RESULTS = DOCUMENT.with_name("performance_gpu.json")
PICTURE = DOCUMENT.with_suffix(".png")

BENCHMARKS = ("inference.py", "training_step.py", "transforms.py")
PAGES_KEPT, DEFAULT, GPU = "pages kept", "default allocator", "on a GPU"
HEADINGS = {PAGES_KEPT: "With pages kept", DEFAULT: "Default allocator", GPU: "On a GPU"}


class Target(NamedTuple):
    """One contender at least so many times as good as the best of others."""

    title: str
    name: str
    others: Sequence[str]
    at_least: float
    setting: str = PAGES_KEPT
    memory: bool = False


def targets() -> list[Target]:
    found = []
    for images in ("1 image", "8 images", "32 images"):
        wide, narrow = (f"Inference, {images}, {dtype}" for dtype in ("float32", "bfloat16"))
        found += [
            Target(wide, "fresnet", ("OpenVINO", "ONNX Runtime"), 1.05),
            Target(wide, "fresnet", ("torchvision",), 1.25),
            Target(wide, "fresnet", ("torchvision",), 1.6, DEFAULT),
            Target(narrow, "fresnet", ("OpenVINO",), 1.0),
            Target(f"Inference, {images}, int8", "fresnet", ("fresnet in float32",), 2.0),
        ]
    step = "Training step, 16 images of 224 px"
    compiled = "Training step compiled, 16 images of 224 px"
    found += [
        Target(step, "fresnet", ("torchvision",), 0.97),
        Target(step, "fresnet", ("torchvision",), 1 / 1.05, memory=True),
        Target(compiled, "fresnet", ("torchvision",), 1.0),
        Target(compiled, "fresnet", ("torchvision",), 1 / 0.9, memory=True),
        Target(step, "fresnet in bfloat16", ("torchvision in bfloat16",), 1.0),
        Target(step, "fresnet in bfloat16", ("fresnet",), 2.0),
        Target("Training step, 4 images of 32 px", "fresnet", ("torchvision",), 1 / 1.02),
    ]
    small, large = (f"ResNet-50, {n} images of {side} px" for n, side in ((8, 64), (4, 224)))
    stock = ("stock vmap(grad)",)
    found += [
        Target(f"Per-sample gradients, {small}", "fresnet running", stock, 2.5, DEFAULT),
        Target(f"Per-sample gradients, {small}", "fresnet running", stock, 1.7),
        Target(f"Per-sample gradients, {large}", "fresnet running", stock, 1.0),
    ]
    for size in (small, large):
        title = f"Norms of per-sample gradients, {size}"
        for name in ("per_sample_norms", "clipped_grads"):
            found.append(Target(title, name, ("one batched gradient",), 0.5))
            found.append(Target(title, name, ("one batched gradient",), 1 / 1.3, memory=True))
    for what in ("logits", "gradients"):
        title = f"Ensemble of 8 ResNet-18, {what}, 16 images of 64 px"
        found.append(Target(title, "fresnet vmap", ("loop",), 1.0))
    rival = ("torchvision compiled",)
    for images in ("1 image", "8 images", "32 images", "128 images", "256 images"):
        found += [
            Target(f"Inference on a GPU, {images}", "fresnet", rival, 1.0, GPU),
            Target(f"Training step on a GPU, {images}", "fresnet compiled", rival, 1.0, GPU),
        ]
    return found


Results = Mapping[tuple[str, str], Mapping[str, Any]]


def judge(results: Results) -> str:
    """The targets in Markdown: what was asked for, what was measured, whether it is met."""
    lines = [
        "| | of | against | asked | measured (quartiles) | met |",
        "| --- | --- | --- | ---: | --- | --- |",
    ]
    for target in targets():
        entry = results.get((target.title, target.setting))
        if entry is None:
            continue
        rows = [Measured(**row) for row in entry["rows"]]
        by_name = {row.name: row for row in rows}
        rival = min(target.others, key=lambda name: statistics.median(by_name[name].seconds))
        if target.memory:
            middle = by_name[rival].peak / max(by_name[target.name].peak, 1)
            measured = f"{middle:.2f}"
        else:
            low, middle, high = quartiles(ratios(rows, target.name, rival))
            measured = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        what = "as little memory as" if target.memory else "as fast as"
        default = ", default allocator" if target.setting == DEFAULT else ""
        lines.append(
            f"| {target.title}{default} | {target.name} | {what} {rival} | {target.at_least:.2f} "
            f"| {measured} | {'yes' if middle >= target.at_least else '**no**'} |"
        )
    return "\n".join(lines)


def report(results: Results) -> str:
    """The measured part of the document."""
    cpu = [entry for (_, setting), entry in results.items() if setting != GPU]
    parts = [_measured(cpu), judge(results)]
    for setting, heading in HEADINGS.items():
        entries = [entry for (_, found), entry in results.items() if found == setting]
        if entries:
            parts.append(f"\n## {heading}\n")
            parts += [_measured(entries)] if setting == GPU else []
            parts.append("\n\n".join(map(table, entries)))
    return "\n".join(parts)


def _measured(entries: Sequence[Mapping[str, Any]]) -> str:
    """When, on what and with which versions."""
    environments = [entry["environment"] for entry in entries]
    dates = sorted({environment["date"] for environment in environments})
    environment = {**environments[0], "date": " and ".join(dates)}
    return f"Measured: {', '.join(f'{name} {value}' for name, value in environment.items())}.\n"


def draw(results: Results, path: Path) -> None:
    """Images per second of every contender in inference, pages kept."""
    shown = [
        (title.removeprefix("Inference, "), entry)
        for (title, setting), entry in results.items()
        if title.startswith("Inference") and setting == PAGES_KEPT
    ]
    figure = Figure(figsize=(11, 3.2 * ((len(shown) + 1) // 2)), layout="constrained")
    axes = figure.subplots((len(shown) + 1) // 2, 2, squeeze=False).flatten()
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    for axis, (title, entry) in zip(axes, shown, strict=False):
        rows = [Measured(**row) for row in entry["rows"]]
        rows.sort(key=lambda row: -statistics.median(row.seconds))
        rates = [[entry["images"] / second for second in row.seconds] for row in rows]
        middles = [statistics.median(rate) for rate in rates]
        spread = [
            [middle - quartiles(rate)[0] for rate, middle in zip(rates, middles, strict=True)],
            [quartiles(rate)[2] - middle for rate, middle in zip(rates, middles, strict=True)],
        ]
        colours = ["#c44e52" if row.name == "fresnet" else "#8c8c8c" for row in rows]
        axis.barh([row.name for row in rows], middles, xerr=spread, color=colours)
        axis.set_title(title)
        axis.set_xlabel("images per second; median and quartiles")
    figure.savefig(path, dpi=80)


def read(path: Path) -> Results:
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return {(entry["title"], entry["setting"]): entry for entry in entries}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="all sizes and settings, and written")
    parser.add_argument("--report", action="store_true", help="write anew from the last full run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = RESULTS if args.report else Path(folder) / "results.json"
        settings: list[Mapping[str, str]] = [KEPT, {}] if args.full else [KEPT]
        for setting, name in product([] if args.report else settings, BENCHMARKS):
            command = [sys.executable, str(HERE / name), "--record", str(path)]
            if args.full and (setting or name == "inference.py"):
                command.append("--full")
            subprocess.run(command, env={**os.environ, **setting}, check=True)
        results = read(path)
        if args.full:
            RESULTS.write_text(path.read_text())
    if args.full or args.report:
        results = {**results, **read(GPU_RESULTS)}
        written = re.sub(
            r"(?<=<!-- measured -->\n).*?(?=<!-- end -->)",
            lambda _: report(results) + "\n",
            DOCUMENT.read_text(),
            flags=re.S,
        )
        DOCUMENT.write_text(written)
        draw(results, PICTURE)
    print(judge(results))


if __name__ == "__main__":
    main()
