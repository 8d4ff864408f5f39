"""cuDNN's convolutions with sum and ReLU inside, and a network of them as one CUDA graph.

PyTorch has operators for these convolutions, but its compiler does not use them. What follows a
convolution it makes into another kernel, which reads and writes the activations once more. No other
file here calls these operators.
"""

from collections.abc import Callable
from threading import Lock
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fresnet.inference.fused import Fused, FusedLayer, Inference
from fresnet.network import ops
from fresnet.network.net import run_network
from fresnet.network.nodes import (
    Bias,
    Geometry,
    NoAttention,
    NoNorm,
    Params,
    PooledProjection,
    Projection,
    attention_of,
    blocks_of,
    last_layer,
    with_blocks,
)

Window: TypeAlias = tuple[list[int], list[int], list[int], int]
"""The stride, padding and dilation of a convolution, and its groups."""

ALIGNED = 8
"""The kernels for tensor cores read channels in multiples of this."""

KERNELS = "cudnn_convolution_relu", "cudnn_convolution_add_relu"
"""torch's undocumented functions for a convolution with ReLU, and for one with sum and ReLU."""

WARM = 3
"""Runs before a graph is recorded, in which libraries prepare themselves and try algorithms."""


def is_supported(dtype: torch.dtype, device: torch.device) -> bool:
    cudnn = torch.backends.cudnn
    narrow = dtype in (torch.float32, torch.bfloat16, torch.float16)
    return device.type == "cuda" and narrow and cudnn.enabled and cudnn.is_available()


class CuDNN(Fused):
    """A convolution, sum and ReLU in one kernel where cuDNN has one."""

    def convolution(
        self, shape: torch.Size, weight: Tensor, bias: Tensor | None, how: Geometry, *, relu: bool
    ) -> FusedLayer:
        return convolution(shape, weight, bias, how, relu=relu)

    def max_pool(self, x: Tensor, stride: int = 2, padding: int = 1) -> Tensor:
        """It is compiled. PyTorch's own kernel also writes indices, four times as many bytes."""
        return _compiled(ops.max_pool)(x, stride, padding)


def prepare(params: Params, x: Tensor) -> Inference:
    """Prepare the folded network for images of this shape."""
    params = with_biases_in_sums(params)
    images = x.contiguous(memory_format=torch.channels_last)
    do = CuDNN()
    ready = params._replace(stats=run_network(params, images, do).seen)

    def run(x: Tensor) -> Tensor:
        y: Tensor = params.weights.head.run(run_network(ready, x, do).y, do)
        return y

    fused = fuse(run, images)
    return lambda x: fused(x.contiguous(memory_format=torch.channels_last))


def with_biases_in_sums(params: Params) -> Params:
    """The same folded network, with each projection's bias in the layer that adds the projection.

    cuDNN adds a bias only where ReLU follows, and no ReLU follows a projection.
    """
    weights = params.weights
    stages = (with_blocks(s, map(_bias_in_sum, blocks_of(s))) for s in weights.stages)
    return params._replace(weights=weights._replace(stages=tuple(stages)))


def _bias_in_sum(block: Any) -> Any:
    attention, shortcut = attention_of(block), block.shortcut
    projects = isinstance(shortcut, Projection | PooledProjection)
    if not projects or not isinstance(attention, NoAttention):
        return block
    last = last_layer(block)
    layer, projection = getattr(block, last), shortcut.layer
    if not isinstance(layer.norm, Bias) or not isinstance(projection.norm, Bias):
        return block
    total = Bias(layer.norm.bias + projection.norm.bias)
    bare = shortcut._replace(layer=projection._replace(norm=NoNorm()))
    return block._replace(shortcut=bare, **{last: layer._replace(norm=total)})


def convolution(
    shape: torch.Size, weight: Tensor, bias: Tensor | None, how: Geometry, *, relu: bool
) -> FusedLayer:
    """`fused.convolution` in one kernel, where cuDNN has one.

    The kernels are slow for few channels with stride 2, as in a stem. `squares` avoids that case.
    """
    k = weight.shape[3]
    if how != Geometry(2) or weight.shape[1] >= ALIGNED:
        window = [how.stride] * 2, how.padding(weight), [how.dilation] * 2, how.groups
        return _convolution(weight, bias, window, relu=relu)
    back = [k // 2 + side % 2 for side in shape[2:]]
    border = (k // 2, back[1], k // 2, back[0])
    window = [1] * 2, [0] * 2, [1] * 2, 1
    layer = _convolution(squares(F.pad(weight, (0, 1, 0, 1))), bias, window, relu=relu)
    arrange = _compiled(squares)
    return lambda x, added: layer(arrange(x, border), added)


def _convolution(weight: Tensor, bias: Tensor | None, window: Window, *, relu: bool) -> FusedLayer:
    weight = weight.contiguous(memory_format=torch.channels_last)
    aligned = weight.shape[0] % ALIGNED == weight.shape[1] % ALIGNED == 0
    kernel, summing = (getattr(torch, name, None) for name in KERNELS)

    def run(x: Tensor, added: Tensor | None = None) -> Tensor:
        y: Tensor
        if aligned and relu and kernel and added is None:
            y = kernel(x, weight, bias, *window)
        elif aligned and relu and summing and added is not None:
            y = summing(x, weight, added, 1.0, bias, *window)
        else:
            y = F.conv2d(x, weight, bias, *window)
            y = y if added is None else y + added
            y = F.relu(y) if relu else y
        return y

    return run


def squares(x: Tensor, border: tuple[int, ...] = (0, 0, 0, 0)) -> Tensor:
    """x `[b c h w]` with the values of each 2x2 square in one place's channels: `[b 4c.. h/2 w/2]`.

    A convolution with an odd kernel and stride 2 equals a convolution of these squares with stride
    1 and a kernel of half the size, rounded up. Channels of zeros are added up to a multiple of
    `ALIGNED`.
    """
    x = rearrange(F.pad(x, border), "b c (h i) (w j) -> b (c i j) h w", i=2, j=2)
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % ALIGNED))
    return x.contiguous(memory_format=torch.channels_last)


def fuse(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """The function as one CUDA graph for tensors such as x, with the fastest algorithms.

    Calls take turns, because a graph has one place for its input and one for its output.
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
    # A graph knows only the addresses of weights. Keeping the function keeps the weights alive.
    places = source, result, function

    def run(x: Tensor) -> Tensor:
        source, result, _ = places
        with turn, torch.cuda.device(x.device):
            last.wait()  # for the run before, whichever stream it was in
            source.copy_(x)
            graph.replay()
            y = result.clone()
            last.record()
        return y

    return run


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, compiled where there is Triton."""
    try:
        from torch.utils._triton import has_triton
    except ImportError:  # it is private
        return function
    return torch.compile(function, dynamic=False) if has_triton() else function
