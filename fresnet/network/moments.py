"""Batch statistics as a value: moments that merge, and the statistics that they make.

Each function takes trees such as `forward_moments` returns, or single nodes.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from fresnet.errors import FresnetError, check_type, describe, shown
from fresnet.network.nodes import Moments, NormStats, over
from fresnet.network.options import check_momentum
from fresnet.numbers import as_number
from fresnet.pytorch.collectives import Group, all_sum

Tree = TypeVar("Tree")


def merge(first: Tree, *rest: Tree) -> Tree:
    """The moments of several sets of values, taken together.

        mean = mean_a + d n_b / n,   m2 = m2_a + m2_b + d^2 n_a n_b / n,   d = mean_b - mean_a

    Merging is associative and commutative to rounding. Moments of no values are its exact identity.

    >>> import torch, fresnet
    >>> one = fresnet.nodes.Moments(torch.tensor(1.0), torch.tensor([3.0]), torch.tensor([0.0]))
    >>> two = fresnet.nodes.Moments(torch.tensor(2.0), torch.tensor([6.0]), torch.tensor([2.0]))
    >>> tuple(fresnet.moments.merge(one, two))       # of 3, 5 and 7
    (tensor(3.), tensor([5.]), tensor([8.]))

    Raises:
      FresnetError: if the trees differ, or hold anything but moments.
    Source: Chan, Golub & LeVeque 1979, "Updating formulae", Eq. 2.1.
    """
    return _map("merge", lambda *sets: reduce(_merge, sets), first, *rest)


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
    """The moments of all the group's processes, taken together. Each process gets the same.

        mean = sum n_i mean_i / n,   m2 = sum m2_i + n_i (mean_i - mean)^2,   n = sum n_i

    They are differentiable in every process's moments. Each process must call this function, in the
    same order.

    Raises:
      FresnetError: if the tree holds anything but moments, or as `forward_train` does for a group.
    """
    check_type("merge_across", Group, "a process group of torch.distributed", group=group)
    own: list[Moments] = []
    _map("merge_across", own.append, moments)
    if not own:
        return moments
    sizes = [len(node.mean) for node in own]
    n, mean, m2 = _joined(own)
    # All norms go in two messages, because a message's cost hardly depends on its length.
    total, moment = all_sum(torch.stack([n, n * mean]), group)
    middle = moment / total.clamp(min=1)
    m2 = all_sum(m2 + n * (mean - middle).square(), group)
    parts = zip(*(values.split(sizes) for values in (total, middle, m2)), strict=True)
    merged = (Moments(n[0], mean, m2) for n, mean, m2 in parts)
    return _map("merge_across", lambda _: next(merged), moments)


def _joined(nodes: Sequence[Moments]) -> Moments:
    """n, mean and m2 of all channels of all nodes, end to end; each `[c]`."""
    n, mean, m2 = zip(*nodes, strict=True)
    sizes = [len(values) for values in mean]
    counts = [count.expand(size) for count, size in zip(n, sizes, strict=True)]
    return Moments(torch.cat(counts), torch.cat(mean), torch.cat(m2))


def update(stats: Tree, moments: object, *, momentum: float | Tensor = 0.1) -> Tree:
    """Move running statistics towards these moments, as training does after a batch.

        mean <- (1 - momentum) mean + momentum E[x]
        var  <- (1 - momentum) var  + momentum Var[x] n / (n - 1)

    Statistics stay as they are where there were no values, as at a frozen norm.

    Args:
      stats: a tree of `NormStats`, such as `params.stats`.
      moments: a tree of `Moments` like it.
      momentum: the weight of the new value: a number from 0 to 1 or a 0-d float tensor.
    Returns:
      New statistics, constants with respect to the old ones.
    Raises:
      FresnetError: if the trees differ, or if the momentum is not such a number.
    """
    momentum = check_momentum("update", momentum)
    pairs: list[tuple[NormStats, Moments]] = []
    _map("update", lambda *pair: pairs.append(pair), stats, moments, first=NormStats)
    if not pairs:
        return stats
    # All norms go at once. With calls for each norm, calling would take longer than computing.
    old, seen = zip(*pairs, strict=True)
    sizes = [len(node.mean) for node in old]
    n, mean, m2 = _joined(seen)
    olds = [torch.cat(values).detach() for values in zip(*old, strict=True)]
    dtype = olds[0].dtype  # the moments' may differ: a step may compute in another precision
    # A number is filled in by the device. A copy of it from the CPU would wait for the device.
    weight = (
        momentum.to(olds[0]) if isinstance(momentum, Tensor) else olds[0].new_full((), momentum)
    )
    news = (mean.to(dtype), (m2 / (n - 1).clamp(min=1)).to(dtype))
    moved = (
        torch.where(n > 0, a.lerp(b, weight), a).split(sizes)
        for a, b in zip(olds, news, strict=True)
    )
    new = iter([NormStats(*values) for values in zip(*moved, strict=True)])
    return _map("update", lambda *_: next(new), stats, moments, first=NormStats)


def statistics(stats: Tree, moments: object, *, correction: int = 0) -> Tree:
    """Statistics made of these moments; by default those that training normalised by.

        mean = E[x],   var = Var[x] n / (n - correction)

    With these in place of the running statistics, `forward` gives the logits of `forward_train` on
    the same batch, and the batch's statistics are constants.

    >>> import torch, fresnet
    >>> params, x = fresnet.init(0, fresnet.RESNET18), torch.randn(4, 3, 64, 64)
    >>> logits, batch = fresnet.forward_moments(params, x)
    >>> params = params._replace(stats=fresnet.moments.statistics(params.stats, batch))
    >>> torch.allclose(fresnet.forward(params, x), logits, atol=1e-3)
    True

    Args:
      stats: a tree of `NormStats`, such as `params.stats`. They are kept where there were no
        values, as at a frozen norm.
      moments: a tree of `Moments` like it.
      correction: 1 for the unbiased variance that running statistics hold.
    Returns:
      A tree like stats.
    Raises:
      FresnetError: if the trees differ, or if correction is no number from 0 on.
    """
    number = as_number(correction)
    if number is None or not number >= 0:
        raise FresnetError(
            f"statistics expects correction to be a number from 0 on; got {shown(correction)}"
        )

    def of_batch(old: NormStats, seen: Moments) -> NormStats:
        new = (seen.mean, seen.m2 / (seen.n - correction).clamp(min=1))
        return NormStats(*(torch.where(seen.n > 0, b, a) for a, b in zip(old, new, strict=True)))

    return _map("statistics", of_batch, stats, moments, first=NormStats)


def _map(
    caller: str, function: Callable[..., object], tree: Tree, *rest: object, first: type = Moments
) -> Tree:
    """The tree with the `Moments` or `NormStats` in each place replaced by the function of them."""
    _check_nodes(caller, [first, *[Moments] * len(rest)], tree, *rest)
    mapped: Tree = over(function, tree, *rest, units=(NormStats, Moments))
    return mapped


def _check_nodes(caller: str, kinds: Sequence[type], *nodes: Any) -> None:
    if any(isinstance(node, (Moments, NormStats)) for node in nodes):
        if [type(node) for node in nodes] != kinds:
            expected = ", ".join(kind.__name__ for kind in kinds)
            got = ", ".join(map(describe, nodes))
            raise FresnetError(f"moments.{caller} expects {expected}; got {got}")
        if len({node.mean.shape for node in nodes}) > 1:
            got = ", ".join(str(tuple(node.mean.shape)) for node in nodes)
            raise FresnetError(
                f"moments.{caller} expects means of one shape; got {got}: unstack and merge first?"
            )
        return
    one, *others = nodes
    if not isinstance(one, tuple) or any(
        type(other) is not type(one) or len(other) != len(one) for other in others
    ):
        got = ", ".join(map(describe, nodes))
        raise FresnetError(
            f"moments.{caller} expects trees of moments, all of one structure; got {got}"
        )
    for below in zip(*nodes, strict=True):
        _check_nodes(caller, kinds, *below)
