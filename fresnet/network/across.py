"""The moments of norms that several processes share: by one message forward and one back."""

from typing import Any

import torch
from torch import Tensor

from fresnet.network.moments import merge_across
from fresnet.network.nodes import Moments, Stats, over
from fresnet.pytorch.collectives import Group, all_sum, eager, gather

GATHERED = 32
"""How many processes gather at most. NCCL gathers around a ring, and more are sooner by a tree."""


@eager
def merge_at_once(moments: Moments, group: Group) -> Moments:
    """What `merge_across` makes of one norm's moments, by a message where that sends two.

    The processes gather all moments, and each merges them by itself. For many norms at once, or
    among many processes, two sums are better: what N processes gather is N times as long.

    Args:
      moments: n `[]`, mean and m2 `[c]` each.
      group: the processes, which all call this function, in the same order.
    Raises:
      FresnetError: if another process ends or does not answer in time.
    Source: Chan, Golub & LeVeque 1979, "Updating formulae", Eq. 2.1.
    """
    if group.size() > GATHERED:
        return merge_across(moments, group)
    n, mean, m2 = moments
    each = _Gather.apply(torch.cat([n[None], mean, m2]).detach(), group)
    ns, means, m2s = each.split([1, len(mean), len(mean)], 1)
    total = ns.sum(0)
    middle = (ns * means).sum(0) / total.clamp(min=1)
    around = (m2s + ns * (means - middle).square()).sum(0)
    # The values are known, and derivatives follow from what this process adds to them. Around the
    # constant `middle` m2 is a sum too: sum (x - middle)^2 = m2 + n (mean - middle)^2.
    own = torch.cat([n * mean / total.clamp(min=1), m2 + n * (mean - middle).square()])
    mean, around = _Known.apply(own, torch.cat([middle, around]), group).chunk(2)
    return Moments(total[0], mean, around - total * (mean - middle).square())


def share_of(moments: Stats, count: int) -> Stats:
    """Moments of which those of `count` processes, which all have the same, count once together."""
    if count == 1:
        return moments
    share: Stats = over(
        lambda same: Moments(same.n / count, same.mean, same.m2 / count), moments, units=(Moments,)
    )
    return share


class _Gather(torch.autograd.Function):
    """`gather` of a constant."""

    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        return gather(x, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Group], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(
        info: object, in_dims: tuple[int, None], x: Tensor, group: Group
    ) -> tuple[Tensor, int]:
        return _Gather.apply(x, group), in_dims[0] + 1


class _Known(torch.autograd.Function):
    """`all_sum` of x, whose value is known: a message is sent for its derivative alone."""

    @staticmethod
    def forward(x: Tensor, value: Tensor, group: Group) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Group], output: Tensor) -> None:
        ctx.group = inputs[-1]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        return all_sum(cotangent, ctx.group), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return all_sum(tangent, ctx.group)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, int | None, None],
        x: Tensor,
        value: Tensor,
        group: Group,
    ) -> tuple[Tensor, int]:
        x, value = (
            v.expand(info.batch_size, *v.shape) if dim is None else v.movedim(dim, 0)
            for v, dim in zip((x, value), in_dims, strict=False)
        )
        return _Known.apply(x, value, group), 0
