"""Checkpoints are exact to the bit, whole or not there, and never silently another state."""

import json
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import reference
import safetensors.torch
import torch
from assertions import assert_identical, assert_same, unmutated
from hypothesis import given
from hypothesis import strategies as st
from killed_saves import Kill, Order, Report, saver, state_of
from strategies import OPTIMIZERS, examples, tensor_trees, train_states

import fresnet
from fresnet import FresnetError, Spec
from fresnet.network.nodes import BasicBlock, Bottleneck, BottleneckV1
from fresnet.optim import adamw, sgd
from fresnet.training import TrainState, restore_state, save_state, start
from fresnet.training.checkpoint import saved_states
from fresnet.weights.storage import write_safetensors

Give = Callable[[Order], Report]


@pytest.fixture(scope="module")
def give() -> Iterator[Give]:
    with saver() as give:
        yield give


def steps_in(folder: Path) -> list[int]:
    """The steps of the files, the newest first. There is nothing else in the folder."""
    assert sorted(saved_states(folder)) == sorted(folder.iterdir())
    return [int(path.stem.removeprefix("step-")) for path in saved_states(folder)]


def check_restores(folder: Path, step: int, state_of: Callable[[int], Any] = state_of) -> None:
    found = restore_state(state_of(0), folder)
    assert found is not None
    assert found.step == step
    assert_identical(found.state, state_of(step))


# What is saved comes back.


def check_round_trip(state: Any, folder: Path) -> None:
    with unmutated(state):
        path = save_state(state, folder, step=3)
    found = restore_state(fresnet.tree.map(torch.zeros_like, state), folder)
    assert found is not None
    assert_identical(found.state, state)
    assert (found.step, found.notes, found.path) == (3, {}, path)


@examples(40)
@given(state=train_states())
def test_every_training_state_comes_back_to_the_bit_and_in_its_strides(
    tmp_path_factory: pytest.TempPathFactory, state: TrainState
) -> None:
    """`load` gives the network to evaluate from the same file."""
    folder = tmp_path_factory.mktemp("states")
    check_round_trip(state, folder)
    (path,) = folder.iterdir()
    network = state.average or state.params
    loaded = fresnet.load(path)
    assert_same(loaded, network)
    fresnet.tree.map(torch.equal, loaded, network)


@pytest.mark.slow
@examples(150)
@given(state=tensor_trees())
def test_every_tree_comes_back_to_the_bit_and_in_its_strides(
    tmp_path_factory: pytest.TempPathFactory, state: Any
) -> None:
    check_round_trip(state, tmp_path_factory.mktemp("trees"))


def test_what_is_restored_shares_no_memory(tmp_path: Path) -> None:
    """Leaves that shared memory before are now apart, so each may be written to."""
    leaf = torch.arange(6.0)
    save_state((leaf, leaf, leaf[2:]), tmp_path, step=0)
    found = restore_state((leaf, leaf, leaf[2:]), tmp_path)
    assert found is not None
    first, second, part = found.state
    first.zero_()
    assert torch.equal(second, leaf)
    assert torch.equal(part, leaf[2:])


def test_what_is_restored_is_memory_of_its_own(tmp_path: Path) -> None:
    """It is no view of the file, and as much memory as before, also where one value is repeated."""
    leaf = torch.arange(12.0).view(3, 4)
    state = (leaf, leaf.T, leaf[:1].expand(5, 4), torch.tensor(2.0).expand(3, 3))
    path = save_state(state, tmp_path, step=0)
    found = restore_state(state, tmp_path)
    assert found is not None
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_identical(found.state, state)
    storages = [leaf.untyped_storage() for leaf in found.state]
    assert [storage.nbytes() for storage in storages] == [48, 48, 16, 4]
    assert len({storage.data_ptr() for storage in storages}) == 4


