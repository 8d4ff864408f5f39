"""Optimizers made of the update of one leaf."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fresnet import tree
from fresnet.optim.checks import check_like
from fresnet.optim.interface import Optimizer, Rate, State, check_state, first_step
from fresnet.pytorch import transform_stack
from fresnet.tree import Tree, Where

Move: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""The update of one leaf, `(selected, w, g, *moments) -> (w, *moments)`, selected by a `Where`."""


def leafwise(at: Callable[[Tensor], Move], *, moments: int, where: Where) -> Optimizer:
    """An optimizer made of `at`, which gives the update of a leaf for each step."""

    def init(weights: object) -> State:
        step = first_step(weights)
        return State(step, tuple(tree.map(torch.zeros_like, weights) for _ in range(moments)))

    def update(grads: object, state: State, weights: Tree) -> tuple[Tree, State]:
        check_state(state, moments)
        check_like(weights, grads, *state.moments)
        chosen, move = map(where, tree.paths(weights)), at(state.step)
        taken = tree.leaves(grads)[::-1]
        del grads  # so gradients that only this call holds are freed one by one
        others = zip(*map(tree.leaves, (weights, *state.moments)), strict=True)
        moved = [
            _in_dtype_of((w, *old), move(selected, w, taken.pop(), *old))
            for selected, (w, *old) in zip(chosen, others, strict=True)
        ]
        weights, *new = (tree.unflatten(weights, leaves) for leaves in zip(*moved, strict=True))
        return weights, State(state.step + 1, tuple(new))

    return Optimizer(init, update)


def _in_dtype_of(old: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
    """The new tensors; a rate that is a tensor widens those without dimensions."""
    return [leaf.to(before.dtype) for before, leaf in zip(old, new, strict=True)]


def plus(x: Tensor, factor: float | Tensor, y: Tensor) -> Tensor:
    """x + factor y in one pass, without a tensor that holds factor y."""
    if isinstance(factor, Tensor):
        return torch.addcmul(x, y, factor)
    return torch.add(x, y, alpha=factor)


def plus_over(x: Tensor, factor: float | Tensor, y: Tensor) -> Tensor:
    """x + factor y, written over x, which nothing else reads."""
    if torch.compiler.is_compiling() or transform_stack.active():
        return plus(x, factor, y)
    if isinstance(factor, Tensor):
        return x.addcmul_(y, factor)
    return x.add_(y, alpha=factor)


def at_step(rate: Rate, step: Tensor) -> float | Tensor:
    return rate(step) if callable(rate) else rate
