"""Layers, of which all nodes are made, and what stands in their place.

A tree of nodes is a functor of its layers. The same node types hold `Layer`s in `weights`, running
moments in `stats`, a batch's moments in what a training run returns, and ranges in an int8 network.
"""

from collections.abc import Callable
from math import gcd
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from fresnet.tree import rebuild

EPS = 1e-5
"""What norms add to each variance."""

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


class GroupNorm(NamedTuple):
    """A normalisation of each image's channels in g groups, without statistics; each `[g c/g]`.

    Source: Wu & He 2018, arXiv:1803.08494, Sec. 3.1.
    """

    scale: Tensor
    bias: Tensor

    @staticmethod
    def shape(channels: int) -> tuple[int, int]:
        """32 groups, or as many as divide both 32 and the channels: what everyone has."""
        groups = gcd(32, channels)
        return groups, channels // max(groups, 1)


AnyNorm: TypeAlias = Norm | FrozenNorm | GroupNorm | Bias | Rescale | NoNorm

BATCH_NORMS = (Norm, FrozenNorm)
"""The norms that have running moments beside them."""

DRAWN_NORMS = (Norm, GroupNorm)
"""The norms that a network may be drawn with."""

AFFINE = (Bias, Rescale, NoNorm)
"""What stands in a norm's place and normalises nothing: a function of each value by itself."""

NORMS = (*BATCH_NORMS, GroupNorm, *AFFINE)


def norm_shape(norm: type[Any], channels: int) -> tuple[int, ...]:
    """The shape of each leaf of a norm."""
    shape: tuple[int, ...] = norm.shape(channels) if hasattr(norm, "shape") else (channels,)
    return shape


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

    def kernel(self) -> Tensor:
        """What activations are convolved with."""
        return self.conv


class StandardisedLayer(NamedTuple):
    """A layer whose kernel is the weight, standardised for each output channel.

        kernel = (conv - mean) / sqrt(var + 1e-8)

    Source: Qiao et al. 2019, arXiv:1903.10520, Sec. 3; Kolesnikov et al. 2019 ("BiT"),
    arXiv:1912.11370, whose code has this eps.
    """

    conv: Tensor
    norm: AnyNorm

    def kernel(self) -> Tensor:
        """What activations are convolved with."""
        wide = self.conv.to(torch.promote_types(self.conv.dtype, torch.float32))
        var, mean = torch.var_mean(wide, (1, 2, 3), correction=0, keepdim=True)
        return ((wide - mean) * torch.rsqrt(var + 1e-8)).to(self.conv.dtype)


class Normed(NamedTuple):
    """A norm that no convolution precedes, and ReLU, as in ResNet V2."""

    norm: Norm | Any


Unit: TypeAlias = Layer | StandardisedLayer | Normed
LAYERS = (Layer, StandardisedLayer)
UNITS = (*LAYERS, Normed)


class Pair(NamedTuple):
    """A unit, and what stands beside it in another tree. A network runs as a tree of pairs."""

    unit: Any
    beside: Any


def units_of(node: Any) -> list[Any]:
    """The units of a node, in their order."""
    found: list[Any] = []
    over(found.append, node)
    return found


def kinds(node: Any) -> set[type]:
    """The types of a tree's nodes."""
    if not isinstance(node, tuple):
        return set()
    return {type(node)}.union(*map(kinds, node))


def over(
    function: Callable[..., Any], node: Any, *rest: Any, units: tuple[type, ...] = UNITS
) -> Any:
    """The tree with each unit replaced by what the function makes of it and of what is beside it.

    >>> over(lambda unit: len(unit), (Normed(NoNorm()), (Normed(NoNorm()),)))
    (1, (1,))
    """
    if isinstance(node, units):
        return function(node, *rest)
    if not isinstance(node, tuple) or not node:
        return node
    below = zip(node, *rest, strict=True)
    return rebuild(node, [over(function, *at, units=units) for at in below])