@pytest.mark.parametrize("average", [False, True])
def test_torchvision_reads_the_network_in_a_checkpoint(average: bool, tmp_path: Path) -> None:
    params = fresnet.init(0, fresnet.RESNET18, num_classes=5)
    state = start(params, sgd(0.1, momentum=0.9), average=average)
    if average:
        state = state._replace(params=fresnet.init(1, fresnet.RESNET18, num_classes=5))
    path = save_state(state, tmp_path, step=0)
    model = reference.torchvision.models.resnet18(num_classes=5)
    missing, others = model.load_state_dict(safetensors.torch.load_file(path), strict=False)
    assert all(name.endswith(".num_batches_tracked") for name in missing)
    assert all(name.startswith("state.") for name in others)
    assert_same(reference.params(model), params)


def test_notes_come_back(tmp_path: Path) -> None:
    notes = {"seed": 3, "recipe": {"epochs": [1, 2.5], "name": 'é "\n'}, "best": None}
    save_state(state_of(1), tmp_path, step=1, notes=notes)
    found = restore_state(state_of(0), tmp_path)
    assert found is not None
    assert found.notes == notes


# Which files there are.


@examples(40)
@given(
    steps=st.lists(
        st.integers(0, 99) | st.integers(10**12 - 9, 10**12 + 9), min_size=1, max_size=8
    ),
    keep=st.integers(1, 4),
)
def test_the_last_few_are_kept_and_the_newest_is_restored(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], keep: int
) -> None:
    folder, steps = tmp_path_factory.mktemp("states") / "a" / "b", sorted(steps)
    for step in steps:
        path = save_state(state_of(step), folder, step=step, keep=keep)
        assert path == saved_states(folder)[0]
        check_restores(folder, step)
    assert steps_in(folder) == sorted(set(steps), reverse=True)[:keep]


def test_a_state_of_a_lower_step_stands_beside_those_of_higher_ones(tmp_path: Path) -> None:
    """This happens after a run goes back from a damaged state. The state it goes on from stays."""
    for step in (10, 20):
        path = save_state(state_of(step), tmp_path, step=step)
    path.write_bytes(b"")
    for step in (13, 16):
        save_state(state_of(step), tmp_path, step=step, keep=1)
        assert steps_in(tmp_path) == [20, step]
        with pytest.warns(UserWarning, match="going on from"):
            check_restores(tmp_path, step)
    save_state(state_of(23), tmp_path, step=23, keep=1)
    assert steps_in(tmp_path) == [23]


def test_files_of_killed_saves_go_and_others_are_left_alone(tmp_path: Path) -> None:
    others = ["notes.txt", "step-1.safetensors", "step-final.safetensors", ".fresnet-notes"]
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / "step-000000000000.safetensors").mkdir()
    (tmp_path / ".fresnet-0123456789abcdef").mkdir()
    (tmp_path / ".fresnet-0123456789abcdef" / "file").write_bytes(b"half")
    for step in (1, 2, 3):
        path = save_state(state_of(step), tmp_path, step=step, keep=1)
    left = {found.name for found in tmp_path.iterdir()}
    assert left == {*others, "step-000000000000.safetensors", path.name}
    assert {(tmp_path / name).read_text() for name in others} == {"mine"}


def test_the_older_go_only_when_the_new_one_lies_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(state_of(0), tmp_path, step=0)
    order: list[str] = []
    replace, unlink = Path.replace, Path.unlink

    def moved(self: Path, target: Path) -> Path:
        order.append("replace")
        return replace(self, target)

    def removed(self: Path, missing_ok: bool) -> None:
        order.append("unlink")
        unlink(self, missing_ok)

    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append("fsync"))
    monkeypatch.setattr(Path, "replace", moved)
    monkeypatch.setattr(Path, "unlink", removed)
    save_state(state_of(1), tmp_path, step=1, keep=1)
    assert order == ["fsync", "replace", "fsync", "unlink"]


def test_without_a_state_there_is_none(tmp_path: Path) -> None:
    assert restore_state(state_of(0), tmp_path) is None
    assert restore_state(state_of(0), tmp_path / "no" / "folder") is None
    assert saved_states(tmp_path / "no") == []


# Killed at any moment.


