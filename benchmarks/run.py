"""Everything that `docs/performance.md` says, measured and written.

    make bench                # a few sizes with pages kept, printed: python benchmarks/run.py
    make bench-full           # an hour: all sizes, both settings of the allocator

Each benchmark runs in a process of its own for each setting. With the default allocator only
inference runs in all sizes. A full run leaves every time that it measured in
`docs/performance.json`. From that it writes the measured part of `docs/performance.md` and its
picture, and --report does the same without measuring. The figures for a GPU are those that
`make bench-gpu` left in `docs/performance_gpu.json`. The rest of the document is written by hand
and quotes the tables.
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
    """A goal: one contender is at least `at_least` times as good as the best of the others."""

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


def best(rows: Sequence[Measured], names: Sequence[str]) -> str:
    """The fastest of these contenders."""
    seconds = {row.name: statistics.median(row.seconds) for row in rows}
    return min(names, key=seconds.__getitem__)


def judge(results: Results) -> str:
    """The targets in Markdown: what is asked, what was measured, and whether the target is met."""
    lines = [
        "| | of | against | asked | measured (quartiles) | met |",
        "| --- | --- | --- | ---: | --- | --- |",
    ]
    for target in targets():
        entry = results.get((target.title, target.setting))
        if entry is None:
            continue
        rows = [Measured(**row) for row in entry["rows"]]
        rival = best(rows, target.others)
        if target.memory:
            peaks = {row.name: row.peak for row in rows}
            middle = peaks[rival] / max(peaks[target.name], 1)
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
    """A line that says when, on which machine and with which versions it was measured."""
    environments = [entry["environment"] for entry in entries]
    dates = sorted({environment["date"] for environment in environments})
    environment = {**environments[0], "date": " and ".join(dates)}
    return f"Measured: {', '.join(f'{name} {value}' for name, value in environment.items())}.\n"


GROUPS = {
    "Inference on a CPU, float32": r"Inference, (.*), float32",
    "Inference on a CPU, bfloat16": r"Inference, (.*), bfloat16",
    "Inference on a CPU, int8": r"Inference, (.*), int8",
    "Training step on a CPU": r"Training step, (.*)",
    "Training step on a CPU, both compiled": r"Training step compiled, (.*)",
    "Per-sample gradients on a CPU": r".*gradients, ResNet-50, (.*)",
    "Ensemble of eight ResNet-18 on a CPU": r"Ensemble of 8 ResNet-18, (.*), (.*)",
    "Inference on a GPU, bfloat16": r"Inference on a GPU, (.*)",
    "Training step on a GPU, bfloat16": r"Training step on a GPU, (.*)",
}
"""Each heading of the picture, and the titles below it. A label keeps what is in parentheses."""

OURS = {
    "fresnet in bfloat16": "bfloat16",
    "fresnet running": "gradients",
    "per_sample_norms": "norms",
    "clipped_grads": "clipped sum",
}
"""The label for one of our contenders, if the heading does not say which it is."""

THEIRS = {
    "fresnet": "fresnet in float32",
    "loop": "one after another",
    "one batched gradient": "one gradient of the batch",
}
"""The picture's name for a rival, if its own name cannot be read without the table."""

FASTER, SLOWER, EVEN = "#1a6faf", "#c8512b", "#707070"
TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10)


class Line(NamedTuple):
    """A job in the picture, and how many times as fast as its rival fresnet is."""

    job: str
    rival: str
    low: float
    middle: float
    high: float


def by_heading(results: Results) -> dict[str, list[Line]]:
    """All targets of speed, except those for the default allocator."""
    groups: dict[str, list[Line]] = {heading: [] for heading in GROUPS}
    for target in targets():
        entry = results.get((target.title, target.setting))
        if entry is None or target.memory or target.setting == DEFAULT:
            continue
        found = {heading: re.fullmatch(title, target.title) for heading, title in GROUPS.items()}
        heading, match = next((heading, match) for heading, match in found.items() if match)
        job = ", ".join(filter(None, (OURS.get(target.name), *match.groups())))
        rows = [Measured(**row) for row in entry["rows"]]
        rival = best(rows, target.others)
        line = Line(job, THEIRS.get(rival, rival), *quartiles(ratios(rows, target.name, rival)))
        groups[heading].append(line)
    return {heading: group for heading, group in groups.items() if group}


def draw(results: Results, path: Path) -> None:
    """Draw how many times as fast as its best rival fresnet is in each job."""
    groups = by_heading(results)
    every = [line for group in groups.values() for line in group]
    count, inch = len(every) + 1.5 * len(groups), 0.2
    height = inch * count + 1.5
    figure = Figure(figsize=(8, height))
    title = "How many times as fast fresnet is"
    note = (
        "ResNet-50. A dot is the median of all rounds, its line goes from quartile to quartile,"
        " and grey\nmeans no clear difference: the quartiles lie on both sides of 1."
    )
    figure.text(0.02, 1 - 0.25 / height, title, size=13, weight="bold")
    figure.text(0.02, 1 - 0.35 / height, note, size=8.5, va="top")
    axis = figure.add_axes((0.51, 0.3 / height, 0.415, inch * count / height))
    axis.set_xscale("log")
    axis.set_xlim(min(line.low for line in every) / 1.06, max(line.high for line in every) * 1.06)
    axis.set_ylim(count, 0)
    shown = [tick for tick in TICKS if axis.get_xlim()[0] < tick < axis.get_xlim()[1]]
    axis.minorticks_off()
    axis.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axis.set_yticks([])
    axis.tick_params(top=True, labeltop=True, length=0, labelsize=8.5)
    axis.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)
    axis.axvline(1, color="black", linewidth=1.2)
    axis.text(1, -1.6, "\N{LEFTWARDS ARROW} slower  ", ha="right", size=9, color=SLOWER)
    axis.text(1, -1.6, "  faster \N{RIGHTWARDS ARROW}", ha="left", size=9, color=FASTER)

    def write(x: float, y: float, text: str, **style: Any) -> None:
        """Write at `x`, a share of the figure's width."""
        box = axis.get_position()
        place = ((x - box.x0) / box.width, y)
        transform = axis.get_yaxis_transform()
        axis.text(*place, text, transform=transform, va="center", size=8.5, **style)

    write(0.28, -0.55, "against", style="italic")
    y = 0.0
    for heading, group in groups.items():
        y += 1
        write(0.02, y, heading, weight="bold")
        for line in group:
            y += 1
            colour = FASTER if line.low > 1 else SLOWER if line.high < 1 else EVEN
            axis.barh(y, line.middle - 1, left=1, height=0.56, color=colour, alpha=0.3)
            axis.plot((line.low, line.high), (y, y), color=colour, linewidth=1.8)
            axis.plot(line.middle, y, "o", color=colour, markersize=4.5)
            write(0.02, y, line.job)
            write(0.28, y, line.rival)
            write(0.935, y, f"{line.middle:.2f}", color=colour)
        y += 0.5
    figure.savefig(path, dpi=125, pil_kwargs={"optimize": True})


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
