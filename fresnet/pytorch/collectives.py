"""What processes tell each other: sums, what they gather, and the error if one is silent.

`torch.func` can differentiate `all_sum`; PyTorch's own collectives raise under `torch.func.grad`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import monotonic
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from fresnet.errors import FresnetError, reason

try:  # unlike `torch.compiler.disable`, it imports the compiler only when it is needed
    from torch._compile import _disable_dynamo as not_compiled
except ImportError:
    not_compiled = torch.compiler.disable

Group = distributed.ProcessGroup
Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """The function, called by compiled code as it is.

    The compiler says why where it meets the function and may not leave the graph.
    """
    called: Any = not_compiled(function)
    called._torchdynamo_disable = True
    called._torchdynamo_disable_msg = "compiled, its derivatives would leave other processes out"
    same: Function = called
    return same


@eager
def all_sum(x: Tensor, group: Group) -> Tensor:
    """The sum of x over the group's processes; each process gets the same.

    Its derivative is a sum over processes too, so a gradient is that of the sum of their losses.
    Every process must take every derivative that one of them takes, in the same order.

    Raises:
      FresnetError: as `start_sum` does.
    """
    total: Tensor = _AllSum.apply(x, group)
    return total


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        start_sum(total, group)()
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Group], output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return all_sum(cotangent, ctx.group), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return all_sum(tangent, ctx.group)

    @staticmethod
    def vmap(
        info: object, in_dims: tuple[int | None, None], x: Tensor, group: Group
    ) -> tuple[Tensor, int | None]:
        return all_sum(x, group), in_dims[0]


def start_sum(buffer: Tensor, group: Group) -> Callable[[], None]:
    """Start to replace a buffer's content by its sum over processes.

    Returns:
      A function that waits until the sum is in the buffer.
    Raises:
      FresnetError: at once or while waiting, if another process ends or does not answer in time.
    """
    with _all_answered():
        work = distributed.all_reduce(buffer, group=group, async_op=True)

    def wait() -> None:
        with _all_answered():
            work.wait()

    return wait


def gather(x: Tensor, group: Group) -> Tensor:
    """The x of every process of the group, in the order of ranks, `[n *x.shape]`.

    Nothing differentiates it. All processes have x of one shape.

    Raises:
      FresnetError: if another process ends or does not answer in time.
    """
    x = x.contiguous()
    each = [torch.empty_like(x) for _ in range(group.size())]
    with _all_answered():
        distributed.all_gather(each, x, group=group)
    return torch.stack(each)


def neighbours(group: Group, count: int) -> Group | None:
    """The group of this process and of those beside it: the first `count` of them, the next, ...

    All processes call this function. A process alone is None, as everywhere.

    Raises:
      FresnetError: if another process ends or does not answer in time.
    """
    if count in (1, group.size()):
        return None if count == 1 else group
    first = group.rank() // count * count
    ranks = distributed.get_process_group_ranks(group)[first : first + count]
    store = getattr(distributed.distributed_c10d, "_get_default_store", None)  # it is private
    patience = store().timeout if store else None  # the job's; PyTorch's own is half an hour
    with _all_answered():
        beside: Group = distributed.new_group(
            ranks, timeout=patience, use_local_synchronization=True
        )
    return beside


@contextmanager
def answered(rank: int, size: int) -> Iterator[None]:
    """Turn PyTorch's error about another process into one line that says what it means.

    Raises:
      FresnetError: in place of PyTorch's errors, which differ by backend and by place.
    """
    began = monotonic()
    try:
        yield
    except RuntimeError as error:
        said = reason(error).split("] ", 1)[-1].split(". ")[0]  # no place in gloo, no advice
        raise FresnetError(
            f"process {rank} of {size} waited {monotonic() - began:.0f} s for another, which has "
            "ended or does not answer; start the same command again to go on from the last "
            f"checkpoint ({said})"
        ) from None


def _all_answered() -> AbstractContextManager[None]:
    """A message among some processes, told of as one of the whole job, which the user started."""
    return answered(distributed.get_rank(), distributed.get_world_size())
