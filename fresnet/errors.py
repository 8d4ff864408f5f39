"""The one error of the library."""

from typing import Any

from torch import Tensor


class FresnetError(ValueError):
    """A call that fresnet refuses: the message says what was expected and what came."""


def describe(value: Any) -> str:
    """A tensor as its dtype and shape, anything else as its type: what an error says it got.

    >>> import torch
    >>> describe(torch.zeros(2, 3)), describe(torch.tensor(1)), describe([1]), describe(None)
    ('float32 (2, 3)', 'int64 ()', 'a list', 'None')
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
