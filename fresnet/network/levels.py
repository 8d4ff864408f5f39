"""Levels of uint8, and what they stand for; networks that have them."""

from typing import NamedTuple

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError, describe
from fresnet.network.nodes import Quantized, Stats, Weights


class Affine(NamedTuple):
    """The values that levels of uint8 stand for: scale * (level - zero_point)."""

    scale: float
    zero_point: int


def affine(x: Tensor) -> Affine:
    """The levels for values like these, in equal steps, with zero among them."""
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (high - low) / 255 or 1.0
    return Affine(scale, round(-low / scale))


def check_quantized(caller: str, network: Quantized) -> None:
    """Refuse what is not as `quantize` returns it: cast, moved, not finite, or of other trees.

    Raises:
      FresnetError: saying what was expected and what came.
    """
    weights, ranges, _ = network
    if type(weights) is not Weights or type(ranges) is not Stats:
        raise FresnetError(
            f"{caller} expects Quantized(weights, ranges, images) to hold Weights and Stats; "
            f"got {describe(weights)} and {describe(ranges)}"
        )
    for leaf in tree.leaves(network):
        kept = isinstance(leaf, Tensor) and leaf.dtype in (torch.int8, torch.float32)
        if not kept or leaf.device.type != "cpu":
            got = f"{leaf.dtype} on {leaf.device}" if isinstance(leaf, Tensor) else describe(leaf)
            raise FresnetError(
                f"{caller} expects a network as quantize returns it, in int8 and float32 on the "
                f"CPU; got {got}"
            )
        if not leaf.isfinite().all():
            raise FresnetError(f"{caller} expects finite values in a quantised network; got others")
