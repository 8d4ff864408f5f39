"""How a run keeps its folder to itself, and how a signal stops it between two steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fresnet.errors import FresnetError

LOCK = ".lock"


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Lock a folder, so that only one run at a time writes to it.

    Windows has no such locks, and nothing is locked there.

    Raises:
      FresnetError: if another run has locked the folder.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (out / LOCK).open("w", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # workers do not inherit it
        except BlockingIOError as error:
            raise FresnetError(f"another run is writing to {out}: choose another folder") from error
        yield


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Only take note of SIGINT and SIGTERM, so that a step under way can be finished.

    A second signal raises KeyboardInterrupt. Python lets only the main thread handle signals; in
    any other thread this does nothing.

    Returns:
      A function that says whether a signal has come.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
