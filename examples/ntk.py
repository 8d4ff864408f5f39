"""The empirical neural tangent kernel of a small ResNet, computed twice, and what it predicts.

    python examples/ntk.py

If J is the Jacobian of the logits by the weights at initialisation, the kernel of two images is
J(x) J(x')^T, `[k k]` (Jacot et al. 2018, arXiv:1806.07572). It goes through the running
statistics, which are set on the training digits. So each image's logits depend on that image alone.

For 16 digits the kernel is computed in two ways. One contracts Jacobians. The other takes
kernel-vector products, the columns J J^T e, and forms neither J nor its transpose (Novak et al.
2022, arXiv:2206.08720). Then kernel regression on 200 digits tells test digits apart. It uses one
kernel for all classes, that of the summed logits (Mohamadi et al. 2023, arXiv:2206.12543).

It prints the largest difference of the two and the accuracy on test digits, and draws the kernel.
Measured on 2 CPU cores, PyTorch 2.13: difference 2e-14, accuracy 88% (seed 0), in 7 s.
"""

from pathlib import Path
from typing import Any

import torch
from digits import Digits, arguments, load
from style import figure
from torch import Tensor
from torch.func import jacrev, jvp, vjp, vmap
from torch.nn.functional import one_hot

import fresnet
from fresnet import Params, tree

SPEC, CLASSES = fresnet.Spec(fresnet.nodes.BasicBlock, (1, 1), width=16), 10
FEW, TRAIN, TEST, RIDGE = 16, 200, 100, 1e-4


def by_jacobians(params: Params, x: Tensor) -> Tensor:
    """The kernel `[n k n k]`, from the Jacobian of each image."""

    def logits(weights: Any, image: Tensor) -> Tensor:
        return fresnet.forward(Params(weights, params.stats), image[None])[0]

    jacobians = vmap(jacrev(logits), (None, 0))(params.weights, x)
    flat = torch.cat([leaf.flatten(2) for leaf in tree.leaves(jacobians)], dim=2)
    return torch.einsum("n k p, m l p -> n k m l", flat, flat)


def by_products(params: Params, x: Tensor) -> Tensor:
    """The kernel `[n k n k]`, column by column: each is the jvp along the vjp of one logit."""

    def logits(weights: Any) -> Tensor:
        return fresnet.forward(Params(weights, params.stats), x).flatten()

    outputs, pull, *_ = vjp(logits, params.weights)

    def column(one: Tensor) -> Tensor:
        product: Tensor = jvp(logits, (params.weights,), pull(one))[1]
        return product

    columns: Tensor = vmap(column)(torch.eye(len(outputs), dtype=x.dtype))
    return columns.T.reshape(len(x), CLASSES, len(x), CLASSES)


def summed_gradients(params: Params, digits: Digits) -> Tensor:
    """The gradient `[n p]` of each image's summed logits, divided by sqrt(k)."""
    gradients = fresnet.per_sample_grads(
        lambda logits, _: logits.sum() / CLASSES**0.5, params, *digits, norms="running"
    )
    return torch.cat([leaf.flatten(1) for leaf in tree.leaves(gradients)], dim=1)


def regress(kernel: Tensor, labels: Tensor, cross_kernel: Tensor) -> Tensor:
    """Kernel ridge regression on centred one-hot labels: predictions `[m k]`."""
    targets = one_hot(labels, CLASSES).to(kernel.dtype)
    ridge = RIDGE * kernel.diagonal().mean() * torch.eye(len(kernel), dtype=kernel.dtype)
    mean = targets.mean(0)
    predictions: Tensor = cross_kernel @ torch.linalg.solve(kernel + ridge, targets - mean)
    return predictions + mean


def draw(kernel: Tensor, labels: Tensor, path: Path) -> None:
    """Draw the kernel as cosines between gradients, sorted by class, and its eigenvalues."""
    picture = figure(9.5)
    axes, spectrum_axes = picture.subplots(2, 1, height_ratios=(5, 4))
    order, norms = labels.argsort(stable=True), kernel.diagonal().sqrt()
    image = axes.imshow((kernel / norms / norms[:, None])[order][:, order], cmap="magma")
    picture.colorbar(image, label="cosine of two digits' gradients")
    ends = torch.bincount(labels, minlength=CLASSES).cumsum(0) - 0.5
    middles = (ends + torch.cat([ends.new_tensor([-0.5]), ends[:-1]])) / 2
    for line, ticks in ((axes.axhline, axes.set_yticks), (axes.axvline, axes.set_xticks)):
        ticks(middles.tolist(), range(CLASSES))
        for end in ends[:-1].tolist():
            line(end, color="white", linewidth=0.5)
    axes.set(title="Tangent kernel, sorted by class", xlabel="digit", ylabel="digit")
    axes.grid(False)
    spectrum_axes.semilogy(torch.linalg.eigvalsh(kernel).flip(0), ".-")
    spectrum_axes.set(title="Spectrum of the kernel", xlabel="rank", ylabel="eigenvalue")
    picture.savefig(path)


def main() -> None:
    args = arguments()
    train, test = load()
    few, count, test_count = (4, 40, 20) if args.quick else (FEW, TRAIN, TEST)
    train = Digits(train.images[:count].double(), train.labels[:count])
    test = Digits(test.images[:test_count].double(), test.labels[:test_count])
    params = fresnet.init(args.seed, SPEC, num_classes=CLASSES, dtype=torch.float64)
    params = fresnet.recalibrate(params, [train.images])

    contracted, multiplied = (f(params, train.images[:few]) for f in (by_jacobians, by_products))
    difference = (contracted - multiplied).abs().max() / contracted.abs().max()
    print(f"kernel of {few} digits, contracted and by products: {difference:.1e} apart at most")

    gradients, test_gradients = (summed_gradients(params, digits) for digits in (train, test))
    kernel = gradients @ gradients.T
    predictions = regress(kernel, train.labels, test_gradients @ gradients.T)
    accuracy = (predictions.argmax(1) == test.labels).double().mean()
    print(f"kernel regression on {count} digits: {accuracy:.0%} of {test_count} test digits right")
    draw(kernel, train.labels, args.out / "ntk.png")
    print(f"wrote ntk.png to {args.out}")


if __name__ == "__main__":
    fresnet.keep_pages()
    main()
