"""Levels of uint8, and what they stand for."""

from typing import NamedTuple

from torch import Tensor


class Affine(NamedTuple):
    """The values that levels of uint8 stand for: scale * (level - zero_point)."""

    scale: float
    zero_point: int


def affine(x: Tensor) -> Affine:
    """The levels for values like these, in equal steps, with zero among them."""
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (high - low) / 255 or 1.0
    return Affine(scale, round(-low / scale))
