"""Exported files that others run without fresnet compute what `forward` does."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime
import pytest
import reference
import torch
from assertions import (
    assert_close,
    assert_close_or_rounded,
    global_generators_untouched,
    unmutated,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, images, tiny_params
from torch import Tensor, nn

import fresnet
from fresnet import FresnetError, Params, Spec, tree
from fresnet.network.nodes import (
    BareStem7x7,
    BasicBlock,
    Bottleneck,
    BottleneckV1,
    DeepStem,
    LastNorm,
    NoShortcut,
    PooledProjection,
    PreActivation,
    SqueezeExcite,
    Stem3x3,
    ZeroPad,
)

pytestmark = pytest.mark.slow

BOUND = 1e-5
"""The largest relative error in float32, as kernels differ and norms are folded."""


def network(spec: Spec, dtype: torch.dtype = torch.float32) -> Params:
    """A network with every leaf away from where `init` puts it."""
    generator = torch.Generator().manual_seed(0)

    def moved(leaf: Tensor) -> Tensor:
        return (leaf + 0.2 * torch.rand(leaf.shape, generator=generator)).to(dtype)

    weights, stats = fresnet.init(generator, spec, num_classes=5)
    return Params(tree.map(moved, weights), tree.map(lambda s: moved(s).float(), stats))


GROUPED_D = Spec(
    Bottleneck, (1, 1), 8, stem=DeepStem, shortcut=PooledProjection, groups=2, group_width=32
)
SMALL_V2 = Spec(PreActivation, (1, 1), 4, stem=BareStem7x7, last=LastNorm)
NETWORKS = {
    "grouped resnet-d": network(GROUPED_D),
    "cifar, zero padding": network(Spec(BasicBlock, (1, 1), 4, stem=Stem3x3, shortcut=ZeroPad)),
    "few channels": network(Spec(BasicBlock, (1, 1, 1), 4)),
    "plain": network(Spec(BasicBlock, (1, 1), 4, stem=Stem3x3, shortcut=NoShortcut)),
    "v1, frozen": fresnet.freeze(network(Spec(BottleneckV1, (2, 1), 4))),
    "v2, folded": fresnet.fold(network(SMALL_V2)),
    "dilated": fresnet.dilate(network(Spec(Bottleneck, (1, 1), 4)), output_stride=4),
}
STRIDES = {"grouped resnet-d": 8, "cifar, zero padding": 2, "few channels": 16, "plain": 2}
STRIDES |= {"v1, frozen": 8, "v2, folded": 8, "dilated": 4}
"""The stride of each whole network: how many pixels its last stage's places are apart."""

REFUSALS, REFUSED = (
    (AssertionError, RuntimeError),
    r"Guard failed: x\.size|Expected input at \*args",
)
"""How programs refuse a size; the second of each is that of PyTorch before 2.9."""

SMALL = network(Spec(BasicBlock, (1,), 4, stem=Stem3x3))


class Exported(NamedTuple):
    params: Params
    stride: int
    session: Any
    program: Callable[[Tensor], Tensor]
    folder: Path


LONG = ("few channels", "plain", "v1, frozen")
"""Networks whose nodes others have too; each takes ten seconds to export."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in NETWORKS],
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A network in both kinds of files."""
    params, folder = NETWORKS[request.param], tmp_path_factory.mktemp("exported")
    with unmutated(params), global_generators_untouched():
        fresnet.export(params, folder / "net.onnx")
        fresnet.export(params, str(folder / "net.pt2"))
    assert sorted(path.name for path in folder.iterdir()) == ["net.onnx", "net.pt2"]
    program = torch.export.load(folder / "net.pt2").module()
    stride = STRIDES[request.param]
    return Exported(
        params, stride, onnxruntime.InferenceSession(folder / "net.onnx"), program, folder
    )


def run_onnx(session: Any, x: Tensor) -> Tensor:
    (result,) = session.run(None, {"x": x.numpy()})
    return torch.from_numpy(result)


@examples(20)
@given(x=images(dtype=torch.float32))
def test_onnx_runs_as_forward_on_batches_of_every_size(exported: Exported, x: Tensor) -> None:
    assert_close(run_onnx(exported.session, x), fresnet.forward(exported.params, x), BOUND)


