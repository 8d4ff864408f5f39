"""A GPU computes what float64 on the CPU does. The first two tests need no GPU."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from assertions import assert_close, assert_trees_close, logit_terms
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, images, seeds, tiny_params
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy

import fresnet
from fresnet import Params, optim, training, tree
from fresnet.data import normalise
from fresnet.inference import cudnn
from fresnet.network.nodes import Geometry

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""The largest errors, relative to the terms of the logits, because logits may cancel."""


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """float32 as on a CPU, without TF32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield


@examples(100)
@given(
    seed=seeds,
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 12), st.integers(1, 12)),
    side=st.sampled_from([1, 3, 5, 7]),
    with_sum=st.booleans(),
)
def test_a_convolution_of_squares_is_one_of_stride_2(
    seed: int, shape: tuple[int, int, int, int], side: int, with_sum: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in (shape, (4, shape[1], side, side), (4,))
    )
    expected = conv2d(x, weight, bias, 2, side // 2)
    added = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    added = added if with_sum else torch.zeros_like(added)
    layer = cudnn.convolution(x.shape, weight, bias, Geometry(2), relu=False)
    assert cudnn.squares(x.new_zeros(1, 3, 4, 4)).shape[1] % cudnn.ALIGNED == 0
    assert_close(layer(x, added if with_sum else None), expected + added, 1e-12)


@examples(50)
@given(params=tiny_params(), x=images())
def test_a_network_of_fused_layers_is_the_network(params: Params, x: Tensor) -> None:
    """It runs by PyTorch's own operations in place of cuDNN's, and without a graph."""

    def convolution_relu(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        return convolution_add_relu(x, weight, torch.zeros(()), 1.0, *rest)

    def convolution_add_relu(
        x: Tensor, weight: Tensor, added: Tensor, alpha: float, *rest: Any
    ) -> Tensor:
        return (conv2d(x, weight, *rest) + alpha * added).relu()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cudnn_convolution_relu", convolution_relu)
        patch.setattr(torch, "cudnn_convolution_add_relu", convolution_add_relu)
        patch.setattr(cudnn, "ALIGNED", 2)
        patch.setattr(cudnn, "fuse", lambda function, x: function)
        logits = cudnn.prepare(fresnet.fold(params), x)(x)
    assert_close(logits, fresnet.forward(params, x), 1e-11)


@needs_gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@examples(12)
@given(params=tiny_params(), x=images())
def test_every_network_runs_as_it_does_uncompiled(
    dtype: torch.dtype, params: Params, x: Tensor
) -> None:
    network = tree.map(lambda leaf: leaf.to("cuda", dtype), fresnet.fold(params))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cudnn, "_compiled", lambda function: function)  # for speed
        logits = fresnet.compile_inference(network, x.to("cuda", dtype))(x.to("cuda", dtype))
    assert logits.dtype == dtype
    assert logits.is_cuda
    terms = logit_terms(params, x)
    error = logits.cpu().double() - fresnet.forward(params, x)
    assert error.norm() <= BOUNDS[dtype] * terms.norm()


@needs_gpu
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "resnet50d"])
def test_compiled_networks(name: str) -> None:
    """They run in several threads and streams at once, and change nothing global."""
    params = fresnet.init(0, fresnet.SPECS[name], num_classes=10, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 3, 65, 64, generator=generator) for _ in range(8)]
    network = tree.map(lambda leaf: leaf.to("cuda", torch.float32), params)
    infer = fresnet.compile_inference(network, batches[0].cuda())
    assert not torch.backends.cudnn.benchmark

    def run(x: Tensor) -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            return infer(x.cuda()).cpu()

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, batches))
    kept = [infer(x.cuda()) for x in batches]
    for x, result, again in zip(batches, results, kept, strict=True):
        expected = fresnet.forward(params, x.double())
        assert_close(result.double(), expected, 1e-4)
        assert torch.equal(again.cpu(), result)
    assert_close(infer(batches[0][:1].cuda()).cpu(), results[0][:1], 1e-4)


@needs_gpu
def test_gradients_of_every_kind() -> None:
    params = fresnet.init(0, fresnet.RESNET18, num_classes=10, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 48, 40, generator=generator, dtype=torch.float64)
    y = torch.tensor([1, 2, 3, 4])

    optimizer = optim.sgd(0.1, momentum=0.9)
    train_step = training.make_train_step(optimizer)
    tree_of: Callable[..., Any]
    for tree_of in (
        partial(fresnet.per_sample_grads, cross_entropy, norms="running"),
        partial(fresnet.per_sample_grads, cross_entropy, norms="coupled"),
        partial(fresnet.clipped_grads, cross_entropy, max_norm=1.0),
        lambda params, x, y: train_step(training.start(params, optimizer), (x, y))[0].params,
    ):
        expected = tree_of(params, x, y)
        found = tree_of(*tree.map(Tensor.cuda, (params, x, y)))
        assert_trees_close(tree.map(Tensor.cpu, found), expected, 1e-9)


@needs_gpu
@pytest.mark.parametrize("preset", fresnet.PRESETS)
def test_pixels_are_normalised_to_the_bits_of_a_cpu(preset: str) -> None:
    x = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    for pixels in (x, x.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(normalise(pixels.cuda(), preset).cpu(), normalise(pixels, preset))
