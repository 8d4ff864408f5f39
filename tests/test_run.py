"""A stopped run goes on as if it had not been stopped, and says in one line what is wrong."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from assertions import assert_same, assert_trees_close
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from PIL import Image
from sklearn.datasets import load_digits
from strategies import examples
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim import lr_scheduler

import fresnet
from fresnet import FresnetError, Params, Spec, optim, tree
from fresnet.__main__ import _parser, main
from fresnet.data import (
    AreaCrop,
    Augmentation,
    Folder,
    Images,
    Order,
    ScaleCrop,
    augment,
    batches,
    loader,
    scan,
)
from fresnet.data.preprocess import preprocess
from fresnet.data.presets import PRESETS, Preset
from fresnet.network.nodes import BasicBlock, FrozenNorm, Stem3x3
from fresnet.training import (
    command,
    cross_entropy,
    evaluate,
    make_train_step,
    plots,
    save_state,
    share,
)
from fresnet.training import course as running
from fresnet.training import start as begin
from fresnet.training.checkpoint import saved_states
from fresnet.training.course import Course, Options, Outcome
from fresnet.training.evaluation import Evaluation
from fresnet.training.plan import Run
from fresnet.training.plan import assemble as assembled
from fresnet.training.processes import Processes
from fresnet.training.recipes import (
    RECIPES,
    Recipe,
    average_decay_of,
    mixing_of,
    optimizer_of,
    schedule_of,
    with_batch,
    with_crop,
    with_epochs,
)
from fresnet.training.record import in_words, read_log
from fresnet.training.resuming import resumed
from fresnet.training.run import train
from fresnet.weights.storage import read_safetensors, write_safetensors

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

SPEC = Spec(BasicBlock, (1, 1), width=4, stem=Stem3x3)
PARAMS = fresnet.init(0, SPEC, num_classes=4)
ALONE = Processes(None, 0, 1, torch.device("cpu"))
IMAGES, PER_EPOCH, EPOCHS = 38, 4, 3
STEPS = EPOCHS * PER_EPOCH
V1, V2 = (
    with_crop(RECIPES[name], 16)._replace(epochs=EPOCHS, batch=10, rate=0.05)
    for name in ("v1", "v2")
)
CASES = {
    "v1": V1._replace(drops=(1.5, 2)),
    "v2": V2._replace(repeats=2, warm_up=1, average=0.02, drop_path=0.3, dropout=0.2),
}
TRAIN = ("--arch", "resnet20", "--crop", "16", "--batch", "10", "--workers", "0")


def write_digits(root: Path, classes: int, counts: dict[str, int]) -> None:
    """Write this many scanned digits to each folder, with the classes in turn."""
    digits = zip(*load_digits(n_class=classes, return_X_y=True), strict=True)
    for split, count in counts.items():
        for i in range(count):
            pixels, label = next(digits)
            folder = root / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((pixels.reshape(8, 8) * 15.9).astype(np.uint8))
            image.resize((24, 20)).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    write_digits(root, 4, {"train": IMAGES, "val": 18})
    return root


class End(NamedTuple):
    """All that a run leaves behind."""

    state: dict[str, torch.Tensor]
    notes: dict[str, str]
    network: Params
    lines: list[Any]
    evaluation: Any


def end_of(out: Path, outcome: Outcome | None = None) -> End:
    entries, notes = read_safetensors(saved_states(out / "checkpoints")[0])
    found = outcome and (*outcome.evaluation[:-1], outcome.evaluation.confusion.tolist())
    lines = [line for line in read_log(out) if "left_out" not in line]
    return End(entries, notes, fresnet.load(out / "network.safetensors"), lines, found)


def assert_same_end(actual: End, expected: End) -> None:
    assert_same((actual.state, actual.network), (expected.state, expected.network))
    assert actual.notes == expected.notes
    assert actual.lines == expected.lines
    assert actual.evaluation == expected.evaluation


def call(
    digits: Path, out: Path, case: str = "v2", micro_batches: int = 1, **options: Any
) -> Outcome:
    """Run `train` on the digits, without pictures."""
    folders = scan(digits / "train"), scan(digits / "val")
    plan = Run("tiny", CASES[case], seed=3, micro_batches=micro_batches)
    out.mkdir(exist_ok=True)
    with mock.patch.multiple(running, draw_curves=mock.Mock(), draw_confusion=mock.Mock()):
        return train(plan, PARAMS, folders, out, ALONE, **options)


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line that a failing command says before it returns status 1."""
    assert main(["train", *map(str, arguments)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("fresnet train: ")
    return line.removeprefix("fresnet train: ")


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_its_steps_and_evaluations(digits: Path, tmp_path: Path, case: str) -> None:
    """Steps take the recipe's images in their order. An average, if any, is what is evaluated."""
    recipe, training, validation = CASES[case], scan(digits / "train"), scan(digits / "val")
    optimizer = optimizer_of(recipe, PER_EPOCH)
    state = begin(PARAMS, optimizer, seed=3, average=case == "v2")
    train_step = make_train_step(
        optimizer,
        loss_fn=partial(cross_entropy, label_smoothing=recipe.label_smoothing),
        mixing=mixing_of(recipe),
        drop_path=recipe.drop_path,
        dropout=recipe.dropout,
        average_decay=average_decay_of(recipe),
    )
    images = Images(training, partial(augment, augmentation=recipe.augmentation), 3)
    order = Order(IMAGES, 10, 3, recipe.repeats)
    losses = []
    for batch in loader(images, batches(order, 0, STEPS)):
        state, metrics = train_step(state, (batch.x, batch.y))
        losses.append(float(metrics.loss))
    outcome = call(digits, tmp_path, case)
    assert_same(outcome.params, state.average if case == "v2" else state.params)
    assert [line["train"]["loss"] for line in read_log(tmp_path) if "train" in line] == losses
    x, y = preprocess(validation.files, recipe.preset), torch.tensor(validation.labels)
    expected = evaluate(outcome.params, [(x, y)])
    assert_same(outcome.evaluation.confusion, expected.confusion)
    assert outcome.evaluation[:-1] == pytest.approx(expected[:-1])
    last = list(read_log(tmp_path))[-1]
    assert last == {
        "step": STEPS,
        "evaluation": {
            name: getattr(outcome.evaluation, name) for name in ("loss", "top1", "top5", "images")
        },
    }


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("paper", torch.float32), ("v1", torch.uint8), ("v2", torch.float32)],
)
def test_images_are_handed_over_as_pixels_where_they_can_be(
    digits: Path, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    folders = scan(digits / "train"), scan(digits / "val")
    recipe = with_batch(with_crop(RECIPES[name], 16), 10)
    options = Options(recompute=False, workers=0, broken="raise", keep=1, save_every=None)
    course = Course(Run("tiny", recipe), PARAMS, folders, tmp_path, ALONE, options)
    assert next(course.batches(course.places())).x.dtype == dtype


def test_norms_across_one_process_are_its_norms() -> None:
    """So one process can go on with a run of several."""
    ends = []
    for across in (1, 2):
        plan = Run("tiny", CASES["v1"], norms_across=across)
        state, train_step, _ = assembled(plan, PARAMS, IMAGES, ALONE)
        batch = torch.ones(4, 3, 16, 16).cumsum(3), torch.arange(4)
        ends.append(train_step(state, batch))
    assert_same(*ends)


@pytest.mark.parametrize(("micro_batches", "sizes"), [(1, [9, 9]), (2, [5, 5, 4, 4])])
def test_no_evaluation_takes_more_images_at_a_time_than_a_step(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    micro_batches: int,
    sizes: list[int],
) -> None:
    """A step takes the 10 of a batch in micro-batches. There are 18 to validate on."""
    taken: list[int] = []

    def counted(params: Params, batches: Any, **options: Any) -> Any:
        batches = list(batches)
        taken.extend(len(x) for x, _ in batches)
        return evaluate(params, batches, **options)

    monkeypatch.setattr(running, "evaluate", counted)
    plan = Run("tiny", V1, micro_batches=micro_batches)
    folders = scan(digits / "train"), scan(digits / "val")
    options = Options(recompute=False, workers=0, broken="raise", keep=1, save_every=None)
    assert Course(plan, PARAMS, folders, tmp_path, ALONE, options).validate().images == 18
    assert taken == sizes


# Stopped and started again


class FaultError(Exception):
    """An error that is not the run's own."""


def fault() -> None:
    raise FaultError


WAYS: dict[str, Callable[[], None]] = {
    "an error": fault,
    "SIGTERM": partial(os.kill, os.getpid(), signal.SIGTERM),
    "SIGINT": partial(os.kill, os.getpid(), signal.SIGINT),
}
PLACES = ["step", "loader", "save_state", "evaluate", "save"]


@contextmanager
def interrupted(place: str, at: int, how: Callable[[], None], late: bool) -> Iterator[None]:
    """Let a fault happen before or after the at-th call at this place."""
    calls = 0

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at and not late:
                how()
            result = function(*args, **options)
            if calls == at and late:
                how()
            return result

        return call

    def assemble(*args: Any) -> Any:
        state, train_step, order = real(*args)
        return state, wrapped(train_step), order

    def loader(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        with suppress(StopIteration):
            while True:
                yield wrapped(next)(found)

    if place == "step":
        real: Any = assembled
        patch = mock.patch.object(running, "assemble", assemble)
    elif place == "loader":
        real = fresnet.data.loader
        patch = mock.patch.object(fresnet.data, "loader", loader)
    else:
        patch = mock.patch.object(running, place, wrapped(getattr(running, place)))
    with patch:
        yield


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], End]:
    """How a run ends if nothing stops it."""

    @cache
    def end(case: str, micro_batches: int) -> End:
        out = tmp_path_factory.mktemp("whole")
        return end_of(out, call(digits, out, case, micro_batches))

    return end