@examples(20)
@given(x=images(dtype=torch.float32))
def test_a_program_runs_as_forward_on_images_beyond_its_stride(
    exported: Exported, x: Tensor
) -> None:
    if min(x.shape[2:]) > exported.stride:
        with torch.no_grad():  # weights that PyTorch 2.9 loads want gradients
            logits = exported.program(x)
        assert_close(logits, fresnet.forward(exported.params, x), BOUND)
    else:
        with pytest.raises(REFUSALS, match=REFUSED):
            exported.program(x)


def test_a_program_builds_no_graph(tmp_path: Path) -> None:
    fresnet.export(SMALL, tmp_path / "net.pt2", image_size=8)
    program = torch.export.load(tmp_path / "net.pt2").module()
    assert not program(torch.ones(2, 3, 8, 8)).requires_grad


@pytest.mark.slow
@examples(4)
@given(
    params=tiny_params(),
    x=images(side=st.integers(35, 67), dtype=torch.float32),  # beyond the stride of any of them
    frozen=st.booleans(),
    fixed=st.booleans(),
)
def test_every_network_runs_as_forward(
    tmp_path_factory: pytest.TempPathFactory, params: Params, x: Tensor, frozen: bool, fixed: bool
) -> None:
    folder = tmp_path_factory.mktemp("exported")
    frozen = frozen and bool(tree.leaves(params.stats))  # norms in groups have none to go by
    params = tree.map(Tensor.float, fresnet.freeze(params) if frozen else params)
    size = tuple(x.shape[2:]) if fixed else None
    fresnet.export(params, folder / "net.onnx", image_size=size)  # type: ignore[arg-type]
    session = onnxruntime.InferenceSession(folder / "net.onnx")
    (output,) = session.get_outputs()
    headless = type(params.weights.head) is fresnet.nodes.NoHead
    assert output.name == ("features" if headless else "logits")
    assert_close_or_rounded(run_onnx(session, x), params, x, BOUND)
    fresnet.export(params, folder / "net.pt2", image_size=size)  # type: ignore[arg-type]
    program = torch.export.load(folder / "net.pt2").module()
    assert_close(program(x), fresnet.forward(params, x), BOUND)


ALONE = """
import sys

class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "fresnet":
            raise AssertionError("fresnet is asked for")

sys.meta_path.insert(0, Refuse())
import torch

kind, *paths = sys.argv[1:]
load = torch._inductor.aoti_load_package if kind == "compiled" else torch.export.load
for path in paths:
    loaded = load(path)
    run = loaded if kind == "compiled" else loaded.module()
    torch.save([run(x) for x in torch.load(path + ".inputs")], path + ".logits")
assert "fresnet" not in sys.modules
"""


def run_alone(kind: str, paths: Sequence[Path], batches: Sequence[Tensor]) -> list[list[Tensor]]:
    """What a process without fresnet computes from these batches with each file."""
    for path in paths:
        torch.save(list(batches), f"{path}.inputs")
    command = [sys.executable, "-I", "-c", ALONE, kind, *map(str, paths)]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{path}.logits") for path in paths]


def layouts(x: Tensor) -> list[Tensor]:
    """The same images in every order of strides that they may have, and once not dense."""
    wide = x.new_empty(*x.shape[:3], 2 * x.shape[3])[..., ::2].copy_(x)
    return [x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT, wide]


def batches(dtype: torch.dtype, *sizes: tuple[int, int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(b, 3, h, w) for b, h, w in sizes]
    return [
        layout for s in shapes for layout in layouts(torch.randn(s, generator=generator).to(dtype))
    ]


def test_programs_run_without_fresnet(tmp_path: Path) -> None:
    half = network(GROUPED_D, torch.bfloat16)
    fresnet.export(SMALL, tmp_path / "any size.pt2")
    fresnet.export(half, tmp_path / "half.pt2", image_size=(8, 16))
    xs = batches(torch.float32, (1, 9, 12), (5, 8, 33))
    (logits,) = run_alone("program", [tmp_path / "any size.pt2"], xs)
    for x, y in zip(xs, logits, strict=True):
        assert_close(y, fresnet.forward(SMALL, x), BOUND)
    xs = batches(torch.bfloat16, (1, 8, 16), (3, 8, 16))
    (logits,) = run_alone("program", [tmp_path / "half.pt2"], xs)
    for x, y in zip(xs, logits, strict=True):
        assert_close(y, fresnet.forward(half, x), 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param("grouped resnet-d", marks=pytest.mark.long), "cifar, zero padding"],
)
def test_compiled_packages_run_without_fresnet(name: str, tmp_path: Path) -> None:
    """They take every layout, and odd and even sizes. Compiled code checks neither."""
    params, path = NETWORKS[name], tmp_path / "net.pt2"
    fresnet.export(params, path, compiled=True)
    xs = batches(torch.float32, (1, 32, 32), (3, 33, 47), (2, 64, 35), (4, 46, 45))
    (logits,) = run_alone("compiled", [path], xs)
    for x, y in zip(xs, logits, strict=True):
        assert_close(y, fresnet.forward(params, x), BOUND)


