"""Whatever stands at a path is read or refused in one line, and nothing is waited for."""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from assertions import assert_same
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import examples

import fresnet
from fresnet import FresnetError, Spec, tree
from fresnet.__main__ import main
from fresnet.data import scan
from fresnet.data.folder import read_labels
from fresnet.network.nodes import BasicBlock
from fresnet.reading import from_json
from fresnet.training import restore_state, save_state
from fresnet.weights import files, storage, unwrapping

PARAMS = fresnet.init(0, Spec(BasicBlock, (1, 1), width=4), num_classes=3)
STATE = fresnet.to_state_dict(PARAMS)
DEEP = "[" * 200_000


@pytest.fixture(autouse=True)
def waits_for_nothing() -> Iterator[None]:
    """A read that would wait for ever is an error."""

    def end(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.parametrize(
    "read",
    [
        fresnet.load,
        lambda path: fresnet.preprocess([path]),
        lambda path: fresnet.save(PARAMS, path),
        read_labels,
    ],
)
def test_a_pipe_in_place_of_a_file(read: Callable[[Path], Any], pipe: Path) -> None:
    with pytest.raises(FresnetError, match=r"is no regular file$"):
        read(pipe)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "shard.safetensors"])
def test_a_pipe_in_a_folder_of_weights(name: str, tmp_path: Path, pipe: Path) -> None:
    if name != "model.safetensors":
        index = {"weight_map": dict.fromkeys(STATE, "shard.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        safetensors.torch.save_file(STATE, tmp_path / "shard.safetensors")
        assert_same(fresnet.load(tmp_path), PARAMS)
        (tmp_path / name).unlink(missing_ok=True)
    pipe.rename(tmp_path / name)
    with pytest.raises(FresnetError, match=r"is no regular file$"):
        fresnet.load(tmp_path)


def test_pipes_among_images_and_in_a_runs_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, pipe: Path
) -> None:
    """As an image it is one that cannot be read."""
    for name in ("train/a/0.png", "train/b/0.png", "val/a/0.png", "val/b/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    options = ["train", str(tmp_path), "--arch", "resnet20", "--crop", "16", "--batch", "2"]
    options += ["--workers", "0", "--epochs", "1", "--out", str(tmp_path / "out")]
    assert main(options) == 0
    for name in ("train/a/1.png", "out/log.jsonl", "out/.lock", "out/labels.txt", "out/curves.png"):
        path = tmp_path / name
        kept = path.rename(tmp_path / "kept") if path.exists() else None
        pipe.rename(path)
        capsys.readouterr()
        again = [*options, "--out", str(tmp_path / "other")] if kept is None else options
        assert main(again) == 1
        [*_, said] = capsys.readouterr().err.splitlines()
        assert said.endswith(f"{path.name} is no regular file")
        path.rename(pipe)
        if kept:
            kept.rename(path)
    assert main(options) == 0


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    fresnet.save(PARAMS, folder / "net")
    assert_same(fresnet.load(folder / "net"), PARAMS)
    torch.save(STATE, folder / "net.pth")
    assert_same(fresnet.load(folder / "net.pth"), PARAMS)
    save_state(PARAMS, folder, step=3)
    found = restore_state(tree.map(torch.zeros_like, PARAMS), folder)
    assert found is not None
    assert_same(found.state, PARAMS)
    Image.new("RGB", (300, 300)).save(folder / "a.png")
    assert fresnet.preprocess([folder / "a.png"]).shape == (1, 3, 224, 224)
    fresnet.export(PARAMS, folder / "net.onnx", image_size=32)


class Odd(os.PathLike[Any]):
    def __init__(self, text: Any) -> None:
        self.text = text

    def __fspath__(self) -> Any:
        return self.text


@pytest.mark.parametrize("path", [b"a", Odd(b"a"), Odd("a\0b"), Odd(""), "", 3, None])
def test_what_is_no_path(path: Any) -> None:
    for call in (
        fresnet.load,
        scan,
        lambda path: fresnet.save(PARAMS, path),
        lambda path: save_state(PARAMS, path, step=1),
        lambda path: restore_state(PARAMS, path),
    ):
        with pytest.raises(FresnetError, match="expected a path"):
            call(path)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/y", "a/" + "x" * 300, "a\0b", "a\0b/c"])
def test_names_of_no_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for call in (
        fresnet.load,
        lambda name: fresnet.save(PARAMS, name),
        lambda name: fresnet.preprocess([name]),
        lambda name: fresnet.export(PARAMS, f"{name}.onnx"),
        scan,
        lambda name: save_state(PARAMS, name, step=1),
        lambda name: restore_state(PARAMS, name),
    ):
        with pytest.raises(FresnetError):
            call(name)
    if "\0" not in name:
        assert main(["summary", name]) == main(["predict", "a.png", "--weights", name]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ("1" * 10_000, "it is no JSON"),
        (b"\xff\xfe", "it is no JSON"),
        ("", "it is no JSON: Expecting value"),
    ],
)
def test_what_is_no_json(text: str | bytes, message: str) -> None:
    with pytest.raises(FresnetError, match=message):
        from_json(text)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [DEEP, "null", "[]", "3", '{"weight_map": [1]}', "\xff"])