def check_survives(report: Report, folder: Path, keep: int) -> None:
    """Nothing acknowledged is lost, and the next save clears away what the killed one left."""
    found = restore_state(state_of(0), folder)
    last = report.saved[-1] if report.saved else -1
    if found is None:
        assert last == -1
    else:
        assert found.step in (last, last + 1)
        assert_identical(found.state, state_of(found.step))
    save_state(state_of(10**6), folder, step=10**6, keep=keep)
    check_restores(folder, 10**6)
    assert 1 <= len(steps_in(folder)) <= keep


KILLS = [
    Kill(function, call, when)
    for function, per_save, moments in [
        ("save_file", 1, ("before", "halfway", "after")),
        ("fsync", 2, ("before", "after")),
        ("replace", 1, ("before", "after")),
        ("unlink", 1, ("before", "after")),
        ("rmtree", 1, ("before", "after")),
    ]
    for call in range(1, 3 * per_save + 1)
    for when in moments
]
"""Moments around every call that leaves a trace on the disk, in the first saves."""


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, 2])
def test_a_save_killed_at_any_point_leaves_what_was_there_or_the_new_state(
    keep: int, give: Give, tmp_path: Path
) -> None:
    for number, kill in enumerate(KILLS):
        folder = tmp_path / str(number)
        report = give(Order(str(folder), (0, 6), keep, kill))
        assert report.killed
        check_survives(report, folder, keep)


@pytest.mark.slow
@examples(30)
@given(seconds=st.floats(0, 0.08), keep=st.integers(1, 3))
def test_saves_killed_at_any_moment_lose_nothing_that_stood(
    give: Give, tmp_path_factory: pytest.TempPathFactory, seconds: float, keep: int
) -> None:
    folder = tmp_path_factory.mktemp("killed")
    report = give(Order(str(folder), (0, 10**5), keep, seconds=seconds))
    assert report.killed
    check_survives(report, folder, keep)


# Damaged.


def two_states(folder: Path) -> tuple[Path, Path, bytes]:
    """The older file, the newer file, and the newer file's content."""
    older, newer = (save_state(small_state(step), folder, step=step) for step in (0, 1))
    return older, newer, newer.read_bytes()


def small_state(step: int) -> dict[str, Any]:
    return {"a": torch.tensor([1.5, -2.0]) + step, "b": torch.tensor(step)}


def check_passed_over(older: Path, newer: Path, why: str) -> None:
    """One warning names the damaged file, the reason, and the file gone on from."""
    with pytest.warns(UserWarning, match="going on from") as caught:
        check_restores(older.parent, 0, small_state)
    (warning,) = caught
    message = rf"{newer}: .*{why}.*; going on from {older}"
    assert re.fullmatch(message, str(warning.message)), warning.message
    assert warning.filename == __file__  # the caller's


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not a safetensors file: .*header"),
        (b"no weights here", "not a safetensors file: .*header"),
        (safetensors.torch.save({"a": torch.ones(2)}), "it holds no training state"),
    ],
)
def test_a_file_of_something_else_is_passed_over(content: bytes, why: str, tmp_path: Path) -> None:
    older, newer, _ = two_states(tmp_path)
    newer.write_bytes(content)
    check_passed_over(older, newer, why)


def test_a_file_cut_short_anywhere_is_passed_over(tmp_path: Path) -> None:
    older, newer, content = two_states(tmp_path)
    for length in range(len(content)):
        newer.write_bytes(content[:length])
        check_passed_over(older, newer, "not a safetensors file")


def flips(content: bytes) -> Iterator[bytes]:
    """The content with each of its bits changed."""
    for place in range(8 * len(content)):
        byte, bit = divmod(place, 8)
        yield content[:byte] + bytes([content[byte] ^ 1 << bit]) + content[byte + 1 :]


