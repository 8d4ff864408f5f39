"""Trees of tensors: nested tuples, NamedTuples, lists and dicts whose leaves are tensors.

The only file that touches PyTorch's pytree module, which is private but the one that
`torch.func` itself flattens with, so a tree here is a tree there.
"""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

from fresnet.errors import FresnetError, describe

Tree = TypeVar("Tree")
Path = tuple[str | int, ...]


def leaves(tree: Any) -> list[Tensor]:
    """The tree's tensors, in the order of its fields.

    >>> import torch, fresnet
    >>> fresnet.tree.leaves({"a": torch.tensor(1), "b": (torch.tensor(2),)})
    [tensor(1), tensor(2)]
    """
    return _pytree.tree_leaves(tree)


def map(function: Callable[..., Any], tree: Tree, *rest: Any) -> Tree:  # noqa: A001
    """A tree of the same structure, each leaf replaced by `function` of the leaves in its place.

    >>> import torch, fresnet
    >>> fresnet.tree.map(torch.add, (torch.tensor(1), torch.tensor(2)), (10, 20))
    (tensor(11), tensor(22))

    Raises:
      FresnetError: if the trees differ in structure, node types included.
    """
    spec = _pytree.tree_structure(tree)
    for number, other in enumerate(rest, start=2):
        if _pytree.tree_structure(other) != spec:
            raise FresnetError(
                "tree.map expects trees of one structure; "
                f"tree {number} differs from the first {_difference(tree, other)}"
            )
    return _pytree.tree_map(function, tree, *rest)  # type: ignore[no-any-return]


def stack(trees: Sequence[Tree]) -> Tree:
    """Trees of one structure as one, each leaf with a new first dimension: an ensemble for vmap.

    >>> import torch, fresnet
    >>> fresnet.tree.stack([(torch.tensor(1), torch.tensor(2)), (torch.tensor(3), torch.tensor(4))])
    (tensor([1, 3]), tensor([2, 4]))

    Raises:
      FresnetError: if there is no tree, or if they differ in structure or in a leaf's shape.
    """
    if not trees:
        raise FresnetError("tree.stack expects at least one tree; got none")

    def stacked(*leaves: Tensor) -> Tensor:
        if len({leaf.shape for leaf in leaves}) > 1:
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
            raise FresnetError(f"tree.stack expects leaves of one shape; got {shapes}")
        return torch.stack(leaves)

    return map(stacked, *trees)


def unstack(tree: Tree) -> list[Tree]:
    """The trees that `stack` put together.

    Raises:
      FresnetError: if the leaves have no common first dimension.
    """
    sizes = {leaf.shape[:1] for leaf in leaves(tree)}
    if len(sizes) != 1 or () in sizes:
        got = ", ".join(str(tuple(size)) for size in sizes)
        raise FresnetError(f"tree.unstack expects leaves of one first dimension; got {got}")
    (size,) = sizes
    return [map(itemgetter(i), tree) for i in range(*size)]


def paths(tree: Any) -> list[Path]:
    """The way to each leaf, in the order of `leaves`: field names, indices and dict keys.

    >>> import fresnet
    >>> fresnet.tree.paths({"a": 1, "b": (2, 3)})
    [('a',), ('b', 0), ('b', 1)]
    """
    keyed, _ = _pytree.tree_flatten_with_path(tree)
    return [tuple(_entry(key) for key in path) for path, _ in keyed]


def unflatten(like: Tree, new_leaves: Sequence[Any]) -> Tree:
    """The tree `like` with its leaves replaced by `new_leaves`, in the order of `leaves`.

    >>> import fresnet
    >>> fresnet.tree.unflatten((1, [2, 3]), "abc")
    ('a', ['b', 'c'])

    Raises:
      FresnetError: if there are more or fewer new leaves than places.
    """
    spec = _pytree.tree_structure(like)
    if spec.num_leaves != len(new_leaves):
        raise FresnetError(
            f"tree.unflatten expects {spec.num_leaves} leaves; got {len(new_leaves)}"
        )
    return _pytree.tree_unflatten(new_leaves, spec)  # type: ignore[no-any-return]


def ravel(tree: Any) -> Tensor:
    """All leaves end to end in one vector, in the order of `leaves`: the point of parameter space.

    >>> import torch, fresnet
    >>> fresnet.tree.ravel((torch.tensor([[1, 2], [3, 4]]), torch.tensor(5)))
    tensor([1, 2, 3, 4, 5])
    """
    return torch.cat([leaf.flatten() for leaf in leaves(tree)])


def unravel(like: Tree, vector: Tensor) -> Tree:
    """The tree that `ravel` made a vector of, its leaves shaped as those of `like`.

    >>> import torch, fresnet
    >>> fresnet.tree.unravel((torch.zeros(2, 1), torch.zeros(())), torch.arange(3))
    (tensor([[0],
            [1]]), tensor(2))

    Raises:
      FresnetError: if the vector has not as many values as the leaves together.
    """
    shapes = [leaf.shape for leaf in leaves(like)]
    sizes = [shape.numel() for shape in shapes]
    if vector.shape != (sum(sizes),):
        raise FresnetError(
            f"tree.unravel expects a vector of {sum(sizes)} values; got {describe(vector)}"
        )
    parts = zip(vector.split(sizes), shapes, strict=True)
    return unflatten(like, [part.view(shape) for part, shape in parts])


def _difference(a: Any, b: Any) -> str:
    for one, other in zip_longest(paths(a), paths(b)):
        if one != other:
            return f"at {one or other}"
    return "in the type of a node"


def _entry(key: Any) -> str | int:
    match key:
        case _pytree.GetAttrKey(name=name):
            return name
        case _pytree.SequenceKey(idx=index):
            return index
        case _pytree.MappingKey(key=name):
            return name  # type: ignore[no-any-return]
    raise FresnetError(f"fresnet.tree knows tuples, NamedTuples, lists and dicts; got {key!r}")
