"""Which transforms of `torch.func` are at work, read off the stack that it keeps.

The only file that reads that stack, which is private. Compiled code never comes here.
"""

from torch import Tensor
from torch._C import _functorch
from torch.autograd.forward_ad import unpack_dual

_KINDS = _functorch.TransformType


def active() -> bool:
    """Whether this call runs inside any transform."""
    return bool(_functorch.get_interpreter_stack())


def reverse_mode_alone() -> bool:
    """Whether every transform at work is reverse-mode differentiation: no jvp, no vmap."""
    return {t.key() for t in _functorch.get_interpreter_stack() or ()} <= {_KINDS.Grad}


def fused_norm_is_exact(*inputs: Tensor) -> bool:
    """Whether PyTorch's fused batch normalisation is right in every derivative to be taken here.

    It is for one derivative in reverse mode and for any derivative of that one. What would
    differentiate it further, or its forward-mode derivative, takes the saved moments for
    constants and comes out wrong without an error.
    """
    if any(_is_differentiated_outside(tensor) for tensor in inputs):
        return False
    modes = [t.key() for t in _functorch.get_interpreter_stack() or ()]
    modes = [mode for mode in modes if mode in (_KINDS.Grad, _KINDS.Jvp)]
    return not modes or (modes[-1] == _KINDS.Grad and len(modes) <= 2)


def _is_differentiated_outside(tensor: Tensor) -> bool:
    """Whether `torch.autograd`, not `torch.func`, is to differentiate by this tensor.

    Its own reverse mode alone is left to the operation: it can ask how often.
    """
    in_transform = active()
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return unpack_dual(tensor).tangent is not None or (in_transform and tensor.requires_grad)
