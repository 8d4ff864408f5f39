"""Several processes as one job, started by `torchrun`, or one alone."""

import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn
from zlib import crc32

import torch
from torch import Tensor, distributed

from fresnet import tree
from fresnet.errors import FresnetError, describe, shown
from fresnet.network.options import check_group
from fresnet.numbers import as_integer
from fresnet.pytorch.collectives import Group, all_sum, answered
from fresnet.training.checkpoint import nodes_of
from fresnet.tree.walks import check_tensors

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""The variables that torchrun sets for each process."""

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}
"""What holds for a process for which nothing is set."""


class Processes(NamedTuple):
    """A job, as one of its processes sees it."""

    group: Group | None
    """All processes of the job; None if there is only one."""

    rank: int
    size: int
    device: torch.device


@contextmanager
def joined(*, timeout_s: float = 60.0, backend: str | None = None) -> Iterator[Processes]:
    """Join the other processes that `torchrun` started, and leave them at the end.

    After an error this process stays among them until it ends.

    >>> with joined(backend="gloo") as processes:             # started without torchrun
    ...     processes
    Processes(group=None, rank=0, size=1, device=device(type='cpu'))

    Args:
      timeout_s: how long a process waits for another, for example while that one writes a
        checkpoint, before it gives up.
      backend: by default "nccl" where there are GPUs, with one process for each, and "gloo"
        elsewhere.
    Raises:
      FresnetError: if torchrun's variables are set only in part or to anything else (an empty one
        counts as not set), if a machine has fewer GPUs than
        processes, or if another process ends or does not answer in time: at the start, or later in
        any call that waits for it. With NCCL, PyTorch's watchdog ends this process then.
      SystemExit: on SIGTERM, which torchrun sends to the other processes when one has ended.
    """
    found = {name: os.environ[name] for name in ENVIRONMENT if os.environ.get(name)}
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    rank, size, local = _numbers(found)
    device = _device(local) if backend == "nccl" else torch.device("cpu")
    if size == 1:
        yield Processes(None, rank, size, device)
        return
    missing = [name for name in ENVIRONMENT if name not in found]
    if missing:
        raise FresnetError(f"joined expects what torchrun sets; {', '.join(missing)} is not set")
    with answered(rank, size):
        distributed.init_process_group(
            backend,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if backend == "nccl" else None,
        )
    with _ended_by_signal(rank, size):
        yield Processes(distributed.group.WORLD, rank, size, device)
    # After an error the group is not destroyed: the others would notice at once, and torchrun would
    # end this process before it has said what happened.
    distributed.destroy_process_group()


def _numbers(found: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, size of the job, and rank on this machine."""
    told = {name: found.get(name, standard) for name, standard in ALONE.items()}
    if all(re.fullmatch(r"\d{1,9}", text) for text in told.values()):
        rank, size, local, port = map(int, told.values())
        if rank < size and local < size and port < 2**16:
            return rank, size, local
    got = ", ".join(f"{name}={text}" for name, text in found.items())
    raise FresnetError(
        "joined expects what torchrun sets: RANK and LOCAL_RANK below WORLD_SIZE, which is 1 if "
        f"it is not set, and the number of a port; got {got}"
    )


def share(images: int, processes: int) -> int:
    """How many images of a batch each process takes.

    >>> share(64, 4)
    16

    Raises:
      FresnetError: if the processes cannot all take the same number.
    """
    if as_integer(images) is None or (as_integer(processes) or 0) < 1:
        raise FresnetError(
            "share expects a number of images and one of processes, from 1 on; "
            f"got {shown(images)} and {shown(processes)}"
        )
    fewer = images // processes * processes
    if fewer != images or images < 1:
        fits = f"{fewer} or {fewer + processes}" if fewer > 0 else f"{processes}"
        raise FresnetError(
            f"a batch of {images} images does not divide among {processes} processes; {fits} would"
        )
    return images // processes


def gathered(names: list[str], processes: Processes) -> list[str]:
    """The names of all processes, which all call this.

    Raises:
      FresnetError: if another process does not answer.
    """
    if processes.group is None:
        return names
    everyone: list[list[str]] = [[]] * processes.size
    with answered(processes.rank, processes.size):
        distributed.all_gather_object(everyone, names, group=processes.group)
    return [name for one in everyone for name in one]


def check_same(state: Any, group: Group | None) -> None:
    """Refuse states that differ between processes, even in a single bit.

    Steps keep equal states equal. If states differ, the processes began with different checkpoints
    or options.

    >>> import torch
    >>> check_same((torch.ones(2),), group=None)  # A process alone has nothing to compare.

    Args:
      state: a tree of tensors, such as a `TrainState`.
      group: the processes that compare their states, which all call this; None for a process
        alone, where there is nothing to compare.
    Raises:
      FresnetError: on every process. It names one process, and where its state differs from that of
        process 0.
    """
    check_group("check_same", group)
    check_tensors("check_same", state)
    if group is None:
        return
    kinds = nodes_of(state), [*map(describe, tree.leaves(state))]
    structure = [crc32(repr(kinds).encode())]
    places = ["in structure", *(f"at {path}" for path in tree.paths(state))]
    leaves = tree.leaves(state)
    # Structures are compared first, because trees that differ may have different numbers of leaves.
    for checksums in (structure, [*structure, *map(_checksum, leaves)]):
        table = torch.zeros(group.size(), len(checksums), dtype=torch.int64, device="cpu")
        table[group.rank()] = torch.tensor(checksums, device="cpu")
        table = all_sum(table.to(leaves[0].device), group).cpu()
        for rank, column in (table != table[0]).nonzero().tolist():
            raise FresnetError(
                "processes expect to begin with the same state; that of process "
                f"{rank} differs from process 0's {places[column]}: from another checkpoint?"
            )


def _checksum(leaf: Tensor) -> int:
    # A view as bytes takes a last stride of 1. Indexing makes one; a reshape may not.
    column = leaf.detach().cpu().flatten()[:, None]
    return crc32(column.view(torch.uint8).numpy().tobytes())


def _device(local: int) -> torch.device:
    if local >= torch.cuda.device_count():
        raise FresnetError(
            f"joined expects a GPU for each process of a machine, at least {local + 1}; "
            f"got {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextmanager
def _ended_by_signal(rank: int, size: int) -> Iterator[None]:
    """Let SIGTERM end this process with a message, unless something else handles that signal."""

    def end(*_: object) -> NoReturn:
        raise SystemExit(
            f"process {rank} of {size} was told to end, as when another has ended; start the same "
            "command again to go on from the last checkpoint"
        )

    unseen = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not unseen or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
