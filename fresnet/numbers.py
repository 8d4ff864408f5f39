"""Numbers as users have them: Python's own, numpy's, and 0-d tensors. A bool is no number."""

from numbers import Integral, Real

from torch import Tensor


def as_integer(value: object) -> int | None:
    """The value as Python's int, or None if it is no integer.

    >>> import numpy
    >>> as_integer(numpy.int64(4)), as_integer(True), as_integer(4.0)
    (4, None, None)
    """
    if type(value) is int:
        return value
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def as_number(value: object) -> float | None:
    """The value as Python's int or float, or None if it is no real number.

    >>> import numpy
    >>> as_number(numpy.float32(0.5)), as_number(2), as_number(True), as_number("2")
    (0.5, 2, None, None)
    """
    if type(value) is int or type(value) is float:
        return value
    if isinstance(value, Integral):
        return as_integer(value)
    return float(value) if isinstance(value, Real) else None


def as_scalar(value: object) -> float | Tensor | None:
    """As `as_number`; a 0-d float tensor is itself, and another tensor is None."""
    if isinstance(value, Tensor):
        return value if value.ndim == 0 and value.is_floating_point() else None
    return as_number(value)
