"""What a run would be, as a table: its recipe, its images, and the time that a step takes."""

import textwrap
import time
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch

from fresnet import data, tree
from fresnet.data import AreaCrop, Augmentation, Folder, Images, Order, ScaleCrop
from fresnet.data.loading import OnBroken
from fresnet.data.preprocess import Preset
from fresnet.errors import FresnetError
from fresnet.network.nodes import Params
from fresnet.training.plan import Run, assemble
from fresnet.training.processes import Processes
from fresnet.training.recipes import Recipe, average_decay_of, schedule_of


class _FirstStep(NamedTuple):
    loss: float
    reading_s: float  # to read its images
    computing_s: float


def tried(
    plan: Run,
    params: Params,
    folders: tuple[Folder, Folder],
    processes: Processes,
    *,
    recompute: bool,
    broken: OnBroken,
) -> str:
    """Take one step of a run, write nothing, and say in a table what the run would be."""
    training, validation = folders
    state, train_step, order = assemble(plan, params, len(training.files), processes, recompute)
    began = time.perf_counter()
    batch = _first_batch(plan, training, order, processes, broken)
    read = time.perf_counter()
    x, y = batch.x.to(processes.device), batch.y.to(processes.device)
    _, metrics = train_step(state, (x, y))
    loss = float(metrics.loss)
    first = _FirstStep(loss, read - began, time.perf_counter() - read)
    parameters = sum(leaf.numel() for leaf in tree.leaves(params.weights))
    rows = {
        "network": f"{plan.network}, {parameters:,} parameters",
        "images": f"{len(training.files):,} to train on, {len(validation.files):,} to validate",
        **_rows(plan, data.steps_per_epoch(order), processes.size, first),
    }
    lines = (
        textwrap.fill(text, 79, initial_indent=f"{name:12}", subsequent_indent=" " * 12)
        for name, text in rows.items()
    )
    return "\n".join(lines)


def _first_batch(
    plan: Run, training: Folder, order: Order, processes: Processes, broken: OnBroken
) -> data.Batch:
    transform = partial(data.augment, augmentation=plan.recipe.augmentation)
    places = data.batches(order, 0, 1, rank=processes.rank, ranks=processes.size)
    (batch,) = data.loader(Images(training, transform, plan.seed), places, broken=broken)
    if not batch.places:
        raise FresnetError(
            f"no image of the first batch can be read; the first is {batch.broken[0]}"
        )
    return batch


def _rows(plan: Run, per_epoch: int, processes: int, first: _FirstStep) -> Mapping[str, str]:
    """The rows of the table about the recipe and its first step."""
    recipe = plan.recipe
    steps = recipe.epochs * per_epoch
    labels = {
        "smoothed by": recipe.label_smoothing,
        "mixup": recipe.mixup,
        "cutmix": recipe.cutmix,
    }
    return {
        "batches": f"{recipe.batch:,} images"
        + f", {recipe.batch // processes:,} in each process" * (processes > 1)
        + f", in {plan.micro_batches} parts" * (plan.micro_batches > 1),
        "length": f"{recipe.epochs:,} epochs of {per_epoch:,} steps, {steps:,} in all",
        "rate": _rates(recipe, per_epoch),
        "decay": f"{recipe.weight_decay:g}" + ("" if recipe.decay_norms else ", of all but norms"),
        "training": _words(recipe.augmentation),
        "labels": ", ".join(f"{name} {value:g}" for name, value in labels.items() if value)
        or "as they are",
        "average": f"decay {average_decay_of(recipe):.6g} a step" if recipe.average else "none",
        "evaluation": _words(recipe.preset),
        "first step": f"loss {first.loss:.3f}; {first.reading_s:.2f} s to read images, "
        f"{first.computing_s:.2f} s more",
        "all steps": f"{_duration(steps * first.computing_s)} at that rate, if images are read "
        "meanwhile",
    }


def _rates(recipe: Recipe, per_epoch: int) -> str:
    """The learning rate at first, and after those epochs that show how it goes on."""
    rate = schedule_of(recipe, per_epoch)
    cosine = () if recipe.drops else ((recipe.warm_up + recipe.epochs) / 2, recipe.epochs)
    start = torch.zeros((), dtype=torch.float32, device="cpu")
    first, *later = (
        f"{float(rate(start + round(epoch * per_epoch))):.3g} after {epoch:.3g}"
        for epoch in sorted({0, recipe.warm_up, *recipe.drops, *cosine})
    )
    return ", ".join([first.replace("after 0", "at first"), *later]) + " epochs"


def _words(settings: Augmentation | Preset | AreaCrop | ScaleCrop) -> str:
    """What the settings ask for, apart from those that hardly anyone changes."""
    return ", ".join(
        _word(name.replace("_", " "), value)
        for name, value in settings._asdict().items()
        if value and name not in ("mean", "std", "corner")
    )


def _word(name: str, value: object) -> str:
    if isinstance(value, AreaCrop | ScaleCrop):
        return f"{name} ({_words(value)})"
    if value is True:
        return name
    if isinstance(value, tuple):
        return f"{name} {value[0]:.3g} to {value[1]:.3g}"
    return f"{name} {getattr(value, '__name__', value)}"


def _duration(seconds: float) -> str:
    for length, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {name}"
    return f"{seconds:.3g} seconds"
