"""In int8 each layer is exact to its rounding, and the network classifies as before."""

from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from typing import Any

import pytest
import torch
from assertions import assert_same, logit_terms, unmutated
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import examples, images, seeds, tiny_params
from torch import Tensor
from torch.nn.functional import conv2d, pad

import fresnet
from fresnet import FresnetError, Params, optim, tree
from fresnet.inference import int8
from fresnet.inference.int8 import from_levels, to_levels
from fresnet.inference.int8_kernels import convolution, is_supported
from fresnet.network.levels import Affine, affine
from fresnet.network.nodes import Bottleneck, FramedStem7x7, Geometry, StandardisedLayer, kinds
from fresnet.training import make_train_step, start

SPEC = fresnet.SPECS["resnet20"]

pytestmark = pytest.mark.skipif(not is_supported(), reason="int8 needs a processor with VNNI")


def trained() -> tuple[Params, Any, Any]:
    """A small network trained by the recipe of `examples/train_digits.py`, and its digits."""
    import digits  # it takes libraries that are not asked for on every version
    from train_digits import BATCH, LOSS, batch, rate_for

    train, test = digits.load()
    epochs, per_epoch = 6, len(train.labels) // BATCH
    optimizer = optim.sgd(rate_for(epochs, per_epoch), momentum=0.9, weight_decay=5e-4)
    step = make_train_step(optimizer, loss_fn=LOSS)
    spec = fresnet.Spec(Bottleneck, (1, 1, 1), width=32)
    state = start(fresnet.init(0, spec, num_classes=10, zero_init_residual=True), optimizer)
    for i in range(epochs * per_epoch):
        state, _ = step(state, batch(train, i, seed=0))
    return state.params, train, test


