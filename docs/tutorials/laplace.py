"""Uncertainty by a Laplace approximation
======================================

A network is sure of itself even where it has seen nothing like the image. A Laplace approximation
makes the head's weights a Gaussian whose precision is the curvature of the loss, and averages over
it (Daxberger et al. 2021, arXiv:2106.14806). `fresnet.embed` gives what the head sees, and
`torch.func.hessian` the curvature. :doc:`../howto` has this and dropout in few lines.
"""

import matplotlib.pyplot as plt
import torch
from digits import load
from torch.func import grad, hessian
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

import fresnet
from fresnet import nodes, tree

train, test = load()
params = fresnet.init(0, fresnet.Spec(nodes.BasicBlock, (1, 1, 1), width=16), num_classes=10)


def loss_fn(weights, stats, x, y):
    logits, stats = fresnet.forward_train(fresnet.Params(weights, stats), x)
    return cross_entropy(logits, y), stats


generator = torch.Generator().manual_seed(0)
for _ in range(100):
    chosen = torch.randperm(len(train.labels), generator=generator)[:64]
    batch = train.images[chosen], train.labels[chosen]
    grads, stats = grad(loss_fn, has_aux=True)(*params, *batch)
    params = fresnet.Params(tree.map(lambda w, g: w - 0.1 * g, params.weights, grads), stats)

# %%
# The loss of all training images as a function of the head alone, 650 numbers, and its Hessian. A
# prior with a standard deviation of 1 adds the identity.

head, features = params.weights.head, fresnet.embed(params, train.images)


def head_loss(vector):
    matrix, bias = tree.unravel(head, vector)
    return cross_entropy(features @ matrix.T + bias, train.labels, reduction="sum")


mean = tree.ravel(head)
precision = hessian(head_loss)(mean) + torch.eye(len(mean))
print(f"{len(mean)} weights of the head, precision up to {precision.diagonal().max():.1f}")

# %%
# Draw 100 heads, and average what they say of test digits that are turned further and further.

factor = torch.linalg.cholesky(precision)
noise = torch.randn(len(mean), 100, generator=generator)
draws = mean + torch.linalg.solve_triangular(factor.T, noise, upper=True).T
heads = [tree.unravel(head, draw) for draw in draws]


def turned(x, degrees):
    cos, sin = torch.tensor(degrees).deg2rad().cos(), torch.tensor(degrees).deg2rad().sin()
    grid = affine_grid(torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]] * len(x)), x.shape, False)
    return grid_sample(x, grid, padding_mode="border", align_corners=False)


angles, curves = list(range(0, 181, 15)), {"point": [], "Laplace": [], "right": []}
for angle in angles:
    seen = fresnet.embed(params, turned(test.images, float(angle)))
    point = (seen @ head.weight.T + head.bias).softmax(1)
    averaged = torch.stack([(seen @ m.T + b).softmax(1) for m, b in heads]).mean(0)
    curves["point"].append(100 * point.max(1).values.mean())
    curves["Laplace"].append(100 * averaged.max(1).values.mean())
    curves["right"].append(100 * (averaged.argmax(1) == test.labels).float().mean())

# %%
# At 90° most predictions are wrong. Averaged, the network says so less loudly.

figure, axes = plt.subplots()
axes.plot(angles, curves["point"], ".-", label="confidence of the network")
axes.plot(angles, curves["Laplace"], ".-", label="confidence with Laplace")
axes.plot(angles, curves["right"], ".-", color="black", label="digits right")
axes.set(
    title="Test digits that are turned",
    xlabel="degrees",
    ylabel="%",
    xticks=angles[::2],
    ylim=(0, 102),
)
axes.legend(loc="upper right", fontsize=11)
for i in (0, 6):
    print(
        f"{angles[i]:2d}°: {curves['right'][i]:.0f}% right, "
        f"{curves['point'][i]:.0f}% confident, {curves['Laplace'][i]:.0f}% with Laplace"
    )
