"""Gradients of a batch in parts, summed within a process and across processes.

Each part of the graph is freed once the backward pass has gone through it, as in `grad_and_value`,
and processes send their sums during that pass. Under another derivative, a vmap or a compiler,
`torch.func` takes the gradient, and sums are sent after it.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError, check_type, shown
from fresnet.network.options import check_group
from fresnet.pytorch import transform_stack
from fresnet.pytorch.collectives import Group, all_sum, start_sum
from fresnet.tree.walks import check_floats

Weights = TypeVar("Weights")
Seen = TypeVar("Seen")

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""How many bytes are sent at once. A smaller first bucket lets sending begin early.

Source: Li et al. 2020, arXiv:2006.15704, Sec. 3.2.3.
"""


def gradients(
    loss_fn: Callable[..., tuple[Tensor, Seen]],
    weights: Weights,
    parts: Sequence[tuple[Any, ...]],
    *,
    group: Group | None = None,
) -> tuple[Weights, list[tuple[Tensor, Seen]]]:
    """The gradient of a loss summed over parts of a batch, which are taken one after the other.

    >>> import torch
    >>> def loss_fn(w, x):
    ...     return (w[0] * x).sum(), ()
    >>> grads, found = gradients(loss_fn, (torch.zeros(2),), [(torch.ones(2),), (torch.ones(2),)])
    >>> grads
    (tensor([2., 2.]),)

    Args:
      loss_fn: a function of weights and a part that returns `(loss [], seen)`. No derivative is
        taken of the tree `seen`. Whatever else the function depends on is a constant to it, except
        under `torch.func`.
      weights: a tree, the point where the gradient is taken.
      parts: for each part, a tuple of trees of tensors, the further arguments of `loss_fn`.
      group: processes whose parts are summed as well. Each has the same number of parts. The sums
        are sent while the gradient of the last part is taken, those of the last layers first.
    Returns:
      `(grads, found)`: grads, a tree like the weights, is the same to the bit on every process of
      the group; found holds `(loss, seen)` of each part.
    Raises:
      FresnetError: if an argument is not as described.
    """
    check_type("gradients", Callable, "a function", loss_fn=loss_fn)
    check_floats("gradients", weights)
    check_group("gradients", group)
    if not isinstance(parts, Sequence) or not parts or {*map(type, parts)} != {tuple}:
        raise FresnetError(
            f"gradients expects parts to be a list of tuples, such as [(x, y)]; got {shown(parts)}"
        )
    if torch.compiler.is_compiling() or transform_stack.differentiated(
        *tree.leaves((weights, parts))
    ):
        return _composed(loss_fn, weights, parts, group)
    leaves = [leaf.detach().requires_grad_() for leaf in tree.leaves(weights)]
    buckets = None if group is None else _Buckets(leaves, len(parts), group)
    grads: list[Tensor] = []
    found = []
    for part in parts:
        with torch.enable_grad():
            loss, seen = loss_fn(tree.unflatten(weights, leaves), *part)
        if not loss.requires_grad:
            raise FresnetError(
                "gradients expects a loss that depends on the weights; got one that does not"
            )
        new = [*torch.autograd.grad(loss, leaves, materialize_grads=True)]
        found.append((loss.detach(), tree.map(Tensor.detach, seen)))
        del loss, seen
        if grads and not buckets:
            # `pop` frees the terms of one sum before the next sum is taken.
            new = [grads.pop() + new.pop() for _ in leaves][::-1]
        grads = new
    return tree.unflatten(weights, buckets.sums() if buckets else grads), found


def _composed(
    loss_fn: Callable[..., tuple[Tensor, Seen]],
    weights: Weights,
    parts: Sequence[tuple[Any, ...]],
    group: Group | None,
) -> tuple[Weights, list[tuple[Tensor, Seen]]]:
    gradient = torch.func.grad_and_value(loss_fn, has_aux=True)
    each, found = zip(*(gradient(weights, *part) for part in parts), strict=True)
    grads = tree.map(lambda *leaves: reduce(torch.add, leaves), *each)
    if group is not None:
        grads = tree.map(lambda leaf: all_sum(leaf, group), grads)
    return grads, list(found)


class _Buckets:
    """Gradients end to end in a few buffers, each summed over processes as soon as it is full.

    Hooks on the leaves fill the buffers during the backward passes, beginning with the last layers.
    """

    def __init__(self, leaves: Sequence[Tensor], passes: int, group: Group) -> None:
        self._group = group
        self._views: list[Tensor] = [torch.empty(0, device="cpu")] * len(leaves)
        self._buffers: list[Tensor] = []
        self._awaited: list[int] = []  # how many gradients each buffer still waits for
        self._empty = set(range(len(leaves)))
        self._sums: list[Callable[[], None]] = []  # each call waits for the sum of one buffer
        for number, bucket in enumerate(dealt(leaves)):
            sizes = [leaves[i].numel() for i in bucket]
            buffer = leaves[bucket[0]].new_empty(sum(sizes))
            self._buffers.append(buffer)
            self._awaited.append(passes * len(bucket))
            for i, end, size in zip(bucket, accumulate(sizes), sizes, strict=True):
                leaf = torch.empty_like(leaves[i], device="meta")
                self._views[i] = buffer.as_strided(leaf.shape, leaf.stride(), end - size)
                leaves[i].register_hook(partial(self._receive, number, i))

    def _receive(self, number: int, i: int, grad: Tensor) -> Tensor:
        view = self._views[i]
        if i in self._empty:
            self._empty.remove(i)
            view.copy_(grad)
        else:
            view.add_(grad)
        self._awaited[number] -= 1
        while len(self._sums) < len(self._buffers) and not self._awaited[len(self._sums)]:
            self._send()  # every process sends its buffers in the same order
        return view

    def _send(self) -> None:
        buffer = self._buffers[len(self._sums)]
        self._sums.append(start_sum(buffer, self._group))

    def sums(self) -> list[Tensor]:
        for i in self._empty:
            self._views[i].zero_()
        while len(self._sums) < len(self._buffers):
            self._send()
        for wait in self._sums:
            wait()
        return self._views


def dealt(leaves: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the leaves, in buckets of one dtype and about `BUCKET` bytes; the last come first.

    The first bucket is of about `FIRST_BUCKET` bytes.
    """
    buckets: list[list[int]] = []
    room = 0
    for i in reversed(range(len(leaves))):
        if room <= 0 or leaves[i].dtype != leaves[i + 1].dtype:
            room = BUCKET if buckets else FIRST_BUCKET
            buckets.append([])
        buckets[-1].append(i)
        room -= leaves[i].nbytes
    return buckets
