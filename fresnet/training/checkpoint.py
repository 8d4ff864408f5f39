"""Training states in files, from which training goes on with the same bits."""

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from typing_extensions import NamedTuple

from fresnet import tree
from fresnet.data.presets import Preset
from fresnet.errors import FresnetError, describe, reason, shown
from fresnet.network.nodes import Params
from fresnet.numbers import as_integer
from fresnet.reading import as_path, from_json, spelt
from fresnet.training.strides import are_strides, laid_out, strides_of
from fresnet.tree.walks import children_of, steps_of
from fresnet.weights.files import BESIDES, NETWORK, structure_of
from fresnet.weights.names import names
from fresnet.weights.notes import texts_of
from fresnet.weights.storage import read_safetensors, remove_leftovers, write_safetensors

STATE = "fresnet.state"
"""The name of the metadata that hold step, notes, strides, and types of nodes."""

State = TypeVar("State")


class Restored(NamedTuple, Generic[State]):
    """A state from a checkpoint, with the step and the notes that it was saved with."""

    state: State
    step: int
    notes: Mapping[str, Any]
    path: Path


class _About(NamedTuple):
    """What the metadata of a file say, beside its entries."""

    step: int
    notes: Mapping[str, Any]
    strides: Mapping[str, Sequence[int]]
    nodes: Mapping[str, str]


def save_state(
    state: Any,
    folder: str | os.PathLike[str],
    *,
    step: int,
    keep: int = 3,
    notes: Mapping[str, Any] | None = None,
    preset: str | Preset | None = None,
    labels: Sequence[str] | None = None,
) -> Path:
    """Write a state to `folder/step-000000001200.safetensors`, and remove older files.

    Whatever happens meanwhile, the file is whole or not there. Older files are removed only once it
    lies on the disk. `fresnet.load` reads the network in it, which is the average of a
    `TrainState`, or its params if it keeps no average.

    Args:
      state: any tree of tensors, such as a `TrainState`.
      folder: the folder for the file, made if it is not there. One process at a time saves to it.
      step: the number in the file's name. The newest file has the highest number.
      keep: how many files remain, this one and those of lower steps.
      notes: anything else to remember, as JSON can hold it.
      preset: how images are prepared for the network in the state, as in `save`.
      labels: what its classes are called, as in `save`.
    Returns:
      The path of the file.
    Raises:
      FresnetError: if an argument is not as described, or if the file cannot be written. What was
        there before is then still there.
    """
    folder = as_path(folder)
    files, number = as_integer(keep), as_integer(step)
    if files is None or files < 1:
        raise FresnetError(f"save_state expects keep to be a positive integer; got {shown(keep)}")
    if number is None or not 0 <= number < 2**63:
        got = "a larger one" if number is not None and number > 0 else shown(step)
        raise FresnetError(f"save_state expects step to be an integer from 0 on; got {got}")
    if not isinstance(notes, Mapping | None):
        raise FresnetError(f"save_state expects notes to be a mapping; got {describe(notes)}")
    entries = _entries("save_state", state)
    about = {
        "step": number,
        "notes": dict(notes or {}),
        "strides": {name: strides_of(leaf) for name, leaf in entries.items()},
        "nodes": nodes_of(state),
    }
    try:
        texts = {STATE: json.dumps(about)}
    except (TypeError, ValueError, RecursionError) as error:
        raise FresnetError(f"save_state expects notes as JSON has them; {reason(error)}") from error
    network = _network(state)
    if network is None and (preset is not None or labels is not None):
        raise FresnetError("save_state expects preset and labels of a network; got a state of none")
    if network:
        params = getattr(state, network)
        texts[NETWORK] = structure_of(params)
        texts |= texts_of("save_state", params, preset, labels)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise FresnetError(f"save_state cannot make {folder}: {reason(error)}") from error
    path = folder / f"step-{number:012}.safetensors"
    write_safetensors("save_state", _apart(entries), path, texts)
    # Files of higher steps are damaged, or training went back to before them. They do not count.
    for old in [file for file in saved_states(folder) if _step_of(file) <= number][files:]:
        try:
            old.unlink(missing_ok=True)
        except OSError as error:
            raise FresnetError(f"save_state cannot remove {old}: {reason(error)}") from error
    remove_leftovers(folder)
    return path


