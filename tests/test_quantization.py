"""int8 networks: as near to float32 as 256 levels allow, whatever they are made of."""

from functools import cache

import pytest
import torch
from assertions import assert_close, assert_same, unmutated
from digits import load
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, images, seeds, tiny_params
from torch import Tensor
from torch.nn.functional import conv2d

import fresnet
from fresnet import FresnetError, Params, onednn, optim, training, tree
from fresnet.quantization import affine, from_levels, to_levels
from fresnet.types import Affine, BasicBlock, Quantized, Stem3x3


@examples(40)
@given(params=tiny_params(), x=images(batch=st.integers(2, 4), dtype=torch.float32))
def test_every_network_is_near_to_itself_in_float32(params: Params, x: Tensor) -> None:
    """Of the terms of which logits are sums, a few levels out of 255."""
    params = tree.map(Tensor.float, params)
    with unmutated(params, x):
        quantized = fresnet.quantize(params, [x])
    with unmutated(quantized, x):
        logits = fresnet.compile_inference(quantized, x)(x)
    assert logits.dtype is torch.float32
    head, features = params.weights.head, fresnet.features(params, x)[-1].mean((2, 3))
    terms = features @ head.weight.abs().T + head.bias.abs()
    assert (logits - fresnet.forward(params, x)).norm() <= 0.06 * terms.norm()


@examples(40)
@given(
    seed=seeds,
    shape=st.tuples(*[st.integers(1, 9)] * 4),
    outputs=st.integers(1, 9),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    activation=st.booleans(),
    with_sum=st.booleans(),
)
def test_a_layer_is_the_convolution_of_what_its_levels_stand_for(
    seed: int,
    shape: tuple[int, int, int, int],
    outputs: int,
    kernel: int,
    stride: int,
    activation: bool,
    with_sum: bool,
) -> None:
    """To one level: sums are exact, and rounded once."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    weight = torch.randint(-127, 128, (outputs, shape[1], kernel, kernel), generator=generator)
    scale, bias = torch.rand(2, outputs, generator=generator) / 100 + 1e-3
    source = affine(x)
    levels = to_levels(x, source)
    wide = weight.double() * scale.double()[:, None, None, None]
    y = conv2d(from_levels(levels, source).double(), wide, bias.double(), stride, kernel // 2)
    plus = torch.randn(y.shape, generator=generator)
    added = affine(plus) if with_sum else None
    plus = to_levels(plus, affine(plus))
    y = y + from_levels(plus, added).double() if added else y
    y = y.relu() if activation else y
    result = affine(y)
    layer = onednn.int8_convolution(
        x.shape,
        weight.to(torch.int8),
        scale,
        bias,
        source=source,
        result=result,
        added=added,
        stride=stride,
        padding=kernel // 2,
        activation=activation,
    )
    found = layer(levels, plus if with_sum else None)
    assert found.dtype is torch.uint8
    assert (from_levels(found, result) - y).abs().max() <= 1.01 * result.scale


def test_levels_have_a_zero_and_reach_both_ends() -> None:
    assert affine(torch.tensor([-1.0, 254.0])) == Affine(1.0, 1)
    assert affine(torch.tensor([3.0, 255.0])) == Affine(1.0, 0)
    assert affine(torch.zeros(2)) == Affine(1.0, 0)
    levels = affine(torch.tensor([-2.0, 3.1]))
    assert_close(
        from_levels(to_levels(torch.zeros(1, 1, 1, 1), levels), levels).sum(), torch.tensor(0.0), 0
    )


@cache
def trained() -> tuple[Params, Tensor, Tensor]:
    """A small network trained on digits, and the images of training and of the test."""
    train, test = load(16)
    spec = fresnet.Spec(BasicBlock, (1, 1, 1), width=16, stem=Stem3x3)
    optimizer = optim.sgd(0.05, momentum=0.9)
    step = training.make_train_step(optimizer)
    state = training.start(fresnet.init(0, spec, num_classes=10), optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        order = torch.randperm(len(train.labels), generator=generator)
        for chosen in order.split(64)[:-1]:
            state, _ = step(state, (train.images[chosen], train.labels[chosen]))
    accuracy = fresnet.forward(state.params, test.images).argmax(1) == test.labels
    assert accuracy.float().mean() > 0.9
    return state.params, train.images, test.images


def test_on_digits_the_classes_are_those_of_float32() -> None:
    params, seen, unseen = trained()
    quantized = fresnet.quantize(params, seen[:128].split(32))
    classes = fresnet.compile_inference(quantized, unseen)(unseen).argmax(1)
    assert (classes == fresnet.forward(params, unseen).argmax(1)).float().mean() >= 0.99


def test_ranges_are_of_all_images_in_any_order() -> None:
    params, seen, _ = trained()
    parts = list(seen[:96].split(32))
    whole = fresnet.quantize(params, iter(parts))
    assert_same(fresnet.quantize(params, parts[::-1]), whole)
    fewer = fresnet.quantize(params, parts[:1])
    assert_same(fewer.weights, whole.weights)
    assert whole.images[0] <= fewer.images[0] <= fewer.images[1] <= whole.images[1]
    assert tree.ravel(whole.ranges).sum() != tree.ravel(fewer.ranges).sum()


def test_what_is_no_network_of_float32_is_refused() -> None:
    params = fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=3)
    x = torch.ones(2, 3, 8, 8)
    double = tree.map(Tensor.double, params)
    for arguments, message in (
        ((x, [x]), "quantize expects Params"),
        ((double, [x.double()]), r"quantize expects weights in torch\.float32; got torch\.float64"),
        ((params, x), "quantize expects an iterable of batches"),
        ((params, []), "quantize expects at least one batch"),
        ((params, [x / 0]), "quantize expects finite activations"),
        ((params, [x[0]]), r"quantize expects x \[b 3 h w\]"),
    ):
        with pytest.raises(FresnetError, match=message):
            fresnet.quantize(*arguments)
    quantized = fresnet.quantize(params, [x])
    assert isinstance(quantized, Quantized)
    with pytest.raises(FresnetError, match="expects a network as quantize returns it"):
        fresnet.compile_inference(tree.map(Tensor.double, quantized), x)
    with pytest.raises(FresnetError, match=r"in the weights' torch\.float32; got torch\.float64"):
        fresnet.compile_inference(quantized, x.double())


def test_without_kernels_int8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    params = fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=3)
    x = torch.ones(2, 3, 8, 8)
    quantized = fresnet.quantize(params, [x])
    monkeypatch.setattr(onednn, "is_int8_supported", lambda: False)
    with pytest.raises(FresnetError, match="expects a PyTorch with oneDNN for int8"):
        fresnet.compile_inference(quantized, x)