@pytest.mark.slow
@examples(20)
@given(
    case=st.sampled_from(list(CASES)),
    micro_batches=st.integers(1, 2),
    places=st.lists(
        st.tuples(
            st.sampled_from(PLACES),
            st.integers(1, STEPS),
            st.sampled_from(list(WAYS)),
            st.booleans(),
        ),
        min_size=1,
        max_size=3,
    ),
    workers=st.sampled_from([0, 0, 1]),
    save_every=st.sampled_from([None, 1, 3]),
)
def test_a_stopped_run_ends_with_the_bits_of_one_that_is_not(
    digits: Path,
    whole: Callable[[str, int], End],
    tmp_path_factory: pytest.TempPathFactory,
    case: str,
    micro_batches: int,
    places: list[tuple[str, int, str, bool]],
    workers: int,
    save_every: int | None,
) -> None:
    out = tmp_path_factory.mktemp("stopped")
    again = partial(call, digits, out, case, micro_batches, workers=workers, save_every=save_every)
    for place, at, how, late in places:
        with interrupted(place, at, WAYS[how], late), suppress(FaultError, KeyboardInterrupt):
            again()
    outcome = again()
    assert_same_end(end_of(out, outcome), whole(case, micro_batches))
    assert_same_end(end_of(out, again()), whole(case, micro_batches))  # once more, after its end
    shutil.rmtree(out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [1, 3, PER_EPOCH, STEPS])
def test_a_signal_loses_no_step(digits: Path, tmp_path: Path, number: int, at: int) -> None:
    """The current step is finished and saved, and the handlers are those of before."""
    before = signal.getsignal(number)
    how = partial(os.kill, os.getpid(), number)
    with interrupted("step", at, how, late=False), pytest.raises(KeyboardInterrupt):
        call(digits, tmp_path)
    [path, *_] = saved_states(tmp_path / "checkpoints")
    assert path.stem == f"step-{at:012}"
    assert steps_of(tmp_path) == at
    assert signal.getsignal(number) is before


def test_a_run_on_shards_is_one_on_folders(
    capsys: pytest.CaptureFixture[str], folders: Path, digits: Path
) -> None:
    """It goes on like one too, and notes the shards' files."""
    for split in ("train", "val"):
        folder = scan(digits / split)
        Path("shards", split).mkdir(parents=True)
        with tarfile.open(f"shards/{split}/0.tar", "w") as tar:
            for i, (file, label) in enumerate(zip(folder.files, folder.labels, strict=True)):
                tar.add(file, f"{i:03}.png")
                member = tarfile.TarInfo(f"{i:03}.cls")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"%d" % label))
    options = (*TRAIN, "--epochs", "2", "--drop-path", "0.1")
    with interrupted("step", 2, WAYS["SIGTERM"], late=False):
        assert "stopped; " in refused(capsys, "shards", *options, "--out", "out")
    for data, out in (("shards", "out"), ("good", "expected")):
        assert main(["train", data, *options, "--out", out]) == 0
    actual, expected = end_of(Path("out")), end_of(Path("expected"))
    assert_same((actual.state, actual.network), (expected.state, expected.network))
    assert actual.lines == expected.lines
    assert Path("out/labels.txt").read_text().split() == ["0", "1", "2", "3"]
    Path("shards/train/0.tar").rename("shards/train/1.tar")
    assert "holds a run of files' checksum" in refused(capsys, "shards", *options, "--out", "out")
    (folders / "shards" / "val" / "0.tar").write_bytes(b"")
    said = refused(capsys, "shards", *options, "--out", "other")
    assert said.startswith("expects tar files, uncompressed, with an image")
    assert said.endswith("shards/val/0.tar: empty file")


def test_an_evaluation_is_not_waited_for_but_made_up(
    digits: Path, tmp_path: Path, whole: Callable[[str, int], End]
) -> None:
    """The state is saved before the evaluation can be stopped."""
    how = partial(os.kill, os.getpid(), signal.SIGTERM)
    with interrupted("evaluate", 2, how, late=False), pytest.raises(KeyboardInterrupt):
        call(digits, tmp_path)
    assert saved_states(tmp_path / "checkpoints")[0].stem == f"step-{2 * PER_EPOCH:012}"
    assert sum("evaluation" in line for line in read_log(tmp_path)) == 1
    assert_same_end(end_of(tmp_path, call(digits, tmp_path)), whole("v2", 1))


