"""Learn learning rates by differentiating through training, BatchNorm and all.

    python examples/meta_lr.py

A run of training is 16 steps of SGD in training mode. There is a learning rate for each step and
kind of parameter, and the loss on held-out digits after the run is a differentiable function of
these rates. Gradient descent on their logarithms improves them (Maclaurin et al. 2015,
arXiv:1502.03492; here the steps are kept in memory instead of being run backwards).

Running statistics are carried along, but are constants to every derivative. The held-out loss
therefore goes through the statistics of the held-out batch. `forward` judges the outcome on the
test digits.

It prints how far the hypergradient is from a finite difference, and what meta-training changed for
these first weights and for others. It draws the rates learned and the held-out loss.
Measured on 2 CPU cores, PyTorch 2.13: held-out loss 1.77 to 1.28, test accuracy 48% to 67%, for
other first weights 65% to 74% (seed 0), in 15 s.
"""

from pathlib import Path
from typing import Any

import torch
from digits import Digits, arguments, load, small
from style import figure
from torch import Tensor
from torch.func import grad, grad_and_value
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import Params, tree

SPEC = fresnet.Spec(fresnet.nodes.BasicBlock, (1, 1), width=8)
STEPS, BATCH, HELD_OUT = 16, 64, 256
FIRST_RATE, META_STEPS, META_RATE, STATS_MOMENTUM = 0.1, 20, 0.3, 0.3
KINDS = ("convolutions", "norms", "head")


def kind(path: tree.Path) -> int:
    """Which of KINDS the leaf at this path is."""
    return 2 if path[0] == "head" else int(path[-1] in ("scale", "bias"))


def loss_fn(weights: Any, stats: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
    params = Params(weights, stats)
    logits, stats = fresnet.forward_train(params, x, momentum=STATS_MOMENTUM)
    return cross_entropy(logits, y), stats


def train(log_rates: Tensor, params: Params, batches: Digits) -> Params:
    """Train by SGD: step i on batch i, by the rates `log_rates[i]` of the three kinds."""
    kinds = [kind(path) for path in tree.paths(params.weights)]
    for log_rate, x, y in zip(log_rates, *batches, strict=True):
        grads, stats = grad(loss_fn, has_aux=True)(*params, x, y)
        rates = tree.unflatten(grads, log_rate.exp()[kinds].unbind())
        weights = tree.map(lambda w, g, rate: w - rate * g, params.weights, grads, rates)
        params = Params(weights, stats)
    return params


def meta_loss(log_rates: Tensor, params: Params, batches: Digits, held_out: Digits) -> Tensor:
    """The loss on held-out digits after training."""
    loss, _ = loss_fn(*train(log_rates, params, batches), *held_out)
    return loss


def draw(log_rates: Tensor, losses: list[float], path: Path) -> None:
    picture = figure(8.0)
    rate_axes, loss_axes = picture.subplots(2, 1)
    for i, name in enumerate(KINDS):
        rate_axes.plot(range(1, len(log_rates) + 1), log_rates[:, i].exp(), ".-", label=name)
    rate_axes.axhline(FIRST_RATE, color="black", linestyle=":", label="before")
    rate_axes.set(title="Learned learning rates", xlabel="training step", ylim=(0, None))
    rate_axes.set_ylabel("learning rate")
    rate_axes.legend(loc="upper right")
    loss_axes.plot(losses, ".-")
    loss_axes.set(title=f"Held-out loss after {len(log_rates)} training steps")
    loss_axes.set(xlabel="meta-iteration", ylabel="cross-entropy")
    loss_axes.xaxis.get_major_locator().set_params(integer=True)
    picture.savefig(path)


def main() -> None:
    args = arguments()
    generator = torch.Generator().manual_seed(args.seed)
    digits, test = map(small, load())
    order = torch.randperm(len(digits.labels), generator=generator)
    held_out = Digits(*(values[order[:HELD_OUT]] for values in digits))
    steps, meta_steps = (3, 2) if args.quick else (STEPS, META_STEPS)
    chosen = order[HELD_OUT : HELD_OUT + steps * BATCH].view(steps, BATCH)
    batches = Digits(*(values[chosen] for values in digits))
    params, other = (
        fresnet.init(generator, SPEC, num_classes=10, dtype=torch.float64) for _ in range(2)
    )
    rates = first = torch.full((steps, len(KINDS)), FIRST_RATE, dtype=torch.float64).log()

    direction = torch.randn(first.shape, dtype=first.dtype, generator=generator)
    slope = (grad(meta_loss)(first, params, batches, held_out) * direction).sum()
    h = 1e-6  # Gradients jump where a ReLU switches; at 1e-5 a switch is often crossed.
    ends = [meta_loss(first + s * direction, params, batches, held_out) for s in (h, -h)]
    difference = (ends[0] - ends[1]) / (2 * h)
    print(f"hypergradient against a finite difference: {abs(difference / slope - 1):.1e} apart")

    losses = []
    for _ in range(meta_steps):
        hypergradient, loss = grad_and_value(meta_loss)(rates, params, batches, held_out)
        losses.append(loss.item())
        rates = rates - META_RATE * hypergradient / hypergradient.norm()
    losses.append(meta_loss(rates, params, batches, held_out).item())
    print(f"held-out loss {losses[0]:.4f} before, {losses[-1]:.4f} after {meta_steps} iterations")
    for name, start in {"same": params, "other": other}.items():
        for when, by in {"before": first, "after": rates}.items():
            logits = fresnet.forward(train(by, start, batches), test.images)
            accuracy = (logits.argmax(1) == test.labels).double().mean()
            print(f"{name} first weights, {when}: test accuracy {accuracy:.1%}")
    draw(rates, losses, args.out / "meta_lr.png")
    print(f"wrote meta_lr.png to {args.out}")


if __name__ == "__main__":
    fresnet.keep_pages()
    main()
