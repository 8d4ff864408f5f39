"""The neural tangent kernel
=========================

Near its first weights a network is almost linear in them, and its kernel is the product of the
images' gradients: k(x, x') = J(x) · J(x') (Jacot et al. 2018, arXiv:1806.07572). What this kernel
tells apart, training will soon tell apart. Here it classifies digits before any training.
"""

import matplotlib.pyplot as plt
import torch
from digits import load
from torch.nn.functional import one_hot

import fresnet
from fresnet import nodes, tree

train, test = load()
x, y = train.images[:200], train.labels[:200]
spec = fresnet.Spec(nodes.BasicBlock, (1, 1), width=16)
params = fresnet.recalibrate(fresnet.init(0, spec, num_classes=10), [x])

# %%
# The gradients of each image's summed logits are the rows of J. They go through the running
# statistics, which `recalibrate` has set on these digits, so each row is of one image alone.


def jacobian(x):
    def summed(logits, _):
        return logits.sum()

    grads = fresnet.per_sample_grads(summed, params, x, x.new_zeros(len(x)), norms="running")
    return torch.cat([leaf.flatten(1) for leaf in tree.leaves(grads)], dim=1)


rows, others = jacobian(x), jacobian(test.images[:200])
kernel = rows @ rows.T
print(f"kernel {tuple(kernel.shape)} from gradients of {rows.shape[1]:,} weights")

# %%
# Kernel regression on one-hot labels.

ridge = 1e-4 * kernel.diagonal().mean() * torch.eye(len(kernel))
targets = one_hot(y, 10).float() - 0.1
predicted = (others @ rows.T @ torch.linalg.solve(kernel + ridge, targets)).argmax(1)
right = (predicted == test.labels[:200]).float().mean()
print(f"{right:.0%} of 200 test digits right, by 200 training digits and no step of training")

# %%
# Sorted by class, the kernel shows which digits look alike to the network.

order, norms = y.argsort(stable=True), kernel.diagonal().sqrt()
figure, axes = plt.subplots(figsize=(6.4, 5.4))
image = axes.imshow((kernel / norms / norms[:, None])[order][:, order], cmap="magma")
figure.colorbar(image, label="cosine of two images' gradients")
ends = torch.bincount(y, minlength=10).cumsum(0)
middles = (ends - torch.bincount(y, minlength=10) / 2).tolist()
axes.set_xticks(middles, range(10))
axes.set_yticks(middles, range(10))
axes.set(title="Tangent kernel at the first weights", xlabel="digit", ylabel="digit")
axes.grid(False)