def test_the_log_of_a_checkpoint_lies_on_the_disk_before_it(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may then leave more of the log than of the checkpoints, but not less."""
    log, synced, saved = tmp_path / "log.jsonl", [0], []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        if log.exists() and os.path.samestat(os.fstat(descriptor), log.stat()):
            synced.append(log.stat().st_size)

    def saving(*args: Any, **options: Any) -> Path:
        saved.append((synced[-1], log.stat().st_size))
        return save_state(*args, **options)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(running, "save_state", saving)
    call(digits, tmp_path)
    assert len(saved) == EPOCHS
    assert all(on_disk == written > 0 for on_disk, written in saved)


def test_a_second_signal_does_not_wait(digits: Path, tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    with interrupted("step", 2, twice, late=False), pytest.raises(KeyboardInterrupt):
        call(digits, tmp_path)
    assert saved_states(tmp_path / "checkpoints") == []


def test_a_log_is_read_up_to_where_it_was_cut(
    digits: Path, tmp_path: Path, whole: Callable[[str, int], End]
) -> None:
    """A killed process may leave a line half written."""
    with interrupted("step", 7, fault, late=True), pytest.raises(FaultError):
        call(digits, tmp_path)
    for rest in (b'{"step": 7, "tra', b"\0\0\xff\xfe"):
        log = tmp_path / "log.jsonl"
        before = list(read_log(tmp_path))
        log.write_bytes(log.read_bytes() + rest)
        assert list(read_log(tmp_path)) == before
    assert_same_end(end_of(tmp_path, call(digits, tmp_path)), whole("v2", 1))


@pytest.mark.parametrize(
    "line",
    [
        "123",
        "null",
        "{}",
        '"step"',
        '{"step": "x"}',
        '{"step": 3}',
        '{"step": -1, "left_out": {"files": []}}',
        '{"step": 3, "train": {"loss": "x", "accuracy": 0.5, "rate": 0.1, "images": 1}}',
        '{"step": 3, "train": {"loss": 0.5}}',
        '{"step": 3, "train": null}',
        '{"step": 1, "left_out": {"files": []}, "evaluation": 1}',
        '{"step": 1, "left_out": {"files": []}, "train": {"loss": 1}}',
        '{"step": 4, "evaluation": {}}',
        '{"step": 4, "evaluation": 1}',
        '{"step": 3, "left_out": {"files": [3]}}',
        '{"step": 3, "left_out": {"files": "a"}}',
        '{"step": 3, "tra',
        "\0\0\xff",
        "[" * 100_000,
        "",
    ],
)
def test_a_damaged_line_takes_no_other_with_it(
    line: str, digits: Path, tmp_path: Path, whole: Callable[[str, int], End]
) -> None:
    """The run goes on, and says what it leaves out."""
    with interrupted("step", 7, fault, late=True), pytest.raises(FaultError):
        call(digits, tmp_path)
    log = tmp_path / "log.jsonl"
    before = list(read_log(tmp_path))
    assert len(before) == 6
    first, *rest = log.read_text().splitlines()
    log.write_bytes("\n".join([first, line, *rest[:3], line, *rest[3:], ""]).encode("latin-1"))
    assert list(read_log(tmp_path)) == before
    with pytest.warns(match=r"log.jsonl: left out as damaged, 2 lines"):
        outcome = call(digits, tmp_path)
    assert_same_end(end_of(tmp_path, outcome), whole("v2", 1))
    assert log.read_text().splitlines()[:2] == [first, rest[0]]


def start(*arguments: Any, torchrun: bool = False) -> "subprocess.Popen[str]":
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"] * torchrun
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "fresnet", "train", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(condition: Callable[[], Any], process: "subprocess.Popen[str]") -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.01)


def steps_of(out: Path) -> int:
    """How many steps the log has."""
    return sum("train" in line for line in read_log(out))


@pytest.mark.slow
def test_a_killed_command_ends_with_the_bits_of_one_that_is_not(
    digits: Path, tmp_path: Path
) -> None:
    options = [digits, *TRAIN[:-1], 1, "--recipe", "v2", "--epochs", 12]
    assert main(["train", *map(str, options), "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "killed"
    for steps in (PER_EPOCH + 2, 5 * PER_EPOCH + 2):  # some of them after the last checkpoint
        process = start(*options, "--out", out)
        until(lambda steps=steps: steps_of(out) >= steps, process)  # type: ignore[misc]
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start(*options, "--out", out)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "top 1" in said
    assert_same_end(end_of(out), end_of(tmp_path / "whole"))


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_are_gone_on_with_by_one(
    digits: Path, tmp_path: Path
) -> None:
    """If they normalise across, they do what one process does, up to rounding."""
    fresnet.save(PARAMS, tmp_path / "tiny.safetensors")
    options = [digits, *TRAIN[2:], "--norms-across", 2, "--epochs", 40, "--timeout", 20]
    options += ["--weights", tmp_path / "tiny.safetensors"]
    assert main(["train", *map(str, options), "--out", str(tmp_path / "one")]) == 0
    out = tmp_path / "two"
    job = start(*options, "--out", out, torchrun=True)
    until(lambda: steps_of(out) > 2 * PER_EPOCH, job)
    began = time.monotonic()
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = job.communicate(timeout=60)
    assert time.monotonic() - began < 40
    assert job.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("fresnet train: ")]
    assert len(said) == 1
    assert "goes on from" in said[0] or "start the same command again to go on" in said[0]
    assert 2 * PER_EPOCH < steps_of(out) < 40 * PER_EPOCH
    assert main(["train", *map(str, options), "--out", str(out)]) == 0
    two, one = (list(read_log(folder)) for folder in (out, tmp_path / "one"))
    for a, b in zip(two, one, strict=True):
        assert a.keys() == b.keys()
        assert a["step"] == b["step"]
        for kind in a.keys() - {"step"}:
            assert a[kind]["loss"] == pytest.approx(b[kind]["loss"], rel=1e-4)
            assert a[kind]["images"] == b[kind]["images"]


# What is refused


@pytest.fixture
def folders(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with good and bad folders of images."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits, "good")
    shutil.copytree(digits, "fewer")
    shutil.rmtree("fewer/val/3")
    for empty in ("none/train/a", "none/train/b", "single/train/a"):
        Path(empty).mkdir(parents=True)
    Path("file").write_text("a file")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            "none",
            "expects images in every class; none/train/a has none that ends in .jpg",
        ),
        (
            "single",
            "expects single/train to hold a folder for each of two classes or more",
        ),
        ("good/train", "a folder of class folders; good/train/train: No such file or directory"),
        ("good --validation no", "a folder of class folders; no: No such file or directory"),
        ("fewer", "expects the 4 classes given; fewer/val lacks 1: '3'"),
        ("good --recipe v3", "unknown --recipe 'v3'; there are paper, v1, v2, lars-4k"),
        ("good --arch resnet21 --batch 1000", "unknown --arch 'resnet21'; did you mean 'resnet"),
        ("good --arch resnet21", "unknown --arch 'resnet21'; did you mean 'resnet"),
        ("good --weights no.pth", "cannot load no.pth: No such file or directory"),
        ("good --epochs 0", "--epochs expects a positive number; got 0"),
        ("good --recipe v2 --epochs 5", "expected more epochs than the 5 that the recipe warms up"),
        ("good --batch -1", "--batch expects a positive number; got -1"),
        ("good --rate nan", "--rate expects a positive number; got nan"),
        ("good --head-rate 0", "--head-rate expects a positive number; got 0"),
        ("good --freeze stem --freeze haed", "such as stem or stages.0; got 'haed'"),
        ("good --freeze head --head-rate 1", "chooses; got 'head.*'"),
        ("good --freeze *", "expects an optimizer that changes a weight; got frozen"),
        ("good --freeze * --dry-run", "expects an optimizer that changes a weight; got frozen"),
        ("good --drop-path 1", "--drop-path expects a number from 0 to below 1; got 1.0"),
        ("good --dropout nan", "--dropout expects a number from 0 to below 1; got nan"),
        ("good --arch plain20 --drop-path 0.1", "draw_masks expects shortcuts where paths are"),
        ("good --crop 0", "--crop expects a positive number; got 0"),
        ("good --keep 0", "--keep expects a positive number; got 0"),
        ("good --save-every 0", "--save-every expects a positive number; got 0"),
        ("good --micro-batches 0", "--micro-batches expects a positive number; got 0"),
        ("good --norms-across 0", "--norms-across expects a positive number; got 0"),
        ("good --micro-batches 11 --batch 10", "of 11 micro-batches expects as many images; got"),
        ("good --seed 99999999999999999999", "--seed expects"),
        ("good --workers -1", "--workers expects a number from 0 on; got -1"),
        ("good --workers -1 --dry-run", "--workers expects a number from 0 on; got -1"),
        ("good --timeout nan", "--timeout expects a positive number of at most 10000000; got nan"),
        ("good --timeout 1e15", "--timeout expects a positive number of at most"),
        ("good --batch 1000", "a batch of 1000 images is more than the"),
        ("good --arch resnet20 --weights a.pth", "cannot load a.pth: No such file or directory"),
        ("good --weights grey", "grey takes images of 1 channels; train has images of 3"),
        ("good --out file", "cannot write to file: File exists"),
        ("good --out file/out", "cannot write to file/out: Not a directory"),
        ("good --out /proc/out", "cannot write to /proc/out: No such file or directory"),
    ],
)
def test_bad_input_is_refused_in_a_line(
    capsys: pytest.CaptureFixture[str], folders: Path, arguments: str, reason: str
) -> None:
    options = () if "--micro" in arguments or "--workers" in arguments else ("--workers", "0")
    grey = fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=4, in_channels=1)
    fresnet.save(grey, "grey")
    arch = () if "--weights" in arguments else ("--arch", "resnet20")
    said = refused(capsys, *arch, "--crop", "16", "--batch", "10", *options, *arguments.split())
    assert reason in said
    assert "scan" not in said  # the function's name, which nobody called
    assert not any(folders.glob("runs/*/checkpoints/*"))


@pytest.mark.parametrize(
    ("classes", "head"), [(4, "its head"), (7, "a fresh head"), (0, "a fresh")]
)
def test_weights_without_a_head_for_these_classes_get_a_fresh_one(
    classes: int, head: str, capsys: pytest.CaptureFixture[str], folders: Path
) -> None:
    fresnet.save(fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=classes), "begin")
    assert main(["train", "good", *TRAIN[2:], "--weights", "begin", "--dry-run"]) == 0
    assert f"begin with {head}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "images", "batch", "rate"),
    [
        ((), 38, 16, 0.1 * 16 / 256),
        ((), 9, 9, 0.1 * 9 / 256),
        ((), 300, 32, 0.1 * 32 / 256),
        ((), 2047, 128, 0.05),
        ((), 2048, 256, 0.1),
        (("--rate", "0.3"), 38, 16, 0.3),
        (("--batch", "10"), 2048, 10, 0.1 * 10 / 256),
        (("--batch", "10", "--rate", "1"), 38, 10, 1),
    ],
)
def test_a_batch_goes_with_the_images_unless_it_is_told(
    options: tuple[str, ...], images: int, batch: int, rate: float
) -> None:
    """The folder is of names alone."""
    args = _parser().parse_args(["train", "some", *options])
    folder = Folder("some", ("a", "b"), ("a.png",) * images, (0,) * images)
    recipe = command._with_batch(RECIPES["v1"], args, folder)
    assert recipe.batch == batch
    assert recipe.rate == pytest.approx(rate)
    assert recipe._replace(batch=256, rate=0.1) == RECIPES["v1"]


def test_a_batch_that_processes_cannot_share() -> None:
    with pytest.raises(FresnetError, match=r"10 images does not divide among 4 .*; 8 or 12 would"):
        share(10, 4)


def test_a_checkpoint_of_another_run(capsys: pytest.CaptureFixture[str], folders: Path) -> None:
    options = ["good", *TRAIN, "--epochs", "1", "--out", "out"]
    assert main(["train", *options]) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    for other, reason in (
        (("--batch", 5), "out holds a run of batch 10, not 5; of rate 0.00390625, not 0.001953125"),
        (("--seed", 1), "out holds a run of seed 0, not 1: go on with the same, or choose another"),
        (("--arch", "plain20"), "is of another state: "),
        (("--recipe", "v2", "--epochs", 6), "is of another state: "),
    ):
        assert reason in refused(capsys, *options, *other)
    (folders / "good" / "train" / "3" / "one more.png").write_bytes(
        next((folders / "good" / "train" / "3").iterdir()).read_bytes()
    )
    assert f"images {IMAGES}, not {IMAGES + 1}" in refused(capsys, *options)
    assert {path: path.read_bytes() for path in before} == before


def test_a_loss_that_is_no_number(capsys: pytest.CaptureFixture[str], folders: Path) -> None:
    options = ["good", *TRAIN, "--epochs", "3", "--out", "out", "--rate", "1e30"]
    said = refused(capsys, *options)
    assert said.startswith("the loss is nan at step 2, batch 2 of epoch 1, which has good/train/")
    assert said.count(".png") == 3
    assert said.endswith("there is no checkpoint yet")
    assert "NaN" not in (folders / "out" / "log.jsonl").read_text()
    said = refused(capsys, *options, "--save-every", 1, "--out", "other")
    assert said == "weights are not finite after step 1; there is no checkpoint yet" or (
        said.startswith("the loss is nan at step 2")
    )


@pytest.mark.parametrize("at", [PER_EPOCH + 2, 2 * PER_EPOCH])
@pytest.mark.parametrize("broken", ["loss", "weights", "stats"])
@pytest.mark.parametrize("stopped", [False, True])
def test_what_is_not_finite_is_never_saved(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    broken: str,
    stopped: bool,
) -> None:
    """It is not evaluated either. The checkpoint before stays the last, even with a signal."""

    def assemble(*args: Any) -> Any:
        state, train_step, order = real(*args)

        def breaking(state: Any, batch: Any) -> Any:
            new, metrics = train_step(state, batch)
            if new.step == at and stopped:
                os.kill(os.getpid(), signal.SIGTERM)
            if new.step == at and broken == "loss":
                metrics = metrics._replace(loss=metrics.loss * torch.inf)
            elif new.step == at:
                part = tree.map(lambda leaf: leaf * torch.nan, getattr(new.params, broken))
                new = new._replace(params=new.params._replace(**{broken: part}))
            return new, metrics

        return state, breaking, order

    real = assembled
    monkeypatch.setattr(running, "assemble", assemble)
    last = tmp_path / "checkpoints" / f"step-{(at - 1):012}.safetensors"
    with pytest.raises(FresnetError) as error:
        call(digits, tmp_path, "v1", save_every=1)
    assert saved_states(tmp_path / "checkpoints")[0] == last
    assert str(error.value).endswith(f"the last checkpoint is {last}")
    if broken == "loss":
        epoch, number = divmod(at - 1, PER_EPOCH)
        where = f"step {at}, batch {number + 1} of epoch {epoch + 1}, which has {digits}/train/"
        assert str(error.value).startswith(f"the loss is inf at {where}")
    else:
        assert str(error.value).startswith(f"weights are not finite after step {at}; ")
    assert sum("evaluation" in line for line in read_log(tmp_path)) == 1


@pytest.fixture
def damaged(folders: Path) -> list[str]:
    """Files in `good` that hold no image."""
    classes = (Path("good", name) for name in ("train/0", "train/2", "val/1"))
    files = [min(folder.iterdir()) for folder in classes]
    for file in files:
        file.write_bytes(file.read_bytes()[:60])
    return [*map(str, files)]


def test_broken_images_end_a_run(capsys: pytest.CaptureFixture[str], damaged: list[str]) -> None:
    for dry in ((), ("--dry-run",)):
        said = refused(capsys, "good", *TRAIN, "--batch", IMAGES, *dry)
        assert f"loader cannot use 2 of {IMAGES} images of a batch; the first is good/train" in said


@pytest.mark.parametrize("stopped", [False, True])
def test_broken_images_are_left_out_and_named_once(
    capsys: pytest.CaptureFixture[str], damaged: list[str], stopped: bool
) -> None:
    options = ["good", *TRAIN, "--epochs", "3", "--skip-broken", "--out", "out"]
    if stopped:
        for at in (6, 2):
            with interrupted("step", at, WAYS["SIGTERM"], late=False):
                assert refused(capsys, *options).startswith("stopped; the same command goes on fr")
    for _ in range(2):  # and after its end
        capsys.readouterr()
        assert main(["train", *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        at = lines.index("left out 3 images that cannot be read:")
        assert [line.split(": ")[0] for line in lines[at + 1 :]] == damaged
        assert "on 17 images" in lines[at - 3]
        log = [line["left_out"]["files"] for line in read_log(Path("out")) if "left_out" in line]
        assert sum(map(len, log)) == 3 * len(damaged)


def test_batches_without_a_readable_image_are_passed_over(
    capsys: pytest.CaptureFixture[str], damaged: list[str]
) -> None:
    """With a batch of one image every broken one is such a batch, in training and validation."""
    options = ["good", *TRAIN, "--batch", "1", "--epochs", "1", "--skip-broken", "--out", "out"]
    assert main(["train", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("left out 3 images that cannot be read:")
    assert [line.split(": ")[0] for line in lines[at + 1 :]] == damaged
    steps = [line["step"] for line in read_log(Path("out")) if "train" in line]
    assert len(steps) == IMAGES - 2
    (state, *_) = saved_states(Path("out") / "checkpoints")
    assert state.name == f"step-{IMAGES:012}.safetensors"
    entries, _ = read_safetensors(state)
    assert entries["state.step"] == entries["state.optimizer.step"] == IMAGES  # schedules go on


def test_any_names_of_classes(digits: Path, tmp_path: Path) -> None:
    """A folder's name need not be UTF-8, nor the locale's."""
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    names = [b"caf\xe9", "\u732b".encode(), b"$x_1", b"a" * 60]
    for split in ("train", "val"):
        for i, name in enumerate(names):
            target = Path(os.fsdecode(os.fsencode(tmp_path / split) + b"/" + name))
            shutil.copytree(digits / split / str(i), target)
    command = [sys.executable, "-m", "fresnet", "train", str(tmp_path), *TRAIN, "--epochs", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        env=plain,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    labels = (tmp_path / "out" / "labels.txt").read_bytes()
    assert labels.splitlines() == sorted(names, key=os.fsdecode)
    image = min((tmp_path / "train" / "$x_1").iterdir())
    network = tmp_path / "out" / "network.safetensors"
    said = subprocess.run(
        [
            *[sys.executable, "-m", "fresnet", "predict", str(image), "--weights", str(network)],
            *["--labels", str(tmp_path / "out" / "labels.txt"), "--preset", "16,16,bilinear"],
        ],
        env=plain,
        capture_output=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert b"caf" in said.stdout


def test_a_full_disk(capsys: pytest.CaptureFixture[str], folders: Path) -> None:
    """Earlier checkpoints stay, and the run goes on from them once there is room."""
    options = ["good", *TRAIN, "--epochs", "3", "--out", "out"]
    with interrupted("step", PER_EPOCH + 1, WAYS["SIGTERM"], late=False):
        assert refused(capsys, *options).startswith("stopped")
    before = {path: path.read_bytes() for path in saved_states("out/checkpoints")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        said = refused(capsys, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said.startswith("save_state cannot write out/checkpoints/step-000000000008")
    assert "File too large" in said
    assert {path: path.read_bytes() for path in saved_states("out/checkpoints")} == before
    assert main(["train", *options]) == 0


def test_a_log_that_cannot_be_written(capsys: pytest.CaptureFixture[str], folders: Path) -> None:
    options = ["good", *TRAIN, "--epochs", "3", "--out", "out"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        assert refused(capsys, *options) == "cannot write to out: File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert main(["train", *options]) == 0


# Recipes


def test_recipes_are_the_published_ones() -> None:
    paper, v1, v2 = (RECIPES[name] for name in ("paper", "v1", "v2"))
    assert (paper.epochs, paper.batch, paper.rate, paper.drops) == (120, 256, 0.1, (30, 60, 90))
    assert paper.augmentation == Augmentation(ScaleCrop(224, (256, 480)), lighting=0.1)
    # torchvision's references: train.py's defaults, with --batch-size 32 on 8 GPUs.
    assert v1 == Recipe(
        90, 256, 0.1, Augmentation(AreaCrop(224)), PRESETS["imagenet-v1"], drops=(30, 60)
    )
    assert (v1.weight_decay, v1.decay_norms, v1.warm_up, v1.average) == (1e-4, True, 0, 0)
    # --batch-size 128 --lr 0.5 --lr-scheduler cosineannealinglr --lr-warmup-epochs 5
    # --lr-warmup-method linear --auto-augment ta_wide --epochs 600 --random-erase 0.1
    # --weight-decay 0.00002 --norm-weight-decay 0.0 --label-smoothing 0.1 --mixup-alpha 0.2
    # --cutmix-alpha 1.0 --train-crop-size 176 --model-ema --val-resize-size 232
    # --ra-sampler --ra-reps 4
    assert (v2.epochs, v2.batch, v2.rate, v2.drops, v2.warm_up) == (600, 8 * 128, 0.5, (), 5)
    assert (v2.weight_decay, v2.decay_norms, v2.label_smoothing) == (2e-5, False, 0.1)
    assert (v2.mixup, v2.cutmix, v2.repeats) == (0.2, 1.0, 4)
    assert v2.augmentation == Augmentation(AreaCrop(176), trivial_augment=True, erase=0.1)
    assert (v2.preset.resize, v2.preset.crop) == (232, 224)


@pytest.mark.parametrize(
    ("name", "batch", "epochs", "rate", "warm_up", "momentum", "decay"),
    [
        ("lars-4k", 4096, 42, 10, 5, 0.9, 2e-4),
        ("lars-8k", 8192, 44, 17, 5, 0.9, 2e-4),
        ("lars-32k", 32768, 58, 21.2, 16, 0.94, 2.5e-5),
    ],
)
def test_large_batches_are_trained_as_for_mlperf(
    name: str,
    batch: int,
    epochs: int,
    rate: float,
    warm_up: int,
    momentum: float,
    decay: float,
) -> None:
    """Halfway down, the rate is a quarter. Only kernels adapt and decay."""
    recipe = RECIPES[name]
    assert (recipe.batch, recipe.epochs, recipe.label_smoothing) == (batch, epochs, 0.1)
    schedule = schedule_of(recipe, 10)
    for epoch, part in ((0, 0.01), (warm_up, 1), ((warm_up + epochs) / 2, 0.25), (epochs, 0)):
        at = torch.tensor(10 * epoch, dtype=torch.float64)
        assert float(schedule(at)) == pytest.approx(part * rate)
    expected = optim.lars(0.01 * rate, momentum=momentum, weight_decay=decay, trust=0.001)
    weights, found = PARAMS.weights, []
    for optimizer in (optimizer_of(recipe, 10), expected):
        state = optimizer.init(weights)
        moments = tree.map(torch.cos, state.moments)
        found.append(optimizer.update(weights, state._replace(moments=moments), weights)[0])
    assert_trees_close(found[0], found[1], 1e-6)


@pytest.mark.parametrize("per_epoch", [1, 7])
@pytest.mark.parametrize("name", ["paper", "v1", "v2"])
def test_rates_are_those_of_torchs_schedulers(name: str, per_epoch: int) -> None:
    """They are built as in torchvision's references, and compared where epochs begin."""
    recipe = RECIPES[name]
    optimizer = torch.optim.SGD([torch.zeros(1)], recipe.rate)
    truth: Any
    if recipe.drops:
        truth = lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1)
    else:
        truth = lr_scheduler.SequentialLR(
            optimizer,
            [
                lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=5),
                lr_scheduler.CosineAnnealingLR(optimizer, T_max=600 - 5),
            ],
            milestones=[5],
        )
    rate = schedule_of(recipe, per_epoch)
    for epoch in range(recipe.epochs):
        at = torch.tensor(float(epoch * per_epoch), dtype=torch.float64)
        assert float(rate(at)) == pytest.approx(truth.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)
            truth.step()


