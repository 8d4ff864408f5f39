"""Learning to learn
=================

MAML looks for first weights from which one step of training is enough (Finn et al. 2017,
arXiv:1703.03400). Its gradient goes through the step, and here over eight tasks at once: `grad` of
`vmap` of `grad`. A task is to tell three digits apart by one image of each.

:doc:`../argument` shows what stock `torch.func` makes of this with batch normalisation.
"""

import matplotlib.pyplot as plt
import torch
from digits import load
from torch.func import grad, grad_and_value, vmap
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import nodes, optim, tree

train, test = load(size=16)
spec = fresnet.Spec(nodes.BasicBlock, (1, 1), width=16)
params = fresnet.init(0, spec, num_classes=3)

# %%
# The digits from 0 to 6 make the tasks for learning to learn. Tasks of 7, 8 and 9 are held out:
# which digit is class 0, 1 or 2 is drawn anew in each.


def draw(digits, count, generator):
    tasks = []
    for _ in range(count):
        classes = digits[torch.randperm(len(digits), generator=generator)[:3]]
        shown = []
        for digit in classes:
            places = (train.labels == digit).nonzero().flatten()
            shown.append(places[torch.randperm(len(places), generator=generator)[:6]])
        tasks.append(train.images[torch.stack(shown, dim=1)])  # [6 3 c h w]
    images = torch.stack(tasks)
    return images[:, 0], images[:, 1:].flatten(1, 2)


own, asked = torch.arange(3), torch.arange(3).repeat(5)

# %%
# The loss of a task is that after one step. Batch normalisation goes by the images of the task.


def loss_fn(weights, x, y):
    logits, _ = fresnet.forward_train(params._replace(weights=weights), x)
    return cross_entropy(logits, y)


def adapted(weights, x):
    return tree.map(lambda w, g: w - 0.4 * g, weights, grad(loss_fn)(weights, x, own))


def task_loss(weights, x, queries):
    return loss_fn(adapted(weights, x), queries, asked)


def meta_loss(weights, x, queries):
    return vmap(task_loss, (None, 0, 0))(weights, x, queries).mean()


# %%
def right(weights, x, queries):
    """The share of queries that a network answers after its one step."""

    def share(x, queries):
        after = params._replace(weights=adapted(weights, x))
        return (fresnet.forward_train(after, queries)[0].argmax(1) == asked).float().mean()

    return 100 * vmap(share)(x, queries).mean().item()


generator = torch.Generator().manual_seed(0)
held_out = draw(torch.tensor([7, 8, 9]), 32, generator)
optimizer = optim.adam(0.003)
weights, state, curve = params.weights, optimizer.init(params.weights), []
for step in range(101):
    tasks = draw(torch.arange(7), 8, generator)
    if step % 20 == 0:
        curve.append((step, right(weights, *tasks), right(weights, *held_out)))
        print("step {:3d}: {:.0f}% seen, {:.0f}% held out".format(*curve[-1]))
    grads, loss = grad_and_value(meta_loss)(weights, *tasks)
    weights, state = optimizer.update(grads, state, weights)

# %%
steps, seen, unseen = zip(*curve, strict=True)
figure, axes = plt.subplots()
axes.plot(steps, seen, ".-", label="tasks of digits from 0 to 6")
axes.plot(steps, unseen, ".-", label="tasks of 7, 8 and 9")
axes.axhline(100 / 3, color="black", linestyle=":", label="by chance")
axes.set(title="After one step on one image of each class", xlabel="step of meta-learning")
axes.set(ylabel="right, %", ylim=(0, 102))
axes.legend(loc="lower right")