@pytest.mark.long
def test_compiled_packages_in_bfloat16_for_one_size(tmp_path: Path) -> None:
    params = network(Spec(BasicBlock, (1,), 4), torch.bfloat16)
    fresnet.export(params, tmp_path / "net.pt2", compiled=True, image_size=16)
    xs = batches(torch.bfloat16, (1, 16, 16), (3, 16, 16))
    (logits,) = run_alone("compiled", [tmp_path / "net.pt2"], xs)
    for x, y in zip(xs, logits, strict=True):
        assert_close(y, fresnet.forward(params, x), 1e-2)


@pytest.mark.long
def test_a_resnet50(tmp_path: Path) -> None:
    params = reference.params(reference.module(fresnet.RESNET50, 0, dtype=torch.float32))
    for suffix in (".onnx", ".pt2"):
        fresnet.export(params, tmp_path / f"net{suffix}")
        assert 94e6 < (tmp_path / f"net{suffix}").stat().st_size < 96e6
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    program = torch.export.load(tmp_path / "net.pt2").module()
    for x in batches(torch.float32, (1, 224, 224), (3, 160, 192))[::2]:
        expected = fresnet.forward(params, x)
        assert_close(run_onnx(session, x), expected, BOUND)
        assert_close(program(x), expected, BOUND)


def test_what_is_in_an_onnx_file(exported: Exported) -> None:
    """Names and sizes say what they are, all operators are standard, and there are no traces."""
    model = onnx.load(exported.folder / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    ((x,), (logits,)) = model.graph.input, model.graph.output
    sizes = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (x, logits)
    ]
    assert (x.name, logits.name) == ("x", "logits")
    assert sizes == [["batch", 3, "height", "width"], ["batch", 5]]
    assert [(o.domain, o.version >= 18) for o in model.opset_import] == [("", True)]
    assert not model.functions
    operators = {
        "Add",
        "AveragePool",
        "Conv",
        "Gemm",
        "MaxPool",
        "Mul",
        "Pad",
        "ReduceMean",
        "Relu",
    }
    assert {node.op_type for node in model.graph.node} <= operators
    content = (exported.folder / "net.onnx").read_bytes()
    assert b"fresnet" not in content
    assert b".py" not in content


def test_onnx_runtime_folds_every_norm_into_its_convolution(
    exported: Exported, tmp_path: Path
) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(exported.folder / "net.onnx", options)
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    count = Counter(node.op_type for node in nodes)
    blocks = [b for s in exported.params.weights.stages for b in fresnet.nodes.blocks_of(s)]
    sums = sum(not isinstance(b.shortcut, NoShortcut) for b in blocks)
    alone = sum(isinstance(b, PreActivation) for b in blocks)  # norms that no convolution precedes
    alone += isinstance(exported.params.weights.last, LastNorm)
    assert count["BatchNormalization"] == 0
    assert (count["Mul"], count["Add"]) == (alone, sums + alone)


