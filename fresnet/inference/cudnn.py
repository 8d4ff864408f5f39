"""cuDNN's convolutions with sum and ReLU inside, and a network of them as one CUDA graph.

The only file that calls those operators, which PyTorch has but its compiler does not use: it writes
what follows a convolution as a kernel that reads and writes the activations once more.
"""

from collections.abc import Callable
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._triton import has_triton

from fresnet.network.nodes import FusedLayer

ALIGNED = 8
"""Channels in multiples of which the kernels for tensor cores read."""

WARM = 3
"""Runs before a graph is recorded: libraries prepare themselves, and try their algorithms."""


def is_supported(dtype: torch.dtype, device: torch.device) -> bool:
    cudnn = torch.backends.cudnn
    narrow = dtype in (torch.float32, torch.bfloat16, torch.float16)
    return device.type == "cuda" and narrow and cudnn.enabled and cudnn.is_available()


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
    """As `onednn.convolution`: a convolution, then sum and ReLU, in one kernel where there is one.

    Of few channels and stride 2, as images in a stem, the kernels are slow: see `squares`.
    """
    if stride == 2 and dilation == groups == 1 and weight.shape[1] < ALIGNED:
        return _on_squares(shape, weight, bias, activation)
    weight = weight.contiguous(memory_format=torch.channels_last)
    aligned = weight.shape[0] % ALIGNED == weight.shape[1] % ALIGNED == 0
    laid = [stride] * 2, [padding] * 2, [dilation] * 2, groups

    def run(x: Tensor, added: Tensor | None = None) -> Tensor:
        if not (aligned and activation):
            y = F.conv2d(x, weight, bias, *laid)
            y = y if added is None else y + added
            return F.relu(y) if activation else y
        if added is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *laid)
        return torch.cudnn_convolution_add_relu(x, weight, added, 1.0, bias, *laid)

    return run


def _on_squares(
    shape: torch.Size, weight: Tensor, bias: Tensor | None, activation: bool
) -> FusedLayer:
    k = weight.shape[3]
    wider = squares(F.pad(weight, (0, 1, 0, 1)))
    back = [k // 2 + side % 2 for side in shape[2:]]
    border = (k // 2, back[1], k // 2, back[0])
    layer = convolution(shape, wider, bias, activation=activation)
    arrange = _compiled(squares)

    def run(x: Tensor, added: Tensor | None = None) -> Tensor:
        return layer(arrange(x, border), added)

    return run


def squares(x: Tensor, border: tuple[int, ...] = (0, 0, 0, 0)) -> Tensor:
    """x `[b c h w]` with each square of 2x2 values as channels of one: `[b 4c.. h/2 w/2]`.

    A convolution of odd size and stride 2 is one of half the size, rounded up, and stride 1 over
    such squares. Channels of zeros fill up to a multiple of `ALIGNED`.
    """
    x = F.pad(x, border).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    x = x.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % ALIGNED))
    return x.contiguous(memory_format=torch.channels_last)


def max_pool(x: Tensor) -> Tensor:
    """As `ops.max_pool`: PyTorch's own kernel writes indices too, four times as many bytes."""
    return _compiled(_max_pool)(x)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


def fuse(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """The function for tensors such as x as one CUDA graph, its algorithms the fastest of those.

    Calls take turns: a graph has one place for what goes in and one for what comes out.
    """
    cudnn, search = torch.backends.cudnn, torch.backends.cudnn.benchmark
    cudnn.benchmark = True
    try:
        with torch.cuda.device(x.device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM):
                    function(x)
            torch.cuda.current_stream().wait_stream(aside)
            source, graph = x.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = function(source)
            turn, last = Lock(), torch.cuda.Event()
    finally:
        cudnn.benchmark = search
    # Of weights a graph knows addresses alone: with the function they live as long as it does.
    places = source, result, function

    def run(x: Tensor) -> Tensor:
        source, result, _ = places
        with turn, torch.cuda.device(x.device):
            last.wait()  # for the run before, in whichever stream
            source.copy_(x)
            graph.replay()
            y = result.clone()
            last.record()
        return y

    return run


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False) if has_triton() else function
