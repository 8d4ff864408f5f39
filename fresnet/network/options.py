"""What options of the public functions may be: a momentum, a group of processes, an image size."""

from typing import Any

from torch import Tensor

from fresnet.errors import FresnetError, describe, shown
from fresnet.numbers import as_integer, as_scalar
from fresnet.pytorch.collectives import Group


def check_momentum(caller: str, momentum: float | Tensor) -> float | Tensor:
    """The momentum, a number from 0 to 1 or a 0-d float tensor.

    Raises:
      FresnetError: if it is neither, saying what came.
    """
    scalar = as_scalar(momentum)
    if isinstance(scalar, Tensor) or (scalar is not None and 0 <= scalar <= 1):
        return scalar
    raise FresnetError(
        f"{caller} expects momentum to be a number from 0 to 1 or a 0-d float tensor; "
        f"got {shown(momentum)}"
    )


def check_group(caller: str, group: Group | None) -> None:
    """Refuse a group that is neither None nor a process group.

    Raises:
      FresnetError: saying what came.
    """
    if group is not None and not isinstance(group, Group):
        raise FresnetError(
            f"{caller} expects group to be a process group of torch.distributed; "
            f"got {describe(group)}"
        )


def check_image_size(caller: str, image_size: int | tuple[int, int]) -> tuple[int, int]:
    """The height and width of an image size, which may be given as the side of a square.

    Raises:
      FresnetError: if they are not integers from 1 to 2**20.
    """
    side = as_integer(image_size)
    size: Any = image_size if side is None else (side, side)
    if isinstance(size, tuple | list) and len(size) == 2:
        height, width = map(as_integer, size)
        if height and width and all(0 < n <= 2**20 for n in (height, width)):
            return height, width
    raise FresnetError(
        f"{caller} expects image_size to be an integer from 1 to 2**20, or two; "
        f"got {shown(image_size)}"
    )
