"""Networks in files: safetensors that other libraries read too, and other libraries' own files."""

import json
import os
import warnings
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor

from fresnet import tree
from fresnet.data.presets import Preset
from fresnet.errors import FresnetError, listed, reason
from fresnet.network.check import check_params, check_values
from fresnet.network.family import SPECS
from fresnet.network.nodes import (
    HEADS,
    NODES,
    NORMS,
    STAGES,
    UNITS,
    Params,
    Weights,
    beside,
)
from fresnet.network.specs import Spec
from fresnet.reading import as_path, check_regular, from_json, spelt
from fresnet.weights import torch_files
from fresnet.weights.assembly import assemble, check_fit
from fresnet.weights.blanks import BLANK, blank_stats
from fresnet.weights.formats import refusal
from fresnet.weights.hub import INDEX, download, is_repository, local, shards
from fresnet.weights.names import name_tree, names
from fresnet.weights.notes import texts_of
from fresnet.weights.older import Structure, with_layers
from fresnet.weights.pickles import Skipped
from fresnet.weights.published import published
from fresnet.weights.state_dicts import check_architecture, from_state_dict, named_leaves, spec_of
from fresnet.weights.storage import read_safetensors, write_safetensors
from fresnet.weights.unwrapping import mappings_in

TYPES = {kind.__name__: kind for kind in (*NODES, *UNITS, *NORMS, *STAGES, *HEADS, Weights)}
"""The types that the metadata of a file may name."""

MOST_TEXT = 128
"""How many letters the types of nodes take for a leaf, with room to spare: 10 to 25 are usual."""

NETWORK = "fresnet"
"""The name of the metadata that hold a network's types."""

BESIDES = "state."
"""The prefix of the entries of a training state that stand beside its network in a file."""


