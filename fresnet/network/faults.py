"""Where PyTorch's kernels for convolutions are wrong, for whoever calls one to keep off them."""

import torch
from torch import Tensor


def missing_columns(width: int, weight: Tensor, stride: int) -> int:
    """How many columns of zeros a map of this width needs beside it, for a right result.

    Kernels for AMX that make a single output in a line, by a stride and in fewer than 32 bits,
    return what was in memory before, in gradients too (PyTorch 2.13). A second output in the line
    makes them right.
    """
    alone = stride > 1 and width <= stride and weight.shape[-1] > 1
    return stride if alone and weight.dtype.itemsize < 4 and weight.device.type == "cpu" else 0


def overruns(weight: Tensor, stride: int) -> bool:
    """Whether the kernel for this weight's gradient may write past its buffer.

    Such are the kernels for 1x1 convolutions by a stride in channels last whose channels do not
    fill a vector: 8 with AVX2 and 16 with AVX-512. The process ends, or the gradient is wrong
    (uxlfoundation/oneDNN#6035; PyTorch 2.13). An exported program gives no gradients, and what
    keeps off the kernel would bind it to sizes as odd as those of its example: so it is exempt.
    """
    narrow = stride > 1 and weight.shape[1] < 16 and weight.shape[-1] == 1
    return narrow and weight.device.type == "cpu" and not torch.compiler.is_exporting()


def with_usual_stride(tensor: Tensor) -> Tensor:
    """The tensor with the stride of the first dimension that a tensor of its own has.

    Where there is one image, or one output, that stride may be anything; but where it is unusual,
    PyTorch 2.13 raises or gives a wrong gradient in float64, if the weight lies channels last.
    """
    usual = len(tensor) != 1 or tensor.stride(0) == tensor[0].numel()
    return tensor if usual else torch.cat([tensor, tensor])[:1]
