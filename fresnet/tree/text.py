"""Trees in words: types, shapes and dtypes in a few lines, and never a value of a tensor."""

from collections.abc import Iterable
from itertools import groupby
from math import inf
from typing import Any

import torch
from torch import Tensor

from fresnet.errors import shown
from fresnet.tree.walks import children_of

WIDTH = 80
MOST = 8
"""How many kinds of children a sequence names that is too long for a line."""


def pformat(tree: object) -> str:
    """The tree in a few lines: node types, and of each tensor dtype and shape.

    A list or tuple that is too long for a line is told by the types of what is in it.

    >>> import torch, fresnet
    >>> print(fresnet.tree.pformat({"a": torch.zeros(2, 3), "b": (torch.tensor(1), 0.5)}))
    {'a': f32[2,3], 'b': (i64[], 0.5)}
    >>> print(fresnet.tree.pformat([torch.zeros(2)] * 99))
    [99 f32[2]]

    This is how networks, gradients and states of optimizers print themselves.
    """
    return _text(tree, "", 0)


def register(*kinds: type) -> None:
    """Let nodes of these types print themselves, and come back from files of `torch.save`."""
    for kind in kinds:
        kind.__repr__ = pformat  # type: ignore[method-assign, assignment]
    torch.serialization.add_safe_globals([*kinds])


def _text(node: Any, margin: str, column: int) -> str:
    """The node, written from this column of a line on that has this margin."""
    line = _line(node, WIDTH - column)
    children = children_of(node)
    if column + len(line) < WIDTH or not children or _is_sequence(node) or _tells_itself(node):
        return line
    inner = f"{margin}  "
    lines = (
        f"{inner}{label}{_text(child, inner, len(inner) + len(label))}"
        for label, child in zip(_labels(node), children, strict=True)
    )
    opening, closing = _brackets(node)
    return f"{opening}\n" + ",\n".join(lines) + f"\n{margin}{closing}"


def _line(node: Any, room: float) -> str:
    """The node in a line, in which sequences that take more room are counted."""
    children = children_of(node)
    if children is None:
        return _leaf(node)
    if _tells_itself(node):
        return str(node)
    below = inf if _is_sequence(node) else room
    pairs = zip(_labels(node), children, strict=True)
    line = ", ".join(f"{label}{_line(child, below)}" for label, child in pairs)
    if type(node) is tuple and len(node) == 1:
        line += ","
    if _is_sequence(node) and len(line) >= room:
        line = _counted(node)
    return line.join(_brackets(node))


def _leaf(leaf: object) -> str:
    if not isinstance(leaf, Tensor):
        return shown(leaf)
    dtype = str(leaf.dtype).removeprefix("torch.")
    for long, short in (("float", "f"), ("complex", "c"), ("uint", "u"), ("int", "i")):
        dtype = dtype.replace(long, short)
    return f"{dtype}[{','.join(map(str, leaf.shape))}]"


def _counted(sequence: Iterable[object]) -> str:
    """What a sequence holds, in numbers: `3 Bottleneck, 4 Bottleneck` of two stages."""
    found: list[str] = []
    for kind, run in groupby(sequence, _kind):
        children = [*run]
        if len(children) == 1 or _is_sequence(children[0]):
            found += [kind] * len(children)
        else:
            found.append(f"{len(children)} {kind}")
    more = [f"{len(found) - MOST} more"] if len(found) > MOST else []
    return ", ".join([*found[:MOST], *more])


def _kind(child: Any) -> str:
    if children_of(child) is None:
        return _leaf(child)
    if _is_sequence(child):
        return _counted(child) or _line(child, inf)
    return type(child).__name__


def _is_sequence(node: object) -> bool:
    return type(node) in (tuple, list)


def _tells_itself(node: object) -> bool:
    """Whether the node's type says in a line what it is, as that of a whole network does."""
    return type(node).__str__ is not object.__str__


def _brackets(node: object) -> tuple[str, str]:
    name = "" if type(node) in (tuple, list, dict) else type(node).__name__
    opening, closing = "{}" if isinstance(node, dict) else "[]" if isinstance(node, list) else "()"
    return f"{name}{opening}", closing


def _labels(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [f"{shown(key)}: " for key in node]
    return [f"{field}=" for field in node._fields] if hasattr(node, "_fields") else [""] * len(node)
