"""Which transforms of `torch.func` are active, as PyTorch's own stack of them tells.

The stack is private, and no other file reads it. If a PyTorch does not have it, every function here
gives the safe answer: the caller then takes a slower way that is right under every transform.
Compiled code never comes here.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

NAMES = (
    "TransformType",
    "get_interpreter_stack",
    "get_unwrapped",
    "is_functorch_wrapped_tensor",
    "maybe_get_level",
)
"""The names that this file reads from `torch._C._functorch`."""

_functorch: Any = getattr(torch._C, "_functorch", None)

READABLE = all(hasattr(_functorch, name) for name in NAMES)
"""Whether this PyTorch has all of them."""


def active() -> bool:
    """Whether this call may run inside a transform."""
    return not READABLE or bool(_stack())


def mapped() -> bool:
    """Whether this call is known to run inside a vmap."""
    return READABLE and _functorch.TransformType.Vmap in _stack()


def differentiated(*inputs: Tensor) -> bool:
    """Whether code outside may differentiate or map what is computed here from these tensors."""
    if active() or any(map(has_tangent, inputs)):
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


def has_tangent(tensor: Tensor) -> bool:
    """Whether code outside differentiates this tensor in forward mode, without torch.func."""
    return unpack_dual(tensor).tangent is not None


def forward_mode(*inputs: Tensor) -> bool:
    """Whether what is computed here from these tensors may be differentiated in forward mode."""
    if not READABLE or _functorch.TransformType.Jvp in _stack():
        return True
    return any(has_tangent(_unwrapped(tensor)) for tensor in inputs)


def can_be_written_over(y: Tensor, term: Tensor) -> bool:
    """Whether PyTorch takes y for the place of its sum with a term, as far as one can tell.

    It refuses where a derivative is taken within which the term is a variable and y is not, where a
    vmap maps the term and not y, and where one of the two is functional.
    """
    if not active():
        return True
    kinds = _functorch.TransformType if READABLE else None
    if kinds is None or not {kinds.Vmap, kinds.Functionalize}.isdisjoint(_stack()):
        return False
    levels = [_functorch.maybe_get_level(tensor) for tensor in (y, term)]
    return bool(levels[1] <= levels[0])


def one_derivative(*inputs: Tensor) -> bool:
    """Whether at most one derivative, in reverse mode, is to be taken here as far as one can tell.

    PyTorch's fused batch normalisation is right in that one alone. Its derivatives take the saved
    moments for constants, so others can be wrong without an error: a second derivative, under a
    vmap at least, and every derivative of its forward-mode derivative. A vmap may begin only after
    this call, so it cannot be ruled out here. The second derivative of its max pooling has no rule
    for a vmap of maps in channels last.
    """
    if not READABLE:
        return False
    stack, inputs = _stack(), tuple(map(_unwrapped, inputs))
    if any(map(has_tangent, inputs)):
        return False
    if stack and any(tensor.requires_grad for tensor in inputs):
        return False  # autograd comes later; without transforms the operation asks how often
    kinds = _functorch.TransformType
    return [kind for kind in stack if kind in (kinds.Grad, kinds.Jvp)] in ([], [kinds.Grad])


def _unwrapped(tensor: Tensor) -> Tensor:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def _stack() -> list[object]:
    """The active transforms, the outermost first."""
    return [transform.key() for transform in _functorch.get_interpreter_stack() or ()]
