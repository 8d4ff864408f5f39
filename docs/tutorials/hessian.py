"""Products with a Hessian
=======================

How sharp is the minimum that training found? The sharpest direction is the leading eigenvector of
the loss's Hessian. The matrix is never formed: its product with a vector is the derivative of the
gradient along that vector, `jvp` of `grad`. BatchNorm's statistics of the batch are part of both.
"""

import matplotlib.pyplot as plt
import torch
from digits import load
from torch.func import grad, jvp
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import nodes, tree

train, _ = load(size=16)
x, y = train.images[:128], train.labels[:128]
spec = fresnet.Spec(nodes.BasicBlock, (1, 1), width=8, stem=nodes.Stem3x3)
params = fresnet.init(0, spec, num_classes=10)


def loss_fn(weights):
    return cross_entropy(fresnet.forward_train(params._replace(weights=weights), x)[0], y)


# %%
# Power iteration: multiply, normalise, repeat. The eigenvalue is v · Hv.


def sharpest(weights, steps=20):
    v = torch.randn(tree.ravel(weights).shape, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        v = v / v.norm()
        product = jvp(grad(loss_fn), (weights,), (tree.unravel(weights, v),))[1]
        product = tree.ravel(product)
        value, v = v @ product, product
    return value, v / v.norm()


# %%
# In a quadratic bowl, gradient descent diverges where the sharpness exceeds 2 / rate. In a network
# the sharpness rises to there and beyond, and the loss falls all the same (Cohen et al. 2021,
# arXiv:2103.00065).

RATE, EVERY = 0.2, 15
weights, seen = params.weights, []
for step in range(121):
    if step % EVERY == 0:
        value, _ = sharpest(weights)
        seen.append((step, loss_fn(weights).item(), value.item()))
        print(f"step {step:3d}: loss {seen[-1][1]:.3f}, sharpness {seen[-1][2]:.1f}")
    weights = tree.map(lambda w, g: w - RATE * g, weights, grad(loss_fn)(weights))

# %%
steps, losses, values = zip(*seen, strict=True)
figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(6.4, 5.6))
above.plot(steps, losses, ".-")
above.set(title="Full-batch gradient descent, rate 0.2", ylabel="loss")
below.plot(steps, values, ".-", label="leading eigenvalue")
below.axhline(2 / RATE, color="C3", linestyle=":", label="2 / rate")
below.set(xlabel="step", ylabel="sharpness")
below.legend()