@pytest.mark.slow
def test_digits_are_classified_as_in_float32() -> None:
    params, train, test = trained()
    infer = fresnet.compile_inference(
        fresnet.quantize(params, train.images[:256].split(64)), test.images
    )
    logits, exact = infer(test.images), fresnet.forward(params, test.images)
    right = exact.argmax(1) == test.labels
    assert right.float().mean() > 0.9
    assert (logits.argmax(1) == exact.argmax(1)).float().mean() >= 0.99
    assert (logits - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.slow
@examples(40)
@given(
    params=tiny_params(attention=False, grouped=False, headed=True),
    x=images(dtype=torch.float32),
    seed=seeds,
)
def test_every_network_runs_near_itself(params: Params, x: Tensor, seed: int) -> None:
    """Errors are below three hundredths of the logits' terms, because logits may cancel.

    The median of five networks of one shape is taken. Rounding alone makes larger errors in one
    network of a thousand.
    """
    if isinstance(params.weights.stem, FramedStem7x7):
        with pytest.raises(FresnetError, match="a stem without a frame of zeros"):
            fresnet.quantize(tree.map(Tensor.float, params), [x])
        return
    # A kernel of two values becomes -1 and 1, however near they are: noise changes it at random.
    assume(StandardisedLayer not in kinds(params.weights))
    generator = torch.Generator().manual_seed(seed)
    errors = []
    for _ in range(5):
        one = tree.map(
            lambda w: w.float() + 0.1 * torch.randn(w.shape, generator=generator), params.weights
        )
        errors.append(error_in_int8(Params(one, tree.map(Tensor.float, params.stats)), x))
    assert torch.stack(errors).median() <= 0.03


def error_in_int8(params: Params, x: Tensor) -> Tensor:
    with unmutated(params, x):
        quantized = fresnet.quantize(params, [x])
    with unmutated(quantized, x):
        logits = fresnet.compile_inference(quantized, x)(x)
    error: Tensor = (logits - fresnet.forward(params, x)).norm() / logit_terms(params, x).norm()
    return error


@st.composite
def affines(draw: st.DrawFn, signed: bool = True) -> Affine:
    zero_point = draw(st.integers(0, 255)) if signed else 0
    return Affine(draw(st.floats(0.01, 1)), zero_point)


@examples(300)
@given(
    seed=seeds,
    size=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    channels=st.sampled_from([(3, 6), (16, 16), (64, 16), (6, 64)]),
    groups=st.sampled_from([1, 2]),
    kernel=st.sampled_from([1, 3, 7]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    source=affines(),
    added=st.none() | affines(),
    result=affines(),
    activation=st.booleans(),
)
def test_a_layer_is_its_float_arithmetic_rounded_once(
    seed: int,
    size: tuple[int, int, int],
    channels: tuple[int, int],
    groups: int,
    kernel: int,
    stride: int,
    dilation: int,
    source: Affine,
    added: Affine | None,
    result: Affine,
    activation: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    (b, h, w), (c, o) = size, channels
    # As in networks. oneDNN's kernel for 3 channels a group and 32 outputs is wrong (PyTorch 2.13).
    groups = groups if c == o else 1

    def levels(low: int, *shape: int) -> Tensor:
        whole = torch.randint(low, low + 256, shape, generator=generator)
        return whole.to(torch.int8 if low else torch.uint8).to(memory_format=torch.channels_last)

    x, weight = levels(0, b, c, h, w), levels(-128, o, c // groups, kernel, kernel)
    scale = (torch.rand(o, generator=generator) + 0.1) / 127 / (c * kernel) ** 0.5
    bias = torch.randn(o, generator=generator)
    how = Geometry(stride, dilation, groups)
    exact = conv2d(
        (x.double() - source.zero_point) * source.scale,
        weight * scale.double()[:, None, None, None],
        bias.double(),
        stride,
        how.padding(weight),
        dilation,
        groups,
    )
    layer = convolution(
        x.shape,
        *(weight, scale, bias, how),
        source=source,
        result=result,
        added=added,
        relu=activation,
    )
    shortcut = None
    if added is not None:
        shortcut = levels(0, *exact.shape)
        exact = exact + (shortcut.double() - added.zero_point) * added.scale
    exact = exact.relu() if activation else exact
    with unmutated(x):
        y = layer(x, shortcut)
    expected = (exact / result.scale + result.zero_point).clamp(0, 255)
    assert y.dtype is torch.uint8
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (y - expected).abs().max() <= 0.502  # half a step, and float32's own rounding


@pytest.mark.parametrize("side", [1, 5])
def test_a_product_of_matrices_is_the_convolution(side: int) -> None:
    """A 1x1 kernel with zeros around it is no 1x1 kernel, so it stays a convolution."""
    generator = torch.Generator().manual_seed(0)

    def levels(*shape: int) -> Tensor:
        x = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        return x.contiguous(memory_format=torch.channels_last)

    x, add = levels(3, 20, side, side), levels(3, 40, side, side)
    weight = torch.randint(-127, 128, (40, 20, 1, 1), generator=generator, dtype=torch.int8)
    others = torch.full((40,), 1e-3), torch.randn(40, generator=generator)
    one, other = (
        convolution(
            x.shape,
            *(kernel, *others),
            source=Affine(0.03, 0),
            result=Affine(0.02, 9),
            added=Affine(0.01, 120),
        )
        for kernel in (weight, pad(weight, [1] * 4))
    )
    with unmutated(x):
        y = one(x, add.clone())
    assert torch.equal(y, other(x, add.clone()))
    assert y.unique().numel() > 30


@examples(100)
@given(x=images(dtype=torch.float32), shift=st.floats(-3, 3))
def test_levels_cover_what_was_seen_in_equal_steps_with_zero_among_them(
    x: Tensor, shift: float
) -> None:
    x = x + shift
    levels = affine(x)
    back = from_levels(to_levels(x, levels), levels)
    assert (back - x).abs().max() <= levels.scale * 0.501 + 1e-6
    assert not from_levels(to_levels(torch.zeros_like(x), levels), levels).any()
    assert affine(torch.zeros(3)) == (1.0, 0)
    assert affine(x.abs()).zero_point == 0


def test_ranges_are_those_of_all_batches_in_any_order() -> None:
    params = fresnet.init(0, SPEC, num_classes=5)
    batches = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0)).split([4, 2, 1])
    first, *others = (fresnet.quantize(params, order) for order in permutations(batches))
    for other in others:
        assert_same(other, first)
    whole = tree.leaves(fresnet.quantize(params, [torch.cat(batches)]))
    for leaf, together in zip(tree.leaves(first), whole, strict=True):
        torch.testing.assert_close(leaf, together)
    each = [fresnet.quantize(params, iter([x])) for x in batches]
    for leaf, *parts in zip(*(tree.leaves(q.ranges) for q in (first, *each)), strict=True):
        assert torch.equal(leaf, torch.stack(torch.stack(parts).aminmax()))
    assert first.images.tolist() == [min(map(Tensor.min, batches)), max(map(Tensor.max, batches))]


def test_under_autocast_it_is_the_same() -> None:
    params, x = fresnet.init(0, SPEC, num_classes=5), torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = fresnet.quantize(params, [x])
    assert_same(found, fresnet.quantize(params, [x]))


def test_weights_are_rounded_to_steps_of_each_channels_largest() -> None:
    params = fresnet.init(0, SPEC, num_classes=5)
    x = torch.randn(2, 3, 16, 16)
    folded, quantized = fresnet.fold(params), fresnet.quantize(params, [x])
    conv, (scale, bias) = quantized.weights.stem.layer
    error = (conv * scale[:, None, None, None] - folded.weights.stem.layer.conv).abs()
    assert (error <= 0.501 * scale[:, None, None, None]).all()
    assert (conv.abs().amax((1, 2, 3)) == 127).all()
    assert torch.equal(bias, folded.weights.stem.layer.norm.bias)


def test_what_lies_outside_of_the_range_is_clipped() -> None:
    levels = affine(torch.tensor([-1.0, 3.0]))
    assert to_levels(
        torch.tensor([[[[-50.0, -1.0, 0.0, 3.0, 50.0]]]]), levels
    ).flatten().tolist() == [
        0,
        0,
        64,
        255,
        255,
    ]


def test_the_mean_of_levels_is_rounded_where_levels_follow() -> None:
    levels = torch.tensor([[[[1, 1], [1, 0]]]], dtype=torch.uint8)
    assert int8._Levels(Affine(1.0, 0)).average_pool(levels).tolist() == [[[[1]]]]
    assert int8._Levels(Affine(2.0, 1)).mean(levels).tolist() == [[-0.5]]


def test_a_channel_without_weights_stays_without() -> None:
    params = fresnet.init(0, SPEC, num_classes=5)
    conv = params.weights.stem.layer.conv.clone()
    conv[3] = 0
    stem = params.weights.stem
    stem = stem._replace(layer=stem.layer._replace(conv=conv))
    params = params._replace(weights=params.weights._replace(stem=stem))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    quantized = fresnet.quantize(params, [x])
    assert not quantized.weights.stem.layer.conv[3].any()
    assert fresnet.compile_inference(quantized, x)(x).isfinite().all()


def test_what_is_quantized_and_compiled_keeps_its_weights() -> None:
    params, x = fresnet.init(0, SPEC, num_classes=5), torch.randn(2, 3, 16, 16)
    params = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    quantized = fresnet.quantize(params, [x])
    assert not any(leaf.requires_grad for leaf in tree.leaves(quantized))
    infer = fresnet.compile_inference(quantized, x)
    logits = infer(x)
    with torch.no_grad():
        for leaf in tree.leaves(params):
            leaf.zero_()
    assert torch.equal(fresnet.compile_inference(quantized, x)(x), logits)
    before = infer(x[:1]), infer(x)
    again = fresnet.compile_inference(quantized, x)
    for leaf in tree.leaves(quantized):
        leaf.zero_()
    assert torch.equal(again(x[:1]), before[0])  # prepared only now
    assert torch.equal(again(x), before[1])


SPECS = {"basic": SPEC, "bottlenecks": fresnet.Spec(Bottleneck, (2, 2), width=16)}
"""Sums end 3x3 convolutions in one of them and 1x1 convolutions in the other."""


@pytest.mark.parametrize("name", SPECS)
def test_any_shape_is_taken_and_several_threads_may_ask(name: str) -> None:
    params = fresnet.init(0, SPECS[name], num_classes=5)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 24), (3, 24), (3, 31), (4, 9)] * 4
    batches = [torch.randn(b, 3, side, 24, generator=generator) for b, side in shapes]
    quantized = fresnet.quantize(params, batches)
    infer = fresnet.compile_inference(quantized, batches[0])
    with unmutated(quantized, *batches), ThreadPoolExecutor(8) as pool:
        found = list(pool.map(infer, batches))
        alone = fresnet.compile_inference(quantized, batches[0])
        for x, logits in zip(batches, found, strict=True):
            assert torch.equal(logits, alone(x))


