"""Files make exact round trips, other libraries' checkpoints load, and the rest is an error."""

import argparse
import json
import math
import os
import pickle
import random
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import reference
import safetensors.torch
import timm
import torch
import transformers
from assertions import assert_close, assert_same, unmutated
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, tiny_params

import fresnet
from fresnet import FresnetError, Params, Preset, Spec, optim, training, tree
from fresnet.__main__ import main
from fresnet.data.presets import preset_of
from fresnet.network.nodes import (
    BasicBlock,
    Bottleneck,
    BottleneckV1,
    DilatedStage,
    NoShortcut,
    PooledProjection,
)
from fresnet.weights import files, hub, storage

PARAMS = fresnet.init(0, Spec(Bottleneck, (1, 2), 4, groups=2, group_width=32), num_classes=3)
STATE = fresnet.to_state_dict(PARAMS)
PRESET = Preset(9, 8, "bicubic")


def test_a_file_from_before_trees_held_layers_is_read_as_then() -> None:
    """It has grouped V1 bottlenecks, frozen norms and a dilated stage, and gives its old logits."""
    params = fresnet.load(Path(__file__).parent / "before_layers.safetensors")
    x = torch.linspace(-1, 1, 3 * 16 * 16, dtype=torch.float64).view(1, 3, 16, 16)
    expected = [[-0.00552044874434407, 0.2559785741717695, 0.2774513788031788]]
    assert_close(fresnet.forward(params, x), torch.tensor(expected, dtype=torch.float64), 1e-12)
    first, last = params.weights.stages
    assert {type(block) for block in (*first, *last.blocks)} == {BottleneckV1}
    assert type(last) is DilatedStage
    norms = {type(unit.norm).__name__ for unit in first[0][:3]}
    assert norms == {"Norm", "FrozenNorm"}


def refusal(path: Any) -> str:
    """What `load` says when it refuses this file."""
    with pytest.raises(FresnetError) as caught:
        fresnet.load(path)
    message = str(caught.value)
    assert message.startswith(f"cannot load {path}: ")
    return message.removeprefix(f"cannot load {path}: ")