@pytest.mark.slow
def test_a_changed_bit_anywhere_never_gives_another_state(tmp_path: Path) -> None:
    _, newer, content = two_states(tmp_path)
    unnoticed = 0
    for changed in flips(content):
        newer.write_bytes(changed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = restore_state(small_state(0), tmp_path)
        assert found is not None
        assert_identical(found.state, small_state(found.step))
        assert [str(newer) in str(w.message) for w in caught] == [True] * (1 - found.step)
        unnoticed += found.step
    assert unnoticed < 200  # these bits are padding, or say that PyTorch wrote the file


def test_the_newest_of_several_that_is_whole_is_gone_on_from(tmp_path: Path) -> None:
    paths = [save_state(state_of(step), tmp_path, step=step) for step in range(3)]
    for path in paths[1:]:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="going on from") as caught:
        check_restores(tmp_path, 0)
    (warning,) = caught
    assert [str(path) in str(warning.message) for path in paths] == [True] * 3


def test_where_all_are_damaged_they_are_named(tmp_path: Path) -> None:
    paths = [save_state(state_of(step), tmp_path, step=step) for step in range(3)]
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FresnetError, match="no checkpoint can be read: ") as caught:
        restore_state(state_of(0), tmp_path)
    assert [str(path) in str(caught.value) for path in paths] == [True] * 3


LEAF = torch.arange(6.0).view(2, 3)
ABOUT = {"step": 3, "notes": {}, "strides": {"state.0": [3, 1]}, "nodes": {"state": "list"}}


@pytest.mark.parametrize(
    "about",
    [
        None,
        [],
        {},
        "[" * 100_000,
        "{",
        *({name: value for name, value in ABOUT.items() if name != missing} for missing in ABOUT),
        *(ABOUT | {"step": step} for step in (None, "3", -1, 3.5, True)),
        *(ABOUT | {name: None} for name in ("notes", "strides", "nodes")),
        *(ABOUT | {name: ["a"]} for name in ("notes", "strides", "nodes")),
        *(
            ABOUT | {"strides": {"state.0": strides}}
            for strides in (
                None,
                3,
                "31",
                [1],
                [3, 1, 1],
                [3, -1],
                [3, 1.0],
                [3, True],
                [10**13, 1],  # 80 TB
                [2**62, 2**62],
                [10**30, 1],
                [1, 1],  # values in one place
                [2, 1],
            )
        ),
    ],
)
def test_metadata_that_describe_no_state_are_a_damage(about: Any, tmp_path: Path) -> None:
    """Their checksum is right, whoever wrote them. The file before them is read instead."""
    save_state([LEAF], tmp_path, step=1)
    texts = {"fresnet.state": about if isinstance(about, str) else json.dumps(about)}
    write_safetensors("save", {"state.0": LEAF}, tmp_path / "step-000000000003.safetensors", texts)
    with pytest.warns(match="step-000000000003.*; going on from .*step-000000000001"):
        found = restore_state([LEAF], tmp_path)
    assert found is not None
    assert_identical(found.state, [LEAF])


def test_leaves_without_values_come_back_in_their_strides(tmp_path: Path) -> None:
    """Their strides may be any: there is no value that could lie in the place of another."""
    empty = torch.empty(4, 0, 4, 2)
    for order in permutations(range(4)):
        view = empty.permute(order)
        check_round_trip(
            (view, view[::2], view[:, :1], view[None].expand(3, -1, -1, -1, -1)), tmp_path
        )


def test_what_metadata_say_of_strides_is_what_is_restored(tmp_path: Path) -> None:
    path = tmp_path / "step-000000000003.safetensors"
    for strides in ([3, 1], [1, 2], [1, 3], [4, 1], [0, 1], [0, 0], [3, 60]):
        about = ABOUT | {"strides": {"state.0": strides}}
        write_safetensors("save", {"state.0": LEAF}, path, {"fresnet.state": json.dumps(about)})
        found = restore_state([LEAF], tmp_path)
        assert found is not None
        assert list(found.state[0].stride()) == strides


