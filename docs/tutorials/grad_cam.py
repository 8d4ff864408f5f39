"""Where a network looks: Grad-CAM
===============================

Grad-CAM weighs the maps of a stage by the gradient of one logit with respect to them (Selvaraju et
al. 2017, arXiv:1610.02391). With modules this takes hooks. Here the maps are what
`fresnet.features` returns, and the rest of the network is a function of them. In
:doc:`../howto` the same takes eight lines, for any stage.
"""

import matplotlib.pyplot as plt
import torch
from digits import load
from torch.func import grad
from torch.nn.functional import cross_entropy, interpolate

import fresnet
from fresnet import nodes, tree

train, test = load(size=16)
spec = fresnet.Spec(nodes.BasicBlock, (1, 1, 1), width=16, stem=nodes.Stem3x3)
params = fresnet.init(0, spec, num_classes=10)


def loss_fn(weights, stats, x, y):
    logits, stats = fresnet.forward_train(fresnet.Params(weights, stats), x)
    return cross_entropy(logits, y), stats


# %%
# Training sees one digit in each image, on either side of it, and is never told on which.

generator = torch.Generator().manual_seed(0)
empty = train.images.min()
for _ in range(100):
    chosen = torch.randperm(len(train.labels), generator=generator)[:64]
    digits = train.images[chosen]
    x = torch.cat([digits, empty.expand_as(digits)], dim=3)
    sides = torch.rand(64, generator=generator) < 0.5
    x = torch.where(sides[:, None, None, None], x, x.roll(16, dims=3))
    grads, stats = grad(loss_fn, has_aux=True)(*params, x, train.labels[chosen])
    params = fresnet.Params(tree.map(lambda w, g: w - 0.1 * g, params.weights, grads), stats)

# %%
# `fresnet.forward_head` is the end of `forward`, from the maps of the last stage to the logits.


def logit(maps, digit):
    return fresnet.forward_head(params, maps[None])[0, digit]


def grad_cam(image, digit):
    maps = fresnet.features(params, image[None])[-1][0]
    weights = grad(logit)(maps, digit).mean((1, 2))
    heat = torch.einsum("c, c h w -> h w", weights, maps).relu()
    return interpolate(heat[None, None], image.shape[1:], mode="bilinear")[0, 0]


# %%
# Now there are two digits in an image. It is asked for the left one, and then for the right one.

figure, grid = plt.subplots(4, 2, figsize=(6.4, 7.0), layout="constrained")
for row, i in zip(grid, (0, 2, 6, 8), strict=True):
    image = torch.cat([test.images[i], test.images[i + 1]], dim=2)
    for axes, digit in zip(row, test.labels[i : i + 2].tolist(), strict=True):
        axes.imshow(image[0], cmap="gray_r")
        axes.imshow(grad_cam(image, digit), cmap="inferno", alpha=0.6)
        axes.set_title(f"Where is the {digit}?")
        axes.set_axis_off()
