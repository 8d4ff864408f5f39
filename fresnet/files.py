"""Parameters to and from files: safetensors that other libraries read too, and theirs."""

import json
import os
import re
import secrets
import zipfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from fresnet import tree
from fresnet.check import check_params, first_conv
from fresnet.errors import FresnetError, reason
from fresnet.hub import download, is_repository, local
from fresnet.init import fresh_stats
from fresnet.interop import assemble, from_state_dict, named, names
from fresnet.net import forward
from fresnet.types import (
    BLOCKS,
    NORMS,
    SHORTCUTS,
    STEMS,
    DilatedStage,
    Head,
    Params,
    Weights,
)

TYPES = {
    kind.__name__: kind
    for kind in (*STEMS, *BLOCKS, *NORMS, *SHORTCUTS, DilatedStage, Head, Weights)
}
"""What the metadata of a file may name."""


def save(params: Params, path: str | os.PathLike[str]) -> None:
    """Write a network to a safetensors file under torchvision's names.

    torchvision and timm read it, if the network is one of theirs. The types of the nodes stand in
    the file's metadata, so that `load` gives back every network as it was, to the bit: frozen
    norms, dilated stages and all; so does a checksum. The file is written under another name
    and then renamed: a failure leaves what was there before.

    Args:
      params: the network.
      path: where to; what is there is replaced.
    Raises:
      FresnetError: if params is not a network, if values are such as `load` refuses, if the path
        ends as those of `torch.save` do, or if the file cannot be written.
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
        _check_shapes(params)
    except FresnetError as error:
        raise FresnetError(f"save expects a network that load takes; {error}") from error
    state, structure = named(params), json.dumps(_structure(params.weights))
    metadata = {"fresnet": structure, "crc32": _checksum(structure, state)}
    write_safetensors("save", state, path, metadata)


def load(path: str | os.PathLike[str], *, stride_in_1x1: bool = False) -> Params:
    """The network in a file, on the CPU.

    The file may be one of `save`, or any safetensors or `torch.save` file whose state dict
    `from_state_dict` takes, or a folder of Hugging Face's `save_pretrained`. "owner/name" where
    there is no such folder is a repository of Hugging Face, such as "timm/resnet50.a1_in1k": its
    weights are taken from the cache or downloaded.
    No code in a file is ever run.

    Args:
      path: a file, a folder, or "owner/name".
      stride_in_1x1: as in `from_state_dict`. Files of `save`, and the configuration in a
        repository, say it themselves.
    Returns:
      `Params(weights, stats)`.
    Raises:
      FresnetError: naming the file and the reason: it cannot be read, holds no network, or one
        with values that are not finite or variances that are negative; or a repository's
        configuration asks for what a network here does not do.
    """
    try:
        if is_repository(path):
            found, in_1x1 = download(str(path))
        else:
            found, in_1x1 = local(_path(path))
        params = _read(found, stride_in_1x1 or in_1x1)
        _check_values(params)
    except FresnetError as error:
        raise FresnetError(f"cannot load {path!s}: {error}") from error
    return params


def write_safetensors(
    caller: str,
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a state dict whole or not at all.

    Raises:
      FresnetError: naming the file and the reason.
    """

    def write(temporary: Path) -> None:
        save_file = _safetensors("save_file")
        save_file(dict(state), temporary, {"format": "pt", **(metadata or {})})

    _replace(caller, path, write)


