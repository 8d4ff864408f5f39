"""The example on meta-learning: its network, its tasks and its three ways to one run."""

import csv
import gzip
import struct
import sys
from math import inf, nan
from pathlib import Path
from statistics import mean, median, stdev

import meta_fault
import pytest
import torch
from assertions import assert_close, assert_same
from clothes import Clothes
from meta_fault import HELD_OUT, TRAINED, Tasks, Y, draw_tasks, parted
from torch.nn.functional import avg_pool2d, cross_entropy

import fresnet
from fresnet import tree

RECORD = Path(__file__).parent.parent / "docs" / "meta_fault.csv"


def clothes(seed: int) -> Clothes:
    """Two images of noise for each class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(20) % 10
    images = torch.randint(256, (20, 28, 28), generator=generator, dtype=torch.uint8)
    return Clothes(images, labels)


DATA = clothes(0), clothes(1)


@pytest.mark.parametrize("classes", [TRAINED, HELD_OUT])
def test_a_task_has_an_image_of_each_class_under_numbers_of_its_own(classes: torch.Tensor) -> None:
    own, asked = draw_tasks(DATA[0], classes, 30, torch.Generator().manual_seed(0))
    small = avg_pool2d((DATA[0].images[:, None].float() / 255 - 0.2860) / 0.3530, 2)
    assert own.shape == asked.shape == (30, 5, 1, 14, 14)
    numbers = []
    for images in (own, asked):
        distances = (images.flatten(2)[:, :, None] - small.flatten(1)).abs().amax(3)
        assert_close(distances.amin(2), torch.zeros(30, 5), 1e-6)
        numbers.append(DATA[0].labels[distances.argmin(2)])
    assert_same(*numbers)
    assert all(sorted(task) == classes.tolist() for task in numbers[0].tolist())
    assert len({*map(tuple, numbers[0].tolist())}) > 10
    assert not torch.equal(own, asked)


def test_both_networks_are_one() -> None:
    params = fresnet.init(0, meta_fault.SPEC, num_classes=5, in_channels=1, dtype=torch.float64)
    x = torch.randn(5, 1, 14, 14, dtype=torch.float64)
    ours = meta_fault.by_fresnet(params.stats)(params.weights, x)
    assert_close(meta_fault.by_stock(params.weights, x), ours, 1e-12)


def by_autograd(seed: int, tasks: list[Tasks], held_out: Tasks) -> tuple[list[float], float]:
    """A run of MAML by `torch.autograd` and `torch.optim`: meta-losses, and the share right."""
    params = fresnet.init(seed, meta_fault.SPEC, num_classes=5, in_channels=1)
    leaves = [leaf.double().requires_grad_() for leaf in tree.leaves(params.weights)]
    optimizer = torch.optim.Adam(leaves, 0.003)

    def logits(own: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        loss = cross_entropy(meta_fault.by_stock(tree.unflatten(params.weights, leaves), own), Y)
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        moved = [w - 0.4 * g for w, g in zip(leaves, grads, strict=True)]
        return meta_fault.by_stock(tree.unflatten(params.weights, moved), asked)

    losses = []
    for some in tasks:
        each = [cross_entropy(logits(*task), Y) for task in zip(*some, strict=True)]
        loss = torch.stack(each).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    right = [logits(*task).argmax(1) == Y for task in zip(*held_out, strict=True)]
    return losses, torch.stack(right).double().mean().item()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_stock_vmap_makes_another_run_and_fresnet_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_fault, "ASKED", 40)
    found = meta_fault.compare(DATA, torch.float64, runs=2, steps=2)
    truth = found["loop"].losses
    assert truth.shape == (2, 2)
    generator = torch.Generator().manual_seed(2)
    held_out = draw_tasks(DATA[1], HELD_OUT, 40, generator)
    drawn = [draw_tasks(DATA[0], TRAINED, 8, generator) for _ in range(2)]
    for seed in range(2):
        tasks = [Tasks(*(x[4 * seed : 4 * seed + 4].double() for x in some)) for some in drawn]
        asked = Tasks(*(x.double() for x in held_out))
        losses, right = by_autograd(seed, tasks, asked)
        assert truth[:, seed].tolist() == pytest.approx(losses, rel=1e-10)
        assert found["loop"].right[seed].item() == right
    assert_close(found["fresnet"].losses, truth, 1e-10)
    assert_close(found["stock vmap"].losses[0], truth[0], 1e-10)  # before the first step
    assert ((found["stock vmap"].losses[1] - truth[1]).abs() > 1e-6).all()
    assert (truth[0] != truth[0, :1]).any()  # the runs are different ones
    for run in found.values():
        assert run.right.shape == (2,)
        assert ((run.right >= 0) & (run.right <= 1)).all()


def test_the_first_step_beyond_a_bound_is_counted() -> None:
    off = torch.tensor([[0.0, 0.0, 2.0], [2.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    assert_same(parted(off, 1.0), torch.tensor([1, 3, 0]))
    off[2, 1] = nan
    assert_same(parted(off, 1.0), torch.tensor([1, 2, 0]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_command_draws_writes_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, (images, labels) in zip(("train", "t10k"), DATA, strict=True):
        for kind, values in (("images-idx3", images), ("labels-idx1", labels.to(torch.uint8))):
            head = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
            content = gzip.compress(head + values.numpy().tobytes())
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(content)
    monkeypatch.setattr(meta_fault, "ASKED", 3)
    out = tmp_path / "out"
    command = ["meta_fault.py", "--quick", "--data", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    meta_fault.main()
    assert "off by 1e-3: never" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"meta_fault.csv", "meta_fault.png"}
    written = list(csv.reader((out / "meta_fault.csv").read_text().splitlines()))
    assert written[0] == [
        "dtype",
        "way",
        "seed",
        "off by 1e-3 at step",
        "off by 1e-2 at step",
        "right",
    ]
    ways = ("loop", "stock vmap", "fresnet")
    expected = [[d, way, seed] for d in ("float64", "float32") for way in ways for seed in "01"]
    assert [row[:3] for row in written[1:]] == expected
    monkeypatch.setattr(sys, "argv", [*command[:3], str(out), *command[4:]])
    with pytest.raises(SystemExit, match="there is no train-images-idx3-ubyte"):
        meta_fault.main()


def test_the_argument_says_what_was_recorded() -> None:
    """Steps are the medians of the runs, and differences have the standard error of their mean."""
    _, *rows = csv.reader(RECORD.read_text().splitlines())
    text = (RECORD.parent / "argument.md").read_text()
    words = " ".join(text.split())
    for way, spelt in {"loop": "loop", "stock vmap": "stock `vmap`", "fresnet": "fresnet"}.items():
        for dtype in ("float64", "float32"):
            ours = [row for row in rows if row[:2] == [dtype, way]]
            assert len(ours) == meta_fault.RUNS
            slight, far = (median(float(row[i] or "inf") for row in ours) for i in (3, 4))
            steps = ["never" if step == inf else f"{step:g}" for step in (slight, far)]
            right = mean(float(row[5]) for row in ours)
            assert f"| {spelt}, {dtype} | {steps[0]} | {steps[1]} | {right:.1%} |" in text
    for dtype in ("float64", "float32"):
        loop, stock = (
            [100 * float(row[5]) for row in rows if row[:2] == [dtype, way]]
            for way in ("loop", "stock vmap")
        )
        gains = [theirs - true for theirs, true in zip(stock, loop, strict=True)]
        error = stdev(gains) / len(gains) ** 0.5
        points = " points" if dtype == "float64" else ""
        assert f"by {abs(mean(gains)):.1f} ± {error:.1f}{points} in {dtype}" in words
    latest = max(int(row[3]) for row in rows if row[:2] == ["float64", "stock vmap"])
    assert latest == 4
    assert "In float64 every stock run is off by 1e-3 within four steps" in words
