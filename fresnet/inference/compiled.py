"""A network frozen into the fastest callable there is for images of one shape at a time."""

import warnings
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import reason
from fresnet.inference import cudnn, int8, onednn
from fresnet.inference.fused import Inference
from fresnet.network.check import check_images, check_params, check_values, first_conv
from fresnet.network.net import forward, run_network
from fresnet.network.nodes import Params, Quantized
from fresnet.network.regimes import INFERENCE
from fresnet.network.rewrites import fold

EXACT, TENSOR_FLOAT, TIMES = 1e-4, 1e-2, 4
"""By how much a backend's logits may differ: in float32, where TF32 is allowed, and how many times
as much as those of `forward` in the same dtype differ from its logits in float32.
"""

COMPARED = 4
"""How many different images are in the batch by which a backend is compared with `forward`."""

DRAWS = 8
"""How many networks tell how rounding grows. Their mean of squares is seldom far too small."""

_PREPARING = Lock()
"""One for all networks: PyTorch's compiler, which `_prepare` may need, is for one thread."""


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

    What is prepared for a shape is compared with `forward` once. If they differ by more than
    rounding, a warning says so, and images of that shape are run by `forward`.

    Preparing a shape takes as long as some nine runs. Weights packed for the shape stay with the
    callable. Several threads may use it; on a GPU they take turns. Winograd's transforms take a C++
    compiler, `g++` or what CXX names, half a second once in a process; without one a warning says
    so, and oneDNN has all convolutions.

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
      A function of images to what `forward` returns, without derivatives. It takes x of any shape,
      and raises a `FresnetError` for what `forward` would refuse.
    Raises:
      FresnetError: as `forward` does, or for tensors on meta, or for a quantised network that is
        not on the CPU, or where PyTorch has no kernels for it, or the processor none whose sums
        are exact (VNNI).
    """
    network: Any
    prepare: Callable[[Any, Tensor], Inference]
    if isinstance(params, Quantized):
        int8.check_runnable("compile_inference", params)
        network, prepare = tree.map(torch.clone, params), int8.prepare
    else:
        check_params("compile_inference", params)
        with torch.no_grad():
            network = tree.map(torch.clone, tree.map(Tensor.detach, fold(params)))
        prepare = _prepare
    check_images("compile_inference", network, x)
    check_values("compile_inference", network, x)
    if isinstance(params, Params):
        with torch.no_grad():  # what does not fit, packed layers would refuse less well, or not
            params.weights.head.run(run_network(params, x[:0], INFERENCE).y, INFERENCE)
    prepared: dict[torch.Size, Inference] = {}

    def prepared_for(x: Tensor) -> Inference:
        if x.shape not in prepared:
            with _PREPARING:
                if x.shape not in prepared:
                    prepared[x.shape] = prepare(network, x)
        return prepared[x.shape]

    def infer(x: Tensor) -> Tensor:
        check_images("the compiled network", network, x)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return prepared_for(x)(x)

    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        prepared_for(x)
    return infer


def _prepare(params: Params, x: Tensor) -> Inference:
    """The folded network by the backend for its dtype and device, if that computes the same."""
    conv = first_conv(params.weights)
    for backend in (cudnn, onednn):
        if backend.is_supported(conv.dtype, conv.device):
            fused: Inference = backend.prepare(params, x)
            if _agrees(fused, params, x):
                return fused
            warnings.warn(
                f"what {backend.__name__.rpartition('.')[2]} makes of this network is not what it "
                f"computes, for images {tuple(x.shape)}: they are run without it",
                stacklevel=4,
            )
            return partial(forward, params)
    compiled: Inference = torch.compile(partial(forward, params), dynamic=False)
    try:
        compiled(x)
    except RuntimeError as error:  # such as for want of a C++ compiler
        warnings.warn(
            f"PyTorch does not compile this network, so images {tuple(x.shape)} are run as "
            f"forward does: {reason(error)}",
            stacklevel=4,
        )
        return partial(forward, params)
    return compiled


def _agrees(fused: Inference, params: Params, x: Tensor) -> bool:
    """Whether what comes of noise is what `forward` returns, to the rounding of the dtype.

    A few images make up the batch, each as often as the others and in no order, because `forward`
    takes longer than what is compared with it. An error is measured by the terms of which the
    results are sums, for these may cancel. Where more cancels before, as in a norm of a few values
    that are nearly equal, it is measured by what rounding grows to in this network.
    """
    generator = torch.Generator().manual_seed(0)
    few = x[:COMPARED].shape
    noise = torch.randn(few, generator=generator, dtype=torch.float32, device="cpu").to(x)
    batch = (torch.randperm(len(x), generator=generator, device="cpu") % len(noise)).to(x.device)
    wide = torch.promote_types(x.dtype, torch.float32)
    exact = tree.map(lambda leaf: leaf.to(wide), params)
    head, features = exact.weights.head, run_network(exact, noise.to(wide), INFERENCE).y
    expected = head.run(features, INFERENCE).double()
    terms = tree.map(_magnitude, head).run(_magnitude(features), INFERENCE)
    if not terms.isfinite().all():
        return True  # nothing can be said of it
    loose = x.is_cuda and torch.backends.cudnn.allow_tf32
    floor = TENSOR_FLOAT if loose else max(EXACT, torch.finfo(x.dtype).eps)
    rounding = (forward(params, noise).double() - expected)[batch].norm()
    error = (fused(noise[batch]).double() - expected[batch]).norm()
    if error <= TIMES * rounding + floor * terms[batch].norm():
        return True
    by = max(floor / 10, torch.finfo(x.dtype).eps)
    grown = [_off(exact, by, generator, noise.to(wide)) - expected for _ in range(DRAWS)]
    return bool(error <= TIMES * torch.stack(grown)[:, batch].norm() / DRAWS**0.5)


def _off(params: Params, by: float, generator: torch.Generator, x: Tensor) -> Tensor:
    """The logits of a network whose weights are off by about this part of each.

    A kernel that rounds computes what such weights would: its sums are those of terms that are off.
    """

    def off(leaf: Tensor) -> Tensor:
        noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float32, device="cpu")
        return leaf * (1 + by * noise.to(leaf))

    return forward(tree.map(off, params), x).double()


def _magnitude(x: Tensor) -> Tensor:
    return x.double().abs()