@examples(40)
@given(
    params=tiny_params(),
    frozen=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    suffix=st.sampled_from([".safetensors", ".net", ""]),
)
def test_every_network_comes_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory,
    params: Params,
    frozen: bool,
    dtype: torch.dtype,
    suffix: str,
) -> None:
    path = tmp_path_factory.mktemp("files") / f"network{suffix}"
    wide = torch.promote_types(dtype, torch.float32)
    params = Params(
        tree.map(lambda w: w.to(dtype), params.weights),
        tree.map(lambda s: s.to(wide), params.stats),
    )
    if frozen and tree.leaves(params.stats):
        params = fresnet.freeze(params, lambda path: path[-2] == "layer1")
    with unmutated(params):
        fresnet.save(params, path)
    loaded = fresnet.load(path)
    assert_same(loaded, params)
    tree.map(torch.equal, loaded, params)  # refuses other node types, even without leaves
    assert [found.name for found in path.parent.iterdir()] == [path.name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_what_is_loaded_is_laid_out_as_what_was_saved(name: str, tmp_path: Path) -> None:
    params = fresnet.init(0, fresnet.SPECS[name])
    fresnet.save(params, tmp_path / "a")
    loaded = fresnet.load(tmp_path / "a")
    strides = [[leaf.stride() for leaf in tree.leaves(p)] for p in (loaded, params)]
    assert strides[0] == strides[1]


def test_torchvision_and_timm_read_what_is_saved(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    params = fresnet.init(0, fresnet.RESNET18, num_classes=5)
    fresnet.save(params, path)
    model = reference.torchvision.models.resnet18(num_classes=5)
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    assert_same(reference.params(model), params)
    params = fresnet.init(0, fresnet.SPECS["resnet26d"], num_classes=5)
    fresnet.save(params, path)
    model = timm.create_model("resnet26d", num_classes=5, checkpoint_path=str(path))
    assert_same(reference.params(model), params)


@pytest.mark.parametrize("layout", ["torchvision", "huggingface"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_checkpoints_of_others_are_read(
    layout: str, suffix: str, wrapped: bool, tmp_path: Path
) -> None:
    spec = Spec(BottleneckV1, (1, 2), width=4)
    params = fresnet.init(0, spec, num_classes=3)
    state, path = fresnet.to_state_dict(params, layout), tmp_path / f"checkpoint.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(state, path)
    elif wrapped:
        prefixed = {f"module.{name}": value for name, value in state.items()}
        args = argparse.Namespace(lr=0.1, epochs=90)
        torch.save({"epoch": 3, "state_dict": prefixed, "args": args}, path)
    else:
        torch.save(state, path)
    besides = wrapped and suffix == "pth"
    with pytest.warns(UserWarning, match="argparse.Namespace") if besides else nullcontext():
        assert_same(fresnet.load(path, architecture=spec), params)
        assert_same(fresnet.load(str(path)).stats.stem, params.stats.stem)


HUB = """
import torch, fresnet, sys
params = fresnet.load(sys.argv[1])
print(type(params.weights.stages[0][0]).__name__)
print(fresnet.forward(params, torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).tolist())
"""


def hugging_face(in_bottleneck: bool) -> Any:
    """A small network of Hugging Face's."""
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[32, 64],
        depths=[1, 1],
        downsample_in_bottleneck=in_bottleneck,
    )
    return transformers.ResNetForImageClassification(config).eval()


def from_hub(cache: Path, repository: str) -> tuple[int, list[str], str]:
    """`load` of a repository in a process that has only this cache and no connection."""
    done = subprocess.run(
        [sys.executable, "-c", HUB, repository],
        env={**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("in_bottleneck", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_a_repository_of_hugging_face_is_read_from_its_cache(
    in_bottleneck: bool, safe: bool, tmp_path: Path
) -> None:
    """The repository's configuration says where bottlenecks stride."""
    model = hugging_face(in_bottleneck)
    folder = tmp_path / "models--someone--some-resnet"
    snapshot = folder / "snapshots" / "0123abcd"
    model.save_pretrained(snapshot)
    if not safe:
        (snapshot / "model.safetensors").unlink()
        torch.save(model.state_dict(), snapshot / "pytorch_model.bin")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abcd")
    code, printed, err = from_hub(tmp_path, "someone/some-resnet")
    assert code == 0, err
    assert printed[0] == ("BottleneckV1" if in_bottleneck else "Bottleneck")
    with torch.no_grad():
        logits = model(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).logits
    assert torch.allclose(torch.tensor(json.loads(printed[1])), logits, atol=1e-5)


@pytest.mark.slow
def test_a_repository_that_is_not_to_be_had_is_named(tmp_path: Path) -> None:
    code, _, err = from_hub(tmp_path, "someone/nothing")
    assert code == 1
    expected = "cannot load someone/nothing: there is no such file, and no such repository with a"
    assert expected in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "its config.json is no object"),
        ({"hidden_act": "gelu"}, "its activation is gelu"),
        ({"downsample_in_first_stage": True}, "its first stage strides"),
        (
            {"architecture": "resnetv2_50d_evos"},
            "architecture is resnetv2_50d_evos, not a ResNet that fresnet",
        ),
        ({"architecture": "resnet50", "model_args": {"output_stride": 8}}, "arguments of its own"),
    ],
)
def test_a_repository_of_other_computations_is_refused(config: Any, message: str) -> None:
    """Entries of such a repository may have the same names and shapes as ours."""
    with pytest.raises(FresnetError, match=message):
        hub._architecture(config)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet50d",
        "resnet10t",
        "seresnextaa201d_32x8d",
        "ecaresnet50d_pruned",
        "resnext101_64x4d",
        "resnetaa50d",
        "resnetrs50",
        "resnetv2_50",
    ],
)
def test_a_repository_of_a_plain_resnet_is_not(name: str) -> None:
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    told = hub._architecture({"architecture": config.architecture, "num_classes": 1000})
    assert told == fresnet.SPECS.get(config.architecture)
    hub._architecture(transformers.ResNetConfig().to_dict())


@pytest.mark.parametrize("in_bottleneck", [False, True])
def test_a_folder_of_hugging_face_says_where_bottlenecks_stride(
    in_bottleneck: bool, tmp_path: Path
) -> None:
    """The path may be that of the folder or of the file in it."""
    model = hugging_face(in_bottleneck)
    model.save_pretrained(tmp_path)
    spec = Spec(BottleneckV1, (1, 1)) if in_bottleneck else None
    expected = fresnet.from_state_dict(model.state_dict(), architecture=spec)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        loaded = fresnet.load(path)
        assert_same(loaded, expected)
        tree.map(torch.equal, loaded, expected)
    model.config.hidden_act = "gelu"
    model.config.save_pretrained(tmp_path)
    assert refusal(tmp_path) == "its activation is gelu; networks here have relu"
    (tmp_path / "config.json").write_text("{")
    assert "Expecting property name" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("timm/resnet50.a1_in1k", True),
        ("microsoft/resnet-50", True),
        ("models/resnet50.pth", False),
        ("./net", False),
        ("../net", False),
        ("a/b/c", False),
        ("net", False),
        ("tests/net", False),
        (Path("microsoft/resnet-50"), False),
    ],
)
def test_what_is_meant_for_a_file_never_goes_to_the_net(
    path: Any, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    assert hub.is_repository(path) is expected


class Harmful:
    """An object that would write a file if it were unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.victim,)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        (
            "resnet50",
            "fresnet.init(0, fresnet.SPECS['resnet50']) draws one, and python -m fresnet m",
        ),
        ("resnet50.a1_in1k", "did you mean 'timm/resnet50.a1_in1k', a repository?"),
        ("https://host/resnet50.pth", "torch.hub.download_url_to_file(url, path) downloads a file"),
        ("ResNet50_Weights.IMAGENET1K_V2", "get_weight('ResNet50_Weights.IMAGENET1K_V2').url is"),
    ],
)
def test_what_is_no_file_but_a_name_gets_a_hint(
    name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hint in refusal(name)
    monkeypatch.chdir(tmp_path)
    if "/" not in name:
        fresnet.save(PARAMS, name)
        assert_same(fresnet.load(name), PARAMS)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    path, victim = tmp_path / "a.pth", tmp_path / "victim"
    torch.save({"model": Harmful(victim)}, path)
    with pytest.warns(UserWarning, match="nothing of it was run: "):
        assert "got 1 entries: model" in refusal(path)
    path.write_bytes(pickle.dumps({"model": Harmful(victim)}))
    assert refusal(path) == "a pickle, but not of torch.save"
    assert not victim.exists()


def saved(path: Path, **changed: Any) -> Path:
    safetensors.torch.save_file({**STATE, **changed}, path)
    return path


BAD = {
    "missing": (lambda path: None, "No such file or directory"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "a folder": (lambda path: path.mkdir(), "the folder has none of model.safetensors, model."),
    "a folder of states": (
        lambda path: training.save_state(PARAMS, path, step=1),
        "step-000000000001.safetensors?",
    ),
    "a text": (
        lambda path: path.write_text("no weights here"),
        "it is no file of safetensors or torch.save",
    ),
    "another architecture": (
        lambda path: torch.save(timm.create_model("skresnet18").state_dict(), path),
        "got what looks like a ResNet with selective kernels (SKNet)",
    ),
    "no state dict": (lambda path: torch.save([1, 2], path), "expects a mapping of names"),
    "a tensor": (lambda path: torch.save(torch.ones(3), path), "expects a mapping of names"),
    "not a number": (
        lambda path: saved(path, **{"layer2.0.bn1.weight": torch.full((8,), torch.nan)}),
        "layer2.0.bn1.weight holds values that are not finite",
    ),
    "infinite": (
        lambda path: saved(path, **{"bn1.running_mean": torch.full((4,), -torch.inf)}),
        "bn1.running_mean holds values that are not finite",
    ),
    "a negative variance": (
        lambda path: saved(path, **{"bn1.running_var": -torch.ones(4)}),
        "bn1.running_var holds negative variances",
    ),
    "misshapen": (
        lambda path: saved(path, **{"fc.bias": torch.ones(4)}),
        "fc.bias: expected float (3,), got float32 (4,)",
    ),
    "too long": (
        lambda path: saved(path).open("ab").write(b"more"),
        "not a safetensors file: Error while deserializing header",
    ),
    "truncated": (
        lambda path: path.write_bytes(saved(path).read_bytes()[:-10]),
        "not a safetensors file: Error while deserializing header",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_a_file_that_holds_no_network_is_refused_by_name_and_reason(
    name: str, tmp_path: Path
) -> None:
    make, reason = BAD[name]
    make(tmp_path / "file")
    assert reason in refusal(tmp_path / "file")


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck, BottleneckV1])
@pytest.mark.parametrize("classes", [0, 3])
def test_transformers_makes_its_own_network_of_what_is_converted(
    block: Any, classes: int, tmp_path: Path
) -> None:
    params = fresnet.init(0, Spec(block, (1, 1, 2, 1), width=4), num_classes=classes, in_channels=1)
    fresnet.save(params, tmp_path / "ours", labels=["a", "b", "c"] if classes else None)
    (tmp_path / "theirs").mkdir()
    options = (str(tmp_path / "theirs" / "model.safetensors"), "--layout", "huggingface")
    for _ in range(2):  # the second time it replaces its own
        assert main(["convert", str(tmp_path / "ours"), *options]) == 0
    kind = transformers.ResNetForImageClassification if classes else transformers.ResNetModel
    model = kind.from_pretrained(tmp_path / "theirs").eval()
    x = torch.rand(2, 1, 40, 40)
    with torch.no_grad():
        found = model(x).logits if classes else model(x).pooler_output.flatten(1)
    assert torch.allclose(found, fresnet.forward(params, x), atol=1e-5)
    if classes:
        assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert_same(fresnet.load(tmp_path / "theirs"), params)


def test_a_changed_value_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    fresnet.save(PARAMS, path)
    content = path.read_bytes()
    path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    assert refusal(path) == "its checksum is not that of its content: the file is damaged"


def test_a_change_anywhere_in_the_metadata_is_noticed_or_makes_no_difference(
    tmp_path: Path,
) -> None:
    """If the structure's name were lost, the entries alone would make a network of other types."""
    path = tmp_path / "a.safetensors"
    params = fresnet.freeze(fresnet.init(0, Spec(BottleneckV1, (1,), width=2), num_classes=3))
    fresnet.save(params, path)
    content = path.read_bytes()
    loads = 0
    for place in range(content.index(b'"__metadata__"'), content.index(b'"},') + 1):
        byte = content[place] ^ 1 << place % 7
        path.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
        try:
            loaded = fresnet.load(path)
        except FresnetError:
            continue
        assert_same(loaded, params)
        tree.map(torch.equal, loaded, params)  # refuses other node types
        loads += 1
    assert loads < 15  # these bits say that PyTorch wrote the file


@pytest.mark.parametrize(
    "preset",
    [
        *fresnet.PRESETS,
        Preset(9, 8, "bicubic", corner=math.floor, mean=(0, 0.1, 1), std=(1, 2, 0.1)),
    ],
)
def test_notes_come_back(preset: str | Preset, tmp_path: Path) -> None:
    labels = ["cat, great", "\udcff\x85", ""]
    fresnet.save(PARAMS, tmp_path / "a", preset=preset, labels=labels)
    expected = fresnet.PRESETS[preset] if isinstance(preset, str) else preset
    assert fresnet.notes(tmp_path / "a") == (expected, tuple(labels))
    assert_same(fresnet.load(tmp_path / "a"), PARAMS)
    state = training.start(PARAMS, optim.sgd(0.1), seed=0)
    path = training.save_state(state, tmp_path, step=1, preset=preset, labels=labels)
    assert fresnet.notes(path) == (expected, tuple(labels))


def test_notes_on_grey_are_those_of_a_grey_network(tmp_path: Path) -> None:
    """A preset keeps its colours, and whether it squashes."""
    grey = fresnet.init(0, Spec(Bottleneck, (1,), 4), num_classes=3, in_channels=1)
    own = Preset((9, 7), (8, 6), "bilinear", mean=(0.5,), std=(0.2,), channels="L")
    fresnet.save(grey, tmp_path / "a", preset=own)
    assert fresnet.notes(tmp_path / "a").preset == own
    for params, preset in ((grey, PRESET), (PARAMS, own)):
        with pytest.raises(FresnetError, match="of as many channels as the network takes"):
            fresnet.save(params, tmp_path / "b", preset=preset)
    caffe = PRESET._replace(channels="BGR")
    fresnet.save(PARAMS, tmp_path / "a", preset=caffe)
    assert fresnet.notes(tmp_path / "a").preset == caffe


def test_what_holds_no_notes(tmp_path: Path) -> None:
    fresnet.save(PARAMS, tmp_path / "a")
    torch.save(STATE, tmp_path / "a.pth")
    (published,) = fresnet.notes("timm/resnet18.a3_in1k")[:1]
    assert published == Preset(235, 224, "bicubic")
    for path in (tmp_path / "a", tmp_path / "a.pth"):
        assert fresnet.notes(path) == (None, None)
    with pytest.raises(FresnetError, match=r"cannot read the notes of \S*no: No such file"):
        fresnet.notes(tmp_path / "no")


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"id2label": {"1": "b", "0": "a", "2": "c"}}, ("a", "b", "c")),
        ({"label_names": ["a", "b", "c"]}, ("a", "b", "c")),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}, None),
        ({"id2label": {"0": "a", "2": "b"}}, None),
        ({"id2label": {"0": 3}}, None),
        ({}, None),
    ],
)
def test_labels_of_a_folder_of_hugging_face(config: Any, labels: Any, tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert fresnet.notes(tmp_path) == (None, labels)
    assert fresnet.notes(tmp_path / "pytorch_model.bin") == (None, labels)
    fresnet.save(PARAMS, tmp_path / "model.safetensors", preset=PRESET)
    assert fresnet.notes(tmp_path) == (PRESET, None)


TIMM = {
    "input_size": [3, 224, 224],
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}


@pytest.mark.parametrize(
    ("changed", "preset"),
    [
        ({}, "256,224,bicubic,0.5"),
        ({"crop_mode": "center", "test_input_size": [3, 288, 288]}, "329,288,bicubic,0.5"),
        ({"test_input_size": [3, 288, 288], "test_crop_pct": 0.95}, "303,288,bicubic,0.5"),
        ({"crop_mode": "squash"}, None),
        ({"interpolation": "nearest"}, None),
        ({"crop_pct": 0}, None),
        ({"crop_pct": 2}, None),
        ({"input_size": None}, None),
        ({"mean": "half"}, None),
    ],
)
def test_the_preset_in_a_configuration_of_timm(changed: Any, preset: Any, tmp_path: Path) -> None:
    fresnet.save(PARAMS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {**TIMM, **changed}}))
    assert fresnet.notes(tmp_path).preset == (preset and preset_of(preset))


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"labels": ["a", "b"]}, "a line of text for each of the 3 classes; got 2 labels"),
        ({"labels": "abc"}, "for each of the 3 classes; got a str"),
        ({"labels": ["a", "b", 3]}, "for each of the 3 classes; got a list"),
        ({"labels": ["a", "b", "c\n"]}, "for each of the 3 classes; got a list"),
        ({"preset": "timn"}, "unknown preset 'timn'; did you mean 'timm'"),
        (
            {"preset": Preset(9, 8, "bicubic", corner=math.ceil)},
            "a corner that is round or math.floor; got",
        ),
        ({"preset": Preset(7, 8, "bicubic")}, "save cannot note this preset: "),
        (
            {"preset": Preset(9, 8, "bicubic", std=(0, 1, 1))},
            "save cannot note this preset: ",
        ),
    ],
)
def test_notes_that_cannot_be_read_back_are_not_written(
    asked: Any, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(FresnetError, match=re.escape(reason)):
        fresnet.save(PARAMS, tmp_path / "a", **asked)
    assert not any(tmp_path.iterdir())
    with pytest.raises(FresnetError, match="save_state expects preset and labels of a network"):
        training.save_state({}, tmp_path, step=1, **asked)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"preset": 1}',
        '{"preset": {"resize": 9}}',
        '{"labels": "abc"}',
        '{"labels": [1]}',
    ],
)
def test_notes_that_say_nothing_are_refused(text: str, tmp_path: Path) -> None:
    storage.write_safetensors("test", STATE, tmp_path / "a", {"fresnet.notes": text})
    with pytest.raises(FresnetError, match="cannot read the notes of"):
        fresnet.notes(tmp_path / "a")


