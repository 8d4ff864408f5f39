"""The example on Fashion-MNIST: its data, its recipe, and runs that are stopped and resumed."""

import gzip
import re
import struct
import sys
from pathlib import Path
from typing import Any

import fashion
import fashion_ensemble
import numpy as np
import pytest
import torch
from assertions import assert_close, assert_same
from clothes import BATCH, Clothes, cropped, drawn, load, normalised
from torch import Tensor
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import FresnetError, optim, training, tree
from fresnet.weights.storage import read_safetensors

TRAIN, TEST = 300, 50  # two batches, and images that fill none
FILED = 600  # images for training that lie in files


def synthetic(n: int, seed: int) -> Clothes:
    """Noise with a bright bar, whose height is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=generator)
    images = torch.randint(100, (n, 28, 28), generator=generator, dtype=torch.uint8)
    rows = torch.arange(28) // 3 == labels[:, None]
    return Clothes(torch.where(rows[:, :, None], 255, images), labels)


DATA = synthetic(TRAIN, 0), synthetic(TEST, 1)
FILES = synthetic(FILED, 0), DATA[1]


def idx(values: Tensor) -> bytes:
    head = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return head + values.to(torch.uint8).numpy().tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of the four files, of which those for training are gzipped."""
    path = tmp_path / "data"
    path.mkdir()
    for name, (images, labels) in zip(("train", "t10k"), FILES, strict=True):
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            file = path / f"{name}-{kind}-ubyte"
            if name == "train":
                file.with_suffix(".gz").write_bytes(gzip.compress(idx(values)))
            else:
                file.write_bytes(idx(values))
    return path


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["fashion.py", *map(str, arguments)])
    fashion.main()


def states(out: Path) -> dict[str, Any]:
    """The entries of the last checkpoint."""
    (path,) = (out / "checkpoints" / "resnet20").iterdir()
    return read_safetensors(path)[0]


def test_files_are_read_plain_and_gzipped(folder: Path) -> None:
    assert_same(load(folder), FILES)


IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
WHOLE = idx(DATA[1].images)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, None, f"there is no {IMAGES}, plain or as .gz, in .*dataset-fashion-mnist has it"),
        (IMAGES, b"", r"should begin .* with 0 0 8 3 and 3 sizes; it begins with \[\]"),
        (IMAGES, WHOLE[:10], r"and 3 sizes; it begins with \[0, 0, 8, 3, 0, 0, 0, 50, 0, 0\]"),
        (IMAGES, b"\0\0\x0d" + WHOLE[3:], r"it begins with \[0, 0, 13, 3,"),
        (IMAGES, idx(DATA[1].labels), r"it begins with \[0, 0, 8, 1,"),
        (IMAGES, WHOLE[:-1], r"should have 39216 bytes for its sizes \(50, 28, 28\); .* 39215"),
        (IMAGES, WHOLE + b"\0", r"should have 39216 bytes .* has 39217"),
        (IMAGES, idx(DATA[1].images[1:]), r"it has images \(49, 28, 28\) and 50 labels up to"),
        (IMAGES, idx(DATA[1].images[:, 1:]), r"images of 28x28 pixels .* \(50, 27, 28\)"),
        (LABELS, idx(DATA[1].labels + 1), "a class from 0 to 9; .* 50 labels up to 10"),
        ("train-images-idx3-ubyte.gz", gzip.compress(WHOLE)[:-9], "ubyte.gz cannot be read: "),
        ("train-images-idx3-ubyte.gz", WHOLE, "ubyte.gz cannot be read: Not a gzipped file"),
    ],
)
def test_damaged_files_are_refused_in_words(
    folder: Path, name: str, content: bytes | None, message: str
) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(FresnetError, match=message):
        load(folder)


def test_no_images_at_all_are_refused(folder: Path) -> None:
    (folder / IMAGES).write_bytes(idx(DATA[1].images[:0]))
    (folder / LABELS).write_bytes(idx(DATA[1].labels[:0]))
    with pytest.raises(FresnetError, match="0 labels up to None"):
        load(folder)


