"""Files that are written whole or not at all, and checked when they are read."""

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from fresnet.errors import FresnetError, reason
from fresnet.reading import as_path, check_regular, named_in_utf8, spelt

TEMPORARY = ".fresnet-"
"""The prefix of a folder in which a file is being written. 16 hexadecimal digits follow it."""


def write_safetensors(
    caller: str,
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a state dict whole or not at all.

    Args:
      texts: what the metadata hold, beside a checksum over these texts and the entries.
    Raises:
      FresnetError: naming the file and the reason.
    """

    def write(temporary: Path) -> None:
        metadata = {"format": "pt", **(texts or {})}
        if texts:
            metadata["crc32"] = _checksum(texts, state)
        save_file = _safetensors("save_file")
        save_file(dict(state), temporary, metadata)

    write_file(caller, path, write)


def write_pickle(caller: str, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a state dict by `torch.save`, whole or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.save(dict(state), file)

    write_file(caller, path, write)


def write_file(caller: str, path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Write a file in a new folder beside its path, and then move it to its path.

    safetensors writes files beside its target too. In a folder of our own, everything that a killed
    process leaves behind can be recognised.

    Raises:
      FresnetError: naming the file and the reason, whatever the failure was.
    """
    temporary = None
    try:
        target = Path(os.path.realpath(as_path(path)))  # a link stays a link
        check_regular(target)
        unused = target.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
        unused.mkdir()
        temporary = unused
        written = temporary / "file"
        written.touch()
        mode = (target if target.exists() else written).stat().st_mode
        write(written)
        written.chmod(mode)  # safetensors narrows the mode
        with written.open("rb") as file:
            os.fsync(file.fileno())
        written.replace(target)
        _sync_folder(target.parent)
    except Exception as error:
        raise FresnetError(f"{caller} cannot write {spelt(path)}: {reason(error)}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes were writing to this folder when they were killed."""
    for temporary in folder.glob(TEMPORARY + "[0-9a-f]" * 16):
        shutil.rmtree(temporary, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a power cut."""
    if os.name == "posix":  # elsewhere folders cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's entries, and the texts that `write_safetensors` put into its metadata.

    Raises:
      FresnetError: if this is no safetensors file, or if its content is not what was written.
    """
    safe_open = _safetensors("safe_open")
    check_regular(path)
    try:
        with named_in_utf8(path) as name, safe_open(name, framework="pt") as file:
            names = file.keys()  # the file is no mapping
            state = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata() or {}
    except Exception as error:  # a damaged file may fail in any way
        raise FresnetError(f"not a safetensors file: {reason(error)}") from error
    texts = {name: text for name, text in metadata.items() if name.startswith("fresnet")}
    ours = texts or "crc32" in metadata  # the damage may be in the names of the texts
    if ours and metadata.get("crc32") != _checksum(texts, state):
        raise FresnetError("its checksum is not that of its content: the file is damaged")
    return state, texts


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as those of safetensors do."""
    check_regular(path)
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _safetensors(function: str) -> Callable[..., Any]:
    try:
        import safetensors.torch
    except ImportError as error:
        raise FresnetError("it takes safetensors: pip install 'fresnet[io]'") from error
    found: Callable[..., Any] = getattr(safetensors.torch, function)
    return found


def _checksum(texts: Mapping[str, str], state: Mapping[str, Tensor]) -> str:
    """CRC-32 of the texts, and of every entry's name, dtype, shape and bytes."""
    crc = crc32("".join(texts[name] for name in sorted(texts)).encode())
    for name in sorted(state):
        value = state[name].detach().cpu()
        crc = crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), crc)
        column = value.reshape(-1)[:, None]  # the last stride is 1, even if the vector's is not
        crc = crc32(column.view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
