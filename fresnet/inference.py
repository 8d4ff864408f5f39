"""A network frozen into the fastest callable there is for images of one shape at a time."""

from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from fresnet import onednn, tree, winograd
from fresnet.check import check_call, check_images
from fresnet.net import forward, run_head, run_network
from fresnet.regimes import fold
from fresnet.types import Bias, Params

Inference = Callable[[Tensor], Tensor]


def compile_inference(params: Params, x: Tensor) -> Inference:
    """`forward` of these parameters, frozen: norms folded, weights packed for the processor.

    On a CPU, in float32 and bfloat16, each layer of the network, its sum and its ReLU are one call
    of oneDNN; 3x3 convolutions of stride 1 in float32 are Winograd's where that is faster, whose
    logits differ from those of `forward` by about 1e-6 of their norm (5e-7 otherwise; bfloat16's
    by 1e-2). On other devices and in other dtypes `torch.compile` does what it can.

    Preparing a shape takes a second, or twenty where Winograd's transforms are compiled, and keeps
    weights packed for it. Several threads may use the callable.

    >>> import torch, fresnet
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> x = torch.ones(2, 3, 32, 32)
    >>> run = fresnet.compile_inference(params, x)
    >>> torch.allclose(run(x), fresnet.forward(params, x), atol=1e-4)
    True

    Args:
      params: the network, of which a copy is taken. Where bfloat16 is wanted, fold it first and
        then cast it: weights are rounded once.
      x: images, float `[b c h w]`, of the shape that is to be prepared now.
    Returns:
      A function of images to logits `[b k]` without derivatives. It takes x of any shape, and
      raises a `FresnetError` for what `forward` would refuse.
    Raises:
      FresnetError: as `forward` does.
    """
    check_call("compile_inference", params, x)
    with torch.no_grad():
        folded = tree.map(torch.clone, tree.map(Tensor.detach, fold(params)))
    prepare = _pack if onednn.is_supported(x.dtype, x.device) else _compile
    prepared: dict[torch.Size, Inference] = {}
    lock = Lock()

    def infer(x: Tensor) -> Tensor:
        check_images("the compiled network", folded, x)
        if x.shape not in prepared:
            with lock:
                if x.shape not in prepared:
                    prepared[x.shape] = prepare(folded, x)
        return prepared[x.shape](x)

    infer(x)
    return infer


@torch.no_grad()
def _pack(params: Params, x: Tensor) -> Inference:
    """Run the network once, keeping of each layer what oneDNN is to do; then do that."""
    layers: list[onednn.Layer] = []

    def pack(
        conv: Tensor,
        norm: Bias,
        _: Any,
        x: Tensor,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        shortcut: Tensor | None = None,
        activation: bool = True,
    ) -> tuple[Tensor, tuple[()]]:
        if winograd.is_faster(x.shape, conv, stride, dilation, groups):
            layer = winograd.convolution(x.shape, conv, norm.bias, activation=activation)
        else:
            layer = onednn.convolution(
                x.shape,
                conv,
                norm.bias,
                stride=stride,
                padding=dilation * (conv.shape[-1] // 2),
                dilation=dilation,
                groups=groups,
                activation=activation,
            )
        layers.append(layer)
        return layer(x, shortcut), ()

    run_network(params, x.contiguous(memory_format=torch.channels_last), pack)

    @torch.no_grad()
    def infer(x: Tensor) -> Tensor:
        rest = iter(layers)

        def layer(*arguments: Any, shortcut: Tensor | None = None, **_: Any) -> Any:
            return next(rest)(arguments[3], shortcut), ()

        activations, _ = run_network(params, x.contiguous(memory_format=torch.channels_last), layer)
        return run_head(params.weights.head, activations[-1])

    return infer


def _compile(params: Params, x: Tensor) -> Inference:
    mode = "reduce-overhead" if x.is_cuda else "default"
    compiled = torch.compile(partial(forward, params), dynamic=False, mode=mode)

    @torch.no_grad()
    def infer(x: Tensor) -> Tensor:
        return compiled(x).clone()  # what a CUDA graph returns, the next run writes over

    infer(x)
    return infer