def test_an_epoch_shows_each_image_at_most_once_in_an_order_of_its_own() -> None:
    epochs = [drawn(TRAIN, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for draws in epochs:
        assert draws.shape == (2, BATCH, 4)
        images, down, right, mirrored = draws.flatten(0, 1).unbind(1)
        assert len(images.unique()) == 2 * BATCH
        assert 0 <= images.min() <= images.max() < TRAIN
        for moves in (down, right):
            assert moves.unique().tolist() == [*range(9)]
        assert not torch.equal(down, right)
        assert mirrored.unique().tolist() == [0, 1]
    assert len({tuple(draws[0, :, 0].tolist()) for draws in epochs}) == 4
    assert_same(drawn(TRAIN, 1, 1), epochs[3])


def test_images_are_padded_cropped_mirrored_and_normalised() -> None:
    """They are so one by one, by numpy."""
    draws = drawn(TRAIN, 0, 0)[0]
    x, y = cropped(DATA[0], draws)
    for image, label, (i, down, right, mirrored) in zip(x, y, draws.tolist(), strict=True):
        padded = np.pad(DATA[0].images[i].numpy(), 4)
        expected = padded[down : down + 28, right : right + 28]
        assert np.array_equal(image.numpy(), expected[:, ::-1] if mirrored else expected)
        assert label == DATA[0].labels[i]
    assert_close(normalised(x), (x[:, None] - 255 * 0.2860) / (255 * 0.3530), 1e-6)


@pytest.mark.slow
def test_a_resumed_run_is_an_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    options: dict[str, Any] = {"epochs": 3, "seed": 0}
    for at in fashion.train("resnet20", DATA, out=straight, **options):
        expected = at
    next(fashion.train("resnet20", DATA, out=broken, **options))
    (broken / "resnet20.csv").unlink()  # as if it had been stopped before it wrote the log
    run = fashion.train("resnet20", DATA, out=broken, **options)
    assert next(run).rows[0][:4] == expected.rows[0][:4]
    assert len(fashion.logs(broken)["resnet20"]) == 1
    for at in run:
        got = at
    assert_same(got.params, expected.params)
    assert_same(states(broken), states(straight))
    assert [row[:4] for row in got.rows] == [row[:4] for row in expected.rows]
    assert expected.rows[-1].train_loss < expected.rows[0].train_loss


@pytest.mark.slow
def test_a_run_is_one_of_torch_optim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lower rate keeps the rounding of a few steps small, and a larger decay can be seen."""
    assert (fashion.RATE, fashion.MOMENTUM, fashion.WEIGHT_DECAY) == (0.1, 0.9, 1e-4)  # the paper's
    monkeypatch.setattr(fashion, "RATE", 1e-3)
    monkeypatch.setattr(fashion, "WEIGHT_DECAY", 0.1)
    *_, last = fashion.train("plain20", DATA, epochs=2, seed=7, out=tmp_path)
    params = fresnet.init(7, fresnet.SPECS["plain20"], num_classes=10, in_channels=1)
    leaves = [leaf.requires_grad_() for leaf in tree.leaves(params.weights)]
    optimizer = torch.optim.SGD(leaves, 1e-3, momentum=0.9, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    stats = params.stats
    for epoch in range(2):
        seen = []
        for draws in drawn(TRAIN, 7, epoch):
            x, y = cropped(DATA[0], draws)
            weights = tree.unflatten(params.weights, leaves)
            logits, stats = fresnet.forward_train(fresnet.Params(weights, stats), normalised(x))
            optimizer.zero_grad()
            loss = cross_entropy(logits, y)
            loss.backward()
            optimizer.step()
            schedule.step()
            seen.append([loss.item(), (logits.argmax(1) != y).double().mean().item()])
        assert last.rows[epoch][:3] == pytest.approx((epoch + 1, *np.mean(seen, 0)), rel=1e-5)
    expected = torch.cat([leaf.detach().flatten() for leaf in leaves])
    assert_close(tree.ravel(last.params.weights), expected, 1e-6)
    wrong = fresnet.forward(last.params, normalised(DATA[1].images)).argmax(1) != DATA[1].labels
    assert last.rows[-1].test_error == pytest.approx(wrong.double().mean().item())


@pytest.mark.slow
def test_the_command_trains_draws_and_refuses(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    main(monkeypatch, "--data", folder, "--out", out, "--device", "cpu", "--epochs", "1")
    printed = capsys.readouterr().out
    assert "resnet20  epoch   1 of 1: training error " in printed
    assert "| resnet20 | 1 | " in printed
    made = {"curves.png", "resnet20.csv", "resnet20.safetensors", "suspects.png"}
    assert {path.name for path in out.iterdir()} == {"checkpoints", *made}
    assert fresnet.load(out / "resnet20.safetensors").weights.head.bias.shape == (10,)
    (out / "curves.png").unlink()
    main(monkeypatch, "--out", out, "--networks")
    assert capsys.readouterr().out == printed[printed.index("| network") :]
    assert (out / "curves.png").is_file()

    for arguments, message in (
        (("--epochs", "2"), "resnet20 was started with epochs 1, not 2"),
        (("--epochs", "1", "--seed", "1"), "was started with seed 0, not 1"),
        (("--epochs", "1", "--bfloat16"), "was started with bfloat16 False, not True"),
        (("--data", tmp_path), "there is no train-images-idx3-ubyte"),
        (("--networks", "--out", tmp_path), "there is no log in"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(monkeypatch, "--data", folder, "--out", out, "--device", "cpu", *arguments)


@pytest.mark.parametrize(
    ("arguments", "bfloat16"),
    [
        (("--device", "cpu"), False),
        (("--device", "cpu", "--bfloat16"), True),
        (("--device", "cuda"), True),
        (("--device", "cuda", "--no-bfloat16"), False),
    ],
)
def test_the_dtype_of_steps_goes_by_the_device_unless_it_is_said(
    arguments: tuple[str, ...], bfloat16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fashion, "train_all", asked.append)
    with pytest.raises(SystemExit, match="there is no log"):
        main(monkeypatch, "--out", tmp_path, *arguments)
    assert asked[0].bfloat16 is bfloat16


def test_another_programs_checkpoint_is_refused_in_words(tmp_path: Path) -> None:
    spec = fresnet.SPECS["resnet20"]
    params = fresnet.init(0, spec, num_classes=10, in_channels=1)
    state = training.start(params, optim.sgd(0.1, momentum=0.9, weight_decay=1e-4))
    training.save_state(state, tmp_path / "checkpoints" / "resnet20", step=1)
    with pytest.raises(FresnetError, match="resnet20 was started with epochs None, not 1"):
        next(fashion.train("resnet20", DATA, epochs=1, seed=0, out=tmp_path))


def test_suspects_are_wrong_and_go_by_the_length_of_their_gradients() -> None:
    """Lengths are those of `torch.autograd`, image by image."""
    spec = fresnet.Spec(fresnet.nodes.BasicBlock, (1,), width=4, stem=fresnet.nodes.Stem3x3)
    params = fresnet.init(0, spec, num_classes=10, in_channels=1)
    order, said = fashion.suspects(params, DATA[1])
    images, labels = DATA[1]
    leaves = [leaf.clone().requires_grad_() for leaf in tree.leaves(params.weights)]
    network = params._replace(weights=tree.unflatten(params.weights, leaves))
    norms = []
    for x, y in zip(normalised(images), labels, strict=True):
        loss = cross_entropy(fresnet.forward(network, x[None]), y[None])
        grads = torch.autograd.grad(loss, leaves)
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
    guesses = fresnet.forward(params, normalised(images)).argmax(1)
    assert_same(said, guesses)
    wrong = (guesses != labels).nonzero().flatten().tolist()
    assert len(wrong) > 10
    assert order.tolist() == sorted(wrong, key=lambda i: -norms[i])
    right = DATA[1]._replace(labels=guesses)
    assert fashion.suspects(params, right)[0].tolist() == []


def test_the_document_says_what_was_recorded() -> None:
    document = Path(__file__).parent.parent / "docs" / "fashion.md"
    folder, text = document.with_suffix(""), document.read_text()
    logs, scores = fashion.logs(folder), fashion_ensemble.read(folder / "ensemble.csv")
    assert len(logs) == 4
    assert fashion.table(logs) in text
    assert fashion_ensemble.table(scores) in text
    (first, *others), ensemble = [score.error for score in scores[:-1]], scores[-1].error
    assert first == logs["resnet20"][-1].test_error
    words = " ".join(text.split())
    assert f"gets {first:.1%} of the test images of Fashion-MNIST wrong" in words
    assert f"an ensemble of five {ensemble:.1%}" in words
    assert f"ended between {min(others):.1%} and {max(others):.1%}" in words
    assert f"| ResNet-20, 8 epochs | {first:.1%} | this page |" in text
    assert f"| ensemble of five ResNet-20, 8 epochs each | {ensemble:.1%} | this page |" in text
    deeper = logs["resnet56"][-1].test_error - first
    assert f"With shortcuts the difference is {100 * deeper:.1f} points" in words


def test_who_is_wholly_sure_and_right_has_no_error_of_any_kind() -> None:
    """A confidence of 1 is in the last bin."""
    assert fashion_ensemble.score(torch.eye(10), torch.arange(10)) == (0, 0, 0)
    wrong = fashion_ensemble.score(torch.eye(10).roll(1, 1), torch.arange(10))
    assert (wrong.error, wrong.calibration_error) == (1, 1)


def test_there_are_fifteen_bins_of_confidence() -> None:
    """So 0.61 and 0.69 lie in two, and what one lacks the other does not make up for."""
    found = fashion_ensemble.score(torch.tensor([[0.61, 0.39], [0.69, 0.31]]), torch.tensor([0, 1]))
    assert found.calibration_error == pytest.approx((0.39 + 0.69) / 2)


@pytest.mark.slow
def test_an_ensemble_is_scored_as_its_networks_one_by_one(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Errors, losses and calibration errors are those of numpy, network by network."""
    spec = fresnet.SPECS["resnet20"]
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(3)]
    each = []
    for seed, path in enumerate(paths):
        params = fresnet.init(seed, spec, num_classes=10, in_channels=1)
        fresnet.save(params, path)
        each.append(fresnet.forward(params, normalised(DATA[1].images)).softmax(1).numpy())
    arguments = ("--data", folder, "--out", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["fashion_ensemble.py", *map(str, (*paths, *arguments))])
    fashion_ensemble.main()
    printed = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "calibration.png",
        "ensemble.csv",
    }

    labels = DATA[1].labels.numpy()

    def expected(probabilities: Any) -> tuple[float, float, float]:
        confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
        place = np.floor(confidence * 15)
        gaps = [abs((confidence - right)[place == i].sum()) for i in range(16)]
        loss = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
        return 1 - right.mean(), loss, sum(gaps) / len(labels)

    members = np.array([expected(one) for one in each])
    rows = [members.min(0), members.mean(0), members.max(0), expected(np.mean(each, 0))]
    found = [re.findall(r"[\d.]+(?=%? \|)", line)[-3:] for line in printed.splitlines()[2:]]
    for row, (error, loss, gap) in zip(rows, found, strict=True):
        assert float(error) / 100 == pytest.approx(row[0], abs=1e-4)
        assert float(loss) == pytest.approx(row[1], abs=1e-4)
        assert float(gap) / 100 == pytest.approx(row[2], abs=2e-4)
    assert "| ensemble of 3 | " in printed

    monkeypatch.setattr(sys, "argv", ["fashion_ensemble.py", str(paths[0])])
    with pytest.raises(SystemExit):
        fashion_ensemble.main()
    assert "an ensemble has at least two networks; got one" in capsys.readouterr().err


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    few = synthetic(BATCH - 1, 0), DATA[1]
    with pytest.raises(FresnetError, match="takes at least 128 training images; there are 127"):
        next(fashion.train("resnet20", few, epochs=1, seed=0, out=tmp_path))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_captured_steps_are_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replays are two calls, to the bit, and the state that was given is left alone."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    data = tree.map(lambda leaf: leaf.cuda(), DATA[0])
    optimizer = fresnet.optim.sgd(0.1, momentum=0.9, weight_decay=1e-4)
    spec = fresnet.SPECS["resnet20"]
    params = fresnet.init(0, spec, num_classes=10, in_channels=1, device="cuda")
    first = fresnet.training.start(params, optimizer)
    draws = drawn(TRAIN, 0, 0).cuda()
    plain = fashion.steps_on(data, optimizer)
    captured = fashion.captured(plain, first, draws)
    before = tree.map(Tensor.clone, first)
    once, twice = captured(first, draws), plain(first, draws)
    assert_same(once, twice)
    assert_same(captured(once[0], draws), plain(twice[0], draws))
    assert_same(once, twice)
    assert_same(first, before)
