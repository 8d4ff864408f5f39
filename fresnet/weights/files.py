"""Networks in files: safetensors that other libraries read too, and other libraries' own files."""

import json
import os
import re
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from fresnet import tree
from fresnet.errors import FresnetError, reason
from fresnet.network.check import check_params, first_conv
from fresnet.network.nodes import (
    NODES,
    NORMS,
    UNITS,
    DilatedStage,
    Head,
    Params,
    Weights,
    beside,
)
from fresnet.weights.assembly import assemble, check_fit
from fresnet.weights.blanks import BLANK, blank_stats
from fresnet.weights.hub import download, is_repository, local
from fresnet.weights.names import name_tree, names
from fresnet.weights.older import Structure, with_layers
from fresnet.weights.state_dicts import from_state_dict, named_leaves
from fresnet.weights.storage import as_path, read_safetensors, write_safetensors

TYPES = {kind.__name__: kind for kind in (*NODES, *UNITS, *NORMS, DilatedStage, Head, Weights)}
"""The types that the metadata of a file may name."""

NETWORK = "fresnet"
"""The name of the metadata that hold a network's types."""

BESIDES = "state."
"""The prefix of the entries of a training state that stand beside its network in a file."""


def save(params: Params, path: str | os.PathLike[str]) -> None:
    """Write a network to a safetensors file under torchvision's names.

    torchvision and timm read the file, if the network is one of theirs. The file's metadata hold
    the types of the nodes, so `load` gives back every network to the bit, with its frozen norms and
    dilated stages. They also hold a checksum. The file is written under another name and then
    renamed, so a failure leaves what was there before.

    Args:
      params: the network.
      path: the file to write. An existing file is replaced.
    Raises:
      FresnetError: if params is not a network, if two leaves would have one name, if `load` would
        refuse its values, if the path ends like those of `torch.save`, or if the file cannot be
        written.
    """
    check_params("save", params)
    if str(path).endswith((".pth", ".pt", ".bin")):
        raise FresnetError(
            f"save writes safetensors; got {path}: torch.save(to_state_dict(params), path)?"
        )
    if first_conv(params.weights).is_meta:
        raise FresnetError("save expects a network with values; got one on meta")
    try:
        _check_values(params)
        check_fit(params, name_tree(params))
    except FresnetError as error:
        raise FresnetError(f"save expects a network that load takes; {error}") from error
    write_safetensors("save", named_leaves(params), path, {NETWORK: structure_of(params)})


def load(path: str | os.PathLike[str], *, stride_in_1x1: bool = False) -> Params:
    """The network in a file, on the CPU.

    It reads the files of `save`, all safetensors and `torch.save` files with a state dict that
    `from_state_dict` takes, and the folders of Hugging Face's `save_pretrained`. If there is no
    folder "owner", then "owner/name" is a repository of Hugging Face, such as
    "timm/resnet50.a1_in1k". Its weights are taken from the cache or downloaded. No code in a file
    is ever run.

    Args:
      path: a file, a folder, or "owner/name".
      stride_in_1x1: as in `from_state_dict`. A file of `save` and the configuration in a repository
        tell it themselves.
    Returns:
      `Params(weights, stats)`.
    Raises:
      FresnetError: naming the file and the reason. Either the file cannot be read or holds no
        network, or a value is not finite, or a variance is negative, or a repository's
        configuration asks for something that no network here does.
    """
    try:
        if is_repository(path):
            found, in_1x1 = download(str(path))
        else:
            found, in_1x1 = local(as_path(path))
        params = _read(found, stride_in_1x1 or in_1x1)
        _check_values(params)
    except FresnetError as error:
        raise FresnetError(f"cannot load {path!s}: {error}") from error
    return params


def _read(path: Path, stride_in_1x1: bool) -> Params:
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except (OSError, ValueError) as error:
        raise FresnetError(reason(error)) from error
    if not start:
        raise FresnetError("the file is empty")
    if start[8:] != b"{" and start[:1] != b"\x80" and start[:2] != b"PK":
        raise FresnetError("it is no file of safetensors or torch.save")
    if start[8:] != b"{":
        return from_state_dict(_unpickled(path), stride_in_1x1=stride_in_1x1)
    entries, texts = read_safetensors(path)
    if NETWORK not in texts:
        return from_state_dict(entries, stride_in_1x1=stride_in_1x1)
    entries = {name: value for name, value in entries.items() if not name.startswith(BESIDES)}
    return assemble("load", _nodes(texts[NETWORK]), entries, "torchvision")


def _unpickled(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums of torch.save
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise FresnetError(f"the checksum of {damaged} in it is wrong")
        with torch.serialization.safe_globals([Namespace]):  # training scripts keep their args so
            return torch.load(path, map_location="cpu", weights_only=True)
    except FresnetError:
        raise
    except Exception as error:  # a damaged file may fail in any way
        code = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        why = f"it asks for {code[1]}, which is not run" if code else reason(error)
        raise FresnetError(
            f"neither safetensors nor what torch.load reads with weights_only=True: {why}"
        ) from error


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
        weights = _node(with_layers(json.loads(structure)))
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
        if not leaf.isfinite().all():
            raise FresnetError(f"{name} holds values that are not finite")
        if name.endswith(".running_var") and (leaf < 0).any():
            raise FresnetError(f"{name} holds negative variances")