def metadata(structure: Any) -> dict[str, str]:
    """The metadata of a file with a right checksum, whatever its structure."""
    text = structure if isinstance(structure, str) else json.dumps(structure)
    return {"fresnet": text, "crc32": storage._checksum({"fresnet": text}, STATE)}


WHOLE: Any = files._structure(PARAMS.weights)


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        ("{", "its metadata describe no network: it is no JSON: Expecting"),
        ("[" * 2000, "its metadata describe no network: it is nested too deeply"),
        ("[" * 100_000, "its metadata describe a larger network than its tensors are of"),
        ([], "its metadata describe no network"),
        (["print", 0], "its metadata describe no network: 'print'"),
        (["Weights", 0], "its metadata describe no network"),
        (WHOLE[:2], "its metadata describe no network"),
        (
            ["Weights", 0, ["tuple"], ["NoLastNorm"], ["Head", 0, 0]],
            "its metadata describe no network",
        ),
        ([*WHOLE[:2], ["tuple", ["Layer", 0, 0]], *WHOLE[3:]], "its metadata describe no network"),
        ([*WHOLE[:2], ["tuple", WHOLE[2][2], WHOLE[2][1]], *WHOLE[3:]], "layer1.1.conv1.weight"),
    ],
)
def test_metadata_that_describe_no_network_are_refused(
    structure: Any, reason: str, tmp_path: Path
) -> None:
    safetensors.torch.save_file(STATE, tmp_path / "a", metadata(structure))
    assert reason in refusal(tmp_path / "a")


