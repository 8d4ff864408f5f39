"""The picture of `docs/performance.md`: how many times as fast as its best rival fresnet is."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from harness import Measured, quartiles, ratios
from matplotlib.figure import Figure
from report import DEFAULT, Results, best, targets

GROUPS = {
    "From the start to first logits": r"fresnet: From the start to first logits, (.*)",
    "Inference, float32": r"fresnet: Inference, (.*), float32",
    "Inference, bfloat16": r"fresnet: Inference, (.*), bfloat16",
    "Inference, int8": r"fresnet: Inference, (.*), int8",
    "Layer by layer, 1 image of 32 px": r"fresnet: Layer by layer, (.*), 1 image of 32 px",
    "Training step": r"fresnet: Training step, (.*)",
    "Training step, both compiled": r"fresnet: Training step compiled, (.*)",
    "Training step, bfloat16": r"fresnet in bfloat16: Training step, .*",
    "Loss and gradient": r"(.*): Loss and gradient, .*",
    "Per-sample gradients": r"fresnet running: Per-sample gradients, ResNet-50, (.*)",
    "Norms and clipped sums": r"(.*): Norms of per-sample gradients, ResNet-50, (.*)",
    "Clipped sums": r"clipped_grads: Clipped sum of gradients with GroupNorm, ResNet-50, (.*)",
    "Ensemble of 8 ResNet-18": r"fresnet vmap: Ensemble of 8 ResNet-18, (.*), 16 images of 64 px",
    "The same work in JAX": r"fresnet: (.*) beside Flax, (.*)",
    "Reading images on one core": r"(.*): Reading images, .*",
    "Inference on a GPU": r"fresnet: Inference on a GPU, (.*)",
    "Training step on a GPU": r"fresnet compiled: Training step on a GPU, (.*)",
}
"""Each heading of the picture, and which of our contenders in which tables are below it.

A label keeps what is in parentheses.
"""

LABELS = {
    "per_sample_norms": "norms",
    "clipped_grads": "clipped sum",
    "Per-sample gradients": "per sample",
    "Ensemble of 8 ResNet-18": "ensemble",
    ", 16 images of 64 px": "",
    "Inference": "inference",
    "Training step": "step",
}
"""What labels have for longer words."""

THEIRS = {
    "fresnet": "fresnet in float32",
    "loop": "a loop",
    "one batched gradient": "one gradient of the batch",
    "torchvision, backward()": "torchvision",
    "Opacus, ghost clipping": "Opacus' ghost clipping",
    "Opacus, fast gradient clipping": "Opacus' fast gradient clipping",
}
"""The picture's name for a rival, if its own name cannot be read without the table."""

WIDTH, DPI, LINE = 6.0, 120, 0.235
"""Inches, and dots in each: a phone shows half of the 720 dots, with letters of 10 dots."""

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
    """All targets of speed, except those for the default allocator; the best of a group first."""
    groups: dict[str, list[Line]] = {heading: [] for heading in GROUPS}
    for target in targets():
        entry = results.get((target.title, target.setting))
        if entry is None or target.memory or target.setting == DEFAULT:
            continue
        name = f"{target.name}: {target.title}"
        found = {heading: re.fullmatch(words, name) for heading, words in GROUPS.items()}
        heading, match = next((heading, match) for heading, match in found.items() if match)
        job = ", ".join(match.groups())
        for long, short in LABELS.items():
            job = job.replace(long, short)
        rows = [Measured(**row) for row in entry["rows"]]
        rival = best(rows, target.others)
        line = Line(job, THEIRS.get(rival, rival), *quartiles(ratios(rows, target.name, rival)))
        groups[heading].append(line)
    return {
        heading: sorted(group, key=lambda line: -line.middle)
        for heading, group in groups.items()
        if group
    }


def draw(results: Results, path: Path) -> None:
    """Draw how many times as fast as its best rival fresnet is in each job."""
    groups = by_heading(results)
    every = [line for group in groups.values() for line in group]
    count = len(every) + 1.6 * len(groups)
    height = LINE * count + 2.2
    figure = Figure(figsize=(WIDTH, height))
    note = (
        "A ResNet-50 on a CPU, unless a heading says otherwise.\n"
        "Dot: median. Line: quartile to quartile. Grey: no clear\n"
        "difference, for the quartiles lie on both sides of 1."
    )
    title = "How many times as fast fresnet is"
    figure.text(0.02, 1 - 0.15 / height, title, size=17, weight="bold", va="top")
    figure.text(0.02, 1 - 0.52 / height, note, size=12, va="top")
    axis = figure.add_axes((0.5, 0.35 / height, 0.38, LINE * count / height))
    axis.set_xscale("log")
    axis.set_xlim(min(line.low for line in every) / 1.06, max(line.high for line in every) * 1.06)
    axis.set_ylim(count, 0)
    shown = [tick for tick in TICKS if axis.get_xlim()[0] < tick < axis.get_xlim()[1]]
    axis.minorticks_off()
    axis.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axis.set_yticks([])
    axis.tick_params(top=True, labeltop=True, length=0, labelsize=12)
    axis.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)
    axis.axvline(1, color="black", linewidth=1.2)
    above: dict[str, Any] = {"y": -1.7, "size": 12}
    axis.text(1, s="\N{LEFTWARDS ARROW} slower ", ha="right", color=SLOWER, **above)
    axis.text(1, s=" faster \N{RIGHTWARDS ARROW}", ha="left", color=FASTER, **above)

    def write(x: float, y: float, text: str, **style: Any) -> None:
        """Write at `x`, a share of the figure's width."""
        box = axis.get_position()
        place = ((x - box.x0) / box.width, y)
        transform = axis.get_yaxis_transform()
        axis.text(*place, text, transform=transform, va="center", size=12, **style)

    y = 0.0
    for heading, group in groups.items():
        y += 1
        rivals = dict.fromkeys(line.rival for line in group)
        against = f", against {group[0].rival}" if len(rivals) == 1 else ", against"
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        write(0.02, y, heading + against, weight="bold", bbox=behind)
        for line in group:
            y += 1
            colour = FASTER if line.low > 1 else SLOWER if line.high < 1 else EVEN
            axis.barh(y, line.middle - 1, left=1, height=0.56, color=colour, alpha=0.3)
            axis.plot((line.low, line.high), (y, y), color=colour, linewidth=2.2)
            axis.plot(line.middle, y, "o", color=colour, markersize=6)
            words = line.job if len(rivals) == 1 else ", ".join(filter(None, line[1::-1]))
            write(0.02, y, words)
            write(0.98, y, f"{line.middle:.2f}", color=colour, ha="right")
        y += 0.6
    figure.savefig(path, dpi=DPI, pil_kwargs={"optimize": True})
