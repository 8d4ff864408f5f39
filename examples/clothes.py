"""Fashion-MNIST, read from its four files in the idx format and cropped as training takes it.

It is 70,000 images of clothes in 28x28 pixels and ten classes; 10,000 of them are for testing.

Source: Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747; yann.lecun.com/exdb/mnist for the format.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fresnet import FresnetError

FOLDER = Path("/usr/share/datasets/fashion-mnist")
WHERE = (
    "Debian's package dataset-fashion-mnist has it, and github.com/zalandoresearch/fashion-mnist"
)

SIDE, PADDING, BATCH = 28, 4, 128

CLASSES = (
    *("T-shirt", "trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


class Clothes(NamedTuple):
    """Images uint8 `[n 28 28]`; labels int64 `[n]`."""

    images: Tensor
    labels: Tensor


def load(folder: Path) -> tuple[Clothes, Clothes]:
    """The training and the test images.

    Raises:
      FresnetError: if a file is not there or damaged, or if images and labels do not go together.
    """
    return _part(folder, "train"), _part(folder, "t10k")


def _part(folder: Path, name: str) -> Clothes:
    images = read(folder, f"{name}-images-idx3-ubyte", dims=3)
    labels = read(folder, f"{name}-labels-idx1-ubyte", dims=1).long()
    if images.shape != (len(labels), SIDE, SIDE) or not len(labels) or labels.max() >= len(CLASSES):
        raise FresnetError(
            f"{folder} should have images of 28x28 pixels under {name}, each with a class from 0 "
            f"to 9; it has images {tuple(images.shape)} and {len(labels)} labels up to "
            f"{max(labels.tolist(), default=None)}"
        )
    return Clothes(images, labels)


def drawn(size: int, seed: int, epoch: int) -> Tensor:
    """What an epoch's steps see, int64 `[steps b 4]`: image, rows down, columns right, mirrored.

    It depends on the arguments alone, so that a resumed run sees the same. The images that do not
    fill a batch, other ones in each epoch, are left out.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(size, generator=generator)
    moves = torch.randint(2 * PADDING + 1, (size, 2), generator=generator)
    mirrored = torch.randint(2, (size, 1), generator=generator)
    draws = torch.cat([order[:, None], moves, mirrored], dim=1)
    return draws[: size // BATCH * BATCH].view(-1, BATCH, 4)


def cropped(clothes: Clothes, draws: Tensor) -> tuple[Tensor, Tensor]:
    """The batch `(x [b 28 28], y [b])` that these draws `[b 4]` make of the images."""
    chosen, down, right, mirrored = draws.unbind(1)
    padded = pad(clothes.images[chosen], [PADDING] * 4)  # by black, which is the background
    places = torch.arange(SIDE, device=draws.device)
    across = torch.where(mirrored[:, None] > 0, places.flip(0), places)
    rows, columns = down[:, None] + places, right[:, None] + across
    images = torch.arange(len(draws), device=draws.device)
    x = padded[images[:, None, None], rows[:, :, None], columns[:, None, :]]
    return x, clothes.labels[chosen]


def normalised(images: Tensor) -> Tensor:
    """Images uint8 `[b 28 28]` as a network takes them, float32 `[b 1 28 28]`."""
    return (images[:, None].float() / 255 - 0.2860) / 0.3530  # the training pixels' mean and std


def read(folder: Path, name: str, *, dims: int) -> Tensor:
    """The bytes in an idx file, which may be gzipped, as a uint8 tensor of so many dimensions.

    The file begins with two zeros, 8 for bytes, and the number of dimensions. The sizes follow, in
    32 bits each, the highest byte first.

    Raises:
      FresnetError: if there is no such file, or if it holds anything else.
    """
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise FresnetError(f"there is no {name}, plain or as .gz, in {folder} (--data): {WHERE}")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise FresnetError(f"{path} cannot be read: {error}") from error
    head = 4 + 4 * dims
    if data[:4] != bytes([0, 0, 8, dims]) or len(data) < head:
        raise FresnetError(
            f"{path} should begin as an idx file of bytes in {dims} dimensions does, with "
            f"0 0 8 {dims} and {dims} sizes; it begins with {[*data[:head]]}"
        )
    shape = struct.unpack(f">{dims}I", data[4:head])
    if len(data) != head + math.prod(shape):
        raise FresnetError(
            f"{path} should have {head + math.prod(shape)} bytes for its sizes {shape}; "
            f"it has {len(data)}"
        )
    return torch.tensor(np.frombuffer(data, np.uint8, offset=head)).view(shape)
