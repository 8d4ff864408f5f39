"""`predict`: the most probable classes of images."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fresnet.data.folder import EXTENSIONS, images_below, read_labels
from fresnet.data.preprocess import preprocess
from fresnet.data.presets import PRESETS, Preset, in_grey, preset_of, text_of
from fresnet.errors import FresnetError, listed, reason
from fresnet.network.check import first_conv
from fresnet.network.net import forward
from fresnet.network.nodes import NoHead, Params
from fresnet.weights.files import load
from fresnet.weights.notes import notes

BATCH = 16


def predict(args: argparse.Namespace) -> str:
    params = load(args.weights, architecture=args.arch)
    if isinstance(params.weights.head, NoHead):
        hint = "python -m fresnet train DIR --weights FILE gives it one"
        raise FresnetError(f"{args.weights} has no head, so it knows no classes: {hint}")
    classes = len(params.weights.head.bias)
    known = notes(args.weights)
    labels = _labels(args, known.labels, classes)
    preset = _preset(args, known.preset, first_conv(params.weights).shape[1])
    top = min(5, classes) if args.top is None else args.top
    if not 1 <= top <= classes:
        raise FresnetError(f"--top expects 1 to {classes}, the number of classes; got {top}")
    found: list[Mapping[str, Any]] = []
    broken: list[str] = []
    images = [image for place in args.images for image in _images(place, broken)]
    for image, probabilities in _probabilities(params, images, preset, broken):
        predictions = [
            {"class": index, "label": labels[index], "probability": probability}
            for probability, index in zip(*map(Tensor.tolist, probabilities.topk(top)), strict=True)
        ]
        found.append({"image": image, "preset": text_of(preset), "predictions": predictions})
    said = json.dumps(found, indent=2) if args.json else "\n\n".join(map(_table, found))
    if broken:
        if found:
            print(said, flush=True)
        count = f"{len(broken)} of {len(broken) + len(found)} cannot be read:"
        raise FresnetError("\n  ".join([count, *broken] if found or broken[1:] else broken))
    return said


def _images(place: str, broken: list[str]) -> list[str]:
    """An image, or all images in a folder; a folder of none is put to `broken`."""
    if not os.path.isdir(place):
        return [place]
    try:
        found = images_below(place)
        if not found:
            raise FresnetError(f"{place} has no file that ends in {', '.join(EXTENSIONS)}")
        return found
    except FresnetError as error:
        broken.append(str(error))
        return []


def _probabilities(
    params: Params, images: Sequence[str], preset: Preset, broken: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Each image with its probabilities `[k]`; what cannot be read is put to `broken`."""
    stem = first_conv(params.weights)
    for start in range(0, len(images), BATCH):
        read: list[tuple[str, Tensor]] = []
        for image in images[start : start + BATCH]:
            try:
                read.append((image, preprocess([image], preset)))
            except FresnetError as error:
                broken.append(str(error).replace("preprocess cannot read images[0], ", ""))
        if not read:
            continue
        names, xs = zip(*read, strict=True)
        with torch.no_grad():
            logits = forward(params, torch.cat(xs).to(stem.dtype)).float()
        if not logits.isfinite().all():
            raise FresnetError("the network's logits are not finite: these weights overflow")
        yield from zip(names, logits.softmax(1), strict=True)


def _table(found: Mapping[str, Any]) -> str:
    rows = (
        f"  {p['probability']:7.2%}  {p['label'] or 'class {class}'.format(**p)}"
        for p in found["predictions"]
    )
    return "\n".join([f"{found['image']} ({found['preset']})", *rows])


def _preset(args: argparse.Namespace, known: Preset | None, channels: int) -> Preset:
    """The preset that is asked for, or else the one that is known of the weights.

    A network of one channel takes it in grey.
    """
    if channels not in (1, 3):
        raise FresnetError(
            f"{args.weights} takes images of {channels} channels; predict has images of 1 or 3"
        )
    asked = None if args.preset is None else preset_of(args.preset)
    chosen = asked or known or PRESETS["imagenet-v1"]
    if channels == 1 != len(chosen.channels):
        chosen = in_grey(chosen)
        _tell(f"{args.weights} takes grey images: mean {chosen.mean[0]}, std {chosen.std[0]}")
    if asked is None and known is None:
        _tell(f"nothing tells how images for {args.weights} are prepared: imagenet-v1 is taken")
    elif known not in (None, chosen):
        _tell(f"{args.weights} was evaluated with {text_of(known)}; --preset is taken")
    return chosen


def _labels(
    args: argparse.Namespace, known: Sequence[str] | None, classes: int
) -> Sequence[str | None]:
    """The labels that are asked for, or else those that are known; None for each if none are."""
    place: Path = args.labels or args.weights
    labels = known
    if args.labels is not None:
        try:
            labels = read_labels(place)
        except (OSError, FresnetError) as error:
            raise FresnetError(f"cannot read labels {place}: {reason(error)}") from error
    if labels is None:
        return [None] * classes
    if len(labels) != classes:
        raise FresnetError(f"{place} has {len(labels)} labels; the network has {classes} classes")
    if known is not None and [*known] != [*labels]:
        _tell(f"{args.weights} has other labels, such as {listed(known)}; --labels are taken")
    return labels


def _tell(what: str) -> None:
    print(f"fresnet predict: {what}", file=sys.stderr)
