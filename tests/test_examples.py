"""The examples do what their docstrings say."""

import re
import signal
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import gradient_flow
import pytest
import reference
import torch
import train_digits
from assertions import assert_close, assert_same
from digits import load
from torch.nn.functional import conv2d, cross_entropy, relu

import fresnet
from fresnet import optim, training, tree
from fresnet.network.nodes import Identity, Projection, ZeroPad
from fresnet.weights.storage import read_safetensors

FOLDER = Path(train_digits.__file__).parent
QUICK = ("--arch", "resnet18", "--epochs", "1")


def start(name: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start an example. It hears Ctrl-C even if this process, as a background job, does not."""
    return subprocess.Popen(
        [sys.executable, str(FOLDER / name), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=0,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def run(name: str, *arguments: str | Path) -> tuple[int, str, str]:
    process = start(name, *arguments)
    out, err = process.communicate()
    return process.returncode, out, err


def checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries and texts of the last checkpoint."""
    (path,) = (folder / "checkpoints").iterdir()
    return read_safetensors(path)


def interrupt(process: subprocess.Popen[str], after: int) -> str:
    """Press Ctrl-C once the progress bar shows this percentage; returns what was printed."""
    assert process.stderr is not None
    printed = ""
    while not any(int(n) >= after for n in re.findall(r"(\d+)%\|", printed)):
        character = process.stderr.read(1)
        assert character, f"ended too early:\n{printed}"
        printed += character
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate()
    return printed + rest


@pytest.mark.long
def test_an_interrupted_and_resumed_run_is_an_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    code, out, err = run("train_digits.py", *QUICK, "--out", straight)
    assert code == 0, err
    assert "test accuracy" in out
    assert {p.name for p in straight.iterdir()} == {"checkpoints", "curves.png", "digits.png"}

    process = start("train_digits.py", *QUICK, "--out", broken)
    assert "--resume goes on" in interrupt(process, after=13)
    assert process.returncode == 1
    assert 3 <= checkpoint(broken)[0]["state.step"] < 22
    code, resumed, err = run("train_digits.py", *QUICK, "--out", broken, "--resume")
    assert code == 0, err
    assert resumed.splitlines()[0] == out.splitlines()[0]
    assert checkpoint(broken)[0]["state.step"] == 22
    assert_same(checkpoint(broken)[0], checkpoint(straight)[0])
    assert checkpoint(broken)[1] == checkpoint(straight)[1]  # history and all

    model = reference.torchvision.models.resnet18(num_classes=10)
    (path,) = (broken / "checkpoints").iterdir()
    model.load_state_dict(fresnet.to_state_dict(fresnet.load(path)), strict=True)

    code, _, err = run("train_digits.py", "--arch", "resnet34", "--out", broken, "--resume")
    assert code == 1
    assert (
        "is of another state: expected state.params.weights.stages.0.2 BasicBlock; got none" in err
    )
    path.write_bytes(b"broken")
    code, _, err = run("train_digits.py", *QUICK, "--out", broken, "--resume")
    assert code == 1
    assert "no checkpoint can be read" in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resume",), "nothing to resume: there is no checkpoint in"),
        (("--epochs", "0"), "--epochs must be at least 1; got 0"),
        (("--arch", "resnet51"), "invalid choice: 'resnet51'"),
    ],
)
def test_wrong_arguments_end_with_one_line(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, _, err = run("train_digits.py", "--out", tmp_path, *arguments)
    assert code != 0
    assert message in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_its_steps_are_torch_optims() -> None:
    train, _ = load()
    params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    constant = optim.sgd(0.05, momentum=0.9, weight_decay=5e-4)
    state = training.start(params, constant)
    train_step = training.make_train_step(constant, loss_fn=train_digits.LOSS)
    model = reference.torchvision.models.resnet18(num_classes=10)
    model.load_state_dict(fresnet.to_state_dict(params))
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=5e-4)
    for step in range(3):
        x, y = train_digits.batch(train, step, seed=0)
        optimizer.zero_grad()
        cross_entropy(model(x), y, label_smoothing=0.1).backward()
        optimizer.step()
        state, _ = train_step(state, (x, y))
    expected = reference.params(model).weights
    assert_close(tree.ravel(state.params.weights), tree.ravel(expected), 1e-4)


def test_every_epoch_shows_each_digit_at_most_once_in_another_order() -> None:
    train, test = load()
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    indexed = train._replace(images=torch.arange(len(train.labels)))
    epochs = [
        torch.cat([train_digits.batch(indexed, 22 * epoch + i, seed=0)[0] for i in range(22)])
        for epoch in range(2)
    ]
    assert all(len(epoch.unique()) == 22 * 64 for epoch in epochs)
    assert not torch.equal(*epochs)


