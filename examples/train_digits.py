"""Train a ResNet-50 on handwritten digits with a functional loop on `torch.func`.

    python examples/train_digits.py

Shows a progress bar, then prints the accuracy on 360 held-out digits, and writes to --out: the
checkpoint, the training curves and a grid of test digits with prediction and confidence.
It saves after every epoch and on Ctrl-C; the same command with --resume goes on from there, bit
for bit as if never interrupted.

Measured on 2 CPU cores, PyTorch 2.13: 98.3% in 66 s and, on a slower pair, 98.9% in 113 s (seed 0).
"""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from digits import Digits, draw_curves, draw_predictions, load
from torch import Tensor
from torch.func import grad_and_value
from tqdm import tqdm

import fresnet
from fresnet import Params, tree

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
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
        lambda v, g, w: v.mul(MOMENTUM).add(g.add(w, alpha=WEIGHT_DECAY)),
        *(state.velocity, grads, weights),
    )
    weights = tree.map(lambda w, v: w.add(v, alpha=-rate), weights, velocity)
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
    try:
        content = torch.load(path, weights_only=True)
        held = content["run"]
        params = fresnet.from_state_dict(content["model"])
        velocity = tree.unflatten(params.weights, content["velocity"])
        state = State(params, velocity, tuple(content["history"]))
    except Exception as error:
        sys.exit(f"{path} is not a checkpoint of this program: {error!r}")
    for name, value in run.items():
        if held[name] != value:
            sys.exit(f"{path} was started with --{name} {held[name]}, not {value}")
    return state


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a ResNet on scikit-learn's handwritten digits.",
        epilog="Ctrl-C saves; the same command with --resume goes on from there.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--arch", choices=ARCHITECTURES, default="resnet50", help="the network")
    option("--epochs", type=int, default=12, help="passes over the 1,437 training digits")
    option("--seed", type=int, default=0, help="random seed")
    option("--out", type=Path, default=Path("runs/digits"), help="output folder")
    option("--resume", action="store_true", help="go on from the checkpoint in --out")
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
    progress = tqdm(
        total=steps * BATCH,
        initial=start * BATCH,
        unit=" images",
        bar_format="{percentage:3.0f}%|{bar}| {rate_fmt}, {remaining} left{postfix}",
    )
    try:
        for step in range(start, steps):
            rate = learning_rate(step, steps, warm_up=min(2, args.epochs / 2) * per_epoch)
            state = train_step(state, *batch(train, step, args.seed), rate)
            loss, accuracy = state.history[-1]
            progress.set_postfix_str(f"loss {loss:.3f}, acc {accuracy:.0%}", refresh=False)
            progress.update(BATCH)
            if (step + 1) % per_epoch == 0:
                save(checkpoint, state, run)
    except KeyboardInterrupt:
        save(checkpoint, state, run)
        progress.close()
        sys.exit(f"stopped after {len(state.history)} of {steps} steps; --resume goes on")
    progress.close()

    with torch.no_grad():
        logits = torch.cat([fresnet.forward(state.params, x) for x in test.images.split(120)])
    accuracy = (logits.argmax(1) == test.labels).float().mean().item()
    draw_curves(state.history, per_epoch, SMOOTHING, args.out / "curves.png")
    draw_predictions(test, logits, args.out / "digits.png")
    print(f"test accuracy {accuracy:.2%} on {len(test.labels)} digits")
    print(f"wrote checkpoint.pt, curves.png and digits.png to {args.out}")


if __name__ == "__main__":
    main()
