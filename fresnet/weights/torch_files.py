"""Files of `torch.save`: archives, and what PyTorch before 1.6 wrote."""

import sys
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fresnet.errors import FresnetError, reason
from fresnet.weights.pickles import Budget, Skipped, Storage, Unpickler

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""With which files of PyTorch before 1.6 begin."""


class Contents(NamedTuple):
    """What is in a file."""

    found: Any
    """Mappings, lists, numbers, texts and tensors; `Skipped` where there was anything else."""

    skipped: tuple[str, ...]
    """The names in the file of what was not made, each once."""


def read(path: Path) -> Contents:
    """The contents of a file of `torch.save`, on the CPU.

    Raises:
      FresnetError: if it is no such file, or if it is damaged.
    """
    skipped: dict[str, type[Skipped]] = {}
    try:
        read_file = _zipped if zipfile.is_zipfile(path) else _in_sequence
        found = read_file(path, skipped)
    except FresnetError:
        raise
    except Exception as error:  # a damaged file may fail in any way
        raise FresnetError(
            f"neither safetensors nor torch.save wrote it: {reason(error)}"
        ) from error
    return Contents(found, tuple(skipped))


def _zipped(path: Path, skipped: dict[str, type[Skipped]]) -> Any:
    """A file of PyTorch 1.6 and later: an archive of a pickle and the storages."""
    with zipfile.ZipFile(path) as archive:
        pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if pickled is None:
            raise FresnetError("an archive, but not of torch.save")
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise FresnetError("an archive that is compressed, as torch.save writes none")
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}constants.pkl" in archive.namelist():
            raise FresnetError("a TorchScript program, which is not run: save its state_dict()")
        if f"{folder}byteorder" in archive.namelist():
            order = archive.read(f"{folder}byteorder").decode()
            if order != sys.byteorder:
                raise FresnetError(
                    f"its numbers are in {order}-endian order, unlike this machine's"
                )
        storages: dict[str, Tensor] = {}
        budget = Budget(path.stat().st_size)

        def storage(dtype: torch.dtype, key: str, *_: object) -> Storage:
            if key not in storages:
                read = bytearray(archive.read(f"{folder}data/{key}"))  # zipfile checks the checksum
                storages[key] = _bytes(read)
            return Storage(storages[key], dtype, budget)

        return Unpickler(BytesIO(archive.read(pickled)), storage, skipped, budget).load()


def _bytes(read: bytearray) -> Tensor:
    return torch.frombuffer(read or bytearray(1), dtype=torch.uint8)[: len(read)]


def _in_sequence(path: Path, skipped: dict[str, type[Skipped]]) -> Any:
    """An older file: pickles one after the other, and then the storages."""
    sizes: dict[str, int] = {}
    storages: dict[str, Tensor] = {}
    left = path.stat().st_size
    budget = Budget(left)

    def storage(dtype: torch.dtype, key: str, _: object, count: int, view: Any = None) -> Storage:
        nonlocal left
        size = dtype.itemsize
        if key not in storages:
            left -= count * size
            if left < 0:
                raise FresnetError("it is cut short: its tensors are larger than the file")
            sizes[key] = size
            storages[key] = torch.zeros(count * size, dtype=torch.uint8, device="cpu")
        whole = storages[key]
        if view is not None:
            _, offset, length = view
            whole = whole[offset * size : (offset + length) * size]
        return Storage(whole, dtype, budget)

    with path.open("rb") as file:

        def pickled() -> Any:
            return Unpickler(file, storage, skipped, budget).load()

        if pickled() != MAGIC or pickled() != PROTOCOL:
            raise FresnetError("a pickle, but not of torch.save")
        pickled()  # about the system
        found, keys = pickled(), pickled()
        if not all(type(key) is str for key in keys) or set(keys) != set(storages):
            raise FresnetError("it is damaged: it lists other tensors than it has")
        for key in keys:
            count = int.from_bytes(file.read(8), sys.byteorder)
            read = bytearray(file.read(count * sizes[key]))
            if len(read) != len(storages[key]):
                raise FresnetError("it is cut short: not all tensors are in it")
            storages[key].copy_(_bytes(read))
    return found
