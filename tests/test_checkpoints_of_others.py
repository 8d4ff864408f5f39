"""The network is found in training scripts' checkpoints, and nothing that they hold is run."""

import datetime
import io
import os
import pathlib
import pickle
import resource
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from assertions import assert_close, assert_same
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from torch import Tensor, nn
from torch.nn import functional as F

import fresnet
from fresnet import FresnetError, Params, Spec, tree
from fresnet.network.nodes import BasicBlock, CentredZeroPad, NoShortcut, Stem3x3, ZeroPad
from fresnet.weights import pickles, torch_files

SPEC = Spec(BasicBlock, (1, 1), width=4)
PARAMS = fresnet.init(0, SPEC, num_classes=3)
ENCODER = fresnet.init(0, SPEC, num_classes=0)
OTHER = fresnet.init(1, SPEC, num_classes=3)
STATE = fresnet.to_state_dict(PARAMS)
OTHERS = fresnet.to_state_dict(OTHER)


def behind(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def without_head(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


HEAD = {name: value for name, value in STATE.items() if name.startswith("fc.")}


AVERAGES = (
    "state_dict_ema",
    "model_state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema_model",
    "ema",
    "teacher",
)


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_is_taken_before_the_weights_and_told(name: str) -> None:
    """As timm does; its maker evaluates the average."""
    assert_same(fresnet.from_state_dict({name: OTHERS, "epoch": 3}), OTHER)
    for raw in ("state_dict", "model", "net", "student"):
        with pytest.warns(UserWarning, match=f"an average of the weights, '{name}', stands beside"):
            params = fresnet.from_state_dict({raw: STATE, name: OTHERS})
        assert_same(params, OTHER)
    with pytest.warns(UserWarning, match="an average of the weights, 'ema_model.', stands beside"):
        params = fresnet.from_state_dict(
            {**behind("model.", STATE), **behind("ema_model.", OTHERS)}
        )
    assert_same(params, OTHER)


@pytest.mark.parametrize("name", ["net", "network", "module", "model_state", "student"])
def test_wrappers(name: str) -> None:
    assert_same(fresnet.from_state_dict({name: STATE, "best_acc": 93.1}), PARAMS)
    assert_same(fresnet.from_state_dict({"model": {"name": "x"}, name: STATE}), PARAMS)


def test_a_long_way_to_a_network_is_not_gone() -> None:
    """A file names a long name again and again in a few bytes, and a way of them takes memory."""
    long = "x" * 10**6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FresnetError, match="expects the names of torchvision"):
        fresnet.from_state_dict({f"a{i}": {long: {"model": STATE.copy()}} for i in range(300)})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000
    deep = {"callbacks": {"EMA{'decay': 0.999, 'every_n_steps': 1}": {"state": {"net": STATE}}}}
    assert_same(fresnet.from_state_dict(deep), PARAMS)


def test_several_networks_are_refused_by_name() -> None:
    for mapping, message in (
        ({"model": STATE, "net": OTHERS}, "state dicts under 'model' and 'net': pass those of one"),
        (
            {**behind("a.", STATE), **behind("b.", OTHERS)},
            "entries behind 'a.' and 'b.': pass those of one",
        ),
        ({"ema": STATE, "model_ema": OTHERS}, "state dicts under 'ema' and 'model_ema'"),
        (
            {**behind("body.", without_head(STATE)), **HEAD, **behind("head.", HEAD)}
            | {"head.fc.weight": HEAD["fc.weight"]},
            "expects one head; got fc and head.fc",
        ),
    ):
        with pytest.raises(FresnetError, match=message):
            fresnet.from_state_dict(mapping)


@pytest.mark.parametrize("prefix", ["model.", "module.", "module.backbone.", "a.b.c."])
def test_what_stands_beside_a_prefix_is_left_out_and_told(prefix: str) -> None:
    beside = {
        "criterion.weight": torch.ones(3),
        "train_acc.total": torch.tensor(4),
        "queue": torch.ones(4, 8),
        **behind("momentum_encoder.", OTHERS),
    }
    mapping = {**behind(prefix, STATE), **beside}
    with pytest.warns(UserWarning, match="left out: criterion.weight, train_acc.total, queue and"):
        params = fresnet.from_state_dict(mapping)
    assert_same(params, PARAMS)


def test_within_the_network_nothing_is_left_out() -> None:
    for prefix in ("", "module."):
        extra = {f"{prefix}layer1.0.extra.weight": torch.ones(3)}
        with pytest.raises(FresnetError, match=r"layer1.0.extra.weight is unexpected"):
            fresnet.from_state_dict({**behind(prefix, STATE), **extra})
    with pytest.raises(FresnetError, match=r"criterion.weight is unexpected"):
        fresnet.from_state_dict({**STATE, "criterion.weight": torch.ones(3)})


@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone."])
@pytest.mark.parametrize("head", ["fc", "head.fc", "classifier", "linear", "last_linear", "head"])
def test_a_head_may_stand_before_the_prefix(prefix: str, head: str) -> None:
    renamed = {name.replace("fc", head): value for name, value in HEAD.items()}
    encoder = behind(prefix, without_head(STATE))
    assert_same(fresnet.from_state_dict({**encoder, **renamed}), PARAMS)
    assert_same(fresnet.from_state_dict(encoder), ENCODER)


def test_a_segmentation_backbone_loads_with_a_head_or_without() -> None:
    classifier = {
        "classifier.0.weight": torch.ones(2, 8, 3, 3),
        "classifier.1.weight": torch.ones(2),
        "aux_classifier.4.bias": torch.ones(2),
    }
    mapping = {**behind("backbone.", without_head(STATE)), **classifier}
    told = "entries beside the network are left out: classifier.0.weight, .*; "
    with pytest.warns(UserWarning, match=f"{told}if they are of a layer between its body and its"):
        params = fresnet.from_state_dict({**mapping, **HEAD})
    assert_same(params, PARAMS)
    with pytest.warns(UserWarning, match=f"{told}it has no head: if one of them is, call th"):
        params = fresnet.from_state_dict(mapping)
    assert_same(params, ENCODER)


@pytest.mark.parametrize("prefix", ["", "resnet.", "backbone.resnet."])
def test_hugging_faces_models_and_backbones(prefix: str) -> None:
    """`ResNetModel` has the names of its classifier without `resnet.`, and no head."""
    state = fresnet.to_state_dict(PARAMS, "huggingface")
    body = {name.removeprefix("resnet."): value for name, value in state.items()}
    body = {name: value for name, value in body.items() if not name.startswith("classifier")}
    assert_same(fresnet.from_state_dict(behind(prefix, body)), ENCODER)
    assert_same(fresnet.from_state_dict({**behind(prefix, body), **HEAD}), PARAMS)


def option_a(state: dict[str, Tensor], x: Tensor, shortcut: Callable[[Tensor], Tensor]) -> Tensor:
    """akamaster's CIFAR network by PyTorch's own functions, with a shortcut handed in."""

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var = (state[f"{name}.running_{moment}"] for moment in ("mean", "var"))
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.relu(norm("bn1", F.conv2d(x, state["conv1.weight"], padding=1)))
    for stage in (1, 2):
        at, stride = f"layer{stage}.0.", stage
        y = F.conv2d(x, state[f"{at}conv1.weight"], stride=stride, padding=1)
        y = F.relu(norm(f"{at}bn1", y))
        y = norm(f"{at}bn2", F.conv2d(y, state[f"{at}conv2.weight"], padding=1))
        x = F.relu(y + (x if stride == 1 else shortcut(x[:, :, ::2, ::2])))
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


def test_where_option_a_pads_is_told_by_the_architecture_and_else_warned_of() -> None:
    """Names do not tell three published networks apart: zeros after, on both sides, no shortcut."""
    spec = Spec(BasicBlock, (1, 1), width=4, stem=Stem3x3, shortcut=ZeroPad)
    made = fresnet.init(0, spec, num_classes=3, dtype=torch.float64)
    # to_state_dict refuses option A, which no library has; a projection's names are left out here.
    projected = Spec(BasicBlock, (1, 1), width=4, stem=Stem3x3)
    like = fresnet.init(0, projected, num_classes=3, dtype=torch.float64)
    state = {n: v for n, v in fresnet_names(like).items() if "downsample" not in n}
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    expected = {
        ZeroPad: option_a(state, x, lambda y: F.pad(y, (0, 0, 0, 0, 0, 4))),
        CentredZeroPad: option_a(state, x, lambda y: F.pad(y, (0, 0, 0, 0, 2, 2))),
    }
    assert (expected[ZeroPad] - expected[CentredZeroPad]).norm() > 0.01 * expected[ZeroPad].norm()
    for kind, logits in expected.items():
        told = Spec(BasicBlock, (1, 1), stem=Stem3x3, shortcut=kind)
        params = fresnet.from_state_dict(state, architecture=told)
        assert_close(fresnet.forward(params, x), logits, 1e-12)
    plain = Spec(BasicBlock, (1, 1), stem=Stem3x3, shortcut=NoShortcut)
    params = fresnet.from_state_dict(state, architecture=plain)
    assert [type(b.shortcut) for s in params.weights.stages for b in s] == [NoShortcut] * 2
    with pytest.warns(UserWarning, match="names do not tell how shortcuts get more channels"):
        params = fresnet.from_state_dict(state)
    assert_close(fresnet.forward(params, x), expected[ZeroPad], 1e-12)
    assert tree.map(lambda leaf: leaf.shape, params) == tree.map(lambda leaf: leaf.shape, made)


def fresnet_names(params: Params) -> dict[str, Tensor]:
    """The entries of any network under canonical names."""
    from fresnet.weights.state_dicts import named_leaves

    return named_leaves(params)


def test_what_an_architecture_says_otherwise_is_refused() -> None:
    for architecture, message in (
        ("resnet5", "did you mean 'resnet50'"),
        (50, "expects architecture to be a Spec or a name in SPECS; got 50"),
        ("resnet18", r"expects stages of \(2, 2, 2, 2\), as architecture says; got entries of"),
        (Spec(BasicBlock, (1, 1), stem=Stem3x3), "expects the stem Stem3x3"),
        (Spec(depths=(1, 1)), "expects blocks Bottleneck, as architecture says; got entries of B"),
        (
            Spec(BasicBlock, (1, 1), attention=fresnet.nodes.SqueezeExcite),
            "expects attention SqueezeExcite",
        ),
    ):
        with pytest.raises(FresnetError, match=message):
            fresnet.from_state_dict(STATE, architecture=architecture)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)]
)
@pytest.mark.parametrize("norms_wide", [True, False])
def test_mixed_dtypes_take_the_narrowest_that_holds_all(
    dtypes: tuple[torch.dtype, torch.dtype], norms_wide: bool
) -> None:
    """The usual mixed checkpoint has bfloat16 convolutions beside float32 norms."""
    narrow, wide = dtypes
    state = {
        name: value.to(wide if ("bn" in name) is norms_wide else narrow)
        if value.is_floating_point()
        else value
        for name, value in STATE.items()
    }
    params = fresnet.from_state_dict(state)
    assert {leaf.dtype for leaf in tree.leaves(params.weights)} == {wide}
    assert torch.equal(params.weights.stem.layer.conv, state["conv1.weight"].to(wide))
    assert torch.equal(params.weights.stem.layer.norm.scale, state["bn1.weight"].to(wide))


