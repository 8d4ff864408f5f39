"""`python -m fresnet train`: a recipe on a folder of images."""

import argparse
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from fresnet import tree
from fresnet.data import scan, scan_shards
from fresnet.data.loading import OnBroken
from fresnet.data.shards import Scanned, shards_in
from fresnet.errors import FresnetError, reason, suggestion
from fresnet.network.check import first_conv
from fresnet.network.family import SPECS
from fresnet.network.init import init, with_head
from fresnet.network.nodes import NoHead, Params
from fresnet.network.rewrites import cast
from fresnet.training.course import CONFUSION, CURVES, LABELS, NETWORK, Course, Options, Outcome
from fresnet.training.dry_run import tried
from fresnet.training.plan import Run
from fresnet.training.processes import Processes, joined, share
from fresnet.training.recipes import RECIPES, Recipe, with_batch, with_crop, with_epochs
from fresnet.training.record import in_words
from fresnet.training.resuming import CHECKPOINTS
from fresnet.training.run import train
from fresnet.weights.files import load

MOST_SECONDS = 10**7
"""The longest that a process may wait for another: four months."""


def run(args: argparse.Namespace) -> str:
    """Do what the command asks, and return what it says; only the first process says anything."""
    if not 0 < args.timeout <= MOST_SECONDS:
        raise FresnetError(
            f"--timeout expects a positive number of at most {MOST_SECONDS}; got {args.timeout}"
        )
    with joined(timeout_s=args.timeout) as processes:
        recipe = _recipe(args)
        folders = _folders(args)
        recipe = _with_batch(recipe, args, folders[0])
        share(recipe.batch, processes.size)
        plan, params = _begun(args, recipe, len(folders[0].classes))
        params = tree.map(lambda leaf: leaf.to(processes.device), params)
        if args.dry_run:
            options = Options(args.recompute, 0, _on_broken(args), args.keep, args.save_every)
            said = tried(Course(plan, params, folders, args.out, processes, options))
        else:
            said = _told(_trained(args, plan, params, folders, processes), args.out)
        return said if processes.rank == 0 else ""


