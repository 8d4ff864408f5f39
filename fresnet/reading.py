"""What is asked of files before they are read, since anyone may have written them; and JSON."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fresnet.errors import FresnetError, reason, shown


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path of text.

    Raises:
      FresnetError: if it is none, if it is empty, or if it holds a zero.
    """
    text: object = None
    if isinstance(path, str | os.PathLike):
        text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise FresnetError(f"expected a path; got {shown(path)}")
    return Path(text)


def spelt(path: object) -> str:
    """A path as messages write it, also where it is none."""
    return str(path) if isinstance(path, str | os.PathLike) else shown(path)


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what is there but is no file, such as a named pipe, whose reader waits for ever.

    Raises:
      FresnetError: naming it, if that is so. Whoever opens the file says if nothing is there.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise FresnetError(f"{os.path.basename(path)} is no regular file")


@contextmanager
def named_in_utf8(path: Path) -> Iterator[str]:
    """A name of an existing file that libraries in other languages take.

    A file's name may be any bytes on Linux; they ask for UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield str(path)


def from_json(text: str | bytes) -> Any:
    """What a text in JSON says.

    Raises:
      FresnetError: if it is no JSON, or nested more deeply than Python can read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise FresnetError("it is nested too deeply") from None
    except ValueError as error:
        raise FresnetError(f"it is no JSON: {reason(error)}") from error


def write_json(path: Path, value: object) -> None:
    """Write a value that JSON has, for people to read."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What a file in JSON says.

    Raises:
      FresnetError: naming the file, if it cannot be read or is no JSON.
    """
    try:
        check_regular(path)
        return from_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FresnetError(f"cannot read {path.name}: {reason(error)}") from error
