"""Trees as their tensors: stacked, end to end in one vector, compared."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from operator import itemgetter

import torch
from torch import Tensor

from fresnet.errors import FresnetError, describe, listed, shown
from fresnet.numbers import as_number
from fresnet.tree.walks import (
    Tree,
    check_structures,
    check_tensors,
    leaves,
    map,  # noqa: A004
    paths,
    same_structure,
    unflatten,
)


def stack(trees: Sequence[Tree]) -> Tree:
    """Stack trees of one structure into one tree, with a new first dimension in each leaf.

    A stack of networks is an ensemble, which `torch.func.vmap` can run.

    >>> import torch, fresnet
    >>> fresnet.tree.stack([(torch.tensor(1), torch.tensor(2)), (torch.tensor(3), torch.tensor(4))])
    (tensor([1, 3]), tensor([2, 4]))

    Raises:
      FresnetError: if there is no tree, or if they differ in structure or in a leaf's shape, dtype
        or device.
    """
    if type(trees) not in (list, tuple):
        raise FresnetError(f"tree.stack expects a list or tuple of trees; got {describe(trees)}")
    if not trees:
        raise FresnetError("tree.stack expects at least one tree; got none")
    check_structures("tree.stack", *trees)
    check_tensors("tree.stack", trees)
    for path, *places in zip(paths(trees[0]), *(leaves(tree) for tree in trees), strict=True):
        if len({(leaf.shape, leaf.dtype, leaf.device) for leaf in places}) > 1:
            got = ", ".join(f"{describe(leaf)} on {leaf.device}" for leaf in places)
            raise FresnetError(
                f"tree.stack expects equal shapes, dtypes and devices at {path}; got {got}"
            )
    return map(lambda *places: torch.stack(places), *trees)


def unstack(tree: Tree) -> list[Tree]:
    """The trees that `stack` put together, in their order.

    Raises:
      FresnetError: if the leaves have no common first dimension.
    """
    check_tensors("tree.unstack", tree)
    sizes = {leaf.shape[:1] for leaf in leaves(tree)}
    if len(sizes) != 1 or () in sizes:
        got = ", ".join(str(tuple(size)) for size in sizes)
        raise FresnetError(f"tree.unstack expects leaves of one first dimension; got {got}")
    (size,) = sizes
    return [map(itemgetter(i), tree) for i in range(*size)]


def ravel(tree: object) -> Tensor:
    """All leaves end to end in one vector, in the order of `leaves`.

    For the weights of a network it is their point in parameter space.

    >>> import torch, fresnet
    >>> fresnet.tree.ravel((torch.tensor([[1, 2], [3, 4]]), torch.tensor(5)))
    tensor([1, 2, 3, 4, 5])

    Raises:
      FresnetError: if the leaves are not tensors of one dtype on one device.
    """
    check_tensors("tree.ravel", tree)
    kinds = {f"{leaf.dtype} on {leaf.device}": None for leaf in leaves(tree)}
    if len(kinds) != 1:
        got = listed([*kinds]) if kinds else "no leaves"
        raise FresnetError(f"tree.ravel expects leaves of one dtype on one device; got {got}")
    return torch.cat([leaf.flatten() for leaf in leaves(tree)])


def unravel(like: Tree, vector: Tensor) -> Tree:
    """The tree that `ravel` turned into this vector, with leaves of the shapes in `like`.

    Leaves of four dimensions, such as convolutions, lie in memory channels last.

    >>> import torch, fresnet
    >>> fresnet.tree.unravel((torch.zeros(2, 1), torch.zeros(())), torch.arange(3))
    (tensor([[0],
            [1]]), tensor(2))

    Raises:
      FresnetError: if vector is no vector of as many values as all leaves have together.
    """
    check_tensors("tree.unravel", like)
    shapes = [leaf.shape for leaf in leaves(like)]
    sizes = [shape.numel() for shape in shapes]
    if not isinstance(vector, Tensor) or vector.shape != (sum(sizes),):
        raise FresnetError(
            f"tree.unravel expects a vector of {sum(sizes)} values; got {describe(vector)}"
        )
    parts = zip(vector.split(sizes), shapes, strict=True)
    return unflatten(like, [_channels_last(part.view(shape)) for part, shape in parts])


def _channels_last(leaf: Tensor) -> Tensor:
    """The leaf laid out channels last, by operations that have a rule for vmap."""
    return leaf.movedim(1, -1).contiguous().movedim(-1, 1) if leaf.ndim == 4 else leaf


def equal(one: object, other: object) -> bool:
    """Whether two trees have one structure, and leaves of the same dtypes, shapes and values.

    >>> import torch, fresnet
    >>> fresnet.tree.equal((torch.zeros(2),), (torch.zeros(2),))
    True
    >>> fresnet.tree.equal((torch.zeros(2),), [torch.zeros(2)])
    False

    Raises:
      FresnetError: if a leaf is not a tensor, or has no value to compare, as on meta.
    """
    return _compared("tree.equal", torch.equal, one, other)


def allclose(one: object, other: object, *, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
    """Whether two trees are equal, but for differences of values up to `atol + rtol |other|`.

    >>> import torch, fresnet
    >>> fresnet.tree.allclose((torch.ones(2),), (1.001 * torch.ones(2),), rtol=0.01)
    True

    Raises:
      FresnetError: if a leaf is not a tensor, or has no value to compare, as on meta, or if rtol or
        atol is not a number from 0 on.
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        number = as_number(value)
        if number is None or not number >= 0:
            raise FresnetError(
                f"tree.allclose expects {name} to be a number from 0 on; got {shown(value)}"
            )
    return _compared("tree.allclose", partial(torch.allclose, rtol=rtol, atol=atol), one, other)


def has_values(tensor: Tensor) -> bool:
    """Whether this is neither on meta nor made under PyTorch's `FakeTensorMode`."""
    return not tensor.is_meta and not hasattr(tensor, "fake_mode")


def _compared(
    caller: str, same: Callable[[Tensor, Tensor], bool], one: object, other: object
) -> bool:
    for tree in (one, other):
        check_tensors(caller, tree)
    if not same_structure(one, other):
        return False
    pairs = [*zip(leaves(one), leaves(other), strict=True)]
    if any((a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device) for a, b in pairs):
        return False
    if not all(has_values(leaf) for leaf in chain(*pairs)):
        raise FresnetError(
            f"{caller} expects tensors with values; got some that are on meta or were made under "
            "FakeTensorMode"
        )
    return all(same(a, b) for a, b in pairs)
