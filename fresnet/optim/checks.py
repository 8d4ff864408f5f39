"""What optimizers take for a rate, for another number, and for gradients and moments."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fresnet.errors import FresnetError, check_type, describe, shown
from fresnet.numbers import as_scalar
from fresnet.tree import leaves
from fresnet.tree.walks import check_structures


def checked_rates(caller: str, **values: Any) -> list[Any]:
    """The values, of which each is a number from 0 on, a 0-d float tensor or a schedule.

    Raises:
      FresnetError: naming the first that is none of these.
    """
    return [
        value if callable(value) else _number(caller, name, value, " or a schedule")
        for name, value in values.items()
    ]


def checked_numbers(caller: str, **values: Any) -> list[Any]:
    """The values, of which each is a number from 0 on or a 0-d float tensor."""
    return [_number(caller, name, value, "") for name, value in values.items()]


def _number(caller: str, name: str, value: object, otherwise: str) -> Any:
    scalar = as_scalar(value)
    if isinstance(scalar, Tensor) or (scalar is not None and scalar >= 0):
        return scalar
    raise FresnetError(
        f"{caller} expects {name} to be a number from 0 on, a 0-d float tensor{otherwise}; "
        f"got {shown(value)}"
    )


def check_where(caller: str, **choices: object) -> None:
    """Refuse choices of leaves that are no functions."""
    check_type(caller, Callable, "a function of the path to a leaf, such as kernels", **choices)


def check_like(weights: object, *others: object) -> None:
    """Refuse gradients and moments of another structure than the weights', or of other shapes.

    Those would be broadcast.
    """
    check_structures("update, of weights, grads and moments,", weights, *others)
    for w, *beside in zip(*map(leaves, (weights, *others)), strict=True):
        for other in beside:
            if other.shape != w.shape:
                raise FresnetError(
                    "update expects gradients and moments of the weights' shapes; "
                    f"got {describe(other)} for {describe(w)}"
                )
