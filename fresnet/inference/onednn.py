"""oneDNN with weights packed once: what PyTorch has, but only its compilers call.

The only file that touches those operators, which are private, and TorchScript, which is deprecated.
"""

import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fresnet.network.nodes import Affine, FusedLayer


def is_supported(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    narrow = dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype is torch.float32 or narrow


@cache
def is_int8_supported() -> bool:
    """Whether sums are exact: on processors without VNNI, pairs of products saturate at 16 bits."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qconv_prepack"):
        return False
    with torch.device("cpu"):
        x = torch.full((1, 64, 3, 3), 255, dtype=torch.uint8)
        weight = torch.full((1, 64, 3, 3), 127, dtype=torch.int8)
        one, none = torch.ones(1, dtype=torch.float32), torch.zeros(1, dtype=torch.float32)
    source, result = Affine(1.0, 0), Affine(255 * 127 * weight.numel() / 200, 0)
    layer = int8_convolution(x.shape, weight, one, none, source=source, result=result)
    return layer(x, None).item() == 200


def missing_columns(width: int, weight: Tensor, stride: int) -> int:
    """How many columns of zeros activations need beside them, for the first output to be right.

    Kernels for AMX that make a single output of a line, by a stride and of fewer than 32 bits,
    return what was in memory before, gradients too (PyTorch 2.13). Beside another they do not.
    """
    alone = stride > 1 and width <= stride and weight.shape[-1] > 1
    return stride if alone and weight.dtype.itemsize < 4 and weight.device.type == "cpu" else 0


def overruns(weight: Tensor, stride: int) -> bool:
    """Whether a kernel may write past its buffer, for this weight's gradient.

    They do for 1x1 convolutions by a stride that lie channels last, of fewer channels than fill a
    vector: 8 by AVX2 and 16 by AVX-512. The process ends, or the gradient is wrong
    (uxlfoundation/oneDNN#6035; PyTorch 2.13). Never in a program that is exported: it gives no
    gradients, and what keeps off the kernel would bind it to sizes as odd as those of its example.
    """
    narrow = stride > 1 and weight.shape[1] < 16 and weight.shape[-1] == 1
    return narrow and weight.device.type == "cpu" and not torch.compiler.is_exporting()


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
) -> FusedLayer:
    """A convolution of activations of this shape, then sum and ReLU, for `fuse` to make one.

    Args:
      shape: of the activations, `[b c h w]`.
      weight: `[o c/groups k k]`, detached.
      bias: `[o]`, detached.
    """

    def run(x: Tensor, added: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        y = y if added is None else y + added
        return F.relu(y) if activation else y

    return _with_columns(run, missing_columns(shape[3], weight, stride))


def fuse(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """The function for tensors such as x, by oneDNN's own compiler.

    It takes a block of a network, or a stage, at once; packs weights, and keeps what PyTorch's
    operators prepare anew in each call. TorchScript is the only way to it that PyTorch has. What it
    refuses, as some networks on images of a single pixel, is run as it is.
    """
    enabled = torch.jit.onednn_fusion_enabled()
    torch.jit.enable_onednn_fusion(True)
    try:
        with warnings.catch_warnings(action="ignore"):  # that shapes are numbers to it
            # `torch.jit.trace` would keep the graph, and its weights, as long as the process.
            graph, _ = torch._C._create_graph_by_tracing(function, (x,), lambda _: "", True, False)
        fused: Callable[[Tensor], Tensor] = torch._C._create_function_from_graph("fused", graph)
        for _ in range(2):  # watched, then compiled
            fused(x)
    except RuntimeError:
        return function
    finally:
        torch.jit.enable_onednn_fusion(enabled)
    return fused


def int8_convolution(
    shape: torch.Size,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    source: Affine,
    result: Affine,
    added: Affine | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    activation: bool = False,
) -> FusedLayer:
    """As `convolution`, from uint8 to uint8: sums are int32, then float32, and rounded once.

    Args:
      shape: of the activations, `[b c h w]`.
      weight: int8 `[o c/groups k k]`, of which a step is worth scale `[o]`.
      bias: `[o]`.
      source: what the activations stand for.
      result: what the results stand for.
      added: what the levels stand for that are added, if any are.
    """
    missing = missing_columns(shape[3], weight, stride)
    window = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
    packed = torch.ops.onednn.qconv_prepack(
        weight, scale, *source, *window, [*shape[:3], shape[3] + missing]
    )
    alone = torch.ops.onednn.qconv2d_pointwise.default
    over = torch.ops.onednn.qconv2d_pointwise.binary
    symmetric = torch.zeros_like(scale, dtype=torch.int32)
    to, name = (*result, torch.uint8), "relu" if activation else "none"

    def run(x: Tensor, levels: Tensor | None = None) -> Tensor:
        y: Tensor
        arguments = (x, *source, packed, scale, symmetric)
        if added is None:
            y = alone(*arguments, bias, *window, *to, name, [], "")
        else:
            assert levels is not None
            levels = levels.contiguous(memory_format=torch.channels_last)
            y = over(*arguments, levels, bias, *window, *to, *added, "sum", 1.0, name, [], "")
        return y

    return _with_columns(run, missing, source.zero_point)


def _with_columns(layer: FusedLayer, missing: int, zero: int = 0) -> FusedLayer:
    """The layer, where columns are missing for activations without them."""
    if not missing:
        return layer

    def run(x: Tensor, added: Tensor | None = None) -> Tensor:
        x = F.pad(x, (0, missing), value=zero).contiguous(memory_format=torch.channels_last)
        y = layer(x, None if added is None else F.pad(added, (0, 1)))
        return y[..., :1].contiguous(memory_format=torch.channels_last)

    return run


def uint8_max_pool(x: Tensor, *, kernel_size: int, stride: int, padding: int) -> Tensor:
    """PyTorch's public one refuses uint8."""
    window = ([kernel_size] * 2, [stride] * 2, [padding] * 2, [1, 1])
    y: Tensor = torch.ops.quantized.max_pool2d(x, *window, False)
    return y
