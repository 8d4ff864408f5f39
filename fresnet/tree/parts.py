"""Trees in parts: leaves by name, a leaf or node exchanged, a tree cut in two and put together."""

import re
from collections.abc import Callable, Mapping
from fnmatch import translate
from functools import reduce
from typing import Any, TypeAlias

from torch import Tensor

from fresnet.errors import FresnetError, check_type, describe, listed, shown, suggestion
from fresnet.tree.walks import (
    Path,
    Tree,
    children_of,
    leaves,
    paths,
    rebuild,
    steps_of,
    unflatten,
)

Where: TypeAlias = Callable[[Path], bool]
"""A choice among leaves: whether the leaf at this path is meant."""


def dotted(path: Path) -> str:
    """The path as a name.

    >>> dotted(("stages", 0, 1, "layer2", "conv"))
    'stages.0.1.layer2.conv'
    """
    return ".".join(map(str, path))


def named(tree: object) -> dict[str, Tensor]:
    """The leaves by their names, in the order of `leaves`.

    >>> import torch, fresnet
    >>> fresnet.tree.named({"head": (torch.tensor(1), torch.tensor(2))})
    {'head.0': tensor(1), 'head.1': tensor(2)}

    Raises:
      FresnetError: if two leaves have the same name, as keys with dots in them may make it.
    """
    entries: dict[str, Tensor] = {}
    for name, leaf in zip(map(dotted, paths(tree)), leaves(tree), strict=True):
        if name in entries:
            raise FresnetError(f"tree.named expects one leaf of each name; got two {name}")
        entries[name] = leaf
    return entries


def unnamed(like: Tree, entries: Mapping[str, object]) -> Tree:
    """The tree `like` with its leaves replaced by those of the same names, in any order.

    >>> import torch, fresnet
    >>> fresnet.tree.unnamed({"head": (0, 0)}, {"head.1": 2, "head.0": 1})
    {'head': (1, 2)}

    Raises:
      FresnetError: if entries is no mapping, if a name is missing, or if there is one that `like`
        does not have.
    """
    if not isinstance(entries, Mapping):
        raise FresnetError(f"tree.unnamed expects a mapping of names; got {describe(entries)}")
    places = named(like)
    for name in [*places, *entries]:
        if name not in entries or name not in places:
            what = "a leaf for" if name in places else "no"
            raise FresnetError(f"tree.unnamed expects {what} {shown(name)}")
    return unflatten(like, [entries[name] for name in places])


def at(tree: Tree, path: Path | str, new: object) -> Tree:
    """The tree with another leaf or node at a path, which may be written as a name.

    >>> import fresnet
    >>> fresnet.tree.at({"head": (1, 2), "stem": 3}, "head.1", 5)
    {'head': (1, 5), 'stem': 3}
    >>> fresnet.tree.at({"head": (1, 2), "stem": 3}, ("head",), 5)
    {'head': 5, 'stem': 3}

    Raises:
      FresnetError: if the path leads nowhere.
    """
    steps = tuple(path.split(".")) if isinstance(path, str) else path
    if not isinstance(steps, tuple):
        raise FresnetError(f"tree.at expects a path or the name of one; got {describe(path)}")
    return _at(tree, steps, new) if steps else new  # type: ignore[return-value]


def matching(*patterns: str) -> Where:
    """A choice of the leaves whose name matches a pattern, and of those in a node that does.

    `*` stands for any text, dots included, `?` for one character, `[012]` for one of these.

    >>> import fresnet
    >>> where = fresnet.tree.matching("head", "stages.[01].*.norm")
    >>> where(("head", "bias")), where(("stages", 0, 2, "layer1", "conv"))
    (True, False)

    Raises:
      FresnetError: if a pattern is not a text.
    """
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise FresnetError(f"tree.matching expects patterns as texts; got {describe(pattern)}")
    known = [re.compile(translate(p)) for pattern in patterns for p in (pattern, f"{pattern}.*")]

    def where(path: Path) -> bool:
        name = dotted(path)
        return any(one.match(name) for one in known)

    return where


def partition(tree: Tree, where: Where) -> tuple[Tree, Tree]:
    """The tree in two: with the leaves that are chosen alone, and with the rest alone.

    In the place of a leaf that a part lacks stands `()`, a node without leaves. None would be a
    leaf, and one that `torch.func` refuses. So a part is a tree like any other. Its gradient and
    the state of its optimizer hold the leaves of the part alone.

    >>> import torch, fresnet
    >>> weights = {"stem": torch.tensor(1.0), "head": torch.tensor(2.0)}
    >>> trained, rest = fresnet.tree.partition(weights, fresnet.tree.matching("head"))
    >>> trained, rest
    ({'stem': (), 'head': tensor(2.)}, {'stem': tensor(1.), 'head': ()})
    >>> torch.func.grad(lambda w: fresnet.tree.combine(w, rest)["head"] ** 2)(trained)
    {'stem': (), 'head': tensor(4.)}

    Args:
      where: a function of the path to a leaf, such as one of `matching`.
    Returns:
      `(chosen, rest)`, two trees of the same nodes.
    Raises:
      FresnetError: if where is not a function, or if it chooses no leaf.
    """
    words = "a function of paths, such as tree.matching('head')"
    check_type("tree.partition", Callable, words, where=where)
    places = paths(tree)
    pairs = [*zip(leaves(tree), map(where, places), strict=True)]
    if not any(chosen for _, chosen in pairs):
        example = f", such as {dotted(places[0])}" if places else ""
        raise FresnetError(
            f"tree.partition expects where to choose a leaf; got none of {len(places)}{example}"
        )
    return (
        unflatten(tree, [leaf if chosen else () for leaf, chosen in pairs]),
        unflatten(tree, [() if chosen else leaf for leaf, chosen in pairs]),
    )


def combine(first: Tree, *rest: Tree) -> Tree:
    """The tree that `partition` cut: in each place what stands in one of the parts.

    >>> import fresnet
    >>> fresnet.tree.combine([1, (), ()], [(), 2, ()], [(), (), 3])
    [1, 2, 3]

    Raises:
      FresnetError: if a leaf stands in two parts, or if nodes in one place differ in type or keys.
    """
    return reduce(lambda one, other: _combined((), one, other), rest, first)


def _at(node: Any, path: Path, new: object) -> Any:
    step, *below = path
    children = [*(children_of(node) or ())]
    steps = [*steps_of(node)] if children else []
    places = [i for i, other in enumerate(steps) if other == step]
    places = places or [i for i, other in enumerate(steps) if str(other) == step]  # as in a name
    if not places:
        there = suggestion(str(step), [*map(str, steps)]) if steps else "it has none"
        raise FresnetError(
            f"tree.at expects a path of steps in the tree; {describe(node)} has no step "
            f"{shown(step)}; {there}"
        )
    children[places[0]] = _at(children[places[0]], tuple(below), new) if below else new
    return rebuild(node, children)


def _combined(path: Path, one: Any, other: Any) -> Any:
    for here, there in ((one, other), (other, one)):
        if type(here) is tuple and not here:
            return there
    children, others = children_of(one), children_of(other)
    if (
        children is None
        or others is None
        or type(one) is not type(other)
        or [*steps_of(one)] != [*steps_of(other)]
    ):
        got = listed([describe(one), describe(other)])
        raise FresnetError(
            f"tree.combine expects parts of one tree, each leaf in one of them; got {got} at {path}"
        )
    below = zip(steps_of(one), children, others, strict=True)
    return rebuild(one, [_combined((*path, step), *both) for step, *both in below])
