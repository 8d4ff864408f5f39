"""What processes do together, as a function that `torch.func` can differentiate.

PyTorch's own collectives raise under `torch.func.grad`.
"""

from typing import Any

import torch
from torch import Tensor, distributed

Group = distributed.ProcessGroup


@torch.compiler.disable(reason="compiled, its derivatives would leave other processes out")  # type: ignore[untyped-decorator]
def all_sum(x: Tensor, group: Group) -> Tensor:
    """The sum of x over the group's processes, on each of them the same.

    Its derivative is the sum over processes as well: a gradient is of the sum of their losses.
    Every process must take every derivative that one of them takes, in the same order.
    """
    total: Tensor = _AllSum.apply(x, group)
    return total


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Group], output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return all_sum(cotangent, ctx.group), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        total: Tensor = all_sum(tangent, ctx.group)
        return total

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, None], x: Tensor, group: Group
    ) -> tuple[Tensor, int | None]:
        return all_sum(x, group), in_dims[0]