def test_a_failed_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "network.safetensors"
    fresnet.save(PARAMS, path)
    before = path.read_bytes()

    def full(state: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(FresnetError, match=f"save cannot write {path}: No space left on device"):
        fresnet.save(PARAMS, path)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before
    assert_same(fresnet.load(path), PARAMS)


def test_concurrent_saves_leave_one_of_them(tmp_path: Path) -> None:
    path = tmp_path / "network"
    networks = [tree.map(lambda leaf, n=n: leaf + n, PARAMS) for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: fresnet.save(networks[n % 4], path), range(40)))
    assert any(
        torch.equal(fresnet.load(path).weights[0][0][0], n.weights[0][0][0]) for n in networks
    )
    assert [found.name for found in tmp_path.iterdir()] == ["network"]


def test_a_link_is_kept_and_so_is_the_mode_of_what_was_there(tmp_path: Path) -> None:
    path, link = tmp_path / "network", tmp_path / "link"
    path.touch(mode=0o640)
    link.symlink_to(path)
    fresnet.save(PARAMS, link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert_same(fresnet.load(path), PARAMS)


def test_what_is_written_is_flushed_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    replace = Path.replace

    def noted(self: Path, target: Path) -> Path:
        order.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append("fsync"))
    monkeypatch.setattr(Path, "replace", noted)
    fresnet.save(PARAMS, tmp_path / "network")
    assert order == ["fsync", "replace", "fsync"]  # the file, then its name