def test_weights_in_several_files(tmp_path: Path) -> None:
    names = sorted(STATE)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, listed in shards.items():
        safetensors.torch.save_file({n: STATE[n] for n in listed}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    places = {name: file for file, listed in shards.items() for name in listed}
    index.write_text(str({"weight_map": places}).replace("'", '"'), encoding="utf-8")
    for path in (tmp_path, index):
        assert_same(fresnet.load(path), PARAMS)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FresnetError, match=r"lists b.safetensors, which is not there"):
        fresnet.load(tmp_path)
    index.write_text("{}", encoding="utf-8")
    with pytest.raises(FresnetError, match="lists no files"):
        fresnet.load(tmp_path)
    index.unlink()
    with pytest.raises(FresnetError, match="the folder has none of model"):
        fresnet.load(tmp_path)


BESIDE: dict[str, Any] = {
    "best_acc": np.float64(93.1),
    "history": np.arange(3),
    "where": pathlib.PurePosixPath("runs"),
    "when": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
    "by_class": defaultdict(list, {"cat": [1, 2]}),
    "counts": Counter("abca"),
    "size": torch.Size([3, 4]),
    "dtype": torch.float32,
    "device": torch.device("cpu"),
    "kinds": {1, 2, frozenset({3})},
    "module": nn.Linear(2, 2),
    "complex": 1j,
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("what", BESIDE)
def test_harmless_objects_beside_weights(what: str, old: bool, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    state = {"state_dict": OrderedDict(STATE), what: BESIDE[what]}
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        params = fresnet.load(path)
    assert_same(params, PARAMS)
    made = what in ("by_class", "counts", "size", "dtype", "kinds", "complex")
    assert bool(told) is not made
    if told:
        assert "is left out, and nothing of it was run" in str(told[0].message)


@pytest.mark.parametrize("old", [False, True])
@examples(30)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]),
    shape=st.lists(st.integers(0, 4), max_size=4),
    view=st.sampled_from(["whole", "transposed", "part", "parameter", "expanded"]),
)
def test_tensors_are_read_as_torch_reads_them(
    tmp_path_factory: pytest.TempPathFactory,
    old: bool,
    dtype: torch.dtype,
    shape: list[int],
    view: str,
) -> None:
    tensor: Any = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    match view:
        case "transposed":
            tensor = tensor.mT if tensor.ndim > 1 else tensor
        case "part":
            tensor = tensor[1:] if tensor.ndim else tensor
        case "parameter":
            tensor = nn.Parameter(tensor, requires_grad=False)
        case "expanded":
            tensor = tensor.expand(3, *tensor.shape)
    path = tmp_path_factory.mktemp("tensors") / "tensors.pth"
    content = {
        "padding": torch.ones(2**14),
        "a": tensor,
        "b": [tensor, (tensor.T if tensor.ndim == 2 else tensor,)],
    }
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    found, skipped = torch_files.read(path)
    expected = torch.load(path, weights_only=True)
    assert skipped == ()
    for a, b in zip(
        (found["a"], found["b"][0], found["b"][1][0]),
        (expected["a"], expected["b"][0], expected["b"][1][0]),
        strict=True,
    ):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)
    assert found["a"].untyped_storage().data_ptr() == found["b"][0].untyped_storage().data_ptr()


