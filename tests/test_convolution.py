"""Convolution under `vmap` by fresnet's own kernels equals a loop of PyTorch's."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import assert_close, assert_same
from hypothesis import given
from strategies import Convolution, convolutions, examples
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.nn.functional import conv2d

import fresnet
from fresnet import tree
from fresnet.network import convolution, faults
from fresnet.network.convolution import convolve, pull_back, squared_norms, weight_gradients
from fresnet.network.nodes import Bottleneck, Geometry

Function = Callable[[Tensor, Tensor], Any]


def stock(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """PyTorch's convolution in the plain layout. `faults.with_usual_stride` is about the other."""
    stride, dilation, groups = geometry.stride, geometry.dilation, geometry.groups
    padding = dilation * (weight.shape[3] // 2)
    return conv2d(x, weight.contiguous(), None, stride, padding, dilation, groups)


def gradient(f: Function) -> Function:
    return grad(lambda *inputs: sum(leaf.pow(3).sum() for leaf in tree.leaves(f(*inputs))), (0, 1))


def by_one(f: Function, i: int) -> Function:
    """The gradient by x or by the weight alone, so the cotangent of the other is not pulled."""

    def gradient_by_one(*inputs: Tensor) -> Tensor:
        found: Tensor = grad(lambda *inputs: f(*inputs).pow(3).sum(), i)(*inputs)
        return found

    return gradient_by_one


def forward_over_reverse(f: Function) -> Function:
    return lambda *inputs: jvp(gradient(f), inputs, inputs)


def reverse_over_forward(f: Function) -> Function:
    return gradient(lambda *inputs: jvp(f, inputs, inputs)[1])


def pull_by_jvp(f: Function) -> Function:
    """The function that vjp returns, differentiated in forward mode."""

    def pulled(*inputs: Tensor) -> Any:
        y, pull, *_ = vjp(f, *inputs)
        return jvp(pull, (y,), (y.cos(),))

    return pulled


DERIVATIVES: dict[str, Callable[[Function], Function]] = {
    "none": lambda f: f,
    "first": gradient,
    "second": lambda f: gradient(gradient(f)),
    "second by x": lambda f: by_one(by_one(f, 0), 0),
    "second by the weight": lambda f: by_one(by_one(f, 1), 1),
    "by the weight, then x": lambda f: by_one(by_one(f, 1), 0),
    "third": lambda f: gradient(gradient(gradient(f))),
    "forward over reverse": forward_over_reverse,
    "reverse over forward": reverse_over_forward,
    "jvp of pull": pull_by_jvp,
    "forward over forward": lambda f: lambda *v: jvp(lambda *v: jvp(f, v, v)[1], v, v),
}
FORWARD_MODES = tuple(DERIVATIVES)[7:]


@pytest.mark.parametrize("order", DERIVATIVES)
@examples(20)
@given(drawn=convolutions())
def test_each_derivative_of_a_mapped_convolution_is_a_loop(order: str, drawn: Convolution) -> None:
    """Maps go over images, over weights or over both, by the first or a later dimension."""
    x, weight, geometry = drawn
    if order in FORWARD_MODES:  # these are PyTorch's own
        x, weight = (v.clone(memory_format=torch.contiguous_format) for v in (x, weight))
    ours = DERIVATIVES[order](lambda x, w: convolve(x, w, geometry))
    theirs = DERIVATIVES[order](lambda x, w: stock(x, w, geometry))
    for x_dim, weight_dim in ((0, None), (1, None), (None, 0), (None, 2), (0, 0), (1, 3)):
        xs = x[0] if x_dim is None else x.movedim(0, x_dim)
        weights = weight[0] if weight_dim is None else weight.movedim(0, weight_dim)
        actual = vmap(ours, (x_dim, weight_dim))(xs, weights)
        for i, one in enumerate(tree.unstack(actual)):
            each = x[0 if x_dim is None else i], weight[0 if weight_dim is None else i]
            for a, b in zip(tree.leaves(one), tree.leaves(theirs(*each)), strict=True):
                assert_close(a, b, 1e-11)


@examples(20)
@given(drawn=convolutions())
def test_nested_maps_are_loops(drawn: Convolution) -> None:
    """One map is over networks and one over images, and either is the outer."""
    x, weight, geometry = drawn
    f = gradient(lambda x, w: convolve(x, w, geometry))
    g = gradient(lambda x, w: stock(x, w, geometry))
    outer = vmap(vmap(f, (0, None)), (None, 0))(x, weight)
    inner = vmap(vmap(f, (None, 0)), (0, None))(x, weight)
    for i, j in product(range(len(weight)), range(len(x))):
        expected = g(x[j], weight[i])
        for a, b, c in zip(outer, inner, expected, strict=True):
            assert_close(a[i, j], c, 1e-11)
            assert_close(b[j, i], c, 1e-11)


@pytest.mark.parametrize("small", [0, 10**9])
@examples(20)
@given(drawn=convolutions())
def test_weight_gradients_by_either_kernel_and_their_norms(small: int, drawn: Convolution) -> None:
    x, weight, geometry = drawn
    cotangent = torch.stack([stock(one, weight[0], geometry).cos() for one in x])
    expected = torch.stack(
        [
            grad(lambda w, one, g: (stock(one, w, geometry) * g).sum())(weight[0], one, g)
            for one, g in zip(x, cotangent, strict=True)
        ]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "SMALL", small)
        assert_close(weight_gradients(cotangent, x, weight[0], geometry), expected, 1e-12)
        norms = squared_norms(cotangent, x, weight[0], geometry)
    assert_close(norms, expected.flatten(1).square().sum(1), 1e-12)


@examples(100)
@given(drawn=convolutions(sizes=[(1, 1), (2, 2), (20, 1), (33, 2), (40, 18)]))
def test_maps_of_any_width_in_bfloat16(drawn: Convolution) -> None:
    """With a single output in each line, kernels for AMX return what was in memory before."""
    xs, weights, geometry = drawn
    x, weight = xs[0].bfloat16(), weights[0].bfloat16()
    y = stock(x.double(), weight.double(), geometry)
    assert_close(convolve(x, weight, geometry).double(), y, 1e-2)
    cotangent = y.cos().bfloat16()
    expected = pull_back(cotangent.double(), x.double(), weight.double(), geometry, True, True)
    for grads in (
        pull_back(cotangent, x, weight, geometry, True, True),
        vjp(lambda x, w: convolve(x, w, geometry), x, weight)[1](cotangent),
    ):
        for actual, exact in zip(grads, expected, strict=True):
            assert actual is not None
            assert exact is not None
            assert_close(actual.double(), exact, 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_maps_are_widened_where_kernels_are_wrong_and_nowhere_else(
    dtype: torch.dtype,
) -> None:
    """Here they are wrong on every processor, and forward and back alike."""

    def wrong(x: Tensor, weight: Tensor, stride: int) -> bool:
        single = stride > 1 and x.shape[3] <= stride
        return single and weight.shape[3] > 1 and weight.dtype.itemsize < 4

    def forward(x: Tensor, weight: Tensor, bias: None, stride: int, *rest: int) -> Tensor:
        widths.append(x.shape[3])
        y = conv2d(x, weight, bias, stride, *rest)
        return y * torch.nan if wrong(x, weight, stride) else y

    def back(
        cotangent: Tensor, x: Tensor, weight: Tensor, bias: None, stride: list[int], *rest: Any
    ) -> list[Any]:
        widths.append(x.shape[3])
        grads = kernel(cotangent, x, weight, bias, stride, *rest)
        garbage = torch.nan if wrong(x, weight, stride[0]) else 1
        return [grad if grad is None else grad * garbage for grad in grads]

    widths: list[int] = []
    kernel = torch.ops.aten.convolution_backward
    generator = torch.Generator().manual_seed(0)
    for width, stride, k in product(range(1, 6), (1, 2, 3), (1, 3)):
        shapes = (2, 16, 3, width), (4, 16, k, k)
        x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        geometry = Geometry(stride)
        y, pull, *_ = vjp(partial(stock, geometry=geometry), x.double(), weight.double())
        expected = y, *pull(y)
        widths.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "conv2d", forward)
            patch.setattr(torch.ops.aten, "convolution_backward", back)
            ours = convolve(x, weight, geometry)
            grads = pull_back(y.to(dtype), x, weight, geometry, True, True)
        for actual, exact in zip((ours, *grads), expected, strict=True):
            assert actual is not None
            assert_close(actual.double(), exact, 1e-2)
        assert widths == [width + stride * wrong(x, weight, stride)] * 2


FEW_CHANNELS = """
import torch
from fresnet.network.convolution import convolve, pull_back
from fresnet.network.nodes import Geometry

for channels in range(1, 18):
    x, weight, cotangent = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(channels))
        for shape in ((3, channels, 16, 16), (8, channels, 1, 1), (3, 8, 8, 8))
    )
    x = x.contiguous(memory_format=torch.channels_last)
    exact = pull_back(cotangent.double(), x.double(), weight.double(), Geometry(2), False, True)[1]
    weight.requires_grad_()
    for grad in (
        torch.autograd.grad(convolve(x, weight, Geometry(2)), weight, cotangent)[0],
        pull_back(cotangent, x, weight.detach(), Geometry(2), True, True)[1],
    ):
        assert (grad - exact).norm() < 1e-5 * exact.norm(), channels
"""


@pytest.mark.slow
@pytest.mark.parametrize("vectors", ["AVX2", "AVX512_CORE", "ALL"])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_few_channels_by_a_stride(vectors: str, threads: str) -> None:
    """oneDNN's kernels overrun their buffers: gradients are wrong, or the process ends."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": vectors, "OMP_NUM_THREADS": threads}
    subprocess.run([sys.executable, "-c", FEW_CHANNELS], check=True, env=environment)


FOUND = Path(__file__).parent / "wrong_convolutions.jsonl"
"""Geometries of which PyTorch's own kernels were wrong: see `benchmarks/wrong_convolutions.py`."""


def test_every_geometry_that_was_found_wrong_is_known() -> None:
    """On whatever processor it was."""
    for line in FOUND.read_text().splitlines():
        one = json.loads(line)
        shape = torch.Size([one["images"], one["inputs"], one["height"], one["width"]])
        sides = one["outputs"], one["inputs"] // one["groups"], one["side"], one["side"]
        weight = torch.empty(sides, dtype=getattr(torch, one["dtype"]))
        assert (
            faults.missing_columns(shape, weight, one["stride"])
            or faults.loses_weight_gradient(shape, weight, one["dilation"])
            or faults.overruns(weight, one["stride"])
        ), one


WRONG = """
import json, sys
import torch
from torch.func import grad, vmap
from fresnet.network.convolution import convolve, pull_back
from fresnet.network.nodes import Geometry

def laid(value, last):
    return value.contiguous(memory_format=torch.channels_last) if last else value

def autograd(x, weight, cotangent):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = convolve(x, weight, geometry)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), cotangent.to(y.dtype))]

def autocast(x, weight, cotangent):
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float64):
        return autograd(x.float(), weight.float(), cotangent)

def functional(x, weight, cotangent):
    loss = lambda x, weight: (convolve(x, weight, geometry) * cotangent).sum()
    return [convolve(x, weight, geometry), *grad(loss, (0, 1))(x, weight)]

def mapped(x, weight, cotangent):
    def loss(x, weight, cotangent):
        return (convolve(x, weight, geometry) * cotangent).sum()
    both = vmap(grad(loss, (0, 1)), (0, None, 0))(x[None], weight, cotangent[None])
    return [convolve(x, weight, geometry), *(one[0] for one in both)]

def pulled(x, weight, cotangent):
    pulled = pull_back(cotangent, x, weight, geometry, True, True)
    return [convolve(x, weight, geometry), *pulled]

for line in open(sys.argv[1]):
    one = json.loads(line)
    dtype, generator = getattr(torch, one["dtype"]), torch.Generator().manual_seed(0)
    geometry = Geometry(one["stride"], one["dilation"], one["groups"])
    sides = one["outputs"], one["inputs"] // one["groups"], one["side"], one["side"]
    x = torch.randn(one["images"], one["inputs"], one["height"], one["width"], generator=generator)
    weight = torch.randn(sides, generator=generator)
    x, weight = laid(x.to(dtype), one["x_last"]), laid(weight.to(dtype), one["weight_last"])
    y = convolve(x.double(), weight.double(), geometry)
    cotangent = laid(torch.randn(y.shape, generator=generator).to(dtype), one["x_last"])
    exact = autograd(x.double(), weight.double(), cotangent)
    ways = [autograd, functional, mapped, pulled, *[autocast] * (dtype == torch.bfloat16)]
    for way in ways:
        for size in (x.numel(), weight.numel(), 1 << 16):
            torch.full((size,), torch.nan, dtype=dtype)  # freed memory holds no zeros
        for a, b in zip(way(x, weight, cotangent), exact, strict=True):
            error = (a.double() - b).norm() / b.norm()
            assert error < (3e-2 if dtype == torch.bfloat16 else 1e-4), (way.__name__, error, line)
"""


@pytest.mark.slow
@pytest.mark.parametrize("vectors", ["AVX2", "AVX512_CORE", "AVX512_CORE_BF16", "ALL"])
def test_what_pytorch_computes_wrongly_is_right_in_every_way(vectors: str) -> None:
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": vectors, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRONG, str(FOUND)]
    subprocess.run(command, check=True, env=environment)


def test_an_export_keeps_off_wrong_kernels_and_takes_images_of_any_size(tmp_path: Path) -> None:
    """Of one size it has another column where five outputs would be wrong."""
    spec = fresnet.Spec(Bottleneck, (1, 1, 1, 1), width=16, groups=4, group_width=4)
    dilated = fresnet.dilate(fresnet.init(0, spec, dtype=torch.bfloat16), output_stride=8)
    fresnet.export(dilated, tmp_path / "any.pt2")
    program: Any = torch.export.load(tmp_path / "any.pt2").module()
    for size in ((40, 300), (64, 64)):
        x = torch.randn(2, 3, *size).bfloat16()
        assert_close(program(x).float(), fresnet.forward(dilated, x).float(), 2e-2)
    wide = fresnet.init(0, fresnet.Spec(Bottleneck, (1, 1, 1, 1), width=32), dtype=torch.bfloat16)
    for size, pads in (((32, 160), True), ((64, 160), False)):
        fresnet.export(wide, tmp_path / "one.pt2", image_size=size)
        exported: Any = torch.export.load(tmp_path / "one.pt2")
        assert ("pad" in exported.graph_module.code) == pads
        x = torch.randn(2, 3, *size).bfloat16()
        assert_close(exported.module()(x).float(), fresnet.forward(wide, x).float(), 2e-2)


def test_norms_form_no_gradient_where_positions_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight is 512x512x3x3 and maps are 2x2."""
    monkeypatch.setattr(convolution, "weight_gradients", None)
    x, weight = torch.ones(3, 1, 512, 2, 2), torch.ones(512, 512, 3, 3)
    norms = squared_norms(torch.ones(3, 1, 512, 2, 2), x, weight, Geometry())
    # How many of the four places see a pixel in each of the 512x512 kernels: 1, 2 or 4.
    assert_close(norms, torch.full((3,), 512.0**2 * (4 * 1 + 4 * 4 + 16)), 1e-6)


def test_without_a_map_it_is_pytorchs_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 4, 4, 5, 5, generator=generator).unbind()
    w = w[:, :, :3, :3]
    ours, theirs = (lambda x, w, f=f: f(x, w, Geometry(2, 1, 1)) for f in (convolve, stock))
    assert_same(ours(x, w), theirs(x, w))
    assert_same(gradient(ours)(x, w), gradient(theirs)(x, w))
    y = ours(x, w)
    assert_same(pull_back(y, x, w, Geometry(2, 1, 1), True, True), vjp(theirs, x, w)[1](y))
    assert pull_back(y, x, w, Geometry(2, 1, 1), False, False) == (None, None)


def test_results_for_several_weights_lie_channels_last() -> None:
    x = torch.ones(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    weights = torch.ones(3, 6, 4, 3, 3)
    y = vmap(lambda w: convolve(x, w, Geometry()))(weights)
    assert y.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
