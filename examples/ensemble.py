"""Train eight ResNets at once, by one vmapped step, each with its own seed and learning rate.

    python examples/ensemble.py

It prints the test accuracy of every member, their average, and the accuracy of the ensemble. The
ensemble's probabilities are the mean of its members'. It draws how well confidence and accuracy
agree.
Measured on 2 CPU cores, PyTorch 2.13: average member 96.9%, ensemble 98.1% (seed 0), in 10 s.

Source: Lakshminarayanan, Pritzel & Blundell 2017, arXiv:1612.01474 (deep ensembles).
"""

from pathlib import Path

import torch
from digits import arguments, load
from style import figure
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import Params, tree
from fresnet.network.nodes import BasicBlock, Stats, Weights

MEMBERS, STEPS, BATCH = 8, 100, 64


def loss_fn(weights: Weights, stats: Stats, x: Tensor, y: Tensor) -> tuple[Tensor, Stats]:
    logits, stats = fresnet.forward_train(Params(weights, stats), x)
    return cross_entropy(logits, y), stats


def train_step(params: Params, rate: Tensor, x: Tensor, y: Tensor) -> Params:
    """One step of one member; vmap makes it a step of all."""
    grads, stats = grad(loss_fn, has_aux=True)(*params, x, y)
    return Params(tree.map(lambda w, g: w - rate * g, params.weights, grads), stats)


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 10) -> tuple[Tensor, ...]:
    """Mean confidence and accuracy of each bin that has digits, and the expected gap of the two."""
    confidence, prediction = probabilities.max(1)
    right = (prediction == labels).float()
    place = (confidence * bins).long().clamp(max=bins - 1)
    count = torch.zeros(bins).index_add(0, place, torch.ones_like(right))
    mean_confidence = torch.zeros(bins).index_add(0, place, confidence) / count
    accuracy = torch.zeros(bins).index_add(0, place, right) / count
    gap = ((mean_confidence - accuracy).abs() * count).nansum() / count.sum()
    return mean_confidence[count > 0], accuracy[count > 0], gap


def draw(curves: dict[str, tuple[Tensor, ...]], path: Path, *, images: str) -> None:
    picture = figure(5.0)
    axes = picture.subplots()
    axes.plot([0, 1], [0, 1], color="black", linestyle=":", label="as right as confident")
    for name, (confidence, accuracy, gap) in curves.items():
        axes.plot(confidence, accuracy, marker="o", label=f"{name}: calibration error {gap:.1%}")
    axes.set(title=f"Confidence against accuracy on {images}")
    axes.set(xlabel="mean confidence", ylabel="share right")
    axes.legend()
    picture.savefig(path)


def main() -> None:
    args = arguments()
    generator = torch.Generator().manual_seed(args.seed)

    train, test = load()
    spec = fresnet.Spec(BasicBlock, (1, 1, 1), width=16)
    params = tree.stack([fresnet.init(generator, spec, num_classes=10) for _ in range(MEMBERS)])
    rates = torch.logspace(-1.2, -0.5, MEMBERS)
    step = vmap(train_step, (0, 0, None, None))
    steps = STEPS // 5 if args.quick else STEPS
    for i in range(steps):
        decay = 1 - i / steps
        chosen = torch.randperm(len(train.labels), generator=generator)[:BATCH]
        params = step(params, rates * decay, train.images[chosen], train.labels[chosen])

    with torch.no_grad():
        logits = vmap(fresnet.forward, (0, None))(params, test.images)
    probabilities = logits.softmax(2)
    accuracies = (probabilities.argmax(2) == test.labels).float().mean(1)
    for rate, accuracy in zip(rates, accuracies, strict=True):
        print(f"learning rate {rate:.3f}: test accuracy {accuracy:.1%}")
    together = probabilities.mean(0)
    print(f"average member: {accuracies.mean():.1%}, best member: {accuracies.max():.1%}")
    print(f"ensemble: {(together.argmax(1) == test.labels).float().mean():.1%}")
    best = probabilities[accuracies.argmax()]
    curves = {"best member": reliability(best, test.labels)}
    curves |= {"ensemble": reliability(together, test.labels)}
    draw(curves, args.out / "calibration.png", images="360 test digits")
    print(f"wrote calibration.png to {args.out}")


if __name__ == "__main__":
    fresnet.keep_pages()
    main()