def test_one_size_of_image(tmp_path: Path) -> None:
    fresnet.export(SMALL, tmp_path / "net.onnx", image_size=(1, 7))
    fresnet.export(SMALL, tmp_path / "net.pt2", image_size=(1, 7))
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, 1, 7]
    program = torch.export.load(tmp_path / "net.pt2").module()
    for x in batches(torch.float32, (1, 1, 7), (4, 1, 7)):
        expected = fresnet.forward(SMALL, x)
        assert_close(run_onnx(session, x), expected, BOUND)
        assert_close(program(x), expected, BOUND)
    with pytest.raises(REFUSALS, match=REFUSED):
        program(torch.ones(1, 3, 7, 7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    weights = tree.map(lambda w: w.to(dtype), SMALL.weights)
    params = Params(weights, tree.map(lambda s: s.to(wide), SMALL.stats))
    fresnet.export(params, tmp_path / "net.onnx")
    fresnet.export(params, tmp_path / "net.pt2")
    x = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8).to(dtype)
    expected = fresnet.forward(params, x)
    assert_close(torch.export.load(tmp_path / "net.pt2").module()(x), expected, BOUND)
    if dtype == torch.float16:  # ONNX Runtime has no double convolution on CPU
        session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
        assert_close(run_onnx(session, x), expected, 5e-3)


def test_a_programs_entries_are_a_state_dict_of_torchvisions(tmp_path: Path) -> None:
    model = reference.module(Spec(BasicBlock, (1, 1, 1, 1)), 0, dtype=torch.float32)
    fresnet.export(reference.params(model), tmp_path / "net.pt2")
    entries = torch.export.load(tmp_path / "net.pt2").state_dict
    expected = model.state_dict()
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    assert [*entries] == [name for name in names if "num_batches" not in name]
    for name, entry in entries.items():
        assert torch.equal(entry, expected[name]), name
    model.load_state_dict(entries, strict=True)


def test_leaves_may_share_memory_and_want_gradients(tmp_path: Path) -> None:
    """One network of a stack is exported as it would be alone, and its file is no larger."""
    stack = tree.stack([SMALL, SMALL, SMALL])
    _, member, _ = tree.unstack(tree.map(Tensor.requires_grad_, stack))
    fresnet.export(SMALL, tmp_path / "alone.pt2")
    fresnet.export(member, tmp_path / "net.pt2")
    assert (tmp_path / "net.pt2").stat().st_size == (tmp_path / "alone.pt2").stat().st_size
    x = torch.ones(1, 3, 8, 8)
    program = torch.export.load(tmp_path / "net.pt2").module()
    assert_close(program(x), fresnet.forward(SMALL, x), BOUND)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_nothing_is_printed(suffix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fresnet.export(SMALL, tmp_path / f"net{suffix}")
    assert capfd.readouterr() == ("", "")


STEM = SMALL.weights.stem
NARROW = STEM._replace(layer=STEM.layer._replace(conv=STEM.layer.conv[:3]))
MISFIT = SMALL._replace(weights=SMALL.weights._replace(stem=NARROW))
META = tree.map(lambda leaf: leaf.to("meta"), SMALL)
HALF = SMALL._replace(weights=tree.map(Tensor.bfloat16, SMALL.weights))


@pytest.mark.parametrize(
    ("params", "name", "options", "reason"),
    [
        (SMALL.weights, "a.onnx", {}, r"export expects Params\(weights, stats\); got a Weights"),
        (META, "a.onnx", {}, "export expects tensors with values; got some that are on meta"),
        (SMALL, "a.pth", {}, r"export expects a path that ends in \.onnx or \.pt2; got .*a\.pth"),
        (SMALL, "onnx", {}, r"export expects a path that ends in \.onnx or \.pt2; got .*onnx"),
        (SMALL, "a.onnx", {"compiled": True}, r"ends in \.pt2 if compiled; got .*a\.onnx"),
        (SMALL, "a.onnx", {"image_size": 0}, "export expects image_size to be an integer from 1"),
        (SMALL, "no/a.onnx", {}, r"export cannot write .*a\.onnx: No such file or directory"),
        (SMALL, "no/a.pt2", {}, r"export cannot write .*a\.pt2: No such file or directory"),
        (SMALL, "folder.pt2", {}, r"cannot write .*folder\.pt2: folder\.pt2 is no regular file"),
        (MISFIT, "a.onnx", {}, r"export cannot write .*a\.onnx: a norm of activations .* expects"),
        (MISFIT, "old.pt2", {}, r"export cannot write .*old\.pt2: a norm of activations .* expect"),
        (HALF, "old.onnx", {}, "ONNX expects float32, float16 or float64 weights; got .*bfloat16"),
    ],
)
def test_refusals_leave_everything_as_it_was(
    params: Any, name: str, options: Any, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "folder.pt2").mkdir()
    for old in ("old.onnx", "old.pt2"):
        (tmp_path / old).write_text("old")
    with pytest.raises(FresnetError, match=reason):
        fresnet.export(params, tmp_path / name, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.pt2", "old.onnx", "old.pt2"]
    assert (tmp_path / "old.onnx").read_text() == (tmp_path / "old.pt2").read_text() == "old"


@pytest.mark.parametrize("missing", ["onnx", "onnx_ir.passes.common"])
def test_onnx_takes_an_extra(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(FresnetError, match=r"it takes onnx: pip install 'fresnet\[export\]'"):
        fresnet.export(SMALL, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_onnx_never_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise onnx.checker.ValidationError("no such attribute\nand more")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    (tmp_path / "net.onnx").write_text("old")
    with pytest.raises(FresnetError, match=r"cannot write .*net\.onnx: no such attribute$"):
        fresnet.export(SMALL, tmp_path / "net.onnx")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_fresnet_needs_none_of_it() -> None:
    """Neither the import nor a program needs the extra packages."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(['onnx', 'onnx_ir', 'onnxscript']); "
        "import fresnet; "
        "fresnet.export(fresnet.init(0, fresnet.SPECS['resnet20']), '/dev/null/net.pt2')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "fresnet.errors.FresnetError: export cannot write /dev/null/net.pt2" in done.stderr


@pytest.mark.parametrize(
    ("opset", "name"),
    [
        pytest.param(13, "grouped resnet-d", marks=pytest.mark.long),
        (13, "cifar, zero padding"),
        pytest.param(17, "v2, folded", marks=pytest.mark.long),
        (21, "attention"),
    ],
)
def test_an_opset_for_older_runtimes(opset: int, name: str, tmp_path: Path) -> None:
    attention = Spec(BasicBlock, (1, 1), 8, attention=SqueezeExcite)
    params = network(attention) if name == "attention" else NETWORKS[name]
    path = tmp_path / "net.onnx"
    fresnet.export(params, path, opset=opset)
    (imported,) = (o.version for o in onnx.load(path).opset_import if not o.domain)
    assert imported == opset
    session = onnxruntime.InferenceSession(path)
    for size in ((2, 3, 40, 48), (3, 3, 33, 65)):
        x = torch.randn(size, generator=torch.Generator().manual_seed(0))
        (found,) = session.run(None, {"x": x.numpy()})
        assert_close(torch.from_numpy(found), fresnet.forward(params, x), BOUND)


@pytest.mark.parametrize("opset", [12, True, "17", 17.0])
def test_no_opset(opset: Any, tmp_path: Path) -> None:
    params = next(iter(NETWORKS.values()))
    with pytest.raises(
        FresnetError, match=r"opset to be an integer from 13 on, for an \.onnx; got"
    ):
        fresnet.export(params, tmp_path / "net.onnx", opset=opset)
    with pytest.raises(FresnetError, match=r"for an \.onnx; got 17"):
        fresnet.export(params, tmp_path / "net.pt2", opset=17)


class Traced(nn.Module):
    def __init__(self, params: Params) -> None:
        super().__init__()
        self.params = params

    def forward(self, x: Tensor) -> Tensor:
        return fresnet.forward(self.params, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:Constant folding:UserWarning")
@pytest.mark.parametrize("name", ["grouped resnet-d", "cifar, zero padding", "v1, frozen"])
def test_the_older_tracers_of_pytorch_take_a_network(name: str, tmp_path: Path) -> None:
    params, generator = NETWORKS[name], torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 40, 48, generator=generator)
    expected = fresnet.forward(params, x)
    traced = torch.jit.trace(Traced(params), (x,))
    assert_close(traced(x), expected, 1e-6)
    batch = torch.randn(3, 3, 40, 48, generator=generator)
    assert_close(traced(batch), fresnet.forward(params, batch), 1e-6)
    path = tmp_path / "traced.onnx"
    torch.onnx.export(Traced(params), (x,), path, dynamo=False, input_names=["x"])
    (found,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    assert_close(torch.from_numpy(found), expected, 1e-5)
