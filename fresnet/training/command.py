"""`python -m fresnet train`: a recipe on a folder of images."""

import argparse
import math
import os
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fresnet import data, tree
from fresnet.data import Folder, Images, scan
from fresnet.errors import FresnetError, reason, suggestion
from fresnet.network.init import fresh_head, init
from fresnet.network.nodes import Params
from fresnet.network.specs import SPECS
from fresnet.training.processes import Processes, joined, share
from fresnet.training.recipes import (
    RECIPES,
    Recipe,
    average_decay_of,
    schedule_of,
    with_batch,
    with_crop,
    with_epochs,
)
from fresnet.training.run import (
    CHECKPOINTS,
    CONFUSION,
    CURVES,
    LABELS,
    NETWORK,
    Outcome,
    Run,
    assemble,
    train,
)
from fresnet.weights.files import load


def run(args: argparse.Namespace) -> str:
    with joined(timeout_s=args.timeout) as processes:
        recipe = _recipe(args)
        share(recipe.batch, processes.size)
        training = scan(args.folder / "train")
        validation = scan(args.validation or args.folder / "val", classes=training.classes)
        if recipe.batch > len(training.files):
            raise FresnetError(
                f"a batch of {recipe.batch} images is more than the {len(training.files)} in "
                f"{training.root}: choose a smaller --batch; the rate goes with it"
            )
        name, params = _network(args, len(training.classes))
        params = tree.map(lambda leaf: leaf.to(processes.device), params)
        plan = Run(
            network=f"{name}, {len(training.classes)} classes",
            recipe=recipe,
            seed=args.seed,
            precision=torch.bfloat16 if args.bfloat16 else None,
            micro_batches=args.micro_batches,
            norms_across=args.norms_across,
        )
        if args.dry_run:
            said = _tried(plan, params, (training, validation), processes, args)
            return said if processes.rank == 0 else ""
        workers = _cpus() // processes.size if args.workers is None else args.workers
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            outcome = train(
                plan,
                params,
                (training, validation),
                args.out,
                processes,
                recompute=args.recompute,
                workers=workers,
                broken="skip" if args.skip_broken else "raise",
                keep=args.keep,
                save_every=args.save_every,
            )
        except OSError as error:
            raise FresnetError(f"cannot write to {args.out}: {reason(error)}") from error
        except KeyboardInterrupt as stop:
            raise FresnetError(
                f"stopped; the same command goes on from {args.out / CHECKPOINTS}"
            ) from stop
        return _told(outcome, recipe, args.out) if processes.rank == 0 else ""


