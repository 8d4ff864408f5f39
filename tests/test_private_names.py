"""If a private name of PyTorch is missing, fresnet takes another way or says what is missing."""

import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from assertions import assert_close, assert_trees_close
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import FresnetError, tree
from fresnet.inference import cudnn, int8_kernels, onednn, side_by_side
from fresnet.network.nodes import Geometry, Weights
from fresnet.pytorch import pytrees, transform_stack
from fresnet.weights import export

CONTRIBUTING = Path(__file__).parent.parent / "CONTRIBUTING.md"

SPEC = fresnet.Spec(fresnet.nodes.Bottleneck, (1, 1), width=4)
PARAMS = fresnet.init(0, SPEC, num_classes=5, dtype=torch.float64)
X = torch.randn(4, 3, 40, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(4)


def loss(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
    logits, _ = fresnet.forward_train(PARAMS._replace(weights=weights), x)
    return cross_entropy(logits, y)


def derivatives() -> Any:
    """Derivatives of every kind that takes another way under another transform."""
    w, along = PARAMS.weights, tree.map(torch.cos, PARAMS.weights)
    halves = X.unflatten(0, (2, 2)), Y.unflatten(0, (2, 2))
    followed = tree.map(lambda leaf: leaf.clone().requires_grad_(), w)
    optimizer = fresnet.optim.sgd(0.1, momentum=0.9)
    mixing = fresnet.training.mixup(0.2)
    step = fresnet.training.make_train_step(optimizer, mixing=mixing, recompute=True)
    state, _ = step(fresnet.training.start(PARAMS, optimizer), (X, Y))
    return (
        grad(loss)(w, X, Y),
        vmap(grad(loss), (None, 0, 0))(w, *halves),
        jvp(lambda w: grad(loss)(w, X, Y), (w,), (along,)),
        tree.unflatten(w, torch.autograd.grad(loss(followed, X, Y), tree.leaves(followed))),
        fresnet.per_sample_grads(cross_entropy, PARAMS, X, Y, norms="running"),
        fresnet.clipped_grads(cross_entropy, PARAMS, X, Y, max_norm=1.0),
        state.params,
    )


@pytest.mark.parametrize("name", transform_stack.NAMES)
def test_without_the_transform_stack_every_derivative_is_right(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = derivatives()
    there = {n: getattr(torch._C._functorch, n) for n in transform_stack.NAMES if n != name}
    monkeypatch.setattr(transform_stack, "_functorch", SimpleNamespace(**there))
    monkeypatch.setattr(transform_stack, "READABLE", False)
    assert_trees_close(derivatives(), expected, 1e-9)


@pytest.mark.parametrize("missing", ["norm", "convolution_backward", "dirichlet"])
def test_without_kernels_that_are_not_documented_every_derivative_is_right(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = derivatives()
    if missing == "norm":
        monkeypatch.delattr(torch, "native_batch_norm")
    elif missing == "dirichlet":
        monkeypatch.delattr(torch, "_sample_dirichlet")
    else:
        kernels = SimpleNamespace(
            native_batch_norm_backward=torch.ops.aten.native_batch_norm_backward
        )
        monkeypatch.setattr(torch.ops, "aten", kernels)
    found = derivatives()
    monkeypatch.undo()
    if missing == "dirichlet":  # shares are drawn in another way, so results differ
        assert tree.leaves(found[-1])[0].isfinite().all()
    else:
        assert_trees_close(found, expected, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", [onednn.TRACE, onednn.FUNCTION])
def test_without_onednns_compiler_pytorchs_is_taken(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch._C, name)
    assert not onednn.is_supported(torch.float32, torch.device("cpu"))
    params, x = tree.map(lambda leaf: leaf.float(), (PARAMS, X))
    assert_close(fresnet.compile_inference(params, x)(x), fresnet.forward(params, x), 1e-5)


@pytest.mark.skipif(not int8_kernels.is_supported(), reason="int8 needs a processor with VNNI")
@pytest.mark.parametrize("name", [onednn.TRACE, onednn.FUNCTION])
def test_without_them_int8_runs_layer_by_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params, x = tree.map(lambda leaf: leaf.float(), (PARAMS, X))
    quantized = fresnet.quantize(params, [x])
    logits = fresnet.compile_inference(quantized, x)(x)
    monkeypatch.delattr(torch._C, name)
    assert torch.equal(fresnet.compile_inference(quantized, x)(x), logits)


def test_without_the_probe_for_bfloat16_onednn_is_for_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert onednn.is_supported(torch.float32, torch.device("cpu"))
    assert not onednn.is_supported(torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("name", [name for _, name in int8_kernels.OPERATORS])
def test_without_the_operators_int8_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params, x = tree.map(lambda leaf: leaf.float(), (PARAMS, X))
    quantized = fresnet.quantize(params, [x])
    less = [(SimpleNamespace() if n == name else space, n) for space, n in int8_kernels.OPERATORS]
    monkeypatch.setattr(int8_kernels, "OPERATORS", less)
    int8_kernels.is_supported.cache_clear()
    try:
        with pytest.raises(FresnetError, match="expects oneDNN for int8"):
            fresnet.compile_inference(quantized, x)
    finally:
        int8_kernels.is_supported.cache_clear()


@pytest.mark.parametrize("missing", [cudnn.KERNELS, cudnn.KERNELS[:1], cudnn.KERNELS[1:]])
def test_without_cudnns_kernels_convolutions_are_plain(
    missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in missing:
        monkeypatch.delattr(torch, name)
    monkeypatch.setattr(cudnn, "fuse", lambda function, x: function)
    for name in set(cudnn.KERNELS) - set(missing):  # there is no GPU to run it
        monkeypatch.setattr(torch, name, None)
    logits = cudnn.prepare(fresnet.fold(PARAMS), X)(X)
    assert_close(logits, fresnet.forward(PARAMS, X), 1e-11)


def test_without_the_probe_for_triton_nothing_is_compiled_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils._triton", None)
    assert cudnn._compiled(torch.relu) is torch.relu


def test_without_capabilities_images_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    shape = torch.Size((4, 8, 7, 7))
    assert side_by_side.images_together(shape, torch.bfloat16, Geometry(2).stride) == 1


def test_without_the_packager_a_compiled_export_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor

    monkeypatch.delattr(torch._inductor, "aoti_compile_and_package")
    with pytest.raises(FresnetError, match="compiles no packages"):
        fresnet.export(PARAMS, tmp_path / "a.pt2", compiled=True)
    assert list(tmp_path.iterdir()) == []


def by_remainders(x: Any, y: Any) -> Any:
    """`torch._meta_registrations.div_rtn` before PyTorch 2.13, which asks whether sizes are odd."""
    return x // y - 1 if x % y != 0 and (x % y < 0) != (y < 0) else x // y


def test_programs_take_odd_and_even_images_whatever_the_division(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._meta_registrations, "div_rtn", by_remainders)
    fresnet.export(PARAMS, tmp_path / "a.pt2")
    assert torch._meta_registrations.div_rtn is by_remainders
    assert_close(
        torch.export.load(tmp_path / "a.pt2").module()(X), fresnet.forward(PARAMS, X), 1e-9
    )
    monkeypatch.setattr(export, "_plain_division", nullcontext)
    with pytest.raises(FresnetError, match="binds a program to images of odd sizes: say image_"):
        fresnet.export(PARAMS, tmp_path / "b.pt2")
    fresnet.export(PARAMS, tmp_path / "b.pt2", image_size=40)


def test_a_pytorch_that_does_not_tell_of_exports_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "TELLS", False)
    with pytest.raises(FresnetError, match=r"it takes PyTorch 2\.7 or newer"):
        fresnet.export(PARAMS, tmp_path / "a.pt2")


def test_a_pytorch_that_cannot_rewrite_programs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rewrite(program: object, rules: object) -> None:
        raise RuntimeError("cannot mutate tensors with frozen storage")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", rewrite)
    with pytest.raises(FresnetError, match=r"ONNX takes 2\.8 or newer"):
        fresnet.export(PARAMS, tmp_path / "a.onnx")


class Leaflike(tuple[Any, ...]):
    """To PyTorch a leaf, as a Generic NamedTuple is before PyTorch 2.8."""

    _fields = ("one", "other")

    def __new__(cls, *values: Any) -> "Leaflike":
        return super().__new__(cls, values)

    @classmethod
    def _make(cls, values: Any) -> "Leaflike":
        return cls(*values)


def test_nodes_that_pytorch_takes_for_leaves_are_registered() -> None:
    node = Leaflike(torch.ones(2), torch.zeros(2))
    with pytest.raises(ValueError, match="Leaflike"):
        grad(lambda node: (node[0] * node[1]).sum())(node)
    pytrees.register(Leaflike)
    found = grad(lambda node: (node[0] * node[1]).sum())(node)
    assert type(found) is Leaflike
    assert_trees_close([*found], [torch.zeros(2), torch.ones(2)], 0)
    keyed, _ = torch.utils._pytree.tree_flatten_with_path(node)
    assert [str(path[0]) for path, _ in keyed] == [".one", ".other"]


WITHOUT_ALL = """
import sys, torch

for place, name in (
    (torch._C._functorch, "get_interpreter_stack"),
    (torch._C, "_create_graph_by_tracing"),
    (torch._C, "_create_function_from_graph"),
    (torch, "cudnn_convolution_relu"),
    (torch, "cudnn_convolution_add_relu"),
    (torch.cpu, "get_capabilities"),
):
    if hasattr(place, name):
        delattr(place, name)
sys.modules["torch._compile"] = None

import fresnet

params = fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=10)
x = torch.randn(2, 3, 16, 16)
logits, stats = fresnet.forward_train(params, x)
print(fresnet.forward(params._replace(stats=stats), x).shape)
"""


@pytest.mark.slow
def test_without_all_of_them_it_is_imported_and_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ALL], capture_output=True, text=True, check=False
    )
    assert done.stdout == "torch.Size([2, 10])\n", done.stderr


TOO_OLD = """
import torch

torch.__version__ = torch.torch_version.TorchVersion("2.5.1+cpu")
import fresnet
"""


def test_a_pytorch_that_is_too_old_is_refused_in_a_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOO_OLD], capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1] == (
        "ImportError: fresnet expects PyTorch 2.6 or newer; got 2.5.1+cpu: pip install 'torch>=2.6'"
    )


BARE = """
import warnings, torch

torch.backends.mkldnn.is_available = lambda: False
import fresnet

params = fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=5)
x = torch.ones(2, 3, 16, 16)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    infer = fresnet.compile_inference(params, x)
assert torch.allclose(infer(x), fresnet.forward(params, x), atol=1e-5)
print(*[str(one.message)[:31] for one in told if "forward" in str(one.message)])
try:
    fresnet.compile_inference(fresnet.quantize(params, [x]), x)
except fresnet.FresnetError as error:
    print(str(error)[:50])
try:
    fresnet.export(params, "net.pt2", compiled=True)
except fresnet.FresnetError as error:
    print("C++ compiler" in str(error))
"""


@pytest.mark.slow
def test_without_onednn_and_a_compiler_results_are_right_or_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE],
        env={
            "PATH": str(tmp_path),
            "PYTHONPATH": str(CONTRIBUTING.parent),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "PyTorch does not compile this n",
        "compile_inference expects oneDNN for int8, on a pr",
        "True",
    ], done.stderr


def test_the_table_of_private_names_is_whole() -> None:
    """Every private name in the package stands in the table of CONTRIBUTING.md."""
    table = CONTRIBUTING.read_text().partition("## Private names of PyTorch")[2]
    source = "\n".join(path.read_text() for path in Path(fresnet.__file__).parent.rglob("*.py"))
    names = set(re.findall(r"torch(?:\.\w+)*?\.(_[a-zA-Z]\w+)", source))
    names |= set(re.findall(r"from torch\.?\w* import (_\w+)", source))
    names |= {*transform_stack.NAMES, onednn.TRACE, onednn.FUNCTION, *cudnn.KERNELS}
    names |= {name for _, name in int8_kernels.OPERATORS}
    missing = {name for name in names if name not in table}
    assert not missing
