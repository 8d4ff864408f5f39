"""Walks over trees: their leaves, the paths to them, and trees of one structure side by side.

`torch.func` sees the same trees, with the leaves in the same order. This module walks them itself,
because PyTorch's pytree module is private and takes several times as long.
"""

from collections.abc import Callable, Collection, Iterable, Sequence, ValuesView
from copy import copy
from itertools import zip_longest
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from fresnet.errors import FresnetError, check_type, describe

Tree = TypeVar("Tree")
Path: TypeAlias = tuple[str | int, ...]


def leaves(tree: Any) -> list[Tensor]:
    """The tree's tensors, in the order of its fields.

    >>> import torch, fresnet
    >>> fresnet.tree.leaves({"a": torch.tensor(1), "b": (torch.tensor(2),)})
    [tensor(1), tensor(2)]
    """
    children = children_of(tree)
    if children is None:
        return [tree]
    return [leaf for child in children for leaf in leaves(child)]


def map(function: Callable[..., object], tree: Tree, *rest: object) -> Tree:  # noqa: A001
    """A tree of the same structure: `function` of the leaves in a place stands in that place.

    >>> import torch, fresnet
    >>> fresnet.tree.map(torch.add, (torch.tensor(1), torch.tensor(2)), (10, 20))
    (tensor(11), tensor(22))

    Raises:
      FresnetError: if the trees differ in structure, node types included, or if `function` is none.
    """
    check_type("tree.map", Callable, "a function", function=function)
    check_structures("tree.map", tree, *rest)
    return _map(function, tree, *rest)


def map_with_path(function: Callable[..., object], tree: Tree, *rest: object) -> Tree:
    """As `map`, with the path to the leaves as the first argument of `function`.

    >>> import fresnet
    >>> fresnet.tree.map_with_path(lambda path, leaf: (*path, leaf), {"a": 1, "b": [2]})
    {'a': ('a', 1), 'b': [('b', 0, 2)]}

    Raises:
      FresnetError: if the trees differ in structure, node types included, or if `function` is none.
    """
    check_type("tree.map_with_path", Callable, "a function", function=function)
    check_structures("tree.map_with_path", tree, *rest)
    route = iter(paths(tree))
    return _map(lambda *places: function(next(route), *places), tree, *rest)


def paths(tree: object) -> list[Path]:
    """The path to each leaf, in the order of `leaves`: field names, indices and dict keys.

    >>> import fresnet
    >>> fresnet.tree.paths({"a": 1, "b": (2, 3)})
    [('a',), ('b', 0), ('b', 1)]
    """
    children = children_of(tree)
    if children is None:
        return [()]
    pairs = zip(steps_of(tree), children, strict=True)
    return [(step, *path) for step, child in pairs for path in paths(child)]


def unflatten(like: Tree, new_leaves: Sequence[object]) -> Tree:
    """The tree `like` with its leaves replaced by `new_leaves`, in the order of `leaves`.

    >>> import fresnet
    >>> fresnet.tree.unflatten((1, [2, 3]), "abc")
    ('a', ['b', 'c'])

    Raises:
      FresnetError: if there are more or fewer new leaves than places.
    """
    check_type("tree.unflatten", (Sequence, ValuesView), "a list", new_leaves=new_leaves)
    rest = iter(new_leaves)
    places = len(leaves(like))
    if places != len(new_leaves):
        raise FresnetError(f"tree.unflatten expects {places} leaves; got {len(new_leaves)}")
    return _map(lambda _: next(rest), like)


def rebuild(node: Tree, children: Iterable[object]) -> Tree:
    """A node of the same type, with the same keys if it is a dict, and with these children.

    >>> rebuild({"scale": 1, "bias": 2}, [3, 4])
    {'scale': 3, 'bias': 4}
    """
    if isinstance(node, dict):
        new = copy(node)  # some types of dict hold more than their keys
        new.update(zip(node, children, strict=True))
        return new
    kind = type(node)
    return kind(*children) if hasattr(node, "_fields") else kind(children)  # type: ignore[call-arg]


def children_of(node: object) -> Collection[Any] | None:
    """The children of a node, or None for a leaf."""
    if isinstance(node, (tuple, list)):
        return node
    return node.values() if isinstance(node, dict) else None


def steps_of(node: Any) -> Collection[Any]:
    """The steps from a node to its children: names of fields, keys or indices."""
    return getattr(node, "_fields", None) or (node if isinstance(node, dict) else range(len(node)))


def same_structure(first: object, other: object) -> bool:
    """Whether two trees have the same structure, node types included."""
    children, others = children_of(first), children_of(other)
    if children is None or others is None:
        return children is others
    if type(first) is not type(other) or len(children) != len(others):
        return False
    if isinstance(first, dict) and isinstance(other, dict) and [*first] != [*other]:
        return False
    return all(same_structure(*pair) for pair in zip(children, others, strict=True))


def check_structures(caller: str, first: object, *rest: object) -> None:
    """Refuse trees that differ in structure from the first one.

    Raises:
      FresnetError: saying which does, and where.
    """
    for number, other in enumerate(rest, start=2):
        if not same_structure(first, other):
            raise FresnetError(
                f"{caller} expects trees of one structure; "
                f"tree {number} differs from the first {_difference(first, other)}"
            )


def check_tensors(caller: str, tree: object) -> None:
    """Refuse a tree with a leaf that is no tensor.

    Raises:
      FresnetError: saying what it is, and where.
    """
    for number, leaf in enumerate(leaves(tree)):
        if not isinstance(leaf, Tensor):
            path = paths(tree)[number]
            place = f" at {path}" if path else ""
            raise FresnetError(f"{caller} expects a tree of tensors; got {describe(leaf)}{place}")


def check_floats(caller: str, tree: object) -> None:
    """Refuse a tree that is none of float tensors, or that has no leaf.

    Raises:
      FresnetError: saying what came.
    """
    check_tensors(caller, tree)
    others = [leaf for leaf in leaves(tree) if not leaf.is_floating_point()]
    if others or not leaves(tree):
        got = describe(others[0]) if others else "no leaf"
        raise FresnetError(f"{caller} expects a tree of float tensors; got {got}")


def _map(function: Callable[..., Any], tree: Tree, *rest: object) -> Tree:
    children = children_of(tree)
    if children is None:
        leaf: Tree = function(tree, *rest)
        return leaf
    below = zip(children, *[children_of(other) for other in rest], strict=True)
    return rebuild(tree, [_map(function, *places) for places in below])


def _difference(first: object, other: object) -> str:
    for a, b in zip_longest(paths(first), paths(other)):
        if a is None or b is None:
            return f"at {a or b}, which {'the first' if a is None else 'it'} lacks"
        if a != b:
            return f"at {a}, where it has {b}"
    for path in paths(first):
        for depth in range(len(path)):
            kinds = [type(_node_at(tree, path[:depth])) for tree in (first, other)]
            if kinds[0] is not kinds[1]:
                return f"at {path[:depth]}: {kinds[1].__name__} for {kinds[0].__name__}"
    return "in the type of a node without leaves"


def _node_at(tree: Any, path: Path) -> object:
    """The node at the end of this path."""
    for step in path:
        tree = getattr(tree, step) if hasattr(tree, "_fields") else tree[step]  # type: ignore[arg-type]
    return tree