@pytest.mark.parametrize(
    "path", ["", "/", "\0", "a\0b", None, b"a", 3, "x" * 300, "file/x", "/dev/null"]
)
def test_what_is_no_path_is_refused(
    path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    refusal(path)
    with pytest.raises(FresnetError, match=r"^save cannot write "):
        fresnet.save(PARAMS, path)
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    weights = PARAMS.weights
    lost = PARAMS._replace(weights=tree.map(lambda leaf: leaf * torch.nan, weights))
    with pytest.raises(FresnetError, match=r"save .* load takes; conv1.weight holds values that"):
        fresnet.save(lost, tmp_path / "a")
    none = PARAMS._replace(weights=weights._replace(head=tree.map(lambda v: v[:0], weights.head)))
    with pytest.raises(FresnetError, match=r"save .* load takes; fc.weight holds no values"):
        fresnet.save(none, tmp_path / "a")
    head = weights.head._replace(bias=torch.zeros(9))
    with pytest.raises(FresnetError, match=r"save .* load takes; fc.weight: a head on activations"):
        fresnet.save(PARAMS._replace(weights=weights._replace(head=head)), tmp_path / "a")
    with pytest.raises(FresnetError, match="save expects Params"):
        fresnet.save(STATE, tmp_path / "a")  # type: ignore[arg-type]
    on_meta = fresnet.init(0, fresnet.RESNET18, device="meta")
    with pytest.raises(FresnetError, match="save expects tensors with values; got"):
        fresnet.save(on_meta, tmp_path / "a")
    for suffix in (".pth", ".pt", ".bin"):
        with pytest.raises(
            FresnetError, match=r"save writes safetensors; got .*torch.save\(to_sta"
        ):
            fresnet.save(PARAMS, tmp_path / f"a{suffix}")
    with pytest.raises(FresnetError, match=r"save cannot write .*/no/a: No such file"):
        fresnet.save(PARAMS, tmp_path / "no" / "a")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_want_gradients_are_saved_without_a_word(tmp_path: Path) -> None:
    wanting = tree.map(lambda leaf: leaf.clone().requires_grad_(), PARAMS)
    fresnet.save(wanting, tmp_path / "a")
    assert tree.equal(fresnet.load(tmp_path / "a"), PARAMS)


def test_without_safetensors_its_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(FresnetError, match=re.escape("pip install 'fresnet[io]'")):
        fresnet.save(PARAMS, tmp_path / "a")


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content with damage in one to three places."""
    for _ in range(chance.randint(1, 3)):
        # Half of them at the start, where headers are.
        end = len(content) if chance.random() < 0.5 else min(len(content), 3000)
        start, length = chance.randrange(max(1, end)), chance.choice([1, 1, 2, 8, 64, 1000])
        noise = chance.randbytes(length)
        content = chance.choice(
            [
                content[:start],
                content + noise,
                content[:start] + content[start + length :],
                content[:start] + noise + content[start:],
                content[:start] + noise + content[start + length :],
                content[:start] + bytes(length) + content[start + length :],
                content[:start] + content[start : start + length] * 2 + content[start + length :],
                content[:start]
                + bytes([content[start] ^ 1 << chance.randrange(8)])
                + content[start + 1 :]
                if start < len(content)
                else content,
            ]
        )
    return content


def sources(folder: Path) -> dict[str, Path]:
    """A file of each kind. Files of `save` and zipped ones carry checksums."""
    paths = {name: folder / name for name in ("save", "zipped", "safetensors", "pickled")}
    fresnet.save(PARAMS, paths["save"])
    torch.save(STATE, paths["zipped"])
    safetensors.torch.save_file(STATE, paths["safetensors"])
    torch.save(STATE, paths["pickled"], _use_new_zipfile_serialization=False)
    return paths


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is no tensor, which is left out")
@pytest.mark.parametrize("kind", ["save", "zipped", "safetensors", "pickled"])
def test_a_damaged_file_ends_in_a_clean_error_or_a_network(kind: str, tmp_path: Path) -> None:
    """600 files of each kind. With a checksum, the network can only be the one that was saved."""
    content, path = sources(tmp_path)[kind].read_bytes(), tmp_path / "damaged"
    chance, loads = random.Random(0), []
    for _ in range(600):
        path.write_bytes(damaged(content, chance))
        with suppress(FresnetError):
            loads.append(fresnet.load(path))
    assert len(loads) < 500
    for loaded in loads:
        if kind in ("save", "zipped"):
            assert_same(loaded, PARAMS)
        else:
            shapes = [[leaf.shape for leaf in tree.leaves(p)] for p in (loaded, PARAMS)]
            assert shapes[0] == shapes[1]


def test_plain_networks_are_saved_too(tmp_path: Path) -> None:
    params = fresnet.init(0, fresnet.SPECS["plain20"], num_classes=10)
    with pytest.raises(FresnetError, match="expects a network that torchvision has; got NoShort"):
        fresnet.to_state_dict(params)
    fresnet.save(params, tmp_path / "a")
    loaded = fresnet.load(tmp_path / "a")
    assert_same(loaded, params)
    tree.map(torch.equal, loaded, params)
    assert {type(b.shortcut) for stage in loaded.weights.stages for b in stage} == {NoShortcut}


def test_blocks_of_different_kinds_come_back_as_they_were(tmp_path: Path) -> None:
    """One network has both kinds of projections, which other libraries never mix in their names."""

    def pooled(network: Any) -> Any:
        first, (block,) = network.stages
        block = block._replace(shortcut=PooledProjection(*block.shortcut))
        return network._replace(stages=(first, (block,)))

    params = Params(*map(pooled, fresnet.init(0, Spec(Bottleneck, (1, 1), width=4))))
    fresnet.save(params, tmp_path / "a")
    loaded = fresnet.load(tmp_path / "a")
    assert_same(loaded, params)
    tree.map(torch.equal, loaded, params)
