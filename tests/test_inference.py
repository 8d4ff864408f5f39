"""`compile_inference` computes what `forward` does, in one thread or several."""

import gc
import math
import re
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import assert_close, grown_rounding, logit_terms, unmutated
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import examples, images, seeds, tiny_params
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import conv2d
from torch.utils._python_dispatch import TorchDispatchMode

import fresnet
from fresnet import FresnetError, Params, tree
from fresnet.inference import compiled, fused, native, onednn, side_by_side, winograd
from fresnet.network.nodes import (
    POOLED,
    Bottleneck,
    CentredZeroPad,
    Geometry,
    GroupNorm,
    PooledProjection,
    Projection,
    kinds,
)

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""The largest errors, relative to the terms of the logits, because logits may cancel."""

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7}
"""By what part of it a sum of products may be off, such as one of a few hundred in float32."""


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@examples(30)
@given(params=tiny_params(), x=images())
def test_every_network_runs_as_it_does_uncompiled(
    dtype: torch.dtype, params: Params, x: Tensor
) -> None:
    """oneDNN takes every convolution; it may refuse images of a few pixels.

    Of norms in groups of few values little but rounding remains. So networks with them are given
    larger images here, and are compiled in bfloat16 in test_nodes.py, in their published sizes.
    """
    if GroupNorm in kinds(params.weights):
        assume(dtype is torch.float32)
        assume(min(x.shape[2:]) >= 16)
    network = tree.map(lambda leaf: leaf.to(dtype), fresnet.fold(params))

    def watched_fuse(function: Any, x: Tensor) -> Any:
        made = fuse(function, x)
        if made is function:
            assert min(x.shape[2:]) <= 4
            return made
        with Watch() as watch:
            made(x)
        assert not [name for name in watch.names if "convolution" in name]
        return made

    fuse = onednn.fuse
    with pytest.MonkeyPatch.context() as patch, unmutated(network, x):
        patch.setattr(onednn, "fuse", watched_fuse)
        infer = fresnet.compile_inference(network, x.to(dtype))
        logits = infer(x.to(dtype))
    assert logits.dtype == dtype
    assert_logits_close(params, x, logits, dtype)


class Watch(TorchDispatchMode):
    """The operations that PyTorch runs meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(f.__name__)
        return f(*args, **(kwargs or {}))


def assert_logits_close(params: Params, x: Tensor, logits: Tensor, dtype: torch.dtype) -> None:
    """Or as close as rounding can be told to leave them in this network, in which more cancels."""
    error = (logits.double() - fresnet.forward(params, x)).norm()
    if error > BOUNDS[dtype] * logit_terms(params, x).norm():
        assert error <= 4 * grown_rounding(fresnet.fold(params), x, ROUNDING[dtype])


@pytest.fixture(scope="module")
def winograds() -> None:
    """For tests of what a machine without a C++ compiler does without."""
    try:
        native.library(winograd.TRANSFORMS)
    except FresnetError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("winograds")
