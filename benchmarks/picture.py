"""The picture of `docs/performance.md`: how many times as fast as its best rival fresnet is."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from harness import Measured, quartiles, ratios
from matplotlib.figure import Figure
from report import DEFAULT, Results, best, targets

GROUPS = {
    "From the start to first logits": r"(?:fresnet: )?From the start to first logits, (.*)",
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