@pytest.mark.parametrize(("name", "epochs"), [("paper", 1), ("v1", 1), ("v1", 7), ("v2", 6)])
def test_a_shorter_recipe_has_the_same_rates_in_less_time(name: str, epochs: int) -> None:
    recipe, short = RECIPES[name], with_epochs(RECIPES[name], epochs)
    rates, shorter = schedule_of(recipe, 7 * epochs), schedule_of(short, 7 * recipe.epochs)
    for step in torch.arange(0.0, 7 * epochs * recipe.epochs):
        if recipe.warm_up == 0:
            assert float(shorter(step)) == float(rates(step))
    last = torch.tensor(7.0 * epochs * recipe.epochs)
    for step in (0 * last, last):
        assert float(shorter(step)) == float(rates(step))
    with pytest.raises(FresnetError, match=r"more epochs than the 5 .* warms up; got 5"):
        with_epochs(RECIPES["v2"], 5)


@pytest.mark.parametrize(("epochs", "step"), [(0.3, 2), (0.4, 3)])
def test_the_rate_drops_at_the_step_nearest_to_a_fraction_of_an_epoch(
    epochs: float, step: int
) -> None:
    rate = schedule_of(V1._replace(rate=1.0, drops=(epochs,)), 7)
    rates = [float(rate(torch.tensor(float(at)))) for at in range(7)]
    assert rates == pytest.approx([1.0] * step + [0.1] * (7 - step))


