"""A network frozen into the fastest callable there is for images of one shape at a time."""

from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from fresnet import tree
from fresnet.inference import cudnn, onednn, side_by_side, winograd
from fresnet.inference.quantization import affine, from_levels, to_levels
from fresnet.network.check import check_images, check_params, check_quantized
from fresnet.network.net import Layer, forward, run_head, run_network
from fresnet.network.nodes import Bias, FusedLayer, Params, Quantized, Rescale
from fresnet.network.ops import linear, max_pool
from fresnet.network.rewrites import fold

Inference = Callable[[Tensor], Tensor]

_PREPARING = Lock()
"""One for all networks: PyTorch's compiler cannot be at work in two threads."""


def compile_inference(params: Params | Quantized, x: Tensor) -> Inference:
    """`forward` of these parameters, frozen: norms folded, weights packed for the processor.

    On a CPU, in float32 and bfloat16, oneDNN compiles a stage of the network at a time; 3x3
    convolutions of stride 1 in float32 are Winograd's where that is faster, whose logits differ
    from those of `forward` by about 1e-6 of their norm (5e-7 otherwise; bfloat16's by 1e-2). In
    bfloat16 with AMX the last stage takes four images as one, or two, if maps are narrow and the
    batch can be so divided. On an NVIDIA GPU, in these and float16, cuDNN's convolutions add and
    rectify too, and the network is one CUDA graph; float32 is TF32 if PyTorch's setting says so
    when a shape is prepared. On other devices and in other dtypes `torch.compile` does what it can.

    What `quantize` returns runs in int8: activations are uint8 from the images to the last layer,
    and the head is float32.

    What is not finite may not be seen in the logits: a fused ReLU may make NaN 0, and int8 has
    none. Where that matters, look at the images.

    Preparing a shape takes a second, or twenty where Winograd's transforms are compiled, for as
    many threads as PyTorch then has; they stay for the process, and weights packed for the shape
    with the callable. Several threads may use it; on a GPU they take turns.

    >>> import torch, fresnet
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> x = torch.ones(2, 3, 32, 32)
    >>> run = fresnet.compile_inference(params, x)
    >>> torch.allclose(run(x), fresnet.forward(params, x), atol=1e-4)
    True

    Args:
      params: the network, of which a copy is taken. Where bfloat16 is wanted, fold it first and
        then cast it: weights are rounded once. Or `quantize` it.
      x: images, float `[b c h w]`, of the shape that is to be prepared now.
    Returns:
      A function of images to logits `[b k]` without derivatives. It takes x of any shape, and
      raises a `FresnetError` for what `forward` would refuse.
    Raises:
      FresnetError: as `forward` does, or for a quantised network that is not on the CPU, or where
        PyTorch has no kernels for it, or the processor none whose sums are exact (VNNI).
    """
    network: Any
    prepare: Callable[[Any, Tensor], Inference]
    if isinstance(params, Quantized):
        check_quantized("compile_inference", params)
        network, prepare = tree.map(torch.clone, params), _pack_int8
    else:
        check_params("compile_inference", params)
        with torch.no_grad():
            network = tree.map(torch.clone, tree.map(Tensor.detach, fold(params)))
        head = params.weights.head.weight
        library = cudnn if head.is_cuda else onednn
        fusible = library.is_supported(head.dtype, head.device)
        prepare = partial(_fuse, library) if fusible else _compile
    check_images("compile_inference", network, x)
    if isinstance(params, Params):
        with torch.no_grad():  # what does not fit, packed layers would refuse less well, or not
            forward(*tree.map(lambda leaf: leaf.to("meta"), (params, x)))
    prepared: dict[torch.Size, Inference] = {}

    def infer(x: Tensor) -> Tensor:
        check_images("the compiled network", network, x)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if x.shape not in prepared:
                with _PREPARING:
                    if x.shape not in prepared:
                        prepared[x.shape] = prepare(network, x)
            return prepared[x.shape](x)

    infer(x)
    return infer