def _trained(
    args: argparse.Namespace,
    plan: Run,
    params: Params,
    folders: tuple[Scanned, Scanned],
    processes: Processes,
) -> Outcome:
    """The outcome of the run; an error says in a line why there is none."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        return train(
            plan,
            params,
            folders,
            args.out,
            processes,
            recompute=args.recompute,
            workers=_cpus() // processes.size if args.workers is None else args.workers,
            broken=_on_broken(args),
            keep=args.keep,
            save_every=args.save_every,
        )
    except OSError as error:
        raise FresnetError(f"cannot write to {args.out}: {reason(error)}") from error
    except KeyboardInterrupt as stop:
        raise FresnetError(
            f"stopped; the same command goes on from {args.out / CHECKPOINTS}"
        ) from stop


def _recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that is named, changed as the options say."""
    if args.recipe not in RECIPES:
        raise FresnetError(f"unknown --recipe {args.recipe!r}; {suggestion(args.recipe, RECIPES)}")
    if args.arch is not None and args.arch not in SPECS:
        raise FresnetError(f"unknown --arch {args.arch!r}; {suggestion(args.arch, SPECS)}")
    recipe = RECIPES[args.recipe]
    positive = ("epochs", "batch", "crop", "rate", "head_rate", "micro_batches", "keep")
    for name in (*positive, "save_every", "norms_across"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            option = name.replace("_", "-")
            raise FresnetError(f"--{option} expects a positive number; got {value}")
    if args.workers is not None and args.workers < 0:
        raise FresnetError(f"--workers expects a number from 0 on; got {args.workers}")
    if not 0 <= args.seed < 2**63:
        raise FresnetError(f"--seed expects a number from 0 to below 2**63; got {args.seed}")
    if args.epochs is not None:
        recipe = with_epochs(recipe, args.epochs)
    if args.crop is not None:
        recipe = with_crop(recipe, args.crop)
    for name in ("drop_path", "dropout"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1:
            option = name.replace("_", "-")
            raise FresnetError(f"--{option} expects a number from 0 to below 1; got {value}")
        if value is not None:
            recipe = recipe._replace(**{name: value})
    return recipe._replace(head_rate=args.head_rate, frozen=tuple(args.freeze))


def _folders(args: argparse.Namespace) -> tuple[Scanned, Scanned]:
    """The images to train on, and those to validate on."""
    try:
        training = _scanned(args.folder / "train")
        return training, _scanned(args.validation or args.folder / "val", training.classes)
    except FresnetError as error:
        raise FresnetError(re.sub("^scan(_shards)? ", "", str(error))) from error


def _scanned(root: Path, classes: Sequence[str] | None = None) -> Scanned:
    """The images in a folder: of its folders, or of its shards if it has tar files alone."""
    shards = shards_in(root)
    return scan_shards(shards, classes=classes) if shards else scan(root, classes=classes)


def _with_batch(recipe: Recipe, args: argparse.Namespace, training: Scanned) -> Recipe:
    """The recipe with the batch and rate that are asked for, or that go with so many images.

    The recipe's batch is halved until an epoch has 8 steps, though not below 16 images.
    """
    images, batch = len(training.files), args.batch or recipe.batch
    if args.batch is None:
        while batch > 16 and 8 * batch > images:
            batch //= 2
        batch = min(batch, images)
    if batch > images:
        raise FresnetError(
            f"a batch of {batch} images is more than the {images} in {training.root}: choose a "
            "smaller --batch; the rate goes with it"
        )
    recipe = recipe if batch == recipe.batch else with_batch(recipe, batch)
    return recipe if args.rate is None else recipe._replace(rate=args.rate)


def _begun(args: argparse.Namespace, recipe: Recipe, classes: int) -> tuple[Run, Params]:
    """The run, and the network that it begins with, on the CPU."""
    name, params = _network(args, classes)
    plan = Run(
        network=f"{name}, {classes} classes",
        recipe=recipe,
        seed=args.seed,
        precision=torch.bfloat16 if args.bfloat16 else None,
        micro_batches=args.micro_batches,
        norms_across=args.norms_across,
    )
    return plan, params


def _network(args: argparse.Namespace, classes: int) -> tuple[str, Params]:
    """The name, in words, of the network to begin with, and the network itself on the CPU."""
    if args.weights is None:
        arch = args.arch or "resnet50"
        return arch, init(args.seed, SPECS[arch], num_classes=classes)
    params = cast(load(args.weights, architecture=args.arch), torch.float32)
    weights = params.weights
    if (channels := first_conv(weights).shape[1]) != 3:
        raise FresnetError(
            f"{args.weights} takes images of {channels} channels; train has images of 3"
        )
    name = f"{args.weights} with its head"
    if isinstance(weights.head, NoHead) or len(weights.head.bias) != classes:
        params = with_head(params, num_classes=classes, generator=args.seed)
        name = f"{args.weights} with a fresh head"
    return name, params


def _told(outcome: Outcome, out: Path) -> str:
    """What the command says at its end: result, files, how to classify with it, broken images."""
    found, broken = outcome.evaluation, outcome.broken
    lines = [
        f"{in_words(found)} on {found.images:,} images",
        f"wrote {NETWORK}, {LABELS}, {CURVES}, {CONFUSION} and log.jsonl to {out}",
        f"python -m fresnet predict IMAGE --weights {out / NETWORK}",
    ]
    if broken:
        shown = broken[:10]
        lines += [f"left out {len(broken)} images that cannot be read:", *shown]
        lines += [f"and {len(broken) - len(shown)} more, in log.jsonl"] * (len(broken) > len(shown))
    return "\n".join(lines)


def _on_broken(args: argparse.Namespace) -> OnBroken:
    return "skip" if args.skip_broken else "raise"


def _cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
