"""Train a ResNet-50 on handwritten digits with a functional loop on `torch.func`.

    python examples/train_digits.py

Shows a progress bar, then prints the accuracy on 360 held-out digits, and writes to --out: the
checkpoint, the training curves and a grid of test digits with prediction and confidence.
Ctrl-C saves where it was; --resume goes on from there, bit for bit as if never interrupted.

Measured on 2 CPU cores, PyTorch 2.13: 99.4% in 66 s (seed 0).
"""

import argparse
import math
import os
import sys
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from digits import Digits, draw_predictions, load
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import grad_and_value
from tqdm import tqdm

import fresnet
from fresnet import Params, tree

BATCH, PEAK_RATE, MOMENTUM, WEIGHT_DECAY, SMOOTHING = 64, 0.05, 0.9, 5e-4, 0.1


class State(NamedTuple):
    """All that training carries from one step to the next."""

    params: Params
    velocity: Any  # a tree like params.weights
    history: tuple[tuple[float, float], ...]  # loss and accuracy of every step so far


def loss_fn(weights: Any, stats: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
    logits, stats = fresnet.forward_train(Params(weights, stats), x)
    return F.cross_entropy(logits, y, label_smoothing=SMOOTHING), (logits, stats)


def train_step(state: State, x: Tensor, y: Tensor, rate: float) -> State:
    """One step of SGD with momentum and weight decay, as `torch.optim.SGD` takes it."""
    weights, stats = state.params
    grads, (loss, (logits, stats)) = grad_and_value(loss_fn, has_aux=True)(weights, stats, x, y)
    velocity = tree.map(
        lambda v, g, w: torch.add(torch.add(g, w, alpha=WEIGHT_DECAY), v, alpha=MOMENTUM),
        *(state.velocity, grads, weights),
    )
    weights = tree.map(lambda w, v: torch.add(w, v, alpha=-rate), weights, velocity)
    accuracy = (logits.argmax(1) == y).float().mean()
    return State(Params(weights, stats), velocity, (*state.history, (loss.item(), accuracy.item())))


def learning_rate(step: int, steps: int, warm_up: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < warm_up:
        return PEAK_RATE * (step + 1) / warm_up
    return PEAK_RATE * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2


def batch(digits: Digits, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """The batch of this step: a function of step and seed, so that a resumed run sees the same."""
    epoch, i = divmod(step, len(digits.labels) // BATCH)
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    chosen = torch.randperm(len(digits.labels), generator=generator)[i * BATCH : (i + 1) * BATCH]
    return digits.images[chosen], digits.labels[chosen]


def save(path: Path, state: State, run: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all; its "model" entry loads into torchvision."""
    content = {
        "model": fresnet.to_state_dict(state.params),
        "velocity": tree.leaves(state.velocity),
        "history": state.history,
        "run": run,
    }
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def restore(path: Path, run: dict[str, Any]) -> State:
    """Read a checkpoint of the same run."""
    if not path.exists():
        sys.exit(f"nothing to resume: there is no {path}")
    content = torch.load(path, weights_only=True)
    if content["run"] != run:
        sys.exit(f"{path} holds another run: {content['run']}, not {run}")
    params = fresnet.from_state_dict(content["model"])
    velocity = tree.unflatten(params.weights, content["velocity"])
    return State(params, velocity, tuple(content["history"]))


def least_loss(classes: int = 10) -> float:
    """The entropy of a smoothed label: no prediction has a lower loss."""
    off = SMOOTHING / classes
    on = 1 - SMOOTHING + off
    return -on * math.log(on) - (classes - 1) * off * math.log(off)


def draw_curves(history: tuple[tuple[float, float], ...], per_epoch: int, path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    epochs = [(step + 1) / per_epoch for step in range(len(history))]
    names = ("training loss (label-smoothed)", "training accuracy")
    for i, (axes, name) in enumerate(zip(figure.subplots(1, 2), names, strict=True)):
        values = [record[i] for record in history]
        axes.plot(epochs, values, linewidth=0.8, alpha=0.4)
        smooth = [mean(values[max(0, last - 10) : last + 1]) for last in range(len(values))]
        axes.plot(epochs, smooth, color="C0", label="mean of 11 batches")
        axes.set(xlabel="epoch", title=name)
        axes.grid(alpha=0.3)
    loss_axes, accuracy_axes = figure.axes
    loss_axes.axhline(least_loss(), color="black", linestyle=":", label="least possible")
    loss_axes.legend()
    accuracy_axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=fresnet.SPECS, default="resnet50")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), metavar="DIR")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1; got {args.epochs}")
    run = {"arch": args.arch, "epochs": args.epochs, "seed": args.seed}
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"

    train, test = load()
    if args.resume:
        state = restore(checkpoint, run)
    else:
        params = fresnet.init(
            args.seed, fresnet.SPECS[args.arch], num_classes=10, zero_init_residual=True
        )
        state = State(params, tree.map(torch.zeros_like, params.weights), ())
    per_epoch = len(train.labels) // BATCH
    steps, start = args.epochs * per_epoch, len(state.history)
    progress = tqdm(total=steps * BATCH, initial=start * BATCH, unit="img", desc=args.arch)
    try:
        for step in range(start, steps):
            rate = learning_rate(step, steps, warm_up=min(2, args.epochs / 2) * per_epoch)
            state = train_step(state, *batch(train, step, args.seed), rate)
            loss, accuracy = state.history[-1]
            progress.set_postfix_str(f"loss {loss:.3f}, acc {accuracy:.0%}", refresh=False)
            progress.update(BATCH)
    except KeyboardInterrupt:
        save(checkpoint, state, run)
        progress.close()
        sys.exit(f"stopped after {len(state.history)} of {steps} steps; --resume goes on")
    progress.close()
    save(checkpoint, state, run)

    with torch.no_grad():
        logits = torch.cat([fresnet.forward(state.params, x) for x in test.images.split(120)])
    accuracy = (logits.argmax(1) == test.labels).float().mean().item()
    draw_curves(state.history, per_epoch, args.out / "curves.png")
    draw_predictions(test, logits, args.out / "digits.png")
    print(f"test accuracy {accuracy:.2%} on {len(test.labels)} digits")
    print(f"wrote checkpoint.pt, curves.png and digits.png to {args.out}")


if __name__ == "__main__":
    main()
