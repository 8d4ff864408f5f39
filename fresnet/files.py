"""Parameters to and from files: safetensors that other libraries read too, and theirs."""

import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from fresnet import tree
from fresnet.check import check_params, first_conv
from fresnet.errors import FresnetError
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

TYPES = (*STEMS, *BLOCKS, *NORMS, *SHORTCUTS, DilatedStage, Head, Weights, tuple)


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
      FresnetError: if params is not a network with values, or if the file cannot be written.
    """
    check_params("save", params)
    if first_conv(params.weights).is_meta:
        raise FresnetError("save expects a network with values; got one on meta")
    state, structure = named(params), json.dumps(_structure(params.weights))
    metadata = {"fresnet": structure, "crc32": _checksum(structure, state)}
    write("save", state, Path(path), metadata)


def load(path: str | os.PathLike[str], *, stride_in_1x1: bool = False) -> Params:
    """The network in a file, on the CPU.

    The file may be one of `save`, any safetensors or `torch.save` file whose state dict
    `from_state_dict` takes, or, where there is no such file, the id of a repository of Hugging
    Face, such as "timm/resnet50.a1_in1k", whose weights are downloaded or taken from its cache.
    No code in a file is ever run.

    Args:
      path: a file, or "owner/name".
      stride_in_1x1: as in `from_state_dict`. Files of `save`, and the configuration in a
        repository, say it themselves.
    Returns:
      `Params(weights, stats)`.
    Raises:
      FresnetError: naming the file and the reason: it cannot be read, holds no network, or one
        with values that are not finite or variances that are negative.
    """
    found = Path(path)
    if not found.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        found, stride_in_1x1 = _download(str(path), stride_in_1x1)
    try:
        params = _read(found, stride_in_1x1)
        _check_values(params)
    except FresnetError as error:
        raise FresnetError(f"cannot load {path}: {error}") from error
    return params


def write(
    caller: str, state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a state dict whole or not at all: as safetensors, or as `torch.save` does if the name
    ends in .pth, .pt or .bin.

    Raises:
      FresnetError: naming the file and the reason.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as new files get it; safetensors would narrow it
        if path.suffix in (".pth", ".pt", ".bin"):
            torch.save(dict(state), temporary)
        else:
            save_file = _safetensors("save_file")
            save_file(dict(state), temporary, {"format": "pt", **(metadata or {})})
        temporary.chmod(mode)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except Exception as error:
        raise FresnetError(f"{caller} cannot write {path}: {_reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, stride_in_1x1: bool) -> Params:
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise FresnetError(_reason(error)) from error
    if not start:
        raise FresnetError("the file is empty")
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
        raise FresnetError(f"not a safetensors file: {_reason(error)}") from error


def _unpickled(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums that it wrote
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise FresnetError(f"the checksum of {damaged} in it is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file leads to, it is the file's fault
        raise FresnetError(
            f"neither safetensors nor what torch.load reads with weights_only=True: "
            f"{_reason(error)}"
        ) from error


def _safetensors(function: str) -> Callable[..., Any]:
    try:
        import safetensors.torch
    except ImportError as error:
        raise FresnetError("it takes safetensors: pip install 'fresnet[io]'") from error
    found: Callable[..., Any] = getattr(safetensors.torch, function)
    return found


def _download(repository: str, stride_in_1x1: bool) -> tuple[Path, bool]:
    """The weights of a repository of Hugging Face, and where its bottlenecks stride."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    except ImportError as error:
        raise FresnetError(
            f"cannot load {repository}: there is no such file, and to download a repository "
            "takes huggingface_hub: pip install 'fresnet[io]'"
        ) from error
    try:
        config = json.loads(Path(hf_hub_download(repository, "config.json")).read_bytes())
        try:
            weights = hf_hub_download(repository, "model.safetensors")
        except EntryNotFoundError:
            weights = hf_hub_download(repository, "pytorch_model.bin")
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise FresnetError(
            f"cannot load {repository}: there is no such file, and no such repository to be had: "
            f"{_reason(error)}"
        ) from error
    return Path(weights), stride_in_1x1 or bool(config.get("downsample_in_bottleneck"))


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
        stem = weights.stem[0]
        with torch.no_grad():
            forward(template, stem.new_empty(1, stem.shape[1], 64, 64))
    except FresnetError:
        raise
    except Exception as error:  # damaged metadata may fail in any way
        raise FresnetError(f"its metadata describe no network: {_reason(error)}") from error
    return template


def _node(structure: Any) -> Any:
    if structure == 0:
        return torch.empty((), device="meta")
    kind, *children = structure
    node = {kind.__name__: kind for kind in TYPES}[kind]
    built = map(_node, children)
    return tuple(built) if node is tuple else node(*built)


def _check_values(params: Params) -> None:
    for name, leaf in zip(names(params), tree.leaves(params), strict=True):
        if not leaf.isfinite().all():
            raise FresnetError(f"{name} holds values that are not finite")
        if name.endswith(".running_var") and (leaf < 0).any():
            raise FresnetError(f"{name} holds negative variances")


def _reason(error: Exception) -> str:
    """The first line of what an exception says."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]
