"""oneDNN's own compiler, which takes a stage of a network at once and packs weights beforehand.

It is reached through TorchScript, which is deprecated, and through private functions. No other file
here touches these; int8 is run by `traced` too.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fresnet.inference import side_by_side, winograd
from fresnet.inference.fused import Fused, FusedLayer, Inference
from fresnet.network.net import run_network
from fresnet.network.nodes import AFFINE, POOLED, Geometry, Pair, Params, units_of

TRACE, FUNCTION = "_create_graph_by_tracing", "_create_function_from_graph"
"""The functions of torch._C that trace a function without keeping its graph for the process."""


def is_supported(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this PyTorch has oneDNN's compiler for weights such as these."""
    there = device.type == "cpu" and torch.backends.mkldnn.is_available()
    if not there or not _traces():
        return False
    if dtype is torch.bfloat16:
        has_kernels = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return has_kernels is not None and bool(has_kernels())
    return dtype is torch.float32


def _traces() -> bool:
    return all(hasattr(torch._C, name) for name in (TRACE, FUNCTION))


class OneDNN(Fused):
    """Convolutions that oneDNN compiles, or Winograd's where those are faster."""

    def convolution(
        self, shape: torch.Size, weight: Tensor, bias: Tensor | None, how: Geometry, *, relu: bool
    ) -> FusedLayer:
        if bias is not None and winograd.is_faster(shape, weight, how):
            return winograd.convolution(shape, weight, bias, relu=relu)
        return super().convolution(shape, weight, bias, how, relu=relu)

    def layer(
        self,
        at: Pair,
        x: Tensor,
        how: Geometry,
        *,
        add: Tensor | None = None,
        relu: bool = True,
    ) -> tuple[Tensor, Any]:
        return super().layer(at, x, how, add=None if add is None else _one_way(add), relu=relu)

    def normed(self, at: Pair, x: Tensor) -> tuple[Tensor, Any]:
        return super().normed(at, _one_way(x))

    def join(self, y: Tensor, add: Tensor | None) -> Tensor:
        return super().join(_one_way(y), None if add is None else _one_way(add))


class SideBySide(OneDNN):
    """The last stage, in which narrow maps of several images lie side by side from a stride on.

    Args:
      images: how many images there are. Activations that seem to be of fewer lie side by side.
    """

    def __init__(self, images: int) -> None:
        self.images = images

    def convolution(
        self, shape: torch.Size, weight: Tensor, bias: Tensor | None, how: Geometry, *, relu: bool
    ) -> FusedLayer:
        n = self.images // shape[0]
        if how.stride > 1:
            n = side_by_side.images_together(shape, weight.dtype, how.stride)
        if n == 1:
            return super().convolution(shape, weight, bias, how, relu=relu)
        return side_by_side.convolution(n, shape, weight, bias, how, relu=relu)

    def join(self, y: Tensor, add: Tensor | None) -> Tensor:
        if add is not None and len(add) != len(y):
            add = side_by_side.side_by_side(add, self.images // len(y))
        return super().join(y, add)

    def mean(self, x: Tensor) -> Tensor:
        return side_by_side.average(x, self.images // len(x))

    def gate(self, x: Tensor, gates: Tensor) -> Tensor:
        return side_by_side.gate(x, gates, self.images // len(x))


def prepare(params: Params, x: Tensor) -> Inference:
    """Prepare the folded network for images of this shape."""
    images = x.contiguous(memory_format=torch.channels_last)
    do = OneDNN()
    stage = params.weights.stages[-1]
    # Where a stage pools, its shortcuts alone would stride, and lie side by side alone. A norm that
    # is left would take the moments of several images.
    apart = isinstance(stage, POOLED) or any(
        not isinstance(unit.norm, AFFINE) for unit in units_of((stage, params.weights.last))
    )
    last = do if apart else SideBySide(len(images))
    ready = params._replace(stats=run_network(params, images, do, last=last).seen)

    def run(x: Tensor) -> Tensor:
        y: Tensor = params.weights.head.run(run_network(ready, x, do, last=last).y, last)
        return y

    fused = fuse(run, images)
    return lambda x: fused(x.contiguous(memory_format=torch.channels_last))


def fuse(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """The function compiled by oneDNN's own compiler for tensors such as x.

    The compiler takes a block of a network, or a stage, at once. It packs weights, and keeps what
    PyTorch's operators prepare anew in each call. PyTorch reaches it by TorchScript alone. A
    function that it refuses is run as it is, such as some networks on images of a few pixels.
    """
    enabled = torch.jit.onednn_fusion_enabled()
    torch.jit.enable_onednn_fusion(True)
    try:
        return traced(function, x)
    finally:
        torch.jit.enable_onednn_fusion(enabled)


def traced(function: Callable[..., Tensor], *examples: Tensor) -> Callable[..., Tensor]:
    """The function in TorchScript, which runs it without Python, for tensors such as these.

    A function that it refuses is run as it is.
    """
    if not _traces():
        return function
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they say that shapes become constants
            # `torch.jit.trace` would keep the graph, and its weights, as long as the process.
            graph, _ = torch._C._create_graph_by_tracing(
                function, examples, lambda _: "", True, False
            )
        run: Callable[..., Tensor] = torch._C._create_function_from_graph("traced", graph)
        for _ in range(2):  # the first run is watched, the second is compiled
            run(*examples)
    except RuntimeError:
        return function
    return run


def _one_way(x: Tensor) -> Tensor:
    """The activations; maps of one pixel with the strides that sums and ReLU give them.

    Many strides say the same of such maps. What oneDNN compiles expects those that it once saw. It
    hands others to PyTorch's convolution, along with tensors that only oneDNN can read, and that
    ends the process.
    """
    return x.flatten(1)[:, :, None, None] if x.shape[2:] == (1, 1) else x