def test_another_batch_or_crop() -> None:
    v1, v2, paper = RECIPES["v1"], RECIPES["v2"], RECIPES["paper"]
    assert with_batch(v2, 512) == v2._replace(batch=512, rate=0.25)
    assert with_crop(v1, 224) == v1
    assert with_crop(paper, 112).augmentation.crop == ScaleCrop(112, (128, 240))
    other = with_crop(v2, 88)
    assert other.augmentation == v2.augmentation._replace(crop=AreaCrop(88))
    assert (other.preset.resize, other.preset.crop) == (round(232 * 88 / 224), 88)


def test_averages_are_torchvisions() -> None:
    """torchvision takes every 32nd state, with a weight for all 32 together."""
    share = 2e-5 * 1024 * 32 / 600
    assert 1 - average_decay_of(RECIPES["v2"]) ** 32 == pytest.approx(share, rel=1e-3)
    assert average_decay_of(RECIPES["v2"]._replace(epochs=1, batch=10**6)) == 0
    assert assembled(Run("", CASES["v1"]), PARAMS, 9, ALONE)[0].average == ()


@pytest.mark.parametrize(("name", "spared"), [("v1", False), ("v2", True)])
def test_norms_are_spared_from_decay(name: str, spared: bool) -> None:
    """With gradients of zero, the first update is the decay alone."""
    recipe = RECIPES[name]
    ones = tree.map(torch.ones_like, PARAMS.weights)
    optimizer = optimizer_of(recipe, 10)
    new, _ = optimizer.update(tree.map(torch.zeros_like, ones), optimizer.init(ones), ones)
    rate = recipe.rate * (0.01 if recipe.warm_up else 1)
    for path, leaf in zip(tree.paths(new), tree.leaves(new), strict=True):
        decays = not spared or optim.all_but_norms(path)
        expected = 1 - rate * recipe.weight_decay * decays
        assert torch.allclose(leaf, torch.tensor(expected), rtol=0, atol=1e-7), path
        assert (leaf != 1).all() == decays or rate * recipe.weight_decay < 6e-8


