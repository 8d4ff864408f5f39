"""What a run notes about itself in its checkpoints, and how it goes on from one of them."""

import os
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol, TypeAlias, runtime_checkable
from zlib import crc32

from fresnet.data.shards import Scanned, Shards
from fresnet.errors import FresnetError
from fresnet.training.checkpoint import restore_state, saved_states
from fresnet.training.state import TrainState

CHECKPOINTS = "checkpoints"

Notes: TypeAlias = Mapping[str, int | str]

UNSET = ("None", "()", "RGB", "0.0")
"""What notes say of a setting that is not made. Older runs do not note what they did not know."""


@runtime_checkable
class Fields(Protocol):
    """Any NamedTuple."""

    def _asdict(self) -> dict[str, Any]: ...


def notes_of(run: Fields, training: Scanned, validation: Scanned) -> Notes:
    """A run and its images in words, on one level, as a checkpoint notes them."""
    notes: dict[str, int | str] = {
        "images": len(training.files),
        "classes": " ".join(training.classes),
        "files' checksum": _checksum(training),
        "validation images": len(validation.files),
        "validation files' checksum": _checksum(validation),
    }

    def add(name: str, value: object) -> None:
        if isinstance(value, Fields):
            for field, part in value._asdict().items():
                add(field if name == "recipe" else f"{name} {field}".strip(), part)
        else:
            notes[name] = getattr(value, "__name__", None) or str(value)

    add("", run)
    return notes


def _checksum(folder: Scanned) -> str:
    """Of the names of the files, from the folder on, so that it may be moved; and their labels."""
    lines = [os.path.relpath(file, folder.root) for file in folder.files]
    if isinstance(folder, Shards):  # in a folder the names hold the classes
        lines += map(str, folder.labels)
    text = "\n".join(lines)
    return f"{crc32(text.encode(errors='surrogateescape')):08x}"


def resumed(state: TrainState, out: Path, notes: Notes) -> TrainState:
    """The state of the last checkpoint in `out`, or the given state if there is no checkpoint.

    Raises:
      FresnetError: if the checkpoint is of a run with other notes.
    """
    restored = restore_state(state, out / CHECKPOINTS)
    if restored is None:
        return state
    there = restored.notes
    others = [
        f"{name} {shorten(str(there.get(name)), 40)}, not {shorten(str(notes.get(name)), 40)}"
        for name in dict.fromkeys([*notes, *there])
        if there.get(name) != notes.get(name)
        and not (name not in there and notes.get(name) in UNSET)
    ]
    if others:
        raise FresnetError(
            f"{out} holds a run of {'; of '.join(others)}: go on with the same, or choose another "
            "folder"
        )
    steps = {restored.step, int(restored.state.step), int(restored.state.position)}
    if len(steps) > 1:
        raise FresnetError(
            f"{restored.path} is damaged: expected one number of steps; got {sorted(steps)}"
        )
    return restored.state


def last_good(out: Path) -> str:
    """Which checkpoint is the last in `out`, as the end of an error message."""
    found = saved_states(out / CHECKPOINTS)
    return f"the last checkpoint is {found[0]}" if found else "there is no checkpoint yet"
