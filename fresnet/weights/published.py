"""The family and its published weights: sizes, presets, and accuracies as published."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fresnet.data.presets import Sides, preset_of
from fresnet.errors import FresnetError, suggestion
from fresnet.network.family import SPECS
from fresnet.network.init import init
from fresnet.network.nodes import Stem3x3
from fresnet.network.summary import summary

DATA = Path(__file__).with_name("published.txt")

SIZES = """\
A network's MACs are for 224x224 and 1,000 classes, or for CIFAR's 32x32 and 10;
its weights', for the crop in their preset: RESIZE,CROP,INTERPOLATION."""


class Published(NamedTuple):
    """Weights that someone has published.

    network: the name in `SPECS`.
    name: torchvision's, or that of a repository, which `load` takes.
    preset: how images are prepared for them, as `preset_of` reads it.
    top1: the accuracy in percent that their publisher states, or None.
    """

    network: str
    name: str
    preset: str
    top1: float | None


class Row(NamedTuple):
    """A network on images of its usual size, or with weights on those of their preset."""

    network: str
    weights: Published | None
    parameters: int
    multiply_adds: int
    size: Sides


@cache
def published() -> tuple[Published, ...]:
    """All weights that the data file lists."""
    found = [line.split() for line in _lines() if line and not line.startswith("#")]
    return tuple(
        Published(network, name, preset, None if top1 == "-" else float(top1))
        for network, name, preset, top1 in found
    )


def _lines() -> list[str]:
    return DATA.read_text(encoding="utf-8").splitlines()


def rows(pattern: str = "*") -> list[Row]:
    """The networks whose names match, with all their weights, and other weights that match.

    Raises:
      FresnetError: if nothing matches.
    """
    found: list[Row] = []
    for network in SPECS:
        matches = fnmatchcase(network, pattern)
        chosen = [
            weights
            for weights in published()
            if weights.network == network and (matches or fnmatchcase(weights.name, pattern))
        ]
        if matches or chosen:
            found += _measured(network, chosen)
    if not found:
        known = [*SPECS, *(weights.name for weights in published())]
        raise FresnetError(f"nothing matches {pattern!r}; {suggestion(pattern, known)}")
    return found


def _measured(network: str, chosen: Sequence[Published]) -> list[Row]:
    """A network's row, and those of its weights."""
    usual, classes = (32, 10) if SPECS[network].stem is Stem3x3 else (224, 1000)
    params = init(0, SPECS[network], num_classes=classes, device="meta")
    count = cache(lambda size: summary(params, size))
    found = []
    for weights in (None, *chosen):
        size = preset_of(weights.preset).crop if weights else usual
        found.append(Row(network, weights, count(size).parameters, count(size).multiply_adds, size))
    return found


def table(found: Sequence[Row]) -> str:
    """The rows, 80 columns wide, and where the accuracies come from."""
    cells = [("network", "parameters", "MACs (M)", "top-1"), ("  weights", "preset", "", "")]
    for row in found:
        macs = f"{row.multiply_adds / 1e6:,.0f}"
        if row.weights is None:
            cells.append((row.network, f"{row.parameters:,}", macs, ""))
        else:
            cells.append((f"  {row.weights.name}", row.weights.preset, macs, _top1(row.weights)))
    names, *others = zip(*cells, strict=True)
    widths = [max(map(len, column)) for column in others]
    left = min(max(map(len, names)), 80 - sum(2 + width for width in widths))
    lines = []
    for name, *texts in cells:
        right = "".join(f"  {text:>{width}}" for text, width in zip(texts, widths, strict=True))
        lines += [f"{name:<{left}}{right}"] if len(name) <= left else [name, " " * left + right]
    rule = "-" * max(map(len, lines))
    source = [line.removeprefix("# ") for line in _lines() if line.startswith("#")]
    lines = [*lines[:2], rule, *lines[2:], rule, SIZES, *source]
    return "\n".join(map(str.rstrip, lines))


def markdown(found: Sequence[Row]) -> str:
    """The rows in Markdown, with every digit of the multiply-adds."""
    lines = [
        "| network, and its weights | parameters | multiply-adds | size | preset | top-1 |",
        "| --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for row in found:
        macs = f"{row.multiply_adds:,} | {row.size}"
        if row.weights is None:
            lines.append(f"| {row.network} | {row.parameters:,} | {macs} | | |")
        else:
            name, preset, top1 = row.weights.name, row.weights.preset, _top1(row.weights)
            lines.append(f"| - {name} | | {macs} | {preset} | {top1} |")
    return "\n".join(lines)


def _top1(weights: Published) -> str:
    return "" if weights.top1 is None else f"{weights.top1:.3f}"
