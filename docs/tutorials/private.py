"""Private training
================

Differentially private training bounds what anyone can learn of one image from the weights. Each
image's gradient is clipped to a norm, and noise on the scale of that norm is added to their sum
(DP-SGD, Abadi et al. 2016, arXiv:1607.00133). `fresnet.clipped_grads` returns that sum.

Running statistics of batch normalisation would leak what they saw, without noise. So the network
here has norms in groups, which keep no statistics.
"""

import math

import matplotlib.pyplot as plt
import torch
from digits import load
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import nodes, tree

train, test = load(size=16)
spec = fresnet.Spec(nodes.BasicBlock, (1, 1), width=32, norm=nodes.GroupNorm)
STEPS, CLIP = 25, 1.0

# %%
# A step takes all images. Adding or removing one of them changes the sum by at most `CLIP`, and the
# noise has `sigma` times that as its standard deviation.


def train_step(weights, sigma, rate, generator):
    params = fresnet.Params(weights, start.stats)
    total, norms = fresnet.clipped_grads(cross_entropy, params, *train, max_norm=CLIP)

    def step(w, g):
        noise = sigma * CLIP * torch.randn(g.shape, generator=generator)
        return w - rate * (g + noise) / len(train.labels)

    return tree.map(step, weights, total), norms


# %%
# Steps that each see all images and add Gaussian noise have a privacy loss in closed form, by
# zero-concentrated differential privacy (Bun & Steinke 2016, arXiv:1605.02065, Prop. 1.3).


def epsilon(sigma, delta=1e-4):
    rho = STEPS / (2 * sigma**2)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


start = fresnet.init(0, spec, num_classes=10)
results = {}
for sigma in (0, 8, 24):
    generator = torch.Generator().manual_seed(0)
    weights, curve = start.weights, []
    for _ in range(STEPS):
        weights, norms = train_step(weights, sigma, 1.5, generator)
        logits = fresnet.forward(fresnet.Params(weights, start.stats), test.images)
        curve.append(100 * (logits.argmax(1) == test.labels).float().mean().item())
    name = f"ε = {epsilon(sigma):.1f}" if sigma else "no noise"
    results[name] = curve
    print(f"noise {sigma:2d}, {name}: {curve[-1]:.1f}% of the test digits right")

# %%
# More noise is more privacy and less accuracy. 1,437 images are few: the same noise costs less
# among more.

figure, axes = plt.subplots()
for name, curve in results.items():
    axes.plot(range(1, STEPS + 1), curve, label=name)
axes.set(title="Private training, δ = 1e-4", xlabel="step", ylabel="test digits right, %")
axes.legend()