def test_the_command_freezes_parts_and_goes_on_with_them(
    capsys: pytest.CaptureFixture[str], folders: Path
) -> None:
    options = ["good", *TRAIN, "--epochs", "1", "--out", "out", "--freeze", "stem"]
    options += ["--freeze", "stages.[01]", "--head-rate", "0.5"]
    assert main(["train", *options, "--dry-run"]) == 0
    table = capsys.readouterr().out
    assert "frozen      stem, stages.[01]" in table
    assert re.search(r"^head +0.5 at first", table, re.M)
    with interrupted("step", 2, WAYS["SIGINT"], late=False):
        assert "stopped" in refused(capsys, *options)
    assert "is of another state: " in refused(capsys, *options[:-2])
    assert main(["train", *options]) == 0
    trained = fresnet.load("out/network.safetensors")
    before = fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=4)
    for after, first in zip(trained, before, strict=True):
        for name, leaf in tree.named(first).items():
            still = tree.matching("stem", "stages.[01]")(tuple(name.split(".")))
            assert torch.equal(tree.named(after)[name], leaf) is still, name
    assert isinstance(trained.weights.stem.layer.norm, FrozenNorm)


def test_mixings() -> None:
    assert mixing_of(RECIPES["v1"]) is None
    x, y = torch.rand(4, 3, 8, 8), torch.eye(4)
    for recipe in (V2, V2._replace(mixup=0), V2._replace(cutmix=0)):
        mixing = mixing_of(recipe)
        assert mixing is not None
        mixed, targets = mixing(x, y, torch.Generator().manual_seed(0))
        assert not torch.equal(mixed, x)
        assert torch.allclose(targets.sum(1), torch.ones(4))