def _recipe(args: argparse.Namespace) -> Recipe:
    """The one that is named, changed as the options say."""
    if args.recipe not in RECIPES:
        raise FresnetError(f"unknown --recipe {args.recipe!r}; {suggestion(args.recipe, RECIPES)}")
    recipe = RECIPES[args.recipe]
    for name in ("epochs", "batch", "crop", "rate", "micro_batches", "keep", "save_every"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            option = name.replace("_", "-")
            raise FresnetError(f"--{option} expects a positive number; got {value}")
    if not 0 <= args.seed < 2**63:
        raise FresnetError(f"--seed expects a number from 0 to below 2**63; got {args.seed}")
    if args.epochs is not None:
        recipe = with_epochs(recipe, args.epochs)
    if args.batch is not None:
        recipe = with_batch(recipe, args.batch)
    if args.crop is not None:
        recipe = with_crop(recipe, args.crop)
    return recipe if args.rate is None else recipe._replace(rate=args.rate)


def _network(args: argparse.Namespace, classes: int) -> tuple[str, Params]:
    """The network to begin with, in words and on the CPU."""
    if args.weights is None:
        arch = args.arch or "resnet50"
        if arch not in SPECS:
            raise FresnetError(f"unknown --arch {arch!r}; {suggestion(arch, SPECS)}")
        return arch, init(args.seed, SPECS[arch], num_classes=classes)
    if args.arch is not None:
        raise FresnetError("--weights says itself which network it is; got --arch as well")
    weights, stats = load(args.weights)
    name = f"{args.weights} with its head"
    if len(weights.head.bias) != classes:
        head = fresh_head(args.seed, weights.head.weight.shape[1], classes)
        weights, name = weights._replace(head=head), f"{args.weights} with a fresh head"
    return name, Params(tree.map(Tensor.float, weights), tree.map(Tensor.float, stats))


def _tried(
    plan: Run,
    params: Params,
    folders: tuple[Folder, Folder],
    processes: Processes,
    args: argparse.Namespace,
) -> str:
    """What a run would be, in a table, after one step of it."""
    recipe, (training, validation) = plan.recipe, folders
    state, train_step, order = assemble(
        plan, params, len(training.files), processes, args.recompute
    )
    per_epoch = data.steps_per_epoch(order)
    transform = partial(data.augment, augmentation=recipe.augmentation)
    places = data.batches(order, 0, 1, rank=processes.rank, ranks=processes.size)
    began = time.perf_counter()
    (batch,) = data.loader(
        Images(training, transform, plan.seed),
        places,
        broken="skip" if args.skip_broken else "raise",
    )
    read = time.perf_counter()
    x, y = batch.x.to(processes.device), batch.y.to(processes.device)
    _, metrics = train_step(state, (x, y))
    loss = float(metrics.loss)
    took = time.perf_counter() - read
    steps = recipe.epochs * per_epoch
    parameters = sum(leaf.numel() for leaf in tree.leaves(params.weights))
    rows = {
        "network": f"{plan.network}, {parameters:,} parameters",
        "images": f"{len(training.files):,} to train on, {len(validation.files):,} to validate",
        "batches": f"{recipe.batch:,} images"
        + f", {recipe.batch // processes.size:,} in each process" * (processes.size > 1)
        + f", in {plan.micro_batches} parts" * (plan.micro_batches > 1),
        "length": f"{recipe.epochs:,} epochs of {per_epoch:,} steps, {steps:,} in all",
        "rate": _rates(recipe, per_epoch),
        "decay": f"{recipe.weight_decay:g}" + ("" if recipe.decay_norms else ", of all but norms"),
        "training": _words(recipe.augmentation),
        "labels": ", ".join(
            f"{name} {value:g}"
            for name, value in (
                ("smoothed by", recipe.label_smoothing),
                ("mixup", recipe.mixup),
                ("cutmix", recipe.cutmix),
            )
            if value
        )
        or "as they are",
        "average": f"decay {average_decay_of(recipe):.6g} a step" if recipe.average else "none",
        "evaluation": _words(recipe.preset),
        "first step": f"loss {loss:.3f}; {read - began:.2f} s to read images, {took:.2f} s more",
        "all steps": f"{_duration(steps * took)} at that rate, if images are read meanwhile",
    }
    lines = (
        textwrap.fill(text, 79, initial_indent=f"{name:12}", subsequent_indent=" " * 12)
        for name, text in rows.items()
    )
    return "\n".join(lines)


def _rates(recipe: Recipe, per_epoch: int) -> str:
    """Where the learning rate begins, and where it comes to."""
    rate = schedule_of(recipe, per_epoch)
    cosine = () if recipe.drops else ((recipe.warm_up + recipe.epochs) / 2, recipe.epochs)
    first, *later = (
        f"{float(rate(torch.tensor(float(round(epoch * per_epoch))))):.3g} after {epoch:.3g}"
        for epoch in sorted({0, recipe.warm_up, *recipe.drops, *cosine})
    )
    return ", ".join([first.replace("after 0", "at first"), *later]) + " epochs"


def _words(settings: Any) -> str:
    """What it asks for, but for what is custom."""
    return ", ".join(
        _word(name.replace("_", " "), value)
        for name, value in settings._asdict().items()
        if value and name not in ("mean", "std", "corner")
    )


def _word(name: str, value: Any) -> str:
    if hasattr(value, "_asdict"):
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


def _told(outcome: Outcome, recipe: Recipe, out: Path) -> str:
    found, broken, preset = outcome.evaluation, outcome.broken, recipe.preset
    lines = [
        f"top 1 {found.top1:.2%}, top 5 {found.top5:.2%}, loss {found.loss:.3f} "
        f"on {found.images:,} images",
        f"wrote {NETWORK}, {LABELS}, {CURVES}, {CONFUSION} and log.jsonl to {out}",
        f"python -m fresnet predict IMAGE --weights {out / NETWORK} \\",
        f"    --labels {out / LABELS} --preset {preset.resize},{preset.crop},"
        f"{preset.interpolation}",
    ]
    if broken:
        shown = broken[:10]
        lines += [f"left out {len(broken)} images that cannot be read:", *shown]
        lines += [f"and {len(broken) - len(shown)} more, in log.jsonl"] * (len(broken) > len(shown))
    return "\n".join(lines)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
