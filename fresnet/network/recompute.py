"""Activations computed twice instead of kept, for less memory and one more pass forward.

PyTorch's own checkpointing rests on hooks that `torch.func` refuses.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.func import vjp
from typing_extensions import Unpack

from fresnet import tree
from fresnet.pytorch import transform_stack

Seen = TypeVar("Seen")
Flat: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""A function from leaves to leaves, y first."""


def recomputed(function: Callable[..., tuple[Tensor, Seen]], *trees: object) -> tuple[Tensor, Seen]:
    """The function's result for these trees, without activations kept for the derivative.

    The derivative calls the function again. In compiled code the compiler decides what to keep. In
    forward mode nothing is kept anyway.

    Args:
      function: a pure function from trees of tensors to `(y, seen)`. y is a tensor, and seen is a
        tree that is constant with respect to the trees.
    Source: Chen et al. 2016, arXiv:1604.06174.
    """
    if torch.compiler.is_compiling() or transform_stack.forward_mode(*tree.leaves(trees)):
        return function(*trees)
    like = tree.map(lambda _: 0, trees)  # not the trees, which would keep x after its use
    structure: list[Seen] = []

    def flat(*leaves: Tensor) -> tuple[Tensor, ...]:
        y, seen = function(*tree.unflatten(like, leaves))
        structure[:] = [seen]
        return y, *tree.leaves(seen)

    y, *leaves = _Recompute.apply(flat, *tree.leaves(trees))
    return y, tree.unflatten(structure[0], leaves)


class _Recompute(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(function: Flat, *inputs: Tensor) -> tuple[Tensor, ...]:
        return function(*inputs)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Flat, Unpack[tuple[Tensor, ...]]], output: tuple[Tensor, ...]
    ) -> None:
        ctx.function, *tensors = inputs
        _, *seen = output
        ctx.mark_non_differentiable(*seen)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # The result will be differentiated again, or is mapped, where leaves cannot be made.
        if torch.is_grad_enabled() or transform_stack.active():
            pull = vjp(lambda *inputs: ctx.function(*inputs)[0], *ctx.saved_tensors)[1]
            return None, *pull(cotangent)
        needed = ctx.needs_input_grad[1:]
        inputs = [
            x.detach().requires_grad_(need)
            for x, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            y = ctx.function(*inputs)[0]
        wanted = [x for x in inputs if x.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, cotangent, materialize_grads=True))
        return None, *(next(found) if need else None for need in needed)
