"""Trees of tensors: nested tuples, NamedTuples, lists and dicts whose leaves are tensors."""

from fresnet.tree.parts import Where, at, combine, dotted, matching, named, partition, unnamed
from fresnet.tree.tensors import allclose, equal, ravel, stack, unravel, unstack
from fresnet.tree.text import pformat
from fresnet.tree.walks import (
    Path,
    Tree,
    leaves,
    map,  # noqa: A004
    map_with_path,
    paths,
    rebuild,
    unflatten,
)

__all__ = [
    "Path",
    "Tree",
    "Where",
    "allclose",
    "at",
    "combine",
    "dotted",
    "equal",
    "leaves",
    "map",
    "map_with_path",
    "matching",
    "named",
    "partition",
    "paths",
    "pformat",
    "ravel",
    "rebuild",
    "stack",
    "unflatten",
    "unnamed",
    "unravel",
    "unstack",
]