def test_the_learning_rate_warms_up_then_falls_to_zero() -> None:
    schedule = train_digits.rate_for(epochs=10, per_epoch=10)
    rates = [float(schedule(torch.tensor(float(step)))) for step in range(101)]
    assert rates[20] == max(rates) == pytest.approx(train_digits.PEAK_RATE)
    assert all(a < b for a, b in pairwise(rates[:21]))
    assert all(a > b for a, b in pairwise(rates[20:]))
    assert rates[100] == pytest.approx(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epochs", "least"), [(2, 40), pytest.param(12, 97, marks=pytest.mark.long)]
)
def test_the_main_job_learns(epochs: int, least: float, tmp_path: Path) -> None:
    """It is run as in the README, but for a short time."""
    code, out, err = run("train_digits.py", "--epochs", str(epochs), "--out", tmp_path)
    assert code == 0, err
    accuracy = re.search(r"test accuracy ([\d.]+)% on 360 digits", out)
    assert accuracy is not None
    assert float(accuracy[1]) >= least


CLAIMS = {
    "per_sample_grads.py": ((r"of the 100 most suspected, (\d+) are", 40, 100),),
    "ensemble.py": ((r"ensemble: ([\d.]+)%", 95, 100),),
    "hessian.py": ((r"eigenvalue 1: .* = (\S+)", 0, 1e-10),),
    "ntk.py": ((r"by products: (\S+) apart", 0, 1e-12),),
    "meta_lr.py": ((r"finite difference: (\S+) apart", 0, 1e-5),),
    "degradation.py": (
        (r"plain, from 20 to 56 layers: training loss (\S+)", 0.5, 3),
        (r"residual, from 20 to 56 layers: training loss (\S+)", -0.1, 0.1),
        (r"plain20 +\S+ +(\S+)%", 0, 10),
        (r"resnet56 +\S+ +(\S+)%", 0, 10),
    ),
    "gradient_flow.py": (
        (r"plain56 +(\S+)", 100, 10_000),
        (r"resnet56 +(\S+)", 1, 20),
        (r"resnet56 .* (\S+)\n", 0.9, 1.1),
    ),
}
"""Figures that the other examples print, and the bounds between which they lie."""


@pytest.mark.long
@pytest.mark.parametrize("name", CLAIMS)
def test_the_others_find_what_they_look_for(name: str, tmp_path: Path) -> None:
    code, out, err = run(name, "--out", tmp_path)
    assert code == 0, err
    for pattern, low, high in CLAIMS[name]:
        figure = re.search(pattern, out)
        assert figure is not None, out
        assert low <= float(figure[1]) <= high, out
    assert [path.suffix for path in tmp_path.iterdir()] == [".png"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_the_others_run_to_their_end(name: str, tmp_path: Path) -> None:
    """A few steps of each are run. What is exact at any length is as exact here."""
    code, out, err = run(name, "--quick", "--out", tmp_path)
    assert code == 0, err
    for pattern, low, high in CLAIMS[name]:
        figure = re.search(pattern, out)
        assert figure is not None, out
        if name in ("ntk.py", "meta_lr.py"):
            assert low <= float(figure[1]) <= high, out
    assert [path.suffix for path in tmp_path.iterdir()] == [".png"]


@pytest.mark.parametrize("name", ["plain20", "resnet20", "resnet20b"])
def test_response_stds_are_those_of_the_responses(name: str) -> None:
    """They equal those of the activations, with uneven scales, biases and variances."""
    generator = torch.Generator().manual_seed(0)
    params = fresnet.init(generator, fresnet.SPECS[name], num_classes=10, dtype=torch.float64)
    weights = tree.map(
        lambda w: w + 0.5 * torch.randn(w.shape, dtype=w.dtype, generator=generator), params.weights
    )
    # Images are dark, so that eps counts beside their variances.
    x = 1e-3 * torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=generator)
    stds = gradient_flow.response_stds(fresnet.Params(weights, params.stats), x)
    direct = torch.stack([y.std(correction=0) for y in responses(weights, x)])
    assert len(stds) == 19
    assert_close(stds, direct, relative=1e-12)


def responses(weights: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The batch-normalised outputs of each 3x3 layer of a basic network for CIFAR."""

    def layer(x: torch.Tensor, unit: Any, stride: int = 1) -> torch.Tensor:
        conv, norm = unit
        y = conv2d(x, conv, stride=stride, padding=conv.shape[-1] // 2)
        var, mean = torch.var_mean(y, (0, 2, 3), correction=0, keepdim=True)
        scale, bias = (v[:, None, None] for v in norm)
        return torch.add(bias, (y - mean) / torch.sqrt(var + 1e-5) * scale)

    seen = [layer(x, weights.stem.layer)]
    x = relu(seen[0])
    for i, stage in enumerate(weights.stages):
        for j, w in enumerate(stage):
            stride = 2 if i > 0 and j == 0 else 1
            inner = layer(x, w.layer1, stride)
            y = layer(relu(inner), w.layer2)
            seen += [inner, y]
            match w.shortcut:
                case Identity():
                    y = y + x
                case ZeroPad():
                    y = y + torch.cat([x[:, :, ::2, ::2], 0 * x[:, :, ::2, ::2]], dim=1)
                case Projection():
                    y = y + layer(x, w.shortcut.layer, stride)
            x = relu(y)
    return seen


def test_every_example_is_run() -> None:
    scripts = {path.name for path in FOLDER.glob("*.py")}
    on_clothes = {"fashion.py", "fashion_ensemble.py", "meta_fault.py"}
    shared = {"clothes.py", "digits.py", "style.py"}
    assert scripts == {*CLAIMS, *on_clothes, *shared, "train_digits.py"}
