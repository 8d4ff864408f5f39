"""Cases in which PyTorch's kernels for convolutions are wrong, so that callers avoid them."""

import torch
from torch import Tensor

from fresnet.pytorch.compilers import is_exporting


def missing_columns(shape: torch.Size, weight: Tensor, stride: int) -> int:
    """How many columns of zeros maps `[b c h w]` need beside them for a right result.

    Kernels for AVX-512 return what was in memory before as the weight's gradient, if there is a
    stride, a single output in a line, and a dtype of fewer than 32 bits. Those for AMX do so for
    the result too. A second output in the line makes them right.

    In bfloat16, kernels for AVX-512 without its instructions for it are off by half for 1x1
    convolutions with five outputs in a map, if these have more than 64 channels. So is the gradient
    of x, if x has. Another output in each line makes them right. A program exported for images of
    any size is exempt, because it would be bound to other numbers of outputs; its maps have more of
    them (both: PyTorch 2.13).
    """
    if weight.dtype.itemsize >= 4 or weight.device.type != "cpu":
        return 0
    height, width = shape[2:]
    if weight.shape[-1] > 1:
        return stride if stride > 1 and width <= stride else 0
    known = isinstance(height, int) and isinstance(width, int)
    if max(weight.shape[:2]) <= 64 or (is_exporting() and not known):
        return 0
    return stride if -(-height // stride) * -(-width // stride) == 5 else 0


def loses_weight_gradient(shape: torch.Size, weight: Tensor, dilation: int) -> bool:
    """Whether the kernel for this weight's gradient may return what was in memory before.

    Those of bfloat16 for AVX-512 do so for dilated convolutions in channels last, if a line has
    more than 28 outputs, and if the channels that an output reads are no multiple of 16 (PyTorch
    2.13). An exported program is exempt, because it gives no gradients.
    """
    if dilation == 1 or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return False
    return not is_exporting() and weight.shape[1] % 16 > 0 and shape[3] > 28


def overruns(weight: Tensor, stride: int) -> bool:
    """Whether the kernel for this weight's gradient may write past its buffer.

    Kernels for 1x1 convolutions with a stride in channels last do so if the channels do not fill a
    vector: 8 with AVX2 and 16 with AVX-512. The process ends, or the gradient is wrong
    (uxlfoundation/oneDNN#6035; PyTorch 2.13).

    An exported program is exempt, because it gives no gradients. The way around the kernel would
    also bind the program to odd or to even sizes, whichever its example has.
    """
    narrow = stride > 1 and weight.shape[1] < 16 and weight.shape[-1] == 1
    return narrow and weight.device.type == "cpu" and not is_exporting()


def with_usual_stride(tensor: Tensor) -> Tensor:
    """The tensor with the usual stride of the first dimension, as a tensor of its own has it.

    If there is one image or one output, that stride may be anything. If it is unusual and the
    weight lies channels last, PyTorch 2.13 raises or gives a wrong gradient in float64.
    """
    usual = len(tensor) != 1 or tensor.stride(0) == tensor[0].numel()
    return tensor if usual else torch.cat([tensor, tensor])[:1]
