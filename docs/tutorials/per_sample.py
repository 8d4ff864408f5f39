"""Gradients of each image
=======================

Which training images made the network say this? A step on a training image changes the loss of a
test image by the product of their two gradients (Pruthi et al. 2020, arXiv:2002.08484). So we need
the gradient of each training image by itself. `fresnet.per_sample_grads` returns all of them at
once.
"""

import matplotlib.pyplot as plt
import torch
from digits import load
from torch.func import grad
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import nodes, tree

train, test = load()
params = fresnet.init(0, fresnet.Spec(nodes.BasicBlock, (1, 1, 1), width=16), num_classes=10)

# %%
# First we train a small ResNet for a moment, so that it still makes mistakes.


def loss_fn(weights, stats, x, y):
    logits, stats = fresnet.forward_train(fresnet.Params(weights, stats), x)
    return cross_entropy(logits, y), stats


generator = torch.Generator().manual_seed(0)
for _ in range(60):
    chosen = torch.randperm(len(train.labels), generator=generator)[:100]
    x, y = train.images[chosen], train.labels[chosen]
    grads, stats = grad(loss_fn, has_aux=True)(*params, x, y)
    params = fresnet.Params(tree.map(lambda w, g: w - 0.1 * g, params.weights, grads), stats)

predicted = fresnet.forward(params, test.images).argmax(1)
wrong = (predicted != test.labels).nonzero().flatten()
print(f"{len(wrong)} of {len(test.labels)} test digits are wrong")

# %%
# Batch normalisation ties the images of a batch together, so "the gradient of one image" needs a
# meaning, which `norms=` names. Here it is "running": each image is normalised by the running
# statistics, as in inference. A leaf of the result has the images in front.

x, y = train.images[:500], train.labels[:500]
grads = fresnet.per_sample_grads(cross_entropy, params, x, y, norms="running", chunk_size=100)
print(tuple(params.weights.head.weight.shape), "->", tuple(grads.head.weight.shape))

# %%
# For three wrong test digits, we take the gradient of the loss with the wrong prediction as its
# target, and multiply. The training digits with the largest products pulled the network there.

columns = 5
figure, grid = plt.subplots(3, columns, figsize=(6.4, 4.8), layout="constrained")
for row, i in zip(grid, wrong[:3], strict=True):
    mistake = (test.images[i : i + 1], predicted[i : i + 1])
    pull = fresnet.per_sample_grads(cross_entropy, params, *mistake, norms="running")
    products = tree.map(lambda g, p: (g * p).flatten(1).sum(1), grads, pull)
    order = sum(tree.leaves(products)).argsort(descending=True)
    row[0].imshow(test.images[i, 0], cmap="gray_r")
    row[0].set_title(f"a {test.labels[i]}, taken\nfor {predicted[i]}, as:", color="C3")
    for axes, j in zip(row[1:], order, strict=False):
        axes.imshow(x[j, 0], cmap="gray_r")
        axes.set_title(f"says {y[j]}")
for axes in grid.flat:
    axes.set_axis_off()

# %%
# Where only the norms of the gradients are wanted, `fresnet.per_sample_norms` takes about as long
# as one gradient of the whole batch, since it never forms the others.

norms = fresnet.per_sample_norms(cross_entropy, params, x, y, norms="running")
print(f"median norm {norms.median():.2f}, largest {norms.max():.1f}")