@examples(50)
@given(
    seed=seeds,
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 14), st.integers(1, 30)),
    outputs=st.integers(8, 40),  # if fewer, all may cancel to less than rounding
    activation=st.booleans(),
    with_sum=st.booleans(),
    cached=st.sampled_from([1, 2**15, 2**21]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_winograds_convolution_is_the_convolution(
    seed: int,
    shape: tuple[int, int, int, int],
    outputs: int,
    activation: bool,
    with_sum: bool,
    cached: int,
    layout: torch.memory_format,
) -> None:
    """Parts have one image, a few or all."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias, added = (
        torch.randn(size, generator=generator)
        for size in (shape, (outputs, shape[1], 3, 3), (outputs,), (shape[0], outputs, *shape[2:]))
    )
    x, added = (v.contiguous(memory_format=layout) for v in (x, added))
    expected = conv2d(x.double(), weight.double(), bias.double(), padding=1)
    expected = expected + added if with_sum else expected
    expected = expected.relu() if activation else expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "CACHED", cached)
        layer = winograd.convolution(x.shape, weight, bias, relu=activation)
        with unmutated(x, added):
            y = layer(x, added if with_sum else None)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y.double(), expected, 1e-5)


@pytest.mark.usefixtures("winograds")
def test_winograds_convolution_is_the_same_in_every_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator) for size in ((3, 20, 9, 9), (24, 20, 3, 3)))
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(
                winograd.convolution(x.shape, weight, weight[:, 0, 0, 0], relu=True)(x, None)
            )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.usefixtures("winograds")
@pytest.mark.parametrize("relu", [False, True])
def test_winograds_convolution_keeps_nan_in_its_tiles(relu: bool) -> None:
    x, weight = torch.zeros(1, 17, 10, 10), torch.ones(8, 17, 3, 3)
    x[0, 16, 9, 9] = torch.nan
    y = winograd.convolution(x.shape, weight, torch.zeros(8), relu=relu)(x, None)
    assert y[:, :, 8:, 8:].isnan().all()
    assert not y[:, :, :4, :4].any()


def winograd_layers(infer: fused.Inference, x: Tensor) -> int:
    with Watch() as watch:
        infer(x)
    return sum(name == "winograd_tiles.default" for name in watch.names)


@pytest.mark.usefixtures("winograds")
def test_winograd_takes_no_notice_of_pytorchs_defaults() -> None:
    params = fresnet.init(0, fresnet.Spec(fresnet.RESNET18.block, (1,), width=128), num_classes=5)
    x = torch.randn(6, 3, 72, 76, generator=torch.Generator().manual_seed(0))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            infer = fresnet.compile_inference(params, x)
            assert winograd_layers(infer, x) >= 2
            logits = infer(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(logits, fresnet.forward(params, x), 1e-5)


@pytest.mark.usefixtures("winograds")
def test_several_threads_may_prepare_networks() -> None:
    """And compile the transforms, if they are the first."""
    native.library.cache_clear()
    params = fresnet.init(0, fresnet.Spec(fresnet.RESNET18.block, (1,), width=128), num_classes=5)
    batches = [torch.randn(7, 3, side, 68) for side in (64, 80)]
    with ThreadPoolExecutor(2) as pool:
        prepared = list(pool.map(lambda x: fresnet.compile_inference(params, x), batches))
    for infer, x in zip(prepared, batches, strict=True):
        assert winograd_layers(infer, x) >= 2
        assert_close(infer(x), fresnet.forward(params, x), 1e-5)
        assert_close(prepared[0](x), fresnet.forward(params, x), 1e-5)


@pytest.mark.usefixtures("winograds")
def test_a_network_with_winograds_layers() -> None:
    """It has basic blocks, so second convolutions add shortcuts, and parts of several images."""
    params = fresnet.init(0, fresnet.Spec(fresnet.RESNET18.block, (1, 2), width=128), num_classes=7)
    x = torch.randn(9, 3, 60, 64, generator=torch.Generator().manual_seed(0))
    infer = fresnet.compile_inference(params, x)
    assert winograd_layers(infer, x) == 4  # two layers, in two parts each
    assert_close(infer(x), fresnet.forward(params, x), 1e-5)


def test_any_shape_is_taken_and_several_threads_may_ask() -> None:
    params = fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=5)
    batches = [torch.randn(b, 3, side, 24) for b, side in [(1, 24), (3, 24), (3, 31), (4, 9)] * 8]
    infer = fresnet.compile_inference(params, batches[0])
    with ThreadPoolExecutor(8) as pool:
        for x, logits in zip(batches, pool.map(infer, batches), strict=True):
            assert_close(logits, fresnet.forward(params, x), 1e-5)


def test_what_is_compiled_keeps_its_weights_and_takes_no_derivatives() -> None:
    params = fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=5)
    params = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    x = torch.randn(2, 3, 16, 16)
    infer = fresnet.compile_inference(params, x)
    before = infer(x)
    assert not before.requires_grad
    with torch.no_grad():
        for leaf in tree.leaves(params):
            leaf.zero_()
    assert torch.equal(infer(x), before)
    assert before.norm() > 0


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@examples(25)
@given(
    seed=seeds,
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    n=st.integers(2, 4),
    dilation=st.integers(1, 2),
    groups=st.integers(1, 2),
    activation=st.booleans(),
    added=st.sampled_from(["apart", "side by side", None]),
)
def test_a_convolution_side_by_side_is_the_convolution(
    k: int,
    stride: int,
    seed: int,
    sizes: tuple[int, int, int, int],
    n: int,
    dilation: int,
    groups: int,
    activation: bool,
    added: str | None,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    b, c, h, w = sizes
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((n * b, groups * c, h, w), (groups * 2, c, k, k), (groups * 2,))
    )
    padding = dilation * (k // 2)
    y = conv2d(x, weight, bias, stride, padding, dilation, groups)
    other = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    laid = x if stride > 1 else side_by_side.side_by_side(x, n)
    assert laid.shape == ((n * b, *x.shape[1:]) if stride > 1 else (b, groups * c, h, w * n))
    how = Geometry(stride, dilation, groups)
    layer = side_by_side.convolution(n, laid.shape, weight, bias, how, relu=activation)
    summand = side_by_side.side_by_side(other, n) if added == "side by side" else other
    y = y + other if added else y
    y = y.relu() if activation else y
    with unmutated(laid, summand):
        actual = layer(laid, summand if added else None)
    assert_close(actual, side_by_side.side_by_side(y, n), 1e-12)
    assert_close(side_by_side.average(actual, n), y.mean((2, 3)), 1e-12)


@pytest.mark.slow
@examples(30)
@given(
    params=tiny_params(),
    x=images(batch=st.sampled_from([2, 3, 4, 6])),
    n=st.sampled_from([lambda batch: batch, lambda batch: math.gcd(batch, 2)]),
)
def test_every_network_runs_side_by_side(
    params: Params, x: Tensor, n: Callable[[int], int]
) -> None:
    """In one row or in several. It runs in float32, where this is no faster, but exact."""
    network = tree.map(lambda leaf: leaf.float(), fresnet.fold(params))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_by_side, "images_together", lambda shape, dtype, stride: n(shape[0]))
        logits = fresnet.compile_inference(network, x.float())(x.float())
    assert_logits_close(params, x, logits, torch.float32)


@pytest.mark.parametrize("kind", POOLED)
@pytest.mark.parametrize("shortcut", [Projection, PooledProjection])
def test_where_the_last_stage_pools_images_lie_apart(kind: type, shortcut: type) -> None:
    """Only a convolution with a stride lays them side by side."""
    spec = fresnet.Spec(Bottleneck, (1, 1), width=4, shortcut=shortcut, stage=kind)
    params, x = fresnet.init(0, spec, num_classes=5), torch.randn(4, 3, 32, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_by_side, "images_together", lambda shape, dtype, stride: shape[0])
        logits = fresnet.compile_inference(fresnet.fold(params), x)(x)
    assert_close(logits, fresnet.forward(params, x), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_onednn_compiles_a_stage_at_once_and_lets_go_of_it(
    dtype: torch.dtype, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN takes the whole stage. PyTorch's operations only lay images out and take the mean."""
    if not onednn.is_supported(dtype, torch.device("cpu")):
        pytest.skip("bfloat16 needs a processor with AVX-512")
    weights, graphs = [], []
    convolution, fuse = fused.convolution, onednn.fuse

    def seen_convolution(shape: Any, weight: Tensor, *rest: Any, relu: bool) -> Any:
        weights.append(StorageWeakRef(weight.untyped_storage()))
        return convolution(shape, weight, *rest, relu=relu)

    def seen_fuse(function: Any, x: Tensor) -> Any:
        made: Any = fuse(function, x)
        graphs.append(str(made.graph_for(x)).split("with prim::")[0])
        return made

    monkeypatch.setattr(fused, "convolution", seen_convolution)
    monkeypatch.setattr(onednn, "fuse", seen_fuse)
    params = fresnet.fold(fresnet.init(0, fresnet.RESNET50, num_classes=5))
    params = tree.map(lambda leaf: leaf.to(dtype), params)
    x = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    infer = fresnet.compile_inference(params, x)
    assert_close(infer(x).double(), fresnet.forward(params, x).double(), BOUNDS[dtype])
    assert not torch.jit.onednn_fusion_enabled()
    (graph,) = graphs
    together = side_by_side.images_together(x[..., :4].shape, dtype, 2)
    left = set(re.findall(r" = (?:aten|mkldnn)::(\w+)", graph))
    assert "sum" in left
    assert not left & {"_convolution", "conv2d", "add", "relu", "max_pool2d", "linear"}
    pieces = len(set(re.findall(r"oneDNNFusionGroup_\d+", graph)))
    assert pieces == (15 if together > 1 else 7)
    assert len(weights) > 40
    del infer
    gc.collect()
    assert all(weight.expired() for weight in weights)


def test_images_lie_side_by_side_where_there_are_tiles_to_fill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def together(batch: int, width: int, stride: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return side_by_side.images_together(torch.Size((batch, 1, 30, width)), dtype, stride)

    for amx in (True, False):
        told = {"amx_bf16": amx}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda told=told: told, raising=False)
        found = [together(b, 14, 2) for b in (1, 2, 3, 4, 6, 8, 32)]
        assert found == ([1, 2, 1, 4, 2, 4, 4] if amx else [1] * 7)
        assert together(4, 16, 2) == together(4, 15, 2) == together(4, 8, 1) == (4 if amx else 1)
        assert together(4, 17, 2) == together(4, 9, 1) == together(4, 14, 2, torch.float32) == 1


def test_what_is_compiled_runs_in_any_mode_of_pytorch() -> None:
    params = fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=5)
    x = torch.randn(2, 3, 16, 16)
    infer = fresnet.compile_inference(params, x)
    expected = infer(x)
    with torch.inference_mode():
        assert torch.equal(infer(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(infer(x), expected)
        assert_close(fresnet.compile_inference(params, x)(x), expected, 1e-5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert_close(infer(x), expected, 1e-5)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_other_dtypes_are_compiled_by_pytorch() -> None:
    spec = fresnet.Spec(fresnet.RESNET18.block, (1,), width=4, stem=fresnet.nodes.Stem3x3)
    params = fresnet.init(0, spec, num_classes=5, dtype=torch.float64)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert not onednn.is_supported(x.dtype, x.device)
    assert_close(fresnet.compile_inference(params, x)(x), fresnet.forward(params, x), 1e-12)


@pytest.mark.parametrize(
    ("images", "channels", "dtype", "stride", "dilation", "groups"),
    [
        (8, 128, torch.float32, 2, 1, 1),
        (8, 128, torch.float32, 1, 2, 1),
        (8, 128, torch.float32, 1, 1, 2),
        (8, 128, torch.bfloat16, 1, 1, 1),
        (8, 64, torch.float32, 1, 1, 1),
        (1, 128, torch.float32, 1, 1, 1),
    ],
)
def test_winograd_is_for_plain_convolutions_of_many_channels_and_images(
    images: int, channels: int, dtype: torch.dtype, stride: int, dilation: int, groups: int
) -> None:
    shape = torch.Size((images, channels * groups, 28, 28))
    weight = torch.empty(128, channels, 3, 3, dtype=dtype)
    assert not winograd.is_faster(shape, weight, Geometry(stride, dilation, groups))


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 1.001), (torch.bfloat16, 1.3), (torch.bfloat16, math.nan)]
)
def test_a_backend_that_computes_something_else_is_not_used(
    dtype: torch.dtype, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each shape that is prepared, and with a warning."""
    params = fresnet.fold(fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=5))
    params = tree.map(lambda leaf: leaf.to(dtype), params)
    monkeypatch.setattr(
        onednn, "prepare", lambda params, _: lambda x: factor * fresnet.forward(params, x)
    )
    monkeypatch.setattr(onednn, "is_supported", lambda *_: True)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    message = r"what onednn makes of this network is not what it computes, for images \(2, 3, 16"
    with pytest.warns(UserWarning, match=message):
        infer = fresnet.compile_inference(params, x)
    assert torch.equal(infer(x), fresnet.forward(params, x))
    with pytest.warns(UserWarning, match=r"images \(1, 3, 16, 16\)"):
        infer(x[:1])


def test_a_backend_that_is_wrong_on_one_of_many_images_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=5)
    factors = torch.tensor([1.0] * 8 + [1.01])[:, None]
    monkeypatch.setattr(
        onednn, "prepare", lambda params, _: lambda x: factors * fresnet.forward(params, x)
    )
    x = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="what onednn makes of this network is not what it"):
        fresnet.compile_inference(params, x)


@pytest.mark.parametrize("seed", [5, 6])
def test_rounding_that_a_network_makes_larger_is_no_fault_of_a_backend(seed: int) -> None:
    """Norms of a few values that are nearly equal do so. What is wrong there is seen all the same.

    The backend here is exact, and it is `forward` that is off.
    """
    spec = fresnet.Spec(Bottleneck, (1, 2, 2), 6, shortcut=CentredZeroPad, norm=GroupNorm)
    params = fresnet.fold(fresnet.init(seed, spec, num_classes=0))
    wide, x = tree.map(Tensor.double, params), torch.zeros(2, 3, 1, 2)

    def exact(x: Tensor) -> Tensor:
        return fresnet.forward(wide, x.double()).float()

    assert compiled._agrees(exact, params, x)
    assert not compiled._agrees(lambda x: 1.3 * exact(x), params, x)


@pytest.mark.parametrize("batch", [2, 3, 4, 6])
@pytest.mark.parametrize("side", [8, 11, 16, 17])
def test_a_backend_that_exchanges_images_is_not_used(
    batch: int, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of every size, for a few images alike would hide it."""
    params = fresnet.init(0, fresnet.Spec(Bottleneck, (1,), width=4), num_classes=5)
    monkeypatch.setattr(
        onednn, "prepare", lambda params, _: lambda x: fresnet.forward(params, x).roll(1, 0)
    )
    with pytest.warns(UserWarning, match="what onednn makes of this network is not what it"):
        fresnet.compile_inference(params, torch.zeros(batch, 3, side, side))


def test_weights_that_are_not_finite_are_compiled_all_the_same() -> None:
    params = fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=5)
    head = params.weights.head._replace(bias=torch.full((5,), torch.nan))
    x = torch.ones(1, 3, 16, 16)
    infer = fresnet.compile_inference(
        params._replace(weights=params.weights._replace(head=head)), x
    )
    assert infer(x).isnan().all()


