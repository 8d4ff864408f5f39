"""A state in a file, to be gone on with to the bit."""

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError, describe, reason
from fresnet.files import BESIDES, NETWORK, structure_of
from fresnet.interop import names
from fresnet.storage import TEMPORARY, read_safetensors, write_safetensors
from fresnet.types import Params

STATE = "fresnet.state"
"""The metadata with step, notes, strides, and types of nodes."""


class Restored(NamedTuple):
    state: Any
    step: int
    notes: Mapping[str, Any]
    path: Path


def save_state(
    state: Any,
    folder: str | os.PathLike[str],
    *,
    step: int,
    keep: int = 3,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write a state to `folder/step-000000001200.safetensors`, and remove what is older.

    The file is whole or not there, whatever happens meanwhile, and takes the place of older ones
    only when it lies on the disk. `fresnet.load` reads the network in it: a `TrainState`'s average,
    or params if it keeps none.

    Args:
      state: any tree of tensors, such as a `TrainState`.
      folder: made if it is not there.
      step: the number in the file's name: the newest has the highest.
      keep: how many files remain.
      notes: what else to remember, as JSON has it.
    Returns:
      The file.
    Raises:
      FresnetError: if it cannot be written. What was there before is still there.
    """
    folder = Path(folder)
    if type(keep) is not int or keep < 1:
        raise FresnetError(f"save_state expects keep to be a positive integer; got {keep!r}")
    entries = dict(zip(_names(state), tree.leaves(state), strict=True))
    about = {
        "step": step,
        "notes": dict(notes or {}),
        "strides": {name: leaf.stride() for name, leaf in entries.items()},
        "types": _types(state),
    }
    texts = {STATE: json.dumps(about)}
    if network := _network(state):
        texts[NETWORK] = structure_of(getattr(state, network))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FresnetError(f"save_state cannot make {folder}: {reason(error)}") from error
    path = folder / f"step-{step:012}.safetensors"
    write_safetensors("save_state", _apart(entries), path, texts)
    for old in [*saved_states(folder)[keep:], *folder.glob(f"{TEMPORARY}*")]:
        old.unlink(missing_ok=True)
    return path


def restore_state(like: Any, folder: str | os.PathLike[str]) -> Restored | None:
    """The newest state in a folder, or None if there is no file of a state.

    A damaged file is passed over, with a warning that names it, for the one before.

    Args:
      like: a state of the same structure, shapes and dtypes, such as the one before the first step.
        Leaves come to the devices of its leaves.
    Raises:
      FresnetError: if all are damaged, or if the newest that is not is of another structure.
    """
    damaged = []
    for path in saved_states(folder):
        try:
            entries, texts = read_safetensors(path)
            if STATE not in texts:
                raise FresnetError("it holds no training state")
        except FresnetError as error:
            damaged.append(f"{path}: {error}")
            continue
        about = json.loads(texts[STATE])
        _check_same(path, like, entries, about["types"])
        if damaged:
            warnings.warn(f"{'; '.join(damaged)}; going on from {path}", stacklevel=2)
        leaves = [
            torch.empty_strided(leaf.shape, about["strides"][name], dtype=leaf.dtype).copy_(leaf)
            for name, leaf in ((name, entries[name]) for name in _names(like))
        ]
        moved = [
            leaf.to(place.device) for leaf, place in zip(leaves, tree.leaves(like), strict=True)
        ]
        return Restored(tree.unflatten(like, moved), about["step"], about["notes"], path)
    if damaged:
        raise FresnetError(f"every checkpoint is damaged: {'; '.join(damaged)}")
    return None


def saved_states(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of states in a folder, the newest first."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FresnetError(f"expected a folder of checkpoints; {folder} is none")
    found = folder.glob("step-*.safetensors") if folder.is_dir() else []
    return sorted((p for p in found if re.fullmatch(r"step-\d+", p.stem)), reverse=True)


def _network(state: Any) -> str | None:
    """The field with the network to evaluate, if there is one."""
    fields = ("average", "params")
    return next((f for f in fields if isinstance(getattr(state, f, None), Params)), None)


def _names(state: Any) -> list[str]:
    """Of each leaf: the network's as `save` has them, the others by their paths."""
    network = _network(state)
    networks = iter(names(getattr(state, network)) if network else ())
    return [
        next(networks) if path[0] == network else BESIDES + ".".join(map(str, path))
        for path in tree.paths(state)
    ]


def _types(node: Any) -> Any:
    """The types of a tree's nodes, as JSON has it."""
    if isinstance(node, Tensor):
        return 0
    children = node.values() if isinstance(node, dict) else node
    return [type(node).__name__, *map(_types, children)]


def _apart(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and none in the memory of another: safetensors takes nothing else."""
    seen: set[int] = set()
    result = {}
    for name, leaf in entries.items():
        leaf = leaf.detach().contiguous()
        shared = leaf.untyped_storage().data_ptr() in seen
        whole = leaf.untyped_storage().nbytes() == leaf.nbytes
        result[name] = leaf if whole and not shared else leaf.clone()
        seen.add(leaf.untyped_storage().data_ptr())
    return result


def _check_same(path: Path, like: Any, entries: Mapping[str, Tensor], types: Any) -> None:
    """Refuse what is whole, but another network's, optimizer's or precision's."""
    expected = dict(zip(_names(like), tree.leaves(like), strict=True))
    for name in [*expected, *entries]:
        here, there = (
            describe(side[name]) if name in side else "none" for side in (expected, entries)
        )
        if here != there:
            raise FresnetError(f"{path} is of another state: expected {name} {here}; got {there}")
    if types != _types(like):
        raise FresnetError(f"{path} is of another state: its nodes are of other types")