@pytest.mark.parametrize(("classes", "top5"), [(5, ""), (6, ", top 5 83.33%")])
def test_top_5_is_said_where_it_says_something(classes: int, top5: str) -> None:
    found = Evaluation(6, 1.5, 0.5, 5 / 6, torch.zeros(classes, classes, dtype=torch.int64))
    assert in_words(found) == f"loss 1.500, top 1 50.00%{top5}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_is_a_table_and_the_first_step(
    capsys: pytest.CaptureFixture[str], folders: Path, recipe: str
) -> None:
    before = sorted(Path().rglob("*"))
    options = ["train", "good", *TRAIN, "--epochs", "20", "--recipe", recipe, "--out", "out"]
    options += ["--drop-path", "0.2", "--dropout", "0.1"]
    assert main([*options, "--dry-run"]) == 0
    table = capsys.readouterr().out
    assert sorted(Path().rglob("*")) == before
    assert max(map(len, table.splitlines())) <= 80
    assert f"{IMAGES} to train on, 18 to validate" in table
    assert "20 epochs of 4 steps, 80 in all" in table
    assert "dropped     paths 0.2, features 0.1" in table
    with interrupted("step", 1, WAYS["SIGINT"], late=True):
        assert main(options) == 1
    [first] = read_log(Path("out"))
    assert f"first step  loss {first['train']['loss']:.3f};" in table


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (38, "--batch 10 --micro-batches 10", "of 10 micro-batches expects as many images; got 9"),
        (3, "--batch 2 --crop 4", "expects more than one value per channel"),
        (38, "--batch 10 --rate 1e38", "the loss is nan at step 2, "),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(
    images: int, options: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """38 images make batches of 10, 10, 9 and 9, and 3 images batches of 2 and 1."""
    write_digits(tmp_path / "few", 2, {"train": images, "val": 2})
    arguments = [tmp_path / "few", *TRAIN, *options.split(), "--out", tmp_path / "out"]
    for dry in ((), ("--dry-run",)):
        assert message in refused(capsys, *arguments, *dry)


def test_a_checkpoint_of_other_steps_than_it_says_is_refused(
    capsys: pytest.CaptureFixture[str], folders: Path
) -> None:
    options = ["good", *TRAIN, "--epochs", "1", "--out", "out"]
    assert main(["train", *options]) == 0
    [path] = saved_states(Path("out") / "checkpoints")
    entries, texts = read_safetensors(path)
    for name in ("state.step", "state.position"):
        for steps in (-5, 3, 9 * 10**18):
            changed = {**entries, name: torch.tensor(steps)}
            write_safetensors("save", changed, path, texts)
            for dry in ((), ("--dry-run",)):
                assert "is damaged: expected one number of steps" in refused(capsys, *options, *dry)
    write_safetensors("save", entries, path, texts)
    path.rename(path.with_name("step-000000000007.safetensors"))
    assert "it is of step 4, unlike its name" in refused(capsys, *options)


def test_a_dry_run_of_a_run_under_way(capsys: pytest.CaptureFixture[str], folders: Path) -> None:
    """It tells where the run goes on, and refuses another run."""
    options = ["good", *TRAIN, "--epochs", "2", "--out", "out"]
    with interrupted("step", 3, WAYS["SIGINT"], late=False):
        assert "stopped" in refused(capsys, *options)
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert main(["train", *options, "--dry-run"]) == 0
    table = capsys.readouterr().out
    assert "goes on     after step 3, from out" in table
    assert "out holds a run of seed 0, not 1" in refused(capsys, *options, "--seed", 1, "--dry-run")
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before
    assert main(["train", *options]) == 0
    loss = next(line for line in read_log(Path("out")) if line["step"] == 4)["train"]["loss"]
    assert f"next step   loss {loss:.3f};" in table
    capsys.readouterr()
    assert main(["train", *options, "--dry-run"]) == 0
    assert "goes on     after step 8, from out" in capsys.readouterr().out


def test_another_validation_folder_is_another_run(
    capsys: pytest.CaptureFixture[str], folders: Path
) -> None:
    """Else one curve would be of two folders. The same files may be moved."""
    options = ["good", *TRAIN, "--epochs", "1", "--out", "out"]
    assert main(["train", *options]) == 0
    shutil.copytree("good/val", "moved")
    assert main(["train", *options, "--validation", "moved"]) == 0
    image = min(Path("moved/0").iterdir())
    image.rename(image.with_name("other.png"))
    capsys.readouterr()
    said = refused(capsys, *options, "--validation", "moved")
    assert "out holds a run of validation files' checksum" in said
    (image.with_name("other.png")).unlink()
    assert "of validation images 18, not 17" in refused(capsys, *options, "--validation", "moved")


# Log and pictures


def test_tensorboard_holds_the_log(digits: Path, tmp_path: Path) -> None:
    """This holds for a stopped run too: no step is missing, and none is there twice."""
    for place, at, how in (
        ("step", 6, "SIGTERM"),
        ("step", 5, "an error"),
        ("save", 1, "an error"),
    ):
        with (
            interrupted(place, at, WAYS[how], late=False),
            suppress(FaultError, KeyboardInterrupt),
        ):
            call(digits, tmp_path)
    call(digits, tmp_path)
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    expected: dict[str, list[Any]] = {}
    for line in read_log(tmp_path):
        for kind in line.keys() - {"step"}:
            for name, value in line[kind].items():
                expected.setdefault(f"{kind}/{name}", []).append((line["step"], value))
    assert set(board.Tags()["scalars"]) == set(expected)
    for tag, values in expected.items():
        assert [event.step for event in board.Scalars(tag)] == [step for step, _ in values]
        found = [event.value for event in board.Scalars(tag)]
        assert found == pytest.approx([value for _, value in values], rel=1e-6)


def test_a_clock_that_goes_back_hides_no_step(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard reads files in the order of their names, which begin with the time."""
    now = time.time_ns()
    for seconds in (0, -3600, -7200, -1e9):
        monkeypatch.setattr(time, "time_ns", lambda seconds=seconds: int(now + seconds * 1e9))
        with interrupted("step", 3, fault, late=False), suppress(FaultError):
            call(digits, tmp_path, save_every=1)
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    steps = [line["step"] for line in read_log(tmp_path) if "train" in line]
    assert [event.step for event in board.Scalars("train/loss")] == steps == list(range(1, 9))


def log_of(steps: int, per_epoch: int) -> Iterator[Any]:
    rng = np.random.default_rng(0)
    for step in range(1, steps + 1):
        loss = 0.4 + 2 * np.exp(-2 * step / steps) + 0.1 * rng.normal()
        metrics = {"loss": loss, "accuracy": 1 - loss / 3, "rate": 0.1, "images": 10}
        yield {"step": step, "train": metrics}
        if step % per_epoch == 0:
            found = {"loss": loss - 0.1, "top1": 1 - loss / 3, "top5": 1 - loss / 6, "images": 9}
            yield {"step": step, "evaluation": found}


@pytest.mark.parametrize(("steps", "per_epoch"), [(1, 1), (24, 4), (5000, 250)])
def test_curves(tmp_path: Path, steps: int, per_epoch: int) -> None:
    plots.draw_curves(log_of(steps, per_epoch), per_epoch, tmp_path / "curves.png")
    assert imread(tmp_path / "curves.png").std() > 0.05


def test_curves_of_a_log_that_was_lost(tmp_path: Path) -> None:
    plots.draw_curves([], 4, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_the_confusion_of_many_classes_is_that_of_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of a cell for each of 21,841 classes a side would take 12 GB."""
    monkeypatch.setattr(plots, "CELLS", 4)
    counts = torch.arange(100).view(10, 10)
    grouped = plots._grouped(plots._grouped(counts, 0), 1)
    parts = [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10)]
    assert grouped.tolist() == [[int(counts[a, b].sum()) for b in parts] for a in parts]
    plots.draw_confusion(counts, [str(i) for i in range(10)] * 3, tmp_path / "confusion.png")
    assert imread(tmp_path / "confusion.png").std() > 0.05


@pytest.mark.parametrize("classes", [2, 10, 60])
@pytest.mark.parametrize("name", ["dog {}", "$dog_{}$", "a dog that answers to the name of {}" * 4])
def test_confusion(tmp_path: Path, classes: int, name: str) -> None:
    confusion = torch.randint(0, 4, (classes, classes)) + 30 * torch.eye(classes, dtype=torch.int64)
    names = [name.format(*[i] * 4) for i in range(classes)]
    plots.draw_confusion(confusion, names, tmp_path / "confusion.png")
    assert imread(tmp_path / "confusion.png").std() > 0.05


def test_a_folder_is_one_runs_at_a_time(capsys: pytest.CaptureFixture[str], folders: Path) -> None:
    Path("out").mkdir()
    hold = "import fcntl, sys; f = open('out/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{hold}; print('held', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        said = refused(capsys, "good", *TRAIN, "--out", "out")
        assert said == "another run is writing to out: choose another folder"
        other.stdin.close()
    assert not any(Path("out").glob("*.jsonl"))


def test_predict_takes_what_a_run_says_at_its_end(
    capsys: pytest.CaptureFixture[str], folders: Path
) -> None:
    """These are the names of its classes, and its own way of preparing images."""
    assert main(["train", "good", *TRAIN, "--epochs", "1", "--out", "out"]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    command = told.partition(" predict IMAGE ")[2].split()
    images = sorted(map(str, Path("good/val").rglob("*.png")))
    assert main(["predict", *images, "--json", *command]) == 0
    found = json.loads(capsys.readouterr().out)
    params, preset = fresnet.load("out/network.safetensors"), Preset(18, 16, "bilinear")
    (checkpoint,) = saved_states("out/checkpoints")
    assert fresnet.notes("out/network.safetensors") == fresnet.notes(checkpoint)
    expected = fresnet.forward(params, preprocess(images, preset)).softmax(1).max(1)
    classes = scan("good/train").classes
    for one, best, probability in zip(found, expected.indices, expected.values, strict=True):
        first = one["predictions"][0]
        assert first["label"] == classes[best]
        assert first["probability"] == pytest.approx(probability.item(), rel=1e-4)


def test_a_run_tells_its_result_again_after_its_end(
    capsys: pytest.CaptureFixture[str], folders: Path
) -> None:
    options = ["train", "good", *TRAIN, "--epochs", "2", "--out", "out"]
    assert main([*options, "--dry-run"]) == 0
    plan = capsys.readouterr().out.splitlines()[:-2]
    assert plan[0].startswith("network     resnet20, 4 classes, ")
    assert main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    said = lines[len(plan) :]
    assert lines[: len(plan)] == plan
    for number, line in enumerate(said[:2], 1):
        assert re.fullmatch(
            rf"epoch {number} of 2: validation loss [\d.]+, top 1 [\d.]+%, [\d.,]+ images/s", line
        )
    log = (folders / "out" / "log.jsonl").read_text()
    assert main(options) == 0
    assert capsys.readouterr().out.splitlines() == [*plan, "going on after step 8 of 8", *said[2:]]
    assert (folders / "out" / "log.jsonl").read_text() == log
    for line in log.splitlines():
        assert json.loads(line)["step"] <= 2 * PER_EPOCH
    for picture in ("curves.png", "confusion.png"):
        assert imread(folders / "out" / picture).ndim == 3


def test_what_older_runs_did_not_note_is_no_difference_where_it_is_not_set(tmp_path: Path) -> None:
    state = begin(fresnet.init(0, Spec(BasicBlock, (1,), 4), num_classes=2), optim.sgd(0.1))
    save_state(state, tmp_path / "checkpoints", step=0, notes={"rate": "0.1"})
    notes = {"rate": "0.1", "head_rate": "None", "frozen": "()", "preset channels": "RGB"}
    notes["drop_path"] = "0.0"
    assert_same(resumed(state, tmp_path, notes), state)
    others = ({"head_rate": "1.0"}, {"preset channels": "BGR"}, {"drop_path": "0.1"})
    for other in (*others, {"rate": "None"}):
        with pytest.raises(FresnetError, match="holds a run of"):
            resumed(state, tmp_path, {**notes, **other})
