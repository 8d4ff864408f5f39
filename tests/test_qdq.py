"""Quantised networks in ONNX files: each layer is that of int8, and runtimes run it in int8."""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime
import pytest
import torch
from assertions import global_generators_untouched, unmutated
from onnx import numpy_helper
from torch import Tensor

import fresnet
from fresnet import FresnetError, Params, Quantized, Spec, tree
from fresnet.inference import int8, int8_kernels
from fresnet.network.levels import affine
from fresnet.network.net import run_network
from fresnet.network.nodes import (
    AveragedStage,
    AveragedStem,
    BareStem7x7,
    BasicBlock,
    BlurredStage,
    BlurredStem,
    Bottleneck,
    BottleneckV1,
    CentredZeroPad,
    DeepStem,
    LastNorm,
    Normed,
    NoShortcut,
    PooledProjection,
    PreActivation,
    Stem3x3,
    StridedStem,
    ZeroPad,
    units_of,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not int8_kernels.is_supported(), reason="int8 needs a processor with VNNI"),
]

SPECS = {
    "v2": Spec(PreActivation, (1, 2), 8, stem=BareStem7x7, last=LastNorm),
    "resnet-d, grouped": Spec(
        Bottleneck, (1, 1), 8, stem=DeepStem, shortcut=PooledProjection, groups=2, group_width=32
    ),
    "zero padding": Spec(BasicBlock, (2, 1), 8, stem=Stem3x3, shortcut=ZeroPad),
    "blurred": Spec(BasicBlock, (1, 1), 8, stem_pool=BlurredStem, stage=BlurredStage),
    "averaged, v1": Spec(BottleneckV1, (1, 1), 8, stem_pool=AveragedStem, stage=AveragedStage),
    "strided, centred": Spec(BasicBlock, (1, 1), 8, stem_pool=StridedStem, shortcut=CentredZeroPad),
    "plain": Spec(BasicBlock, (1, 1), 8, stem=Stem3x3, shortcut=NoShortcut),
}
"""Between them they take every step that a regime has without attention."""

LONG = ("averaged, v1", "strided, centred", "plain", "zero padding")
"""Networks whose exports take as long as those of the others; all take some ten seconds."""


def images(b: int, h: int, w: int) -> Tensor:
    return torch.randn(b, 3, h, w, generator=torch.Generator().manual_seed(b))


def network(spec: Spec, classes: int = 5) -> Params:
    """A network with every leaf away from where `init` puts it, and statistics of real images."""
    generator = torch.Generator().manual_seed(0)
    params = fresnet.init(generator, spec, num_classes=classes)

    def moved(leaf: Tensor) -> Tensor:
        return leaf + 0.2 * torch.randn(leaf.shape, generator=generator)

    moved_params = params._replace(weights=tree.map(moved, params.weights))
    return fresnet.recalibrate(moved_params, [images(8, 40, 48)])


class Exported(NamedTuple):
    params: Params
    quantized: Quantized
    path: Path


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in SPECS],
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    params = network(SPECS[request.param], classes=0 if request.param == "blurred" else 5)
    if request.param == "v2":
        params = fresnet.dilate(params, output_stride=4)
    quantized = fresnet.quantize(params, [images(8, 40, 48)])
    path = tmp_path_factory.mktemp("exported") / "net.onnx"
    with unmutated(quantized), global_generators_untouched():
        fresnet.export(quantized, path)
    return Exported(params, quantized, path)


def session(path: Path | bytes, *, optimised: bool) -> Any:
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options)


SMALL = network(Spec(BasicBlock, (1,), 8, stem=Stem3x3))


def assert_as_near_as_int8(path: Path, params: Params, quantized: Quantized, x: Tensor) -> None:
    """The file's distance from the network is at most twice that of `compile_inference`."""
    exact, ours = fresnet.forward(params, x), fresnet.compile_inference(quantized, x)(x)
    for optimised in (False, True):
        (found,) = session(path, optimised=optimised).run(None, {"x": x.numpy()})
        assert found.shape == exact.shape
        assert (torch.from_numpy(found) - exact).norm() <= 2 * (ours - exact).norm()


class Result(NamedTuple):
    """The levels of a result in a file, and how many levels they may be from those of int8."""

    levels: Tensor
    allowed: float


def results(path: Path, x: Tensor) -> Iterator[Result]:
    """All results of a file, in order, as its operators are defined.

    Two numbers near the middle between levels are rounded either way. Before a sum the file rounds
    once more, by half a step at most.
    """
    model = onnx.load(path)
    arrays = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    allowed, branch = {}, 0.0
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            step = float(arrays[node.input[1]])
            if node.input[1].endswith("branch_scale"):
                branch = step
            else:
                allowed[node.output[0]], branch = 1 + branch / 2 / step, 0.0
    for name in allowed:
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    levels = session(model.SerializeToString(), optimised=False).run([*allowed], {"x": x.numpy()})
    return map(Result, map(torch.from_numpy, levels), allowed.values())


class Following(int8._Levels):
    """int8 that compares each result with that of a file, and goes on with the file's."""

    def __init__(self, last: Any, file: Iterator[Result]) -> None:
        super().__init__(last)
        self.file = file

    def follow(self, ours: Tensor) -> Tensor:
        theirs, allowed = next(self.file)
        assert theirs.shape == ours.shape
        assert (theirs.int() - ours.int()).abs().max() <= allowed
        return theirs.contiguous(memory_format=torch.channels_last)

    def layer(self, at: Any, x: Tensor, how: Any, *, add: Any = None, relu: bool = True) -> Any:
        add = None if add is None else add.clone()  # oneDNN writes the sum over it
        return self.follow(super().layer(at, x, how, add=add, relu=relu)[0]), ()

    def normed(self, at: Any, x: Tensor) -> Any:
        return self.follow(super().normed(at, x)[0]), ()