def test_a_folder_of_weights_with_damaged_json(name: str, content: str, tmp_path: Path) -> None:
    if name == "config.json":
        safetensors.torch.save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / name).write_text(content)
    if (name, content) == ("config.json", '{"weight_map": [1]}'):  # it asks for nothing
        assert_same(fresnet.load(tmp_path), PARAMS)
        return
    with pytest.raises(FresnetError, match=rf"^cannot load {re.escape(str(tmp_path))}: .*json"):
        fresnet.load(tmp_path)


def test_names_of_entries_are_of_some_length() -> None:
    with pytest.raises(FresnetError, match="expects names of at most 1000 letters"):
        fresnet.from_state_dict({"a." * 10**5 + name: value for name, value in STATE.items()})


@pytest.mark.parametrize("shard", ["x" * 300, "..", "", "a\0b", 3, None])
def test_an_index_that_lists_no_file(shard: Any, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv1.weight": shard}}))
    with pytest.raises(FresnetError, match=r"^cannot load "):
        fresnet.load(tmp_path)


def test_types_of_more_nodes_than_there_are_tensors_are_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two megabytes of them would take a second and a hundred megabytes."""
    structure = files._structure(PARAMS.weights)
    structure[2][1] = ["tuple", *[structure[2][1][1]] * 10_000]  # type: ignore[index]
    text = json.dumps(structure)
    checksum = storage._checksum({"fresnet": text}, STATE)
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(STATE, path, {"fresnet": text, "crc32": checksum})
    monkeypatch.setattr(files, "_node", None)
    with pytest.raises(FresnetError, match="describe a larger network than its tensors are of"):
        fresnet.load(path)


prefixes = st.lists(st.sampled_from(["a.", "b.", "aa."]), max_size=3).map("".join)


@examples(200)
@given(names=st.lists(prefixes.map("{}w".format), unique=True), ours=st.sets(prefixes))
def test_each_entry_is_behind_the_longest_prefix_of_its_name(
    names: list[str], ours: set[str]
) -> None:
    """One pass finds them. Each name against each prefix took a minute for 20,000 of both."""
    behind = unwrapping._behind(dict.fromkeys(names), sorted(ours))
    assert behind.keys() == ours
    for prefix in ours:
        longer = [other for other in ours if len(other) > len(prefix)]
        assert behind[prefix] == [
            name
            for name in names
            if name.startswith(prefix) and not any(map(name.startswith, longer))
        ]


def test_one_mapping_under_many_names_is_looked_through_once() -> None:
    """A file of two megabytes may name it a hundred thousand times."""

    class Counted(dict[str, Any]):
        looked = 0

        def items(self) -> Any:
            Counted.looked += 1
            return super().items()

    nothing = Counted(a=1)
    with pytest.raises(FresnetError, match="expects the names of torchvision"):
        fresnet.from_state_dict({f"w{i}": {"x": nothing} for i in range(1000)})
    assert Counted.looked < 10
    assert_same(fresnet.from_state_dict({"model": STATE, "net": {"again": STATE}}), PARAMS)