def write_pickle(caller: str, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """The same by `torch.save`."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.save(dict(state), file)

    _replace(caller, path, write)


def _replace(caller: str, path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let a file be written beside this one, under a name of its own, and then take its place."""
    temporary = None
    try:
        target = Path(os.path.realpath(_path(path)))  # a link is kept
        if target.exists() and not target.is_file():
            raise FresnetError("it is no regular file")
        unused = target.with_name(f".fresnet-{secrets.token_hex(8)}")
        os.close(os.open(unused, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        temporary = unused
        mode = (target if target.exists() else temporary).stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors narrows it
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    except Exception as error:
        raise FresnetError(f"{caller} cannot write {path!s}: {reason(error)}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike) or not str(path).strip("\0"):
        raise FresnetError(f"expected a path; got {path!r}")
    return Path(path)


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
    entries, metadata = _safe_entries(path)
    structure = metadata.get("fresnet")
    if structure is None:
        return from_state_dict(entries, stride_in_1x1=stride_in_1x1)
    if metadata.get("crc32") != _checksum(structure, entries):
        raise FresnetError("its checksum is not that of its content: the file is damaged")
    return assemble("load", _template(structure, entries), entries, "torchvision")


def _safe_entries(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    safe_open = _safetensors("safe_open")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()  # it is no mapping
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except Exception as error:  # whatever a damaged file leads to, it is the file's fault
        raise FresnetError(f"not a safetensors file: {reason(error)}") from error


def _unpickled(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums that it wrote
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise FresnetError(f"the checksum of {damaged} in it is wrong")
        with torch.serialization.safe_globals([Namespace]):  # args, as training scripts keep them
            return torch.load(path, map_location="cpu", weights_only=True)
    except FresnetError:
        raise
    except Exception as error:  # whatever a damaged file leads to, it is the file's fault
        code = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        why = f"it asks for {code[1]}, which is not run" if code else reason(error)
        raise FresnetError(
            f"neither safetensors nor what torch.load reads with weights_only=True: {why}"
        ) from error


def _safetensors(function: str) -> Callable[..., Any]:
    try:
        import safetensors.torch
    except ImportError as error:
        raise FresnetError("it takes safetensors: pip install 'fresnet[io]'") from error
    found: Callable[..., Any] = getattr(safetensors.torch, function)
    return found


def _checksum(structure: str, state: Mapping[str, Tensor]) -> str:
    """CRC-32 of the types, and of every entry's name, dtype, shape and bytes."""
    checksum = crc32(structure.encode())
    for name in sorted(state):
        value = state[name].detach().cpu()
        checksum = crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), checksum)
        checksum = crc32(value.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"


def _structure(node: Any) -> Any:
    """The types of a tree's nodes, as JSON has it: ["Norm", 0, 0], a 0 for each leaf."""
    if not isinstance(node, tuple):
        return 0
    return [type(node).__name__, *map(_structure, node)]


def _template(structure: str, entries: Mapping[str, Tensor]) -> Params:
    """A network of these types with the entries' shapes, on meta.

    Raises:
      FresnetError: if types or shapes are not a network's.
    """
    try:
        weights = _node(json.loads(structure))
        listed = names(Params(weights, stats=()))  # type: ignore[arg-type]
        missing = [name for name in listed if name not in entries]
        if missing:
            raise FresnetError(f"{missing[0]} is missing")
        weights = tree.unflatten(weights, [entries[name].to("meta") for name in listed])
        template = Params(weights, fresh_stats(weights))
        _check_shapes(template)
    except FresnetError:
        raise
    except Exception as error:  # damaged metadata may fail in any way
        raise FresnetError(f"its metadata describe no network: {reason(error)}") from error
    return template


def _node(structure: Any) -> Any:
    if structure == 0:
        return torch.empty((), device="meta")
    name, *children = structure
    built = map(_node, children)
    return tuple(built) if name == "tuple" else TYPES[name](*built)


def _check_shapes(params: Params) -> None:
    """Run the network without values: what does not fit is refused as `forward` refuses it."""
    params = tree.map(lambda leaf: leaf.to("meta"), params)
    stem = first_conv(params.weights)
    with torch.no_grad():
        forward(params, stem.new_empty(1, stem.shape[1], 64, 64))


def _check_values(params: Params) -> None:
    for name, leaf in zip(names(params), tree.leaves(params), strict=True):
        if not leaf.isfinite().all():
            raise FresnetError(f"{name} holds values that are not finite")
        if name.endswith(".running_var") and (leaf < 0).any():
            raise FresnetError(f"{name} holds negative variances")
