"""Fine-tuning
===========

A network that knows digits learns to read them in a mirror, from three images of each. With
published weights the start is `fresnet.load("resnet50.safetensors")` instead; the rest is the same.
:doc:`../howto` has another way, with a rate for the head.
"""

import matplotlib.pyplot as plt
import torch
from digits import load
from torch.func import grad
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import nodes, optim

train, test = load()
mirrored = test.images.flip(3)
spec = fresnet.Spec(nodes.BasicBlock, (1, 1, 1), width=16)


def loss_fn(weights, stats, x, y):
    logits, stats = fresnet.forward_train(fresnet.Params(weights, stats), x)
    return cross_entropy(logits, y), stats


def fit(params, optimizer, x, y, steps):
    generator, curve = torch.Generator().manual_seed(0), []
    state = optimizer.init(params.weights)
    for _ in range(steps):
        chosen = torch.randperm(len(y), generator=generator)[:64]
        grads, stats = grad(loss_fn, has_aux=True)(*params, x[chosen], y[chosen])
        weights, state = optimizer.update(grads, state, params.weights)
        params = fresnet.Params(weights, stats)
        right = fresnet.forward(params, mirrored).argmax(1) == test.labels
        curve.append(100 * right.float().mean().item())
    return params, curve


sgd = optim.sgd(0.1, momentum=0.9)
known, curve = fit(fresnet.init(0, spec, num_classes=10), sgd, *train, steps=80)
right = (fresnet.forward(known, test.images).argmax(1) == test.labels).float().mean()
print(f"{right:.1%} of the test digits right, and {curve[-1]:.1f}% of those in the mirror")

# %%
# `freeze` has all norms keep their running statistics, which thirty images would spoil. `by_path`
# says which part is trained, and how.

few = torch.cat([(train.labels == digit).nonzero().flatten()[:3] for digit in range(10)])
x, y = train.images[few].flip(3), train.labels[few]
renewed = fresnet.with_head(known, num_classes=10, generator=1)
ways = {
    "a new head": (fresnet.freeze(renewed), optim.by_path({"head": sgd, "*": optim.frozen})),
    "all weights": (fresnet.freeze(known), optim.sgd(0.01, momentum=0.9)),
    "from scratch": (fresnet.init(1, spec, num_classes=10), optim.sgd(0.05, momentum=0.9)),
}

figure, axes = plt.subplots()
for name, (params, optimizer) in ways.items():
    _, curve = fit(params, optimizer, x, y, steps=30)
    print(f"{name}: {curve[9]:.1f}% after 10 steps, {curve[-1]:.1f}% after 30")
    axes.plot(range(1, 31), curve, label=name)
axes.set(title="Mirrored digits, from three images of each", xlabel="step")
axes.set(ylabel="360 test digits right, %")
axes.legend(loc="lower right")
