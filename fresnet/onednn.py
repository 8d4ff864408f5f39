"""Convolutions of oneDNN with weights packed once: what PyTorch has, but only its compiler calls.

The only file that touches those operators, which are private.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Layer = Callable[[Tensor, Tensor | None], Tensor]
"""Of activations and what is to be added to the result, over which it may be written."""


def is_supported(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    narrow = dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype is torch.float32 or narrow


def convolution(
    shape: torch.Size,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    activation: bool = False,
) -> Layer:
    """A convolution of activations of this shape, lying channels last, then sum and ReLU.

    Args:
      shape: of the activations, `[b c h w]`.
      weight: `[o c/groups k k]`, detached.
      bias: `[o]`, detached.
    """
    window = ([padding] * 2, [stride] * 2, [dilation] * 2, groups)
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    packed = reorder(weight.to_mkldnn(), *window, list(shape))
    alone = torch.ops.mkldnn._convolution_pointwise.default
    over = torch.ops.mkldnn._convolution_pointwise_.binary
    name = "relu" if activation else "none"

    def run(x: Tensor, added: Tensor | None = None) -> Tensor:
        y: Tensor
        if added is None:
            y = alone(x, packed, bias, *window, name, [], "")
        else:
            relu = "relu" if activation else None
            added = added.contiguous(memory_format=torch.channels_last)  # others it does not fuse
            y = over(added, x, packed, bias, *window, "add", 1.0, relu, [], None)
        return y

    return run