def restore_state(like: State, folder: str | os.PathLike[str]) -> Restored[State] | None:
    """The newest state in a folder, or None if no file there holds a state.

    If a file is damaged, a warning names it, and the file before it is read instead.

    Args:
      like: a state of the same structure, shapes and dtypes, such as the one before the first step.
        Each leaf is read to the device of the leaf in its place.
    Raises:
      FresnetError: if all files are damaged, or if the newest that is not has another structure.
    """
    places = _entries("restore_state", like)
    damaged = []
    for path in saved_states(folder):
        try:
            entries, texts = read_safetensors(path)
            about = _about(texts, entries)
            if about.step != _step_of(path):
                raise FresnetError(f"it is of step {about.step}, unlike its name")
        except FresnetError as error:
            damaged.append(f"{path}: {error}")
            continue
        _check_same(path, nodes_of(like), about.nodes)
        _check_same(path, _described(places), _described(entries))
        if damaged:
            warnings.warn(f"{'; '.join(damaged)}; going on from {path}", stacklevel=2)
        leaves = [
            laid_out(entries[name], about.strides[name], place.device)
            for name, place in places.items()
        ]
        return Restored(tree.unflatten(like, leaves), about.step, about.notes, path)
    if damaged:
        raise FresnetError(f"no checkpoint can be read: {'; '.join(damaged)}")
    return None


def saved_states(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of states in a folder, the newest first; none if there is no folder."""
    try:
        found = list(as_path(folder).iterdir())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        where = spelt(folder)
        raise FresnetError(f"cannot list the checkpoints in {where}: {reason(error)}") from error
    states = (p for p in found if re.fullmatch(r"step-\d{12,}\.safetensors", p.name))
    return sorted((p for p in states if p.is_file()), key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _network(state: Any) -> str | None:
    """The name of the field that holds the network to evaluate, if there is one."""
    fields = ("average", "params")
    return next((f for f in fields if isinstance(getattr(state, f, None), Params)), None)


def _entries(caller: str, state: Any) -> dict[str, Tensor]:
    """Leaves by name. In a network these are the names that `save` gives, elsewhere the paths."""
    network = _network(state)
    networks = iter(names(getattr(state, network)) if network else ())
    entries: dict[str, Tensor] = {}
    for path, leaf in zip(tree.paths(state), tree.leaves(state), strict=True):
        in_network = network and path[0] == network
        name = next(networks) if in_network else BESIDES + tree.dotted(path)
        if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided:
            raise FresnetError(f"{caller} expects tensors; got {describe(leaf)} for {name}")
        if name in entries:
            raise FresnetError(f"{caller} expects one leaf of each name; got two {name}")
        entries[name] = leaf
    return entries


def nodes_of(node: Any, name: str = "state") -> dict[str, str]:
    """The name of each node's type, also where a node has no leaves."""
    children = children_of(node)
    if children is None:
        return {}
    nodes = {name: type(node).__name__}
    for step, child in zip(steps_of(node), children, strict=True):
        nodes |= nodes_of(child, f"{name}.{step}")
    return nodes


def _apart(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same entries, contiguous and in memory of their own, as safetensors needs them."""
    seen: set[int] = set()
    result = {}
    for name, leaf in entries.items():
        leaf = leaf.detach().contiguous()
        storage = leaf.untyped_storage().data_ptr()
        result[name] = leaf.clone() if storage in seen else leaf
        seen.add(storage)
    return result


def _about(texts: Mapping[str, str], entries: Mapping[str, Tensor]) -> _About:
    """What the metadata of a file say of its entries.

    Raises:
      FresnetError: if they say nothing, or anything that `save_state` does not write.
    """
    if STATE not in texts:
        raise FresnetError("it holds no training state")
    match from_json(texts[STATE]):
        case {
            "step": int(step),
            "notes": dict(notes),
            "strides": dict(strides),
            "nodes": nodes,
        } if (
            as_integer(step) == step
            and 0 <= step < 2**63
            and isinstance(nodes, dict)
            and all(are_strides(strides.get(name), leaf) for name, leaf in entries.items())
        ):
            return _About(step, notes, strides, nodes)
    raise FresnetError("its metadata describe no training state")


def _described(entries: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: describe(leaf) for name, leaf in entries.items()}


def _check_same(path: Path, here: Mapping[str, str], there: Mapping[str, str]) -> None:
    """Refuse a file that is whole, but of another network, optimizer or precision."""
    for name in [*here, *there]:
        expected, got = (side.get(name, "none") for side in (here, there))
        if expected != got:
            shown = shorten(str(got), 200)
            raise FresnetError(
                f"{path} is of another state: expected {name} {expected}; got {shown}"
            )
