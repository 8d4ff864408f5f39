"""Layers, of which all nodes are made, and what stands in their place.

A tree of nodes is a functor of its layers. The same node types hold `Layer`s in `weights`, running
moments in `stats`, a batch's moments in what a training run returns, and ranges in an int8 network.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

from torch import Tensor

from fresnet.tree import rebuild

T = TypeVar("T")
"""What stands in a `Layer`'s place."""

N = TypeVar("N")
"""What stands in a `Normed`'s place."""


class Norm(NamedTuple):
    """The trained part of a batch normalisation; each `[c]`."""

    scale: Tensor
    bias: Tensor


class FrozenNorm(NamedTuple):
    """A batch normalisation that uses its running moments in training too; each `[c]`."""

    scale: Tensor
    bias: Tensor


class Bias(NamedTuple):
    """y = x + bias, `[c]`: a convolution's own bias, or a norm once folded into its convolution."""

    bias: Tensor


class Rescale(NamedTuple):
    """y = x * scale + bias, each `[c]`: a folded norm that no convolution can take in."""

    scale: Tensor
    bias: Tensor


class NoNorm(NamedTuple):
    """y = x. It stands after a convolution that has neither norm nor bias."""


AnyNorm: TypeAlias = Norm | FrozenNorm | Bias | Rescale | NoNorm


class NormStats(NamedTuple):
    """The running moments of a batch normalisation (the variance is unbiased); each `[c]`."""

    mean: Tensor
    var: Tensor


class Moments(NamedTuple):
    """The number of values n `[]`, their mean and their sum of squared deviations, each `[c]`.

    They stand in the place of `NormStats` in what `forward_moments` returns.
    """

    n: Tensor
    mean: Tensor
    m2: Tensor


class Layer(NamedTuple):
    """The unit of a network: a convolution `[o c/groups k k]` and the norm that follows it."""

    conv: Tensor
    norm: Norm | Any  # one of AnyNorm, of which Norm has all fields


class Normed(NamedTuple):
    """A norm that no convolution precedes, and ReLU, as in ResNet V2."""

    norm: Norm | Any


Unit: TypeAlias = Layer | Normed
UNITS = (Layer, Normed)


class Pair(NamedTuple):
    """A unit, and what stands beside it in another tree. A network runs as a tree of pairs."""

    unit: Any  # Layer or Normed
    beside: Any


def units_of(node: Any) -> list[Any]:
    """The units of a node, in their order."""
    found: list[Any] = []
    over(found.append, node)
    return found


def over(
    function: Callable[..., Any], node: Any, *rest: Any, units: tuple[type, ...] = UNITS
) -> Any:
    """The tree with each unit replaced by what the function makes of it and of what is beside it.

    >>> over(lambda unit: len(unit), (Normed(NoNorm()), (Normed(NoNorm()),)))
    (1, (1,))
    """
    if isinstance(node, units):
        return function(node, *rest)
    if not isinstance(node, tuple):
        return node
    below = zip(node, *rest, strict=True)
    return rebuild(node, [over(function, *at, units=units) for at in below])
