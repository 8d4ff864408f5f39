"""What stands in a file beside a network: how its images are prepared, and its classes' names."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fresnet.data.presets import Preset, as_preset, preset_of, sizes_of
from fresnet.errors import FresnetError, describe, reason, shown
from fresnet.network.check import first_conv
from fresnet.network.nodes import NoHead, Params
from fresnet.reading import as_path, from_json, spelt
from fresnet.weights.hub import configuration, is_repository, local
from fresnet.weights.published import published
from fresnet.weights.storage import is_safetensors, read_safetensors

NOTES = "fresnet.notes"
"""The name of the metadata that hold them."""

CORNERS: Mapping[str, Callable[[float], int]] = {"round": round, "floor": math.floor}


class Notes(NamedTuple):
    """What is known of a network's images and classes; None for what is not."""

    preset: Preset | None = None
    labels: tuple[str, ...] | None = None


def notes(path: str | os.PathLike[str]) -> Notes:
    """How images are prepared for the network in a file, and what its classes are called.

    Files of `save` and of `save_state` hold what was passed to them, and those of
    `python -m fresnet train` hold both. The presets of repositories that `python -m fresnet models`
    lists are known. The configuration of a repository, or of a folder of `save_pretrained`, may
    tell labels (`id2label`, timm's `label_names`) and timm's preset (`pretrained_cfg`). Of every
    other file nothing is known.

    >>> import fresnet
    >>> fresnet.notes("timm/resnet50.a1_in1k").preset.crop
    288

    Args:
      path: what `load` takes.
    Returns:
      `(preset, labels)`: a `Preset` or None, and a tuple with a label for each class or None.
    Raises:
      FresnetError: if the file cannot be read, or if what it says is neither.
    """
    try:
        if is_repository(path):
            found = [preset_of(weights.preset) for weights in published() if weights.name == path]
            preset = found[0] if found else None
            if found and str(path).startswith("timm/"):
                return Notes(preset)  # its configuration would tell no labels
            config = configuration(path)
            return Notes(preset or _preset_of_timm(config), _labels(config))
        file, _ = local(as_path(path))
        if is_safetensors(file):
            _, texts = read_safetensors(file)
            if NOTES in texts:
                return _read(texts[NOTES])
        config = configuration(path)
        return Notes(_preset_of_timm(config), _labels(config))
    except Exception as error:  # a connection may fail in any way
        raise FresnetError(f"cannot read the notes of {spelt(path)}: {reason(error)}") from error


def texts_of(
    caller: str, params: Params, preset: str | Preset | None, labels: Sequence[str] | None
) -> dict[str, str]:
    """The metadata that hold these notes of a network; none if there is nothing to note.

    Raises:
      FresnetError: if there is no such preset, or if labels are not a text for each class.
    """
    said: dict[str, object] = {}
    if preset is not None:
        chosen = as_preset(preset)
        corner = next((name for name, one in CORNERS.items() if one is chosen.corner), None)
        try:
            said["preset"] = {
                "sizes": sizes_of(chosen),
                "corner": corner,
                "mean": [*map(float, chosen.mean)],
                "std": [*map(float, chosen.std)],
                "channels": chosen.channels,
            }
            _preset(from_json(json.dumps(said["preset"])))
        except (TypeError, ValueError) as error:
            raise FresnetError(f"{caller} cannot note this preset: {reason(error)}") from error
        if (count := first_conv(params.weights).shape[1]) != len(chosen.channels):
            raise FresnetError(
                f"{caller} expects a preset of as many channels as the network takes, {count}; got "
                f"{chosen.channels}"
            )
    if labels is not None:
        head = params.weights.head
        classes = 0 if isinstance(head, NoHead) else len(head.bias)
        if not _are_labels(labels) or len(labels) != classes:
            count = f"{len(labels)} labels" if _are_labels(labels) else describe(labels)
            raise FresnetError(
                f"{caller} expects labels, a line of text for each of the {classes} classes; "
                f"got {count}"
            )
        said["labels"] = list(labels)
    return {NOTES: json.dumps(said)} if said else {}


def _preset_of_timm(config: Any) -> Preset | None:
    """The preset in a configuration of timm, at the test size as `published.txt` has it."""
    try:
        told: Mapping[str, Any] = config["pretrained_cfg"]
        if told.get("crop_mode", "center") != "center":
            return None
        side = (told.get("test_input_size") or told["input_size"])[-1]
        resize = math.floor(side / (told.get("test_crop_pct") or told["crop_pct"]))
        colours = {name: [*map(float, told[name])] for name in ("mean", "std")}
        sizes = f"{resize},{side},{told['interpolation']}"
        return _preset({"sizes": sizes, "corner": "round", "channels": "RGB", **colours})
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None  # there is none, or it is no evaluation that a preset can describe


def _labels(config: Any) -> tuple[str, ...] | None:
    """The labels in a configuration, but for those that Hugging Face's library makes up."""
    match config:
        case {"label_names": list(names)}:
            labels = names
        case {"id2label": dict(by_id)} if set(by_id) == {str(i) for i in range(len(by_id))}:
            labels = [by_id[str(i)] for i in range(len(by_id))]
        case _:
            return None
    made_up = labels == [f"LABEL_{i}" for i in range(len(labels))]
    return tuple(labels) if _are_labels(labels) and not made_up else None


def _are_labels(labels: object) -> bool:
    return (
        isinstance(labels, Sequence)
        and not isinstance(labels, str)
        and all(isinstance(one, str) and not {"\n", "\r"} & {*one} for one in labels)
    )


def _read(text: str) -> Notes:
    """The notes in a text of `texts_of`.

    Raises:
      FresnetError: if it is none.
    """
    said = from_json(text)
    if not isinstance(said, dict):
        raise FresnetError(f"expected an object; got {describe(said)}")
    preset, labels = said.get("preset"), said.get("labels")
    if labels is not None and not _are_labels(labels):
        raise FresnetError(f"expected a label for each class; got {describe(labels)}")
    return Notes(
        None if preset is None else _preset(preset), None if labels is None else tuple(labels)
    )


def _preset(fields: object) -> Preset:
    match fields:
        case {
            "sizes": str(sizes),
            "corner": "round" | "floor" as corner,
            "mean": list(mean),
            "std": list(std),
            "channels": "RGB" | "BGR" | "L" as channels,
        } if all(
            isinstance(number, float) and math.isfinite(number) for number in mean + std
        ) and all(number > 0 for number in std):
            preset = preset_of(sizes)._replace(corner=CORNERS[corner], channels=channels)
            return as_preset(preset._replace(mean=tuple(mean), std=tuple(std)))
    raise FresnetError(
        "expected a preset of finite means, positive deviations, and a corner that is round or "
        f"math.floor; got {shown(str(fields))}"
    )