def no_compiler(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("PATH", str(folder))
    patch.delenv("CXX", raising=False)


def half_a_quotation(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("CXX", 'g++ "-O2')


def another_compiler(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("CXX", "false --really")


def nothing_compiled(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("CXX", "true")


def no_place(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(tempfile, "tempdir", str(folder / "none"))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (no_compiler, r"there is no C\+\+ compiler .*, so 3x3 convolutions in float32 take longer"),
        (half_a_quotation, r"CXX names no C\+\+ compiler \(No closing quotation\), so 3x3"),
        (another_compiler, r"false does not compile winograd\.cpp \(\), so 3x3"),
        (nothing_compiled, r"winograd\.cpp cannot be compiled \(.*No such file.*\), so 3x3"),
        (no_place, r"winograd\.cpp cannot be compiled \(.*No such file.*\), so 3x3"),
    ],
)
def test_what_cannot_be_compiled_is_said_once_and_done_without(
    missing: Callable[[pytest.MonkeyPatch, Path], None],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = fresnet.init(0, fresnet.Spec(fresnet.RESNET18.block, (1,), width=128), num_classes=5)
    x = torch.randn(6, 3, 72, 76)
    missing(monkeypatch, tmp_path)
    for function in (native.library, winograd._can_compile):
        function.cache_clear()
    try:
        with pytest.warns(UserWarning, match=message):
            infer = fresnet.compile_inference(params, x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            infer(x[:5])
    finally:
        winograd._can_compile.cache_clear()
    assert winograd_layers(infer, x) == 0
    assert_close(infer(x), fresnet.forward(params, x), 1e-5)


def test_what_forward_refuses_is_refused() -> None:
    params = fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=5)
    x = torch.ones(1, 3, 8, 8)
    with pytest.raises(FresnetError, match="compile_inference expects Params"):
        fresnet.compile_inference(x, x)  # type: ignore[arg-type]
    with pytest.raises(FresnetError, match=r"compile_inference expects x .* got \(1, 4, 8, 8\)"):
        fresnet.compile_inference(params, torch.ones(1, 4, 8, 8))
    stem = params.weights.stem
    even = stem._replace(layer=stem.layer._replace(conv=torch.ones(16, 3, 2, 2)))
    with pytest.raises(FresnetError, match=r"expects a weight \[o 3 k k\], k odd"):
        fresnet.compile_inference(params._replace(weights=params.weights._replace(stem=even)), x)
    infer = fresnet.compile_inference(params, x)
    with pytest.raises(FresnetError, match=r"the compiled network expects x .*one image"):
        infer(x[0])
    with pytest.raises(FresnetError, match=r"in the weights' torch\.float32; got torch\.float64"):
        infer(x.double())


def test_networks_without_values_are_refused() -> None:
    params = fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=5, device="meta")
    x = torch.ones(1, 3, 16, 16, device="meta")
    with pytest.raises(FresnetError, match="compile_inference expects tensors with values"):
        fresnet.compile_inference(params, x)
    with pytest.raises(FresnetError, match="quantize expects tensors with values"):
        fresnet.quantize(params, [x])
