"""An ensemble as one network
==========================

Eight networks are one tree whose leaves have the members in front. `vmap` makes a training step of
one member a step of all, each with its own weights and its own learning rate.
"""

import matplotlib.pyplot as plt
import torch
from digits import load
from torch.func import grad_and_value, vmap
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import nodes, tree

train, test = load()
spec = fresnet.Spec(nodes.BasicBlock, (1, 1, 1), width=16)
members = tree.stack([fresnet.init(seed, spec, num_classes=10) for seed in range(8)])
rates = torch.logspace(-2.5, 0, 8)  # from 0.003 to 1

# %%
# This is a step of one member. Nothing in it knows of the others.


def loss_fn(weights, stats, x, y):
    logits, stats = fresnet.forward_train(fresnet.Params(weights, stats), x)
    return cross_entropy(logits, y), stats


def train_step(params, rate, x, y):
    grads, (loss, stats) = grad_and_value(loss_fn, has_aux=True)(*params, x, y)
    weights = tree.map(lambda w, g: w - rate * g, params.weights, grads)
    return fresnet.Params(weights, stats), loss


# %%
# And this trains all of them.

train_all = vmap(train_step, (0, 0, None, None))
generator = torch.Generator().manual_seed(0)
losses = []
for _ in range(60):
    chosen = torch.randperm(len(train.labels), generator=generator)[:64]
    members, loss = train_all(members, rates, train.images[chosen], train.labels[chosen])
    losses.append(loss)

figure, axes = plt.subplots(layout="constrained")
curves = torch.stack(losses).unfold(0, 5, 1).mean(2)
for i, (rate, curve) in enumerate(zip(rates, curves.T, strict=True)):
    axes.semilogy(curve, label=f"{rate:.3f}", color=plt.cm.viridis(i / 8))
axes.set(title="Eight learning rates in one step", xlabel="step", ylabel="loss, mean of 5 steps")
figure.legend(title="rate", ncols=4, loc="outside lower center")

# %%
# The mean of the members' probabilities is the ensemble's (Lakshminarayanan et al. 2017,
# arXiv:1612.01474).

logits = vmap(fresnet.forward, (0, None))(members, test.images)
right = (logits.argmax(2) == test.labels).float().mean(1)
together = (logits.softmax(2).mean(0).argmax(1) == test.labels).float().mean()
print("members ", " ".join(f"{share:.0%}" for share in right))
print(f"ensemble {together:.1%}")