@pytest.mark.parametrize("name", [*SPECS, "resnetv2_50", "resnet18d"])
def test_python_is_left_out_and_the_levels_are_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = fresnet.init(0, {**fresnet.SPECS, **SPECS}[name], num_classes=5)
    x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    quantized = fresnet.quantize(params, [x])
    calls, prepared = [], int8.prepare(quantized, x)

    def counted(x: Tensor, levels: Affine) -> Tensor:
        calls.append(levels)
        return to_levels(x, levels)

    monkeypatch.setattr(int8, "to_levels", counted)
    logits = prepared(x)
    assert not calls
    monkeypatch.setattr(int8, "traced", lambda function, *_: function)
    assert torch.equal(int8.prepare(quantized, x)(x), logits)
    assert calls


def test_what_cannot_be_quantized_or_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    params, x = fresnet.init(0, SPEC, num_classes=5), torch.randn(1, 3, 8, 8)
    quantized = fresnet.quantize(params, [x])
    with pytest.raises(FresnetError, match="quantize expects Params"):
        fresnet.quantize(quantized, [x])  # type: ignore[arg-type]
    with pytest.raises(FresnetError, match=r"in torch\.float32; got torch\.float64"):
        fresnet.quantize(tree.map(Tensor.double, params), [x.double()])
    with pytest.raises(FresnetError, match=r"iterable of batches .*; got float32 \(1, 3, 8, 8\)"):
        fresnet.quantize(params, x)
    with pytest.raises(FresnetError, match="at least one batch; got none"):
        fresnet.quantize(params, [])
    with pytest.raises(FresnetError, match=r"quantize expects x .*; got \(3, 8, 8\) .*one image"):
        fresnet.quantize(params, [x[0]])
    with pytest.raises(FresnetError, match="finite"):
        fresnet.quantize(params, [x, x * torch.nan])
    infer = fresnet.compile_inference(quantized, x)
    with pytest.raises(FresnetError, match=r"the weights' torch\.float32; got torch\.uint8"):
        infer(x.to(torch.uint8))
    with pytest.raises(FresnetError, match=r"compile_inference expects x .*got \(1, 2, 8, 8\)"):
        fresnet.compile_inference(quantized, x[:, :2])
    with pytest.raises(FresnetError, match=r"as quantize returns it.*float16"):
        fresnet.compile_inference(tree.map(Tensor.half, quantized), x)
    with pytest.raises(FresnetError, match="finite values in a quantised network"):
        fresnet.compile_inference(quantized._replace(images=quantized.images * torch.nan), x)
    twice: Any = quantized.weights
    with pytest.raises(FresnetError, match="hold Weights and Stats; got a Weights and a Weights"):
        fresnet.compile_inference(quantized._replace(ranges=twice), x)
    monkeypatch.setattr(int8, "is_supported", lambda: False)
    with pytest.raises(FresnetError, match="oneDNN for int8"):
        fresnet.compile_inference(quantized, x)
