"""A silent fault of torch.func
============================

Differentiate over a `vmap` that holds a gradient through batch normalisation, and stock
`torch.func` returns a wrong gradient without a word. Its rule for mapping the backward of
`batch_norm` takes the mean and the deviation of the batch for constants. MAML over tasks has this
form, and so have penalties on the gradients of tasks. :doc:`../argument` says more about it.
"""

import matplotlib.pyplot as plt
import torch
from digits import load
from torch.func import grad, vmap
from torch.nn.functional import batch_norm, conv2d, cross_entropy

import fresnet
from fresnet import nodes, optim, tree

train, _ = load(size=16)
spec = fresnet.Spec(nodes.BasicBlock, (1, 1), width=8, stem=nodes.Stem3x3)
params = fresnet.init(0, spec, num_classes=3, dtype=torch.float64)

# %%
# One network, computed twice from the same weights: by fresnet, and as anyone would write it.


def by_fresnet(weights, x):
    return fresnet.forward_train(params._replace(weights=weights), x)[0]


def by_stock(weights, x):
    def layer(of, x, stride=1):
        y = conv2d(x, of.conv, None, stride, of.conv.shape[-1] // 2)
        return batch_norm(y, None, None, of.norm.scale, of.norm.bias, training=True)

    x = layer(weights.stem.layer, x).relu()
    for (block,), stride in zip(weights.stages, (1, 2), strict=True):
        y = layer(block.layer2, layer(block.layer1, x, stride).relu())
        x = (y + (x if stride == 1 else layer(block.shortcut.layer, x, stride))).relu()
    return x.mean((2, 3)) @ weights.head.weight.T + weights.head.bias


# %%
# Three tasks of telling three digits apart. Three losses of a task hold a gradient: MAML's, the
# loss after a step; the same where a step moves the norms alone; and the square of the norms'
# gradient, as a penalty.

generator = torch.Generator().manual_seed(0)
classes = [torch.randperm(10, generator=generator)[:3] for _ in range(3)]
places = [[(train.labels == digit).nonzero().flatten()[:6] for digit in task] for task in classes]
images = torch.stack([train.images[torch.stack(task, dim=1)] for task in places]).double()
x, queries = images[:, :3].flatten(1, 2), images[:, 3:].flatten(1, 2)
y = torch.arange(3).repeat(3)


def task_losses(network):
    def loss_fn(weights, x):
        return cross_entropy(network(weights, x), y)

    def maml(weights, x, queries):
        grads = grad(loss_fn)(weights, x)
        return loss_fn(tree.map(lambda w, g: w - 0.4 * g, weights, grads), queries)

    def norms_of(weights, x):
        norms, rest = tree.partition(weights, tree.matching("*.norm"))
        grads = grad(lambda norms: loss_fn(tree.combine(norms, rest), x))(norms)
        return norms, rest, grads

    def norms_alone(weights, x, queries):
        norms, rest, grads = norms_of(weights, x)
        norms = tree.map(lambda w, g: w - g, norms, grads)
        return loss_fn(tree.combine(norms, rest), queries)

    def penalty(weights, x, queries):
        return tree.ravel(norms_of(weights, x)[2]).square().sum()

    return {"MAML": maml, "MAML, norms alone": norms_alone, "penalty on norms": penalty}


def mapped(task_loss):
    return lambda weights: vmap(task_loss, (None, 0, 0))(weights, x, queries).mean()


def looped(task_loss):
    return lambda weights: sum(map(task_loss, [weights] * 3, x, queries)) / 3


# %%
# The truth needs no other library: it is the same loss with a loop in the place of the `vmap`.

print(f"{'gradient is off by':20}{'stock':>10}{'fresnet':>10}")
for (name, stock), ours in zip(
    task_losses(by_stock).items(), task_losses(by_fresnet).values(), strict=True
):
    truth = tree.ravel(grad(looped(stock))(params.weights))
    errors = [
        (tree.ravel(grad(mapped(loss))(params.weights)) - truth).norm() / truth.norm()
        for loss in (stock, ours)
    ]
    print("{:20}{:10.1e}{:10.1e}".format(name, *errors))
    assert errors[0] > 1e-4
    assert errors[1] < 1e-10

# %%
# What does it do to a run? Three runs of MAML ought to be one: the loop, stock `vmap`, and fresnet.


def run(loss, steps=30):
    optimizer, weights, losses = optim.adam(0.003), params.weights, []
    state = optimizer.init(weights)
    for _ in range(steps):
        losses.append(loss(weights).item())
        weights, state = optimizer.update(grad(loss)(weights), state, weights)
    return torch.tensor(losses, dtype=torch.float64)


stock, ours = task_losses(by_stock)["MAML"], task_losses(by_fresnet)["MAML"]
truth, by_vmap, by_ours = run(looped(stock)), run(mapped(stock)), run(mapped(ours))
print(f"meta-loss after {len(truth)} steps: {truth[-1]:.4f}, {by_vmap[-1]:.4f}, {by_ours[-1]:.4f}")

figure, axes = plt.subplots()
axes.semilogy((by_vmap - truth).abs().clamp(min=1e-17), label="stock vmap")
axes.semilogy((by_ours - truth).abs().clamp(min=1e-17), label="fresnet, under vmap")
axes.set(
    title="How far the meta-loss is from the loop's",
    xlabel="step",
    ylabel="difference",
    ylim=(1e-17, 1),
)
axes.legend()

# %%
# The stock run learns too, but it is another run than the one that was written, and
# nothing says so. How much that matters depends on the share of the gradient that goes through the
# norms: of a penalty on the norms' gradients, much is wrong.