def _followed(name: str) -> Any:
    def method(self: Following, x: Tensor, *how: int, **options: int) -> Tensor:
        return self.follow(getattr(int8._Levels, name)(self, x, *how, **options))

    return method


for name in ("max_pool", "average_pool", "halve", "blur", "subsample", "zero_pad"):
    setattr(Following, name, _followed(name))


def test_each_layer_is_that_of_int8(exported: Exported) -> None:
    """From the same activations."""
    x, (weights, ranges, ends) = images(3, 37, 64), exported.quantized
    filled = int8._filled(ends, *x.shape[1:])
    _, last, packed = run_network(Params(weights, ranges), filled, int8._Packing(len(x)))
    do = Following(affine(last), results(exported.path, x))
    run_network(Params(weights, packed), do.follow(int8.to_levels(x, affine(ends))), do)
    assert next(do.file, None) is None


def test_a_file_is_as_near_to_the_network_as_int8(exported: Exported) -> None:
    """No bound of a layer says what becomes of many layers. A dozen images even out chance."""
    params, quantized, path = exported
    for x in (images(12, 40, 48), images(12, 33, 65)):
        assert_as_near_as_int8(path, params, quantized, x)


def test_onnx_runtime_has_a_kernel_for_int8_for_every_convolution(
    exported: Exported, tmp_path: Path
) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # it warns that the file is for this machine
    onnxruntime.InferenceSession(exported.path, options)
    written = Counter(node.op_type for node in onnx.load(exported.path).graph.node)
    count = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert count["QLinearConv"] == written["Conv"]
    assert count["Conv"] == 0
    norms = sum(isinstance(unit, Normed) for unit in units_of(exported.quantized.weights))
    assert (count["QLinearAdd"], count["Add"]) == (written["Add"] - norms, norms)


def test_weights_are_whole_numbers_in_the_file(exported: Exported) -> None:
    model = onnx.load(exported.path)
    onnx.checker.check_model(model, full_check=True)
    dtypes = {one.name: one.data_type for one in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in dtypes:
            is_weight = node.input[0].endswith("weight")
            expected = onnx.TensorProto.INT8 if is_weight else onnx.TensorProto.INT32
            assert dtypes[node.input[0]] == expected
    assert b"fresnet" not in exported.path.read_bytes()


def test_biases_beside_tiny_weights_are_kept(tmp_path: Path) -> None:
    """In steps of such weights they would be more than int32 has."""
    params, x = fresnet.fold(SMALL), images(12, 16, 16)
    conv = params.weights.stem.layer.conv.clone()
    conv[:2], conv[2:4] = 0, 1e-12 * conv[2:4]
    params = tree.at(params, "weights.stem.layer.conv", conv)
    quantized = fresnet.quantize(params, [x])
    fresnet.export(quantized, tmp_path / "net.onnx", image_size=16)
    assert_as_near_as_int8(tmp_path / "net.onnx", params, quantized, x)


def test_an_opset_for_older_runtimes(tmp_path: Path) -> None:
    x = images(12, 16, 16)
    quantized = fresnet.quantize(SMALL, [x])
    fresnet.export(quantized, tmp_path / "net.onnx", opset=13)
    assert onnx.load(tmp_path / "net.onnx").opset_import[0].version == 13
    assert_as_near_as_int8(tmp_path / "net.onnx", SMALL, quantized, x)


def test_refusals_leave_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = fresnet.quantize(SMALL, [images(2, 16, 16)])
    half = tree.map(Tensor.half, quantized)
    meta = tree.map(lambda leaf: leaf.to("meta"), quantized)
    none: Any = ()
    old = tmp_path / "net.onnx"
    old.write_text("old")
    cases: tuple[tuple[Any, str, Any, str], ...] = (
        (quantized, "net.pt2", {}, r"ends in \.onnx, and no compiled, .*; got .*net\.pt2: for"),
        (quantized, "net.pt2", {"compiled": True}, "export the network that was quantised"),
        (quantized, "net.onnx", {"compiled": True}, "and no compiled, for a network of quantize"),
        (quantized, "net.pth", {}, r"ends in \.onnx, .*; got .*net\.pth"),
        (quantized, "net.onnx", {"opset": 12}, "opset to be an integer from 13 on"),
        (half, "net.onnx", {}, r"a network as quantize returns it.*; got torch\.float16 on cpu"),
        (meta, "net.onnx", {}, "on the CPU; got .*meta"),
        (
            quantized._replace(ranges=none),
            "net.onnx",
            {},
            "to hold Weights and Stats; got a Weights",
        ),
        (tree.at(quantized, "images", 3), "net.onnx", {}, "as quantize returns it.*; got a int"),
        (quantized._replace(weights=SMALL.weights), "net.onnx", {}, "a norm such as a Norm"),
    )
    for network, name, options, reason in cases:
        with pytest.raises(FresnetError, match=reason):
            fresnet.export(network, tmp_path / name, **options)
    with monkeypatch.context() as without:
        without.delattr(torch.onnx, "ops")
        with pytest.raises(FresnetError, match="writes no operators of ONNX: it takes"):
            fresnet.export(quantized, old)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(FresnetError, match=r"it takes onnx: pip install 'fresnet\[export\]'"):
        fresnet.export(quantized, old)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
