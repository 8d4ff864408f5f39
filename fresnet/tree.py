"""Trees of tensors: nested tuples, NamedTuples, lists and dicts whose leaves are tensors.

`torch.func` sees the same trees, with the leaves in the same order. This module walks them itself,
because PyTorch's pytree module is private and takes several times as long.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from copy import copy
from itertools import zip_longest
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from fresnet.errors import FresnetError, describe

Tree = TypeVar("Tree")
Path = tuple[str | int, ...]


def leaves(tree: Any) -> list[Tensor]:
    """The tree's tensors, in the order of its fields.

    >>> import torch, fresnet
    >>> fresnet.tree.leaves({"a": torch.tensor(1), "b": (torch.tensor(2),)})
    [tensor(1), tensor(2)]
    """
    children = _children(tree)
    if children is None:
        return [tree]
    return [leaf for child in children for leaf in leaves(child)]


def map(function: Callable[..., object], tree: Tree, *rest: object) -> Tree:  # noqa: A001
    """A tree of the same structure: `function` of the leaves in a place stands in that place.

    >>> import torch, fresnet
    >>> fresnet.tree.map(torch.add, (torch.tensor(1), torch.tensor(2)), (10, 20))
    (tensor(11), tensor(22))

    Raises:
      FresnetError: if the trees differ in structure, node types included.
    """
    _check_structures("tree.map", tree, *rest)
    return _map(function, tree, *rest)


def stack(trees: Sequence[Tree]) -> Tree:
    """Stack trees of one structure into one tree, with a new first dimension in each leaf.

    A stack of networks is an ensemble, which `torch.func.vmap` can run.

    >>> import torch, fresnet
    >>> fresnet.tree.stack([(torch.tensor(1), torch.tensor(2)), (torch.tensor(3), torch.tensor(4))])
    (tensor([1, 3]), tensor([2, 4]))

    Raises:
      FresnetError: if there is no tree, or if they differ in structure or in a leaf's shape or
        dtype.
    """
    if type(trees) not in (list, tuple):
        raise FresnetError(f"tree.stack expects a list or tuple of trees; got {describe(trees)}")
    if not trees:
        raise FresnetError("tree.stack expects at least one tree; got none")
    _check_structures("tree.stack", *trees)
    for path, *places in zip(paths(trees[0]), *(leaves(tree) for tree in trees), strict=True):
        if len({(leaf.shape, leaf.dtype) for leaf in places}) > 1:
            got = ", ".join(describe(leaf) for leaf in places)
            raise FresnetError(f"tree.stack expects equal shapes and dtypes at {path}; got {got}")
    return map(lambda *places: torch.stack(places), *trees)


def unstack(tree: Tree) -> list[Tree]:
    """The trees that `stack` put together, in their order.

    Raises:
      FresnetError: if the leaves have no common first dimension.
    """
    sizes = {leaf.shape[:1] for leaf in leaves(tree)}
    if len(sizes) != 1 or () in sizes:
        got = ", ".join(str(tuple(size)) for size in sizes)
        raise FresnetError(f"tree.unstack expects leaves of one first dimension; got {got}")
    (size,) = sizes
    return [map(itemgetter(i), tree) for i in range(*size)]


def paths(tree: object) -> list[Path]:
    """The path to each leaf, in the order of `leaves`: field names, indices and dict keys.

    >>> import fresnet
    >>> fresnet.tree.paths({"a": 1, "b": (2, 3)})
    [('a',), ('b', 0), ('b', 1)]
    """
    children = _children(tree)
    if children is None:
        return [()]
    steps = getattr(tree, "_fields", tree if isinstance(tree, dict) else range(len(children)))
    pairs = zip(steps, children, strict=True)
    return [(step, *path) for step, child in pairs for path in paths(child)]


def unflatten(like: Tree, new_leaves: Sequence[object]) -> Tree:
    """The tree `like` with its leaves replaced by `new_leaves`, in the order of `leaves`.

    >>> import fresnet
    >>> fresnet.tree.unflatten((1, [2, 3]), "abc")
    ('a', ['b', 'c'])

    Raises:
      FresnetError: if there are more or fewer new leaves than places.
    """
    rest = iter(new_leaves)
    places = len(leaves(like))
    if places != len(new_leaves):
        raise FresnetError(f"tree.unflatten expects {places} leaves; got {len(new_leaves)}")
    return _map(lambda _: next(rest), like)


def ravel(tree: object) -> Tensor:
    """All leaves end to end in one vector, in the order of `leaves`.

    For the weights of a network it is their point in parameter space.

    >>> import torch, fresnet
    >>> fresnet.tree.ravel((torch.tensor([[1, 2], [3, 4]]), torch.tensor(5)))
    tensor([1, 2, 3, 4, 5])

    Raises:
      FresnetError: if the leaves are not of one dtype.
    """
    dtypes = {leaf.dtype for leaf in leaves(tree)}
    if len(dtypes) != 1:
        raise FresnetError(f"tree.ravel expects leaves of one dtype; got {dtypes or 'no leaves'}")
    return torch.cat([leaf.flatten() for leaf in leaves(tree)])


def unravel(like: Tree, vector: Tensor) -> Tree:
    """The tree that `ravel` turned into this vector, with leaves of the shapes in `like`.

    Leaves of four dimensions, such as convolutions, lie in memory channels last.

    >>> import torch, fresnet
    >>> fresnet.tree.unravel((torch.zeros(2, 1), torch.zeros(())), torch.arange(3))
    (tensor([[0],
            [1]]), tensor(2))

    Raises:
      FresnetError: if the vector does not have as many values as all leaves together.
    """
    shapes = [leaf.shape for leaf in leaves(like)]
    sizes = [shape.numel() for shape in shapes]
    if vector.shape != (sum(sizes),):
        raise FresnetError(
            f"tree.unravel expects a vector of {sum(sizes)} values; got {describe(vector)}"
        )
    parts = zip(vector.split(sizes), shapes, strict=True)
    return unflatten(like, [_channels_last(part.view(shape)) for part, shape in parts])


def rebuild(node: Tree, children: Iterable[object]) -> Tree:
    """A node of the same type, with the same keys if it is a dict, and with these children."""
    if isinstance(node, dict):
        new = copy(node)  # some types of dict hold more than their keys
        new.update(zip(node, children, strict=True))
        return new
    kind = type(node)
    return kind(*children) if hasattr(kind, "_fields") else kind(children)  # type: ignore[call-arg]


def _children(node: object) -> Collection[Any] | None:
    """The children of a node, or None for a leaf."""
    if isinstance(node, tuple | list):
        return node
    return node.values() if isinstance(node, dict) else None


def _map(function: Callable[..., Any], tree: Tree, *rest: object) -> Tree:
    children = _children(tree)
    if children is None:
        leaf: Tree = function(tree, *rest)
        return leaf
    below = zip(children, *[_children(other) for other in rest], strict=True)
    return rebuild(tree, [_map(function, *places) for places in below])


def _channels_last(leaf: Tensor) -> Tensor:
    """The leaf laid out channels last, by operations that have a rule for vmap."""
    return leaf.movedim(1, -1).contiguous().movedim(-1, 1) if leaf.ndim == 4 else leaf


def _check_structures(caller: str, first: object, *rest: object) -> None:
    for number, other in enumerate(rest, start=2):
        if not _same(first, other):
            raise FresnetError(
                f"{caller} expects trees of one structure; "
                f"tree {number} differs from the first {_difference(first, other)}"
            )


def _same(first: object, other: object) -> bool:
    """Whether two trees have the same structure."""
    children, others = _children(first), _children(other)
    if children is None or others is None:
        return children is others
    if type(first) is not type(other) or len(children) != len(others):
        return False
    if isinstance(first, dict) and isinstance(other, dict) and [*first] != [*other]:
        return False
    return all(_same(*pair) for pair in zip(children, others, strict=True))


def _difference(first: object, other: object) -> str:
    for a, b in zip_longest(paths(first), paths(other)):
        if a != b:
            return f"at {a or b}"
    for path in paths(first):
        for depth in range(len(path)):
            kinds = [type(_at(tree, path[:depth])) for tree in (first, other)]
            if kinds[0] is not kinds[1]:
                return f"at {path[:depth]}: {kinds[1].__name__} for {kinds[0].__name__}"
    return "in the type of a node without leaves"


def _at(tree: Any, path: Path) -> object:
    """The node at the end of this path."""
    for step in path:
        tree = getattr(tree, step) if hasattr(tree, "_fields") else tree[step]  # type: ignore[arg-type]
    return tree