def test_leaves_that_overlap_or_leave_wide_gaps_come_back_dense(tmp_path: Path) -> None:
    """Else a small file could ask for any memory, or for values that lie in one place."""
    wide = torch.zeros(5, 1000)[:, 0].normal_()
    state = (
        torch.arange(6.0).unfold(0, 4, 1),
        wide,
        torch.arange(9.0).as_strided((3, 2, 3), (1, 0, 2)),
    )
    save_state(state, tmp_path, step=0)
    found = restore_state(state, tmp_path)
    assert found is not None
    assert_same(found.state, state)
    assert [leaf.stride() for leaf in found.state] == [(1, 3), (1,), (1, 0, 3)]


# Of another run.

BASIC = Spec(BasicBlock, (1, 1), width=2)


def begun(
    spec: Spec = BASIC,
    classes: int = 3,
    optimizer: fresnet.optim.Optimizer = OPTIMIZERS[1],
    dtype: torch.dtype = torch.float32,
    average: bool = False,
) -> TrainState:
    params = fresnet.init(0, spec, num_classes=classes, dtype=dtype)
    return start(params, optimizer, average=average)


def frozen(state: TrainState) -> TrainState:
    return state._replace(params=fresnet.freeze(state.params))


def one_block(block: type) -> TrainState:
    return begun(Spec(block, (1,), width=2))


@pytest.mark.parametrize(
    ("there", "here", "difference"),
    [
        (
            begun(),
            begun(Spec(Bottleneck, (1, 1), width=2)),
            "state.params.weights.stages.0.0 Bottleneck; got BasicBlock",
        ),
        (
            one_block(BottleneckV1),
            one_block(Bottleneck),
            "state.params.weights.stages.0.0 Bottleneck; got BottleneckV1",
        ),
        (
            begun(),
            begun(Spec(BasicBlock, (1, 2), width=2)),
            "state.params.weights.stages.1.1 BasicBlock; got none",
        ),
        (
            begun(Spec(BasicBlock, (1, 2), width=2)),
            begun(),
            "state.params.weights.stages.1.1 none; got BasicBlock",
        ),
        (
            frozen(begun()),
            begun(),
            "state.params.weights.stem.layer.norm Norm; got FrozenNorm",
        ),
        (begun(), begun(classes=5), "fc.weight float32 (5, 4); got float32 (3, 4)"),
        (
            begun(),
            begun(Spec(BasicBlock, (1, 1), width=4)),
            "conv1.weight float32 (4, 3, 7, 7); got float32 (2, 3, 7, 7)",
        ),
        (
            begun(dtype=torch.float64),
            begun(),
            "conv1.weight float32 (2, 3, 7, 7); got float64 (2, 3, 7, 7)",
        ),
        (begun(), begun(optimizer=adamw(0.1)), "state.optimizer.moments.1 Weights; got none"),
        (begun(optimizer=adamw(0.1)), begun(), "state.optimizer.moments.1 none; got Weights"),
        (begun(), begun(optimizer=sgd(0.1)), "state.optimizer.moments.0 none; got Weights"),
        (begun(), begun(average=True), "state.average Params; got tuple"),
        (begun(average=True), begun(), "state.average tuple; got Params"),
        ([torch.ones(2)], (torch.ones(2),), "state tuple; got list"),
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, "state.b float32 (2,); got none"),
        ({"a": ()}, {"a": (), "b": ()}, "state.b tuple; got none"),
    ],
)
def test_a_state_of_another_run_is_refused_by_its_first_difference(
    there: Any, here: Any, difference: str, tmp_path: Path
) -> None:
    """No older state of this run is taken instead."""
    save_state(here, tmp_path, step=1)
    path = save_state(there, tmp_path, step=2)
    with pytest.raises(FresnetError) as caught:
        restore_state(here, tmp_path)
    assert str(caught.value) == f"{path} is of another state: expected {difference}"


def test_the_order_of_a_dict_makes_no_other_state(tmp_path: Path) -> None:
    a, b = torch.ones(2), (torch.zeros(3),)
    save_state({"a": a, "b": b}, tmp_path, step=0)
    found = restore_state({"b": b, "a": a}, tmp_path)
    assert found is not None
    assert_identical(found.state, {"b": b, "a": a})


