"""What the public functions refuse before they compute anything.

Only types, dtypes, devices and shapes are read, never values: nothing here synchronises with a
device or leaves a trace in a compiled graph. Whether channels fit from one operation to the next
is checked by the operations themselves.
"""

from typing import Any

import torch
from torch import Tensor

from fresnet.errors import FresnetError, describe
from fresnet.types import STATS_OF, Norm, Params, Weights


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the statistics beside weights of `dtype`: never narrower than float32.

    >>> stats_dtype(torch.bfloat16), stats_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def check_call(caller: str, params: Params, x: Tensor) -> None:
    """Refuse a tree that is no network, and images that the network does not take.

    Raises:
      FresnetError: naming what was expected, where, and what came.
    """
    check_params(caller, params)
    if not isinstance(x, Tensor):
        raise FresnetError(f"{caller} expects x to be a tensor [b c h w]; got {describe(x)}")
    stem = params.weights.stem.conv
    expected = f"{caller} expects x [b {stem.shape[1]} h w]"
    if x.ndim != 4 or x.shape[1] != stem.shape[1]:
        raise FresnetError(f"{expected}; got {tuple(x.shape)}")
    if 0 in x.shape:
        raise FresnetError(f"{expected} with at least one image and pixel; got {tuple(x.shape)}")
    if x.dtype != stem.dtype:
        raise FresnetError(f"{expected} in the weights' {stem.dtype}; got {x.dtype}")
    if x.device != stem.device:
        raise FresnetError(f"{expected} on the weights' device {stem.device}; got {x.device}")


def check_params(caller: str, params: Params) -> None:
    """Refuse a tree that is no network, or not of one dtype on one device.

    Raises:
      FresnetError: naming the node, what was expected there and what came.
    """
    if type(params) is not Params or type(params.weights) is not Weights:
        raise FresnetError(f"{caller} expects Params(weights, stats); got {describe(params)}")
    stem = getattr(params.weights.stem, "conv", None)
    if not isinstance(stem, Tensor) or stem.ndim != 4 or not stem.is_floating_point():
        raise FresnetError(
            f"{caller} expects weights.stem.conv to be a float tensor [o c k k]; "
            f"got {describe(stem)}"
        )
    _check_pair(caller, "", params.weights, params.stats)
    _check_leaves(caller, "weights", params.weights, stem.dtype, stem.device)
    _check_leaves(caller, "stats", params.stats, stats_dtype(stem.dtype), stem.device)


def _check_pair(caller: str, where: str, weights: Any, stats: Any) -> None:
    """Refuse statistics that do not stand in parallel to the weights, node by node."""
    kind = type(weights)
    if kind is tuple:
        if type(stats) is not tuple or len(stats) != len(weights):
            got = len(stats) if type(stats) is tuple else describe(stats)
            raise FresnetError(
                f"{caller} expects stats{where} to have {len(weights)} nodes, "
                f"as weights{where} has; got {got}"
            )
        for i, pair in enumerate(zip(weights, stats, strict=True)):
            _check_pair(caller, f"{where}[{i}]", *pair)
    elif kind not in STATS_OF:
        raise FresnetError(
            f"{caller} expects weights{where} to be a node of fresnet.types; "
            f"got {describe(weights)}"
        )
    elif type(stats) is not STATS_OF[kind]:
        raise FresnetError(
            f"{caller} expects stats{where} to be {STATS_OF[kind].__name__}, "
            f"as weights{where} is {kind.__name__}; got {describe(stats)}"
        )
    elif kind is not Norm:
        for field in stats._fields:
            _check_pair(caller, f"{where}.{field}", getattr(weights, field), getattr(stats, field))


def _check_leaves(
    caller: str, where: str, node: Any, dtype: torch.dtype, device: torch.device
) -> None:
    if isinstance(node, tuple):
        names = getattr(node, "_fields", None)
        for i, child in enumerate(node):
            _check_leaves(
                caller, f"{where}.{names[i]}" if names else f"{where}[{i}]", child, dtype, device
            )
    elif not isinstance(node, Tensor):
        raise FresnetError(f"{caller} expects {where} to be a tensor; got {describe(node)}")
    elif node.dtype != dtype or node.device != device:
        raise FresnetError(
            f"{caller} expects {where} to be {dtype} on {device}, as the rest of the tree; "
            f"got {node.dtype} on {node.device}"
        )
