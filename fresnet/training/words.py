"""What a run is, as the rows of a table."""

import textwrap
from collections.abc import Mapping

import torch

from fresnet.data import AreaCrop, Augmentation, ScaleCrop
from fresnet.data.presets import Preset
from fresnet.training.plan import Run
from fresnet.training.recipes import Recipe, average_decay_of, momentum_of, schedule_of


def table(rows: Mapping[str, str]) -> str:
    """The rows, 79 columns wide."""
    lines = (
        textwrap.fill(text, 79, initial_indent=f"{name:12}", subsequent_indent=" " * 12)
        for name, text in rows.items()
    )
    return "\n".join(lines)


def rows(run: Run, per_epoch: int, processes: int) -> Mapping[str, str]:
    """The rows of the table about the recipe."""
    recipe = run.recipe
    steps, across = recipe.epochs * per_epoch, min(run.norms_across, processes)
    drops = {"paths": recipe.drop_path, "features": recipe.dropout}
    labels = {
        "smoothed by": recipe.label_smoothing,
        "mixup": recipe.mixup,
        "cutmix": recipe.cutmix,
    }
    return {
        "batches": f"{recipe.batch:,} images"
        + f", {recipe.batch // processes:,} in each process" * (processes > 1)
        + f", in {run.micro_batches} parts" * (run.micro_batches > 1)
        + f", norms across {across} processes" * (across > 1),
        "length": f"{recipe.epochs:,} epochs of {per_epoch:,} steps, {steps:,} in all",
        "rate": _rates(recipe, per_epoch),
        **_parts(recipe, per_epoch),
        "optimizer": (f"LARS, trust {recipe.trust:g}" if recipe.trust else "SGD")
        + f", momentum {momentum_of(recipe):g}",
        "decay": f"{recipe.weight_decay:g}" + _decaying(recipe),
        "training": _words(recipe.augmentation),
        "labels": _named(labels) or "as they are",
        **({"dropped": _named(drops)} if any(drops.values()) else {}),
        "average": f"decay {average_decay_of(recipe):.6g} a step" if recipe.average else "none",
        "evaluation": _words(recipe.preset),
    }


def _named(values: Mapping[str, float]) -> str:
    """Those values that are not 0."""
    return ", ".join(f"{name} {value:g}" for name, value in values.items() if value)


def _parts(recipe: Recipe, per_epoch: int) -> Mapping[str, str]:
    """The rows about parts of the network that train in another way, or not at all."""
    rows = {}
    if recipe.head_rate is not None:
        rows["head"] = _rates(recipe._replace(rate=recipe.head_rate), per_epoch)
    if recipe.frozen:
        rows["frozen"] = ", ".join(recipe.frozen)
    return rows


def _decaying(recipe: Recipe) -> str:
    if recipe.trust:
        return ", of all but norms and biases"
    return "" if recipe.decay_norms else ", of all but norms"


def _rates(recipe: Recipe, per_epoch: int) -> str:
    """The learning rate at first, and after those epochs that show how it goes on."""
    rate = schedule_of(recipe, per_epoch)
    falling = () if recipe.drops else ((recipe.warm_up + recipe.epochs) / 2, recipe.epochs)
    start = torch.zeros((), dtype=torch.float32, device="cpu")
    first, *later = (
        f"{float(rate(start + round(epoch * per_epoch))):.3g} after {epoch:.3g}"
        for epoch in sorted({0, recipe.warm_up, *recipe.drops, *falling})
    )
    return ", ".join([first.replace("after 0", "at first"), *later]) + " epochs"


def _words(settings: Augmentation | Preset | AreaCrop | ScaleCrop) -> str:
    """What the settings ask for, apart from those that hardly anyone changes."""
    return ", ".join(
        _word(name.replace("_", " "), value)
        for name, value in settings._asdict().items()
        if value and name not in ("mean", "std", "corner", "channels")
    )


def _word(name: str, value: object) -> str:
    if isinstance(value, AreaCrop | ScaleCrop):
        return f"{name} ({_words(value)})"
    if value is True:
        return name
    if isinstance(value, tuple):
        return f"{name} {value[0]:.3g} to {value[1]:.3g}"
    return f"{name} {getattr(value, '__name__', value)}"