# What cannot be written.


def check_full(message: str, folder: Path, steps: list[int], why: str) -> None:
    """The error says that the disk is full, and all is as before."""
    path = folder / f"step-{steps[0] + 1:012}.safetensors"
    assert message.startswith(f"save_state cannot write {path}: ")
    assert why in message
    assert steps_in(folder) == steps
    check_restores(folder, steps[0])


@pytest.mark.parametrize("room", [0, 1, 100, 3000, 5000])
def test_where_a_file_grows_too_large_what_was_there_stands(
    room: int, give: Give, tmp_path: Path
) -> None:
    give(Order(str(tmp_path), (0, 3)))
    report = give(Order(str(tmp_path), (3, 4), room=room))
    assert report.saved == []
    check_full(report.error, tmp_path, [2, 1], "File too large")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_on_a_full_disk_what_was_there_stands(small_disk: Path) -> None:
    for step in range(3):
        save_state(state_of(step), small_disk, step=step)
    (small_disk / "filler").write_bytes(b"\0" * 20_000)
    with pytest.raises(FresnetError) as caught:
        save_state(state_of(3), small_disk, step=3)
    (small_disk / "filler").unlink()
    check_full(str(caught.value), small_disk, [2, 1, 0], "No space left on device")


def test_without_the_right_to_write_the_error_says_so(give: Give) -> None:
    """Root gives up its own right first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        give(Order(name, (0, 2)))
        folder.chmod(0o555)
        report = give(Order(name, (2, 3), as_nobody=os.geteuid() == 0))
        check_full(report.error, folder, [1, 0], "Permission denied")
        report = give(Order(f"{name}/new", (2, 3), as_nobody=os.geteuid() == 0))
        assert report.error == f"save_state cannot make {name}/new: Permission denied"


@pytest.mark.parametrize("below", [".", "folder"])
def test_a_file_is_no_folder(below: str, tmp_path: Path) -> None:
    folder = tmp_path / "file" / below
    (tmp_path / "file").touch()
    with pytest.raises(FresnetError, match=f"save_state cannot make {folder}: "):
        save_state(state_of(0), folder, step=0)
    for look in (lambda: restore_state(state_of(0), folder), lambda: saved_states(folder)):
        with pytest.raises(FresnetError, match=f"list the checkpoints in {folder}: Not a dir"):
            look()


STATE = state_of(0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keep": 0}, "save_state expects keep to be a positive integer; got 0"),
        ({"keep": -1}, "save_state expects keep to be a positive integer; got -1"),
        ({"keep": True}, "save_state expects keep to be a positive integer; got True"),
        ({"step": -1}, "save_state expects step to be an integer from 0 on; got -1"),
        ({"step": torch.tensor(3)}, "integer from 0 on; got int64 ()"),
        ({"step": 10**5000}, "integer from 0 on; got a larger one"),
        ({"notes": [1]}, "save_state expects notes to be a mapping; got a list"),
        ({"notes": {"a": {1}}}, "notes as JSON has them; Object of type set is not JSON"),
        ({"folder": None}, "expected a path; got None"),
        ({"folder": "a\0b"}, "expected a path; got 'a\\x00b'"),
        ({"state": (STATE, None)}, "save_state expects tensors; got None for state.1"),
        ({"state": {"rate": 0.1}}, "save_state expects tensors; got a float for state.rate"),
        ({"state": torch.eye(2).to_sparse()}, "got sparse_coo float32 (2, 2) for state."),
        ({"state": {1: STATE, "1": STATE}}, "one leaf of each name; got two state.1.step"),
        ({"state": torch.ones(2, device="meta")}, "save_state cannot write "),
    ],
)
def test_what_cannot_be_saved_is_refused(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given = {"state": STATE, "folder": tmp_path, "step": 0, **changed}
    with pytest.raises(FresnetError, match=re.escape(message)):
        save_state(given.pop("state"), given.pop("folder"), **given)
    assert list(tmp_path.iterdir()) == []
