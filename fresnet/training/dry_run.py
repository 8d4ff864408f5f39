"""What a run would be, as a table: its recipe, its images, and the time that a step takes."""

import textwrap
import time
from collections.abc import Mapping

import torch

from fresnet import data, tree
from fresnet.data import AreaCrop, Augmentation, ScaleCrop
from fresnet.data.presets import Preset
from fresnet.training.course import Course
from fresnet.training.plan import Run
from fresnet.training.processes import check_same
from fresnet.training.recipes import Recipe, average_decay_of, schedule_of


def tried(course: Course) -> str:
    """Take the next step of a run, write nothing, and say in a table what the run would be.

    Where batches differ in size, a step is taken on a smallest one too.

    Raises:
      FresnetError: if the run would refuse these steps.
    """
    run, order, step = course.run, course.order, course.step
    check_same(course.state, course.processes.group)
    places = next(course.places(), None) or _places(course, 0)
    began = time.perf_counter()
    (batch,) = course.batches([places])
    read = time.perf_counter()
    course.take(batch)
    seen = "no image can be read"
    if course.unread is not None:
        seen = f"loss {float(course.unread[1].loss):.3f}"
    computed = time.perf_counter()
    if order.size % course.per_epoch:
        (smallest,) = course.batches([_places(course, course.per_epoch - 1)])
        course.take(smallest)
    course.read()
    parameters = sum(leaf.numel() for leaf in tree.leaves(course.state.params.weights))
    images, validation = len(course.training.files), len(course.validation.files)
    rows = {
        "network": f"{run.network}, {parameters:,} parameters",
        "images": f"{images:,} to train on, {validation:,} to validate",
        **_rows(run, course.per_epoch, course.processes.size),
        **({"goes on": f"after step {step:,}, from {course.out}"} if step else {}),
        "next step" if step else "first step": f"{seen}; {read - began:.2f} s to read "
        f"images, {computed - read:.2f} s more",
        "all steps": f"{_duration(course.steps * (computed - read))} at that rate, if images "
        "are read meanwhile",
    }
    lines = (
        textwrap.fill(text, 79, initial_indent=f"{name:12}", subsequent_indent=" " * 12)
        for name, text in rows.items()
    )
    return "\n".join(lines)


def _places(course: Course, step: int) -> list[data.Place]:
    rank, ranks = course.processes.rank, course.processes.size
    return data.batch_at(course.order, step, rank=rank, ranks=ranks)


def _rows(run: Run, per_epoch: int, processes: int) -> Mapping[str, str]:
    """The rows of the table about the recipe."""
    recipe = run.recipe
    steps = recipe.epochs * per_epoch
    labels = {
        "smoothed by": recipe.label_smoothing,
        "mixup": recipe.mixup,
        "cutmix": recipe.cutmix,
    }
    return {
        "batches": f"{recipe.batch:,} images"
        + f", {recipe.batch // processes:,} in each process" * (processes > 1)
        + f", in {run.micro_batches} parts" * (run.micro_batches > 1),
        "length": f"{recipe.epochs:,} epochs of {per_epoch:,} steps, {steps:,} in all",
        "rate": _rates(recipe, per_epoch),
        **_parts(recipe, per_epoch),
        "decay": f"{recipe.weight_decay:g}" + ("" if recipe.decay_norms else ", of all but norms"),
        "training": _words(recipe.augmentation),
        "labels": ", ".join(f"{name} {value:g}" for name, value in labels.items() if value)
        or "as they are",
        "average": f"decay {average_decay_of(recipe):.6g} a step" if recipe.average else "none",
        "evaluation": _words(recipe.preset),
    }


def _parts(recipe: Recipe, per_epoch: int) -> Mapping[str, str]:
    """The rows about parts of the network that train in another way, or not at all."""
    rows = {}
    if recipe.head_rate is not None:
        rows["head"] = _rates(recipe._replace(rate=recipe.head_rate), per_epoch)
    if recipe.frozen:
        rows["frozen"] = ", ".join(recipe.frozen)
    return rows


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
