"""How leaves lie in memory, which a file of their values does not tell."""

from collections.abc import Sequence

import torch
from torch import Tensor

GAPS = 64
"""How many times the memory of its values a leaf may take, as a member of a stack does."""


def strides_of(leaf: Tensor) -> list[int]:
    """The leaf's strides in memory of its own, or those of a dense one where they are no such."""
    strides = list(leaf.stride())
    if _lie_apart(leaf.shape, strides):
        return strides
    once = leaf[tuple(slice(None) if stride else slice(1) for stride in strides)]
    dense = torch.empty_like(once, device="meta").stride()
    return [new if old else 0 for new, old in zip(dense, strides, strict=True)]


def _lie_apart(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether values lie line after line, without wide gaps; with stride 0 one is repeated.

    Wide gaps would let a small file ask for any amount of memory. Without values there are none.
    """
    if not all(shape):
        return True
    last, values = 0, 1
    for stride, n in sorted(zip(strides, shape, strict=True)):
        if stride and n != 1:
            if stride <= last:
                return False
            last, values = last + (n - 1) * stride, values * n
    return last < GAPS * values


def are_strides(strides: object, leaf: Tensor) -> bool:
    """Whether `save_state` can have written this of a leaf."""
    return (
        isinstance(strides, list)
        and len(strides) == leaf.ndim
        and all(type(stride) is int and 0 <= stride < 2**63 for stride in strides)
        and _lie_apart(leaf.shape, strides)
    )


def laid_out(leaf: Tensor, strides: Sequence[int], device: torch.device) -> Tensor:
    """A copy with these strides on this device."""
    result = torch.empty_strided(leaf.shape, strides, dtype=leaf.dtype, device=device)
    # An expanded dimension has stride 0: the values that it repeats lie in memory once.
    once = tuple(slice(None) if stride else slice(1) for stride in strides)
    result[once].copy_(leaf[once])
    return result
