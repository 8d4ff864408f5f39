"""The library's one error, and helpers for its messages."""

from collections.abc import Collection, Sequence
from difflib import get_close_matches
from numbers import Number
from pathlib import PurePath
from types import NoneType
from typing import Any

import torch
from torch import Tensor

OLDEST = "2.6"
"""The oldest PyTorch for which fresnet is tested."""

if torch.__version__ < OLDEST:
    raise ImportError(
        f"fresnet expects PyTorch {OLDEST} or newer; got {torch.__version__}: "
        f"pip install 'torch>={OLDEST}'"
    )

PLAIN = (Number, str, bytes, PurePath, type, NoneType, torch.dtype, torch.device)
"""The types of values that messages show."""

LONGEST = 200
"""How much of such a value they show."""


class FresnetError(ValueError):
    """A call that fresnet refuses: the message says what was expected and what came."""


def describe(value: object) -> str:
    """What a message says it got: a tensor's dtype and shape, or another value's type.

    >>> import torch
    >>> describe(torch.zeros(2, 3)), describe(torch.tensor(1)), describe([1]), describe(None)
    ('float32 (2, 3)', 'int64 ()', 'a list', 'None')
    """
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f"{value.layout} "
        return f"{layout}{value.dtype} {tuple(value.shape)}".replace("torch.", "")
    return "None" if value is None else f"a {type(value).__name__}"


def shown(value: object) -> str:
    """A value as a message shows it: numbers, texts and the like as they are written.

    Of anything else it is what `describe` says, so no message holds what is in a tensor.

    >>> import torch
    >>> shown(-1), shown("adam"), shown((0.9, None)), shown((0.9, torch.zeros(2))), shown(10**999)
    ('-1', "'adam'", '(0.9, None)', 'a tuple', 'a int')
    """
    parts: Any = value if type(value) in (tuple, list) else [value]
    if not all(isinstance(part, PLAIN) for part in parts):
        return describe(value)
    if any(isinstance(part, int) and abs(part) >= 2**128 for part in parts):
        return describe(value)  # Python refuses to write integers of thousands of digits
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def check_type(caller: str, kind: Any, words: str, **arguments: object) -> None:
    """Refuse arguments of another type than `kind`, which `words` name.

    >>> check_type("scan", str, "a path", root=None)
    Traceback (most recent call last):
    fresnet.errors.FresnetError: scan expects root to be a path; got None

    Raises:
      FresnetError: naming the argument and what came.
    """
    for name, value in arguments.items():
        if not isinstance(value, kind):
            raise FresnetError(f"{caller} expects {name} to be {words}; got {shown(value)}")


def reason(error: Exception) -> str:
    r"""The first line of an exception's own message, for the end of ours.

    >>> reason(OSError(2, "No such file")), reason(KeyError()), reason(ValueError("a\nb"))
    ('No such file', 'KeyError', 'a')
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first of these names, and how many more there are.

    >>> listed(["a", "b"]), listed(["a", "b", "c", "d", "e"])
    ('a and b', 'a, b, c and 2 more')
    """
    more = [f"{len(names) - most:,} more"] if len(names) > most else []
    *first, last = [*names[:most], *more]
    return f"{', '.join(first)} and {last}" if first else last


def suggestion(name: str, known: Collection[str]) -> str:
    """A hint at the known names that may have been meant.

    >>> suggestion("resnet5", ["resnet18", "resnet50", "resnet50_v1"])
    "did you mean 'resnet50', 'resnet50_v1'?"
    """
    longer = [other for other in known if name and other.startswith(name)]
    near = [other for other in get_close_matches(name, known) if other not in longer]
    if not longer and not near:
        return f"there are {listed([*known], 9)}"
    return f"did you mean {', '.join(map(repr, (longer or near)[:3]))}?"