def save(
    params: Params,
    path: str | os.PathLike[str],
    *,
    preset: str | Preset | None = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Write a network to a safetensors file under torchvision's names.

    torchvision and timm read the file, if the network is one of theirs. The file's metadata hold
    the types of the nodes, so `load` gives back every network to the bit, with its frozen norms and
    dilated stages. They also hold a checksum. The file is written under another name and then
    renamed, so a failure leaves what was there before.

    Args:
      params: the network.
      path: the file to write. An existing file is replaced.
      preset: how images are prepared for the network. `notes` and the command `predict` read it.
      labels: what its classes are called, k texts, for the same.
    Raises:
      FresnetError: if params is not a network, if two leaves would have one name, if `load` would
        refuse its values, if preset or labels are not as above, if the path ends like those of
        `torch.save`, or if the file cannot be written.
    """
    check_params("save", params)
    if str(path).endswith((".pth", ".pt", ".bin")):
        raise FresnetError(
            f"save writes safetensors; got {path}: torch.save(to_state_dict(params), path)?"
        )
    check_values("save", params)
    try:
        _check_values(params)
        check_fit(params, name_tree(params))
    except FresnetError as error:
        raise FresnetError(f"save expects a network that load takes; {error}") from error
    texts = {NETWORK: structure_of(params), **texts_of("save", params, preset, labels)}
    write_safetensors("save", named_leaves(params), path, texts)


def load(path: str | os.PathLike[str], *, architecture: str | Spec | None = None) -> Params:
    """The network in a file, on the CPU.

    It reads the files of `save`, all safetensors and `torch.save` files with a state dict that
    `from_state_dict` takes, and the folders of Hugging Face's `save_pretrained`, also where weights
    are in several files. If there is no folder "owner", then "owner/name" is a repository of
    Hugging Face, such as "timm/resnet50.a1_in1k". Its weights are taken from the cache or
    downloaded. No code in a file is ever run: what else a training script kept beside weights is
    left out, and told in a warning.

    Args:
      path: a file, a folder, or "owner/name".
      architecture: as in `from_state_dict`. A file of `save` tells it itself, and so does a
        configuration beside weights; what contradicts a file of `save` is refused.
    Returns:
      `Params(weights, stats)`.
    Raises:
      FresnetError: naming the file and the reason. Either the file cannot be read or holds no
        network, or a value is not finite, or a variance is negative, or a repository's
        configuration asks for something that no network here does.
    """
    try:
        _check_place(path)
        if is_repository(path):
            found, told = download(str(path))
        else:
            found, told = local(as_path(path))
        spec = spec_of("load", architecture)
        params = _read(found, spec or told)
        check_architecture("load", params, architecture, spec)
        _check_values(params)
    except FresnetError as error:
        raise FresnetError(f"cannot load {spelt(path)}: {error}") from error
    return params


def _check_place(path: object) -> None:
    """Refuse names of networks and addresses, with what to do instead.

    Raises:
      FresnetError: if there is no such file, and it is one of those.
    """
    if not isinstance(path, str) or os.path.exists(path):
        return
    if "://" in path:
        hint = "torch.hub.download_url_to_file(url, path) downloads a file"
        raise FresnetError(f"it is an address, and load reads files: {hint}")
    if path in SPECS:
        raise FresnetError(
            f"it is the name of a network and no file: fresnet.init(0, fresnet.SPECS[{path!r}]) "
            f"draws one, and python -m fresnet models {path} lists published weights"
        )
    known = {weights.name for weights in published()}
    if (repository := f"timm/{path}") in known:
        raise FresnetError(f"there is no such file; did you mean {repository!r}, a repository?")
    if "_Weights." in path and path in known:
        raise FresnetError(
            f"torchvision has these weights: torchvision.models.get_weight({path!r}).url is the "
            "address of their file"
        )


def _read(path: Path, spec: Spec | None) -> Params:
    if path.name.endswith(INDEX):
        return from_state_dict(_sharded(path), architecture=spec)
    try:
        check_regular(path)
        with path.open("rb") as file:
            start = file.read(9)
    except (OSError, ValueError) as error:
        raise refusal(path, reason(error)) from error
    if not start:
        raise FresnetError("the file is empty")
    if start[8:] != b"{" and start[:1] != b"\x80" and start[:2] != b"PK":
        raise refusal(path, "it is no file of safetensors or torch.save")
    if start[8:] != b"{":
        return from_state_dict(_unpickled(path), architecture=spec)
    entries, texts = read_safetensors(path)
    if NETWORK not in texts:
        return from_state_dict(entries, architecture=spec)
    entries = {name: value for name, value in entries.items() if not name.startswith(BESIDES)}
    if len(texts[NETWORK]) > MOST_TEXT * (len(entries) + 1):
        raise FresnetError("its metadata describe a larger network than its tensors are of")
    return assemble("load", _nodes(texts[NETWORK]), entries, "torchvision")


def _sharded(index: Path) -> dict[str, Tensor]:
    """The entries of all files that an index of Hugging Face names."""
    files = [index.parent / name for name in shards(index)]
    if missing := [file.name for file in files if not os.path.exists(file)]:
        raise FresnetError(f"{index.name} lists {missing[0]}, which is not there")
    entries: dict[str, Tensor] = {}
    for file in files:
        try:
            entries |= read_safetensors(file)[0]
        except FresnetError as error:
            raise FresnetError(f"{file.name}: {error}") from error
    return entries


def _unpickled(path: Path) -> Any:
    try:
        found, skipped = torch_files.read(path)
    except FresnetError as error:
        raise refusal(path, str(error)) from error
    beside = found if isinstance(found, dict) else {}
    empty = {str(k): type(v).__name__ for k, v in beside.items() if _is_empty(v)}
    tensors = any(isinstance(v, Tensor) for _, one in mappings_in(beside) for v in one.values())
    if _is_empty(found) or (empty and not tensors):
        what = type(found).__name__ if _is_empty(found) else ", ".join(empty.values())
        ours = "fresnet." in what
        hint = "fresnet.save(params, path)" if ours else "torch.save(model.state_dict(), path)"
        raise FresnetError(f"it holds a {what}, which is not made from files: {hint} keeps weights")
    if skipped:
        under = f", under {', '.join(empty)}" if empty else ""
        warnings.warn(
            f"{path} also holds what is no tensor{under}; it is left out, and nothing of it was "
            f"run: {listed(skipped)}",
            stacklevel=4,
        )
    return found


def _is_empty(value: object) -> bool:
    return isinstance(value, Skipped) and not value


def structure_of(params: Params) -> str:
    """The types of a network's nodes in JSON, such as ["Norm", 0, 0], with a 0 for each leaf."""
    return json.dumps(_structure(params.weights))


def _structure(node: object) -> Structure:
    return [type(node).__name__, *map(_structure, node)] if isinstance(node, tuple) else 0


def _nodes(structure: str) -> Params:
    """A network of these types, with blanks for leaves.

    Raises:
      FresnetError: if they are not the types of a network.
    """
    try:
        weights = _node(with_layers(from_json(structure)))
        nodes = Params(weights, beside(blank_stats, weights))
        check_params("load", nodes)
        return nodes
    except Exception as error:  # damaged metadata may fail in any way
        raise FresnetError(f"its metadata describe no network: {reason(error)}") from error


def _node(structure: Any) -> Any:
    if structure == 0:
        return BLANK
    name, *children = structure
    built = map(_node, children)
    return tuple(built) if name == "tuple" else TYPES[name](*built)


def _check_values(params: Params) -> None:
    for name, leaf in zip(names(params), tree.leaves(params), strict=True):
        if not leaf.numel():
            raise FresnetError(f"{name} holds no values")
        if not all(map(isfinite, leaf.detach().aminmax())):  # either is NaN if any value is
            raise FresnetError(f"{name} holds values that are not finite")
        if name.endswith(".running_var") and (leaf < 0).any():
            raise FresnetError(f"{name} holds negative variances")
