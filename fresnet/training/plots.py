"""Pictures of a run: its curves, and which classes it confuses."""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fresnet.training.record import Line

POINTS = 500
"""How many points a curve has at most. Each is the mean of equally many steps."""

CELLS = 1000
"""How many cells a side of a confusion has at most. Each is of equally many classes."""


def draw_curves(lines: Iterable[Line], per_epoch: int, path: Path) -> None:
    """Draw loss and accuracy over epochs, in training and in evaluation."""
    train: list[tuple[float, float, float]] = []
    evaluations: list[tuple[float, float, float, float]] = []
    for line in lines:
        epoch = line["step"] / per_epoch
        if "train" in line:
            train.append((epoch, line["train"]["loss"], line["train"]["accuracy"]))
        if "evaluation" in line:
            found = line["evaluation"]
            evaluations.append((epoch, found["loss"], found["top1"], found["top5"]))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs, losses, accuracies = _means(train) or ([], [], [])
    at, evaluation_losses, top1, top5 = zip(*evaluations, strict=True) if evaluations else [()] * 4
    left.plot(epochs, losses, label="training")
    left.plot(at, evaluation_losses, "o-", markersize=3, label="validation")
    left.set(xlabel="epoch", ylabel="loss")
    right.plot(epochs, [100 * share for share in accuracies], label="training")
    right.plot(at, [100 * share for share in top1], "o-", markersize=3, label="validation")
    right.plot(at, [100 * share for share in top5], "o:", markersize=3, label="validation, top 5")
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 102))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150, format="png")


def draw_confusion(confusion: Tensor, classes: Sequence[str], path: Path) -> None:
    """Draw which share of each class's images was taken for which class."""
    counts = _grouped(_grouped(confusion, 0), 1)
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    few, end = len(classes) <= 20, len(classes) - 0.5
    side = 2.5 + 0.45 * len(classes) if few else 9
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    edges = (-0.5, end, end, -0.5)
    picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100, extent=edges)
    axes.set(xlabel="taken for", ylabel="class")
    if few:
        names = [_label(name) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), names)
        for i, j in confusion.nonzero().tolist():
            colour = "white" if shares[i, j] > 50 else "black"
            count = str(int(confusion[i, j]))
            axes.text(j, i, count, ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(picture, ax=axes, label="% of the class", shrink=0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font may lack letters of a name
        figure.savefig(path, dpi=150, format="png")


def _grouped(counts: Tensor, dim: int) -> Tensor:
    """The counts of groups of neighbouring classes, if there are more classes than cells."""
    classes = counts.shape[dim]
    groups = torch.arange(classes) // -(-classes // CELLS)
    shape = list(counts.shape)
    shape[dim] = int(groups[-1]) + 1
    return counts.new_zeros(shape).index_add_(dim, groups, counts)


def _label(name: str) -> str:
    """At most 24 letters of a name; "$" is escaped, as it would begin a formula."""
    shown = name.encode("utf-8", "backslashreplace").decode()  # bytes that are no letters
    return (shown if len(shown) <= 24 else f"{shown[:21]}...").replace("$", r"\$")


def _means(rows: Sequence[tuple[float, ...]]) -> list[list[float]]:
    """The columns of at most `POINTS` means of consecutive rows."""
    size = max(1, -(-len(rows) // POINTS))
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    means = [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in groups]
    return [list(column) for column in zip(*means, strict=True)]
