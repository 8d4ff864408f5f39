"""Batch statistics as a value: moments that merge, and what becomes of them.

Each function takes trees as `forward_moments` returns them, or single nodes.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fresnet.check import check_momentum
from fresnet.collectives import Group, all_sum
from fresnet.errors import FresnetError, describe
from fresnet.types import Moments, NormStats

Tree = TypeVar("Tree")


def merge(a: Tree, b: Tree) -> Tree:
    """The moments of two sets of values together.

        mean = mean_a + d n_b / n,   m2 = m2_a + m2_b + d^2 n_a n_b / n,   d = mean_b - mean_a

    Associative and commutative to rounding; moments of no values are the identity, exactly.

    >>> import torch, fresnet
    >>> one = fresnet.types.Moments(torch.tensor(1.0), torch.tensor([3.0]), torch.tensor([0.0]))
    >>> two = fresnet.types.Moments(torch.tensor(2.0), torch.tensor([6.0]), torch.tensor([2.0]))
    >>> fresnet.moments.merge(one, two)              # of 3, 5 and 7
    Moments(n=tensor(3.), mean=tensor([5.]), m2=tensor([8.]))

    Raises:
      FresnetError: if the trees differ.
    Source: Chan, Golub & LeVeque 1979, "Updating formulae", Eq. 2.1.
    """
    return _map(_merge, a, b)  # type: ignore[no-any-return]


def _merge(a: Moments, b: Moments) -> Moments:
    n = a.n + b.n
    weight = b.n / n.clamp(min=1)
    difference = b.mean - a.mean
    return Moments(
        n,
        a.mean + difference * weight,
        a.m2 + b.m2 + difference.square() * (a.n * weight),
    )


def merge_across(moments: Tree, group: Group) -> Tree:
    """The moments of the group's processes together, on each of them the same.

        mean = sum n_i mean_i / n,   m2 = sum m2_i + n_i (mean_i - mean)^2,   n = sum n_i

    Differentiable in every process's moments. Each process must call it, in the same order.

    Raises:
      FresnetError: if the tree holds anything but moments.
    """

    def merged(own: Moments) -> Moments:
        total = all_sum(torch.cat([own.n[None], own.n * own.mean]), group)
        n, mean = total[0], total[1:] / total[0].clamp(min=1)
        return Moments(n, mean, all_sum(own.m2 + own.n * (own.mean - mean).square(), group))

    return _map(merged, moments)  # type: ignore[no-any-return]


def update(stats: Tree, moments: Any, *, momentum: float | Tensor = 0.1) -> Tree:
    """Move running statistics towards these moments, as training does after a batch.

        mean <- (1 - momentum) mean + momentum E[x]
        var  <- (1 - momentum) var  + momentum Var[x] n / (n - 1)

    Where there were no values, as at a frozen norm, statistics stay as they are.

    Args:
      stats: a tree of `NormStats`, such as `params.stats`.
      moments: a tree of `Moments` like it.
      momentum: the weight of the new value: a number from 0 to 1 or a 0-d tensor.
    Returns:
      New statistics, constants with respect to the old ones.
    Raises:
      FresnetError: if the trees differ, or if the momentum is not such a number.
    """
    check_momentum("update", momentum)

    def move(old: NormStats, seen: Moments) -> NormStats:
        dtype = seen.mean.dtype
        weight = ((seen.n > 0).to(dtype) * momentum).to(dtype)
        unbiased = seen.m2 / (seen.n - 1).clamp(min=1)
        return NormStats(
            old.mean.detach().lerp(seen.mean, weight), old.var.detach().lerp(unbiased, weight)
        )

    return _map(move, stats, moments)  # type: ignore[no-any-return]


def statistics(stats: Tree, moments: Any) -> Tree:
    """The statistics by which training normalised: mean, and variance without the n / (n - 1).

    `forward` with these in place of the running ones gives the logits of `forward_train` on the
    same batch, with the batch's statistics held constant.

    Args:
      stats: a tree of `NormStats`, such as `params.stats`: kept where there were no values, as at a
        frozen norm.
      moments: a tree of `Moments` like it.
    Returns:
      A tree like stats.
    Raises:
      FresnetError: if the trees differ.
    """

    def of_batch(running: NormStats, seen: Moments) -> NormStats:
        batch = (seen.mean, seen.m2 / seen.n.clamp(min=1))
        kept = (torch.where(seen.n > 0, new, old) for new, old in zip(batch, running, strict=True))
        return NormStats(*kept)

    return _map(of_batch, stats, moments)  # type: ignore[no-any-return]


def _map(function: Callable[..., Any], first: Any, *rest: Any) -> Any:
    """Apply a function node by node: to `Moments` and `NormStats` whole."""
    if isinstance(first, Moments | NormStats):
        for other in rest:
            if not isinstance(other, Moments):
                raise FresnetError(f"moments are expected beside moments; got {describe(other)}")
        return function(first, *rest)
    if not isinstance(first, tuple) or any(
        type(other) is not type(first) or len(other) != len(first) for other in rest
    ):
        nodes = ", ".join(f"{describe(node)}" for node in (first, *rest))
        raise FresnetError(f"trees of moments are expected, all of one structure; got {nodes}")
    children = [_map(function, *nodes) for nodes in zip(first, *rest, strict=True)]
    return type(first)(*children) if hasattr(first, "_fields") else tuple(children)