RAN: list[str] = []


def ran(*_: object) -> None:
    RAN.append("code")


class Reduces:
    """An object whose pickle says what to call."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize(
    "evil",
    [
        Reduces(os.system, ("exit 1",)),
        Reduces(eval, ("RAN.append(1)",)),
        Reduces(ran, ()),
        Reduces(getattr, ("os", "system")),
        Reduces(torch.load, ("other.pth",)),
        Reduces(Reduces, (), {"reduced": 1}, iter([1]), iter([(1, 2)])),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_a_file_that_would_run_code_runs_none(evil: Reduces, old: bool, tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": STATE, "x": evil}, path, _use_new_zipfile_serialization=not old)
    RAN.clear()
    with pytest.warns(UserWarning, match="nothing of it was run: "):
        params = fresnet.load(path)
    assert_same(params, PARAMS)
    assert RAN == []


def test_names_in_a_file_give_nothing_that_is_there() -> None:
    """Whatever name a pickle has, it gets a function of the reader or a class that does nothing."""
    budget = pickles.Budget(0)
    reader = pickles.Unpickler(io.BytesIO(), lambda *_: None, {}, budget)  # type: ignore[arg-type]
    names = [(module, name) for module in ("os", "builtins", "torch", "sys") for name in dir(os)]
    names += [("builtins", name) for name in dir(__builtins__)]
    names += [("torch", name) for name in dir(torch)]
    names += [("torch.storage", "_load_from_bytes"), ("fresnet.weights.pickles", "CALLS")]
    for module, name in names:
        given = reader.find_class(module, name)
        is_class = isinstance(given, type) and issubclass(given, pickles.Skipped)
        assert is_class or isinstance(given, (pickles._Call, torch.dtype)), (module, name)


def crafted(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("crafted/data.pkl", data)
        archive.writestr("crafted/byteorder", "little")
    return path


def test_nothing_is_set_on_anything(tmp_path: Path) -> None:
    """A pickle may say to set attributes of what it has got. None is set."""
    before = dict(pickles.CALLS)
    for at in (b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nfloat32\n", b"cos\nsystem\n"):
        path = crafted(tmp_path / "a.pth", at + b"}X\x08\x00\x00\x00functionI1\nsb.")
        torch_files.read(path)
    assert before == pickles.CALLS
    assert not hasattr(torch.float32, "function")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02\x82\x4d)R.",  # an extension by its number
        b"(S'ls'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'ls'\no.",  # OBJ
        b"P0\n.",  # a persistent id that is a text
    ],
)
def test_instructions_that_torch_save_does_not_write_are_refused(
    data: bytes, tmp_path: Path
) -> None:
    with pytest.raises(FresnetError, match="a pickle of instructions that"):
        torch_files.read(crafted(tmp_path / "a.pth", data))


@pytest.mark.parametrize(
    "data",
    [
        b"})" + b"\x85" * 400_000 + b"K\x01s.",  # a key of tuples within tuples
        b"\x8f(" + b")" + b"\x85" * 400_000 + b"\x90.",  # a set of them
        b"\x80\x02]r" + (30_000_000).to_bytes(4, "little") + b".",  # a memo far out
    ],
)
def test_small_files_neither_end_the_process_nor_fill_memory(data: bytes, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch_files.read(crafted(tmp_path / "a.pth", data))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


FLOATS = b"ctorch\nFloatStorage\n"
MORE_THAN_THEY_HOLD = {
    # a key of tuples, each of which holds the one before twice
    "a key": b"\x80\x02("
    + text("storage")
    + FLOATS
    + b")"
    + b"2\x86" * 25
    + text("cpu")
    + b"K\x01tQ.",
    # keys that are no numbers, of which none is another
    "keys": b"\x80\x02"
    + FLOATS
    + b"q\x000("
    + (b"(" + text("storage") + b"h\x00G\x7f\xf8" + bytes(6) + text("cpu") + b"K\x01tQ") * 3000
    + b"l.",
    # the product of a text and a number
    "a size": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(("
    + text("storage")
    + FLOATS
    + text("0")
    + text("cpu")
    + b"K\x01tQK\x00("
    + text("x" * 100)
    + b"\x8a\x05"
    + (10**7).to_bytes(5, "little")
    + b"tK\x01\x85\x89NtR.",
    "bytes": b"\x80\x05\x96" + (10**9).to_bytes(8, "little") + b".",
    # copies of a list, and of a mapping
    "sizes": b"\x80\x02]q\x00("
    + b"N" * 60000
    + b"e0ctorch\nSize\nq\x010h\x00\x85q\x020("
    + b"h\x01h\x02R" * 2000
    + b"l.",
    "mappings": b"\x80\x02}q\x00("
    + b"".join(b"J" + i.to_bytes(4, "little") + b"N" for i in range(20000))
    + b"u0ccollections\nOrderedDict\nq\x010h\x00\x85q\x020("
    + b"h\x01h\x02R" * 1000
    + b"l.",
    "names": b"\x80\x02(" + b"".join(b"ca\nb%d\n" % i for i in range(100_000)) + b"l.",
}


@pytest.mark.parametrize("what", MORE_THAN_THEY_HOLD)
def test_files_that_describe_more_than_they_hold_fill_no_memory(what: str, tmp_path: Path) -> None:
    path = crafted(tmp_path / "a.pth", MORE_THAN_THEY_HOLD[what])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("crafted/data/0", bytes(4))
        archive.writestr("crafted/data/nan", bytes(100_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(FresnetError):
        torch_files.read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as source,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(FresnetError, match=r"an archive that is compressed, as torch.save writes"):
        fresnet.load(tmp_path / "b.pth")


def test_what_python_2_and_odd_tensors_leave_in_files(tmp_path: Path) -> None:
    """Python 2 wrote the entries of a mapping as an argument."""
    pairs = [[name, value] for name, value in STATE.items()]
    beside = {
        "fft": torch.ones(2, dtype=torch.complex64),
        "negative": torch._neg_view(torch.ones(2)),
    }
    ordered = Reduces(OrderedDict, (pairs,))
    for old in (False, True):
        path = tmp_path / "a.pth"
        torch.save({"state_dict": ordered, **beside}, path, _use_new_zipfile_serialization=not old)
        assert_same(fresnet.load(path), PARAMS)
        found, _ = torch_files.read(path)
        assert torch.equal(found["fft"], beside["fft"])
        assert isinstance(found["negative"], pickles.Skipped)  # it would be read as +1


def test_modules_programs_and_trees_say_what_to_save(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    model = nn.Linear(2, 2)
    for content, message in (
        (model, "it holds a torch.nn.modules.linear.Linear.*model.state_dict"),
        (PARAMS, r"it holds a fresnet.*Params.*fresnet.save\(params, path\) keeps weights"),
        ([STATE], "expects a mapping of names to tensors"),
    ):
        torch.save(content, path)
        with pytest.raises(FresnetError, match=message):
            fresnet.load(path)
    path.write_bytes(pickle.dumps(STATE["fc.bias"].tolist()))
    with pytest.raises(FresnetError, match=r"a pickle, but not of torch.save"):
        fresnet.load(path)
    named = tmp_path / "pickle.safetensors"
    torch.save(STATE, named)
    assert_same(fresnet.load(named), PARAMS)


@pytest.mark.parametrize("old", [False, True])
def test_few_bytes_do_not_become_a_large_tensor(old: bool, tmp_path: Path) -> None:
    path = tmp_path / "large.pth"
    large = torch.ones(1).expand(10**6, 10**4)
    torch.save({**STATE, "conv1.bias": large}, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(FresnetError, match="what it describes is many times larger than the file"):
        fresnet.load(path)


def test_nor_do_many_tensors_together(tmp_path: Path) -> None:
    """Each of these is smaller than the file. Weights that share their memory are not refused."""
    large = {f"entry{i}": torch.ones(1).expand(500, 500) for i in range(1000)}
    torch.save({"model": STATE, **large}, tmp_path / "large.pth")
    with pytest.raises(FresnetError, match="what it describes is many times larger than the file"):
        fresnet.load(tmp_path / "large.pth")
    both = {name: value.view(value.shape) for name, value in STATE.items()}
    torch.save({"model": STATE, "optimizer": both}, tmp_path / "both.pth")
    assert_same(
        fresnet.from_state_dict(torch_files.read(tmp_path / "both.pth").found["model"]), PARAMS
    )


def test_a_second_head_is_refused_by_name() -> None:
    """Else the one that is added to a whole network would go unread."""
    for prefix in ("", "module.", "module.encoder_q."):
        for head in ("fc", "head.fc", "classifier"):
            if prefix + head == "fc":
                continue
            mapping = {**behind(prefix, STATE), f"{head}.weight": torch.ones(5, 8)}
            with pytest.raises(FresnetError, match=r"expects one head; got .*: leave out the othe"):
                fresnet.from_state_dict(mapping)


def test_an_average_has_the_weights_sizes_and_its_own_head() -> None:
    large = fresnet.to_state_dict(fresnet.init(0, Spec(BasicBlock, (2, 1), width=4), num_classes=3))
    for mapping in (
        {"student": STATE, "teacher": large},
        {**behind("model.", STATE), **behind("teacher.", large)},
        {"model": STATE, "best_model": OTHERS},
        {"model": STATE, "discriminator": OTHERS},
    ):
        with pytest.raises(FresnetError, match="expects one network; got"):
            fresnet.from_state_dict(mapping)
    both = {**behind("backbone.", without_head(STATE)), **behind("head.", HEAD)}
    averaged = {
        **behind("ema.backbone.", without_head(OTHERS)),
        "ema.head.fc.weight": OTHERS["fc.weight"],
        "ema.head.fc.bias": OTHERS["fc.bias"],
    }
    with pytest.warns(UserWarning, match="an average of the weights, 'ema.backbone.', stands besi"):
        assert_same(fresnet.from_state_dict({**both, **averaged}), OTHER)
    swapped = {"state_dict": OTHERS, "ema_state_dict": {"steps": 3, **behind("module.", STATE)}}
    with pytest.warns(UserWarning, match="the average under 'state_dict' is taken, where MMEng"):
        assert_same(fresnet.from_state_dict(swapped), OTHER)


def test_a_root_beside_an_average_may_have_nothing_more() -> None:
    both = {**STATE, **behind("ema.", OTHERS)}
    with pytest.warns(UserWarning, match="an average of the weights, 'ema.', stan") as told:
        assert_same(fresnet.from_state_dict(both), OTHER)
    assert len(told) == 1
    with pytest.raises(FresnetError, match="expects one network; got entries behind 'ema"):
        fresnet.from_state_dict({**both, "bottleneck.weight": torch.ones(2)})


def test_kuangliu_calls_projections_shortcuts() -> None:
    state = {name.replace("downsample", "shortcut"): value for name, value in STATE.items()}
    renamed = {name.replace("fc.", "linear."): value for name, value in state.items()}
    assert_same(fresnet.from_state_dict({"net": behind("module.", renamed)}), PARAMS)


def test_a_name_of_the_family_says_sizes_too(tmp_path: Path) -> None:
    params = fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=10)
    fresnet.save(params, tmp_path / "a.safetensors")
    assert_same(fresnet.load(tmp_path / "a.safetensors", architecture="resnet20"), params)
    for wrong in ("resnet20_centred", "resnet20b", "resnet32", "plain20", "resnet50"):
        with pytest.raises(FresnetError, match="as architecture says"):
            fresnet.load(tmp_path / "a.safetensors", architecture=wrong)
    wide = fresnet.init(0, fresnet.SPECS["wide_resnet50_2"], num_classes=2)
    with pytest.raises(
        FresnetError, match=r"layer1.0.conv1.weight to be \(64, 64, 1, 1\), as arch"
    ):
        fresnet.from_state_dict(fresnet.to_state_dict(wide), architecture="resnet50")
