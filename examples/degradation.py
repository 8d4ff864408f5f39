"""Deeper plain networks train worse, deeper residual networks do not: the paper's Fig. 6 in kind.

    python examples/degradation.py

Plain and residual networks of 20 and 56 layers train on digits of 8x8, all on the same batches and
by one recipe. Networks of one depth differ only in the shortcuts, which have no parameters
(He et al. 2015, arXiv:1512.03385, Sec. 4.2). It prints the last losses and errors of each network,
and draws the curves.

Measured on 2 CPU cores, PyTorch 2.13, by default (110 steps), in about a minute: from 20 to 56
layers the training loss goes from 0.03 to 1.34 in plain networks, and from 0.004 to 0.001 in
residual ones (seed 0; seeds 1 and 2 are alike).

Batches, momentum and weight decay are the paper's. The learning rate is 0.02 instead of 0.1, which
the paper too finds too large for the first steps of its deepest residual network. It is divided by
10 once, after two thirds of the steps. Images are neither cropped nor mirrored.
"""

from pathlib import Path
from typing import Any

import torch
from digits import Digits, arguments, load
from matplotlib import colormaps
from style import figure
from torch import Tensor
from torch.func import grad
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import fresnet
from fresnet import Params, tree

KINDS = {"plain": "plain", "resnet": "residual"}
BATCH, PER_EPOCH = 128, 11
RATE, MOMENTUM, WEIGHT_DECAY = 0.02, 0.9, 1e-4
BAR = "{desc} {percentage:3.0f}%|{bar}| {remaining} left{postfix}"


def error_rate(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) != labels).float().mean()


def loss_fn(weights: Any, stats: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
    logits, stats = fresnet.forward_train(Params(weights, stats), x)
    loss = cross_entropy(logits, y)
    return loss, (stats, torch.stack([loss, error_rate(logits, y)]))


def train_step(
    params: Params, velocity: Any, x: Tensor, y: Tensor, rate: float
) -> tuple[Params, Any, Tensor]:
    """One step of SGD with momentum and weight decay, and the loss and error of its batch."""
    weights, stats = params
    grads, (stats, record) = grad(loss_fn, has_aux=True)(weights, stats, x, y)
    velocity = tree.map(
        lambda v, g, w: MOMENTUM * v + g + WEIGHT_DECAY * w, velocity, grads, weights
    )
    weights = tree.map(lambda w, v: w - rate * v, weights, velocity)
    return Params(weights, stats), velocity, record


def train(name: str, digits: Digits, test: Digits, seed: int, epochs: int) -> tuple[Tensor, ...]:
    """Loss and error of every step's batch, and the error on test digits after every epoch."""
    params = fresnet.init(seed, fresnet.SPECS[name], num_classes=10)
    velocity = tree.map(torch.zeros_like, params.weights)
    generator = torch.Generator().manual_seed(seed)
    records, test_errors = [], []
    with tqdm(total=epochs * PER_EPOCH, desc=f"{name:9}", bar_format=BAR, disable=None) as progress:
        for epoch in range(epochs):
            rate = RATE if epoch < 2 * epochs / 3 else RATE / 10
            order = torch.randperm(len(digits.labels), generator=generator)
            for chosen in order.split(BATCH)[:PER_EPOCH]:
                x, y = digits.images[chosen], digits.labels[chosen]
                params, velocity, record = train_step(params, velocity, x, y, rate)
                records.append(record)
                progress.set_postfix_str(f"loss {record[0]:.3f}", refresh=False)
                progress.update()
            # Running statistics lag behind weights that move this fast, more so in a deep network.
            settled = fresnet.recalibrate(params, [digits.images])
            test_errors.append(error_rate(fresnet.forward(settled, test.images), test.labels))
    return *torch.stack(records, dim=1), torch.stack(test_errors)


def draw(curves: dict[str, dict[int, tuple[Tensor, ...]]], path: Path) -> None:
    picture = figure(8.0)
    panels = picture.subplots(2, 1, sharex=True, sharey=True)
    for axes, (kind, by_depth) in zip(panels, curves.items(), strict=True):
        shades = colormaps["viridis_r"](torch.linspace(0.15, 0.95, len(by_depth)))
        for color, (depth, (_, error, test_error)) in zip(shades, by_depth.items(), strict=True):
            smooth = error.unfold(0, PER_EPOCH, 1).mean(1)
            middles = torch.arange(len(smooth)) + (PER_EPOCH + 1) / 2
            axes.plot(middles, 100 * smooth, color=color, linestyle="--", linewidth=1)
            ends = torch.arange(1, len(test_error) + 1) * PER_EPOCH
            axes.plot(ends, 100 * test_error, color=color, label=f"{depth} layers")
        axes.set(
            title=f"{KINDS[kind].capitalize()} networks", ylabel="error, %", xlim=0, ylim=(0, 100)
        )
        axes.legend(title="solid: test, dashed: training")
    panels[1].set_xlabel("training step")
    picture.savefig(path)


def main() -> None:
    args = arguments(full="20 to 110 layers and six times the epochs")
    torch.set_num_threads(1)  # On images this small a second thread gains nothing.
    depths, epochs = ((20, 32, 44, 56, 110), 60) if args.full else ((20, 56), 10)
    epochs = 1 if args.quick else epochs
    digits, test = load(size=8)
    curves = {
        kind: {depth: train(f"{kind}{depth}", digits, test, args.seed, epochs) for depth in depths}
        for kind in KINDS
    }
    print("in the last epoch  training loss  training error  test error")
    for kind, by_depth in curves.items():
        for depth, (loss, error, test_error) in by_depth.items():
            means = f"{loss[-PER_EPOCH:].mean():13.3f}{error[-PER_EPOCH:].mean():16.1%}"
            print(f"{f'{kind}{depth}':19}{means}{test_error[-1]:12.1%}")
    for kind, by_depth in curves.items():
        shallow, *_, deep = (loss[-PER_EPOCH:].mean() for loss, *_ in by_depth.values())
        growth = f"training loss {deep - shallow:+.3f}"
        print(f"{KINDS[kind]}, from {depths[0]} to {depths[-1]} layers: {growth}")
    draw(curves, args.out / "degradation.png")
    print(f"wrote degradation.png to {args.out}")


if __name__ == "__main__":
    fresnet.keep_pages()
    main()