def _fuse(library: Any, params: Params, x: Tensor) -> Inference:
    """Run the network once, keeping of each layer what is to be done; then have all that fused."""
    layers: list[FusedLayer] = []
    owed: Tensor | None = None

    def keep(
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
        nonlocal owed
        bias: Tensor | None = norm.bias
        if not activation and library is cudnn:
            # A projection, and cuDNN adds a bias only where ReLU follows: the next sum adds it too.
            bias, owed = None, bias
        elif shortcut is not None and owed is not None:
            bias, owed = norm.bias + owed, None
        n = len(images) // len(x)
        if stride > 1 and library is onednn and any(conv is leaf for leaf in last_stage):
            n = side_by_side.images_together(x, stride)
        if n > 1:
            layer = side_by_side.convolution(
                n,
                x.shape,
                conv,
                norm.bias,
                stride=stride,
                dilation=dilation,
                groups=groups,
                activation=activation,
            )
        elif bias is not None and winograd.is_faster(x.shape, conv, stride, dilation, groups):
            layer = winograd.convolution(x.shape, conv, bias, activation=activation)
        else:
            layer = library.convolution(
                x.shape,
                conv,
                bias,
                stride=stride,
                padding=dilation * (conv.shape[-1] // 2),
                dilation=dilation,
                groups=groups,
                activation=activation,
            )
        layers.append(layer)
        return layer(x, shortcut), ()

    images = x.contiguous(memory_format=torch.channels_last)
    last_stage = tree.leaves(params.weights.stages[-1])
    pool = cudnn.max_pool if library is cudnn else max_pool
    run_network(params, images, keep, pool=pool)

    def run(x: Tensor) -> Tensor:
        activations, _ = run_network(params, x, _one_by_one(layers), pool=pool)
        if library is onednn:
            y = side_by_side.average(activations[-1], len(x) // len(activations[-1]))
            return linear(y, *params.weights.head)
        return run_head(params.weights.head, activations[-1])

    fused: Inference = library.fuse(run, images)
    return lambda x: fused(x.contiguous(memory_format=torch.channels_last))


def _pack_int8(network: Quantized, x: Tensor) -> Inference:
    """Run the network once, packing each layer; from then on, call them.

    They are told what levels stand for by two images run in floating point. One of them has the
    least value everywhere, and one the greatest: whatever stands between layers, pooling, padding
    or nothing, hands these on.
    """
    params = Params(network.weights, network.ranges)
    layers: list[FusedLayer] = []

    def pack(
        conv: Tensor,
        norm: Rescale,
        seen: Tensor,
        ends: Tensor,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        shortcut: Tensor | None = None,
        activation: bool = True,
    ) -> tuple[Tensor, tuple[()]]:
        shape = torch.Size((len(x), *ends.shape[1:]))
        layer = onednn.int8_convolution(
            shape,
            conv,
            *norm,
            source=affine(ends),
            result=affine(seen),
            added=None if shortcut is None else affine(shortcut),
            stride=stride,
            padding=dilation * (conv.shape[-1] // 2),
            dilation=dilation,
            groups=groups,
            activation=activation,
        )
        layers.append(layer)
        h, w = (-(-side // stride) for side in shape[2:])
        return _filled(seen, len(conv), h, w), ()

    activations, _ = run_network(params, _filled(network.images, *x.shape[1:]), pack)
    images, last = affine(network.images), affine(activations[-1])

    def infer(x: Tensor) -> Tensor:
        activations, _ = run_network(params, to_levels(x, images), _one_by_one(layers))
        return run_head(network.weights.head, from_levels(activations[-1], last))

    return infer


def _filled(ends: Tensor, c: int, h: int, w: int) -> Tensor:
    return ends[:, None, None, None].expand(2, c, h, w)


def _one_by_one(layers: list[FusedLayer]) -> Layer:
    rest = iter(layers)

    def layer(*arguments: Any, shortcut: Tensor | None = None, **_: Any) -> Any:
        return next(rest)(arguments[3], shortcut), ()

    return layer


def _compile(params: Params, x: Tensor) -> Inference:
    compiled: Inference = torch.compile(partial(forward, params), dynamic=False)
    compiled(x)
    return compiled
