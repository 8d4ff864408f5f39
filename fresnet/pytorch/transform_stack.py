"""Which transforms of `torch.func` are at work, read off the stack that it keeps.

The only file that reads that stack, which is private. Compiled code never comes here.
"""

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd.forward_ad import unpack_dual

_KINDS = _functorch.TransformType


def active() -> bool:
    """Whether this call runs inside any transform."""
    return bool(_stack())


def mapped() -> bool:
    """Whether this call runs inside any vmap."""
    return _KINDS.Vmap in _stack()


def differentiated(*inputs: Tensor) -> bool:
    """Whether what is computed here of these tensors is to be differentiated or mapped outside."""
    return active() or any(
        unpack_dual(tensor).tangent is not None
        or (torch.is_grad_enabled() and tensor.requires_grad)
        for tensor in inputs
    )


def forward_mode(*inputs: Tensor) -> bool:
    """Whether what is computed here of these tensors is to be differentiated in forward mode."""
    return _KINDS.Jvp in _stack() or any(
        unpack_dual(_unwrapped(tensor)).tangent is not None for tensor in inputs
    )


def fused_norm_is_exact(*inputs: Tensor) -> bool:
    """Whether PyTorch's fused batch normalisation is right in every derivative to be taken here.

    It is for one derivative, in reverse mode. What would differentiate that again, under a vmap at
    least, or its forward-mode derivative in any way, takes the saved moments for constants and
    comes out wrong without an error; and a vmap may come only once this call is over.
    """
    stack, inputs = _stack(), tuple(map(_unwrapped, inputs))
    if any(unpack_dual(tensor).tangent is not None for tensor in inputs):
        return False
    if stack and any(tensor.requires_grad for tensor in inputs):
        return False  # by torch.autograd, later; where it is alone, the operation can ask how often
    return [kind for kind in stack if kind in (_KINDS.Grad, _KINDS.Jvp)] in ([], [_KINDS.Grad])


def _unwrapped(tensor: Tensor) -> Tensor:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def _stack() -> list[_functorch.TransformType]:
    """The transforms at work, the outermost first."""
    return [transform.key() for transform in _functorch.get_interpreter_stack() or ()]
