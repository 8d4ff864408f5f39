"""Saves in processes that are killed, run out of room or lack rights.

The helper reads orders, one line of JSON each, and forks for every order. So torch is imported only
once, and no test runner is forked.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch

from fresnet import FresnetError
from fresnet.training import save_state

NOBODY = 65534


class Kill(NamedTuple):
    """The moment at which a process kills itself."""

    function: str  # save_file, fsync, replace, unlink or rmtree
    call: int  # counted from 1, over all saves
    when: str  # before it, after it, or halfway through save_file


class Order(NamedTuple):
    folder: str
    steps: tuple[int, int]  # saved one after the other, from the first to before the second
    keep: int = 2
    kill: Kill | None = None
    seconds: float | None = None  # until the helper kills it
    room: int | None = None  # the most bytes that a file may have
    as_nobody: bool = False


class Report(NamedTuple):
    saved: list[int]  # steps whose saves have returned
    error: str  # what the last said instead
    killed: bool


def state_of(step: int) -> dict[str, Any]:
    """A state made from its step, so that the step tells what must have been saved."""
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(40, 20, generator=generator)
    return {"step": torch.tensor(step), "weights": (weights, weights.mT), "half": weights.half()}


@contextmanager
def saver() -> Iterator[Callable[[Order], Report]]:
    """A helper process to give orders to."""
    with subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdin
        assert process.stdout
        orders, reports = process.stdin, process.stdout

        def give(order: Order) -> Report:
            print(json.dumps(order), file=orders, flush=True)
            return Report(*json.loads(reports.readline()))

        yield give
        orders.close()


def obey(order: Order) -> Report:
    """Let a fork save, and return what it said, up to where it may have been killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            _save(order, writer)
        finally:
            os._exit(0)
    os.close(writer)
    if order.seconds is not None:
        time.sleep(order.seconds)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader) as pipe:
        *said, last = pipe.read().split("\n")
    _, status = os.waitpid(child, 0)
    return Report([int(step) for step in said], last, os.WIFSIGNALED(status))


def _save(order: Order, writer: int) -> None:
    if order.room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order.room, order.room))
    if order.as_nobody:
        os.seteuid(NOBODY)
    if order.kill is not None:
        _arrange(order.kill)
    for step in range(*order.steps):
        try:
            save_state(state_of(step), order.folder, step=step, keep=order.keep)
        except FresnetError as error:
            os.write(writer, str(error).encode())
            return
        os.write(writer, f"{step}\n".encode())


def _arrange(kill: Kill) -> None:
    """Wrap the function so that one of its calls is this process's last."""
    owners: dict[str, Any]
    owners = {"save_file": safetensors.torch, "fsync": os, "rmtree": shutil}
    owner = owners.get(kill.function, Path)
    function, calls = getattr(owner, kill.function), iter(range(1, sys.maxsize))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        last = next(calls) == kill.call
        if last and kill.when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if last and kill.when == "halfway":
            os.truncate(args[1], args[1].stat().st_size // 2)
            shutil.copy(args[1], args[1].with_name(".tmpA1b2C3"))  # where safetensors writes first
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, kill.function, wrapped)


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # too large a file is an error, not the end
    for line in sys.stdin:
        folder, steps, keep, kill, *rest = json.loads(line)
        order = Order(folder, tuple(steps), keep, kill and Kill(*kill), *rest)
        print(json.dumps(obey(order)), flush=True)


if __name__ == "__main__":
    main()
