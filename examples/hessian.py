"""The sharpest directions of a training loss: leading eigenpairs of its Hessian, by Lanczos.

    python examples/hessian.py

A small ResNet is trained on 16x16 digits for a moment. Then the loss of one batch in training mode,
through the batch statistics, is a function of all 6,226 weights. Its Hessian is never formed. A
product with it is the jvp of the gradient (Pearlmutter 1994), and Lanczos needs no more than such
products (Golub & Van Loan, "Matrix Computations", Ch. 10).

It prints each eigenvalue with the residual of its eigenpair, and draws the Ritz values as they
converge. It also draws the loss on the plane of the two leading eigenvectors (Li et al. 2018,
arXiv:1712.09913), beside the approximation by gradient and Hessian alone.
Measured on 2 CPU cores, PyTorch 2.13: eigenvalues 9.18, 8.20, 7.13 to 3e-14 (seed 0), in 15 s.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from digits import arguments, load, small
from style import figure
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import Params, tree

SPEC = fresnet.Spec(fresnet.nodes.BasicBlock, (1, 1), width=8)
STEPS, BATCH, RATE = 200, 64, 0.1
HESSIAN_BATCH, LANCZOS_STEPS, EIGENPAIRS, RISE = 256, 60, 5, 0.1

Loss = Callable[[Tensor], Tensor]


def loss_fn(weights: Any, stats: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
    logits, stats = fresnet.forward_train(Params(weights, stats), x)
    return cross_entropy(logits, y), stats


def lanczos(product: Loss, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """An orthonormal basis Q `[steps n]` of the Krylov space, and the tridiagonal Q H Q^T."""
    basis = (start / start.norm())[None]
    tridiagonal = start.new_zeros(steps, steps)
    for i in range(steps):
        residual = product(basis[i])
        tridiagonal[i, i] = residual @ basis[i]
        for _ in range(2):  # Once would leave rounding errors that become copies of eigenvalues.
            residual = residual - (basis @ residual) @ basis
        if i + 1 < steps:
            tridiagonal[i, i + 1] = tridiagonal[i + 1, i] = residual.norm()
            basis = torch.cat([basis, (residual / residual.norm())[None]])
    return basis, tridiagonal


def draw(loss: Loss, at: Tensor, ritz: list[Tensor], plane: Tensor, path: Path) -> None:
    """Draw the Ritz values by Lanczos step, and the loss on a plane through the weights."""
    picture = figure(9.0)
    ritz_axes, axes = picture.subplots(2, 1)
    for step, values in enumerate(ritz, start=1):
        ritz_axes.plot([step] * step, values, ".", color="C0", markersize=4)
    ritz_axes.set(title="Ritz values converge to eigenvalues")
    ritz_axes.set(xlabel="Lanczos step", ylabel="Ritz value")
    sharpest, slope = ritz[-1].flip(0)[:2], plane @ grad(loss)(at)
    span = torch.linspace(-1, 1, 21, dtype=at.dtype) * (2 * RISE / sharpest[:, None]).sqrt()
    grid = torch.stack(torch.meshgrid(*span, indexing="xy"), dim=-1)
    surface = vmap(vmap(loss), chunk_size=1)(at + grid @ plane)
    taylor = loss(at) + grid @ slope + grid.square() @ sharpest / 2
    filled = axes.contourf(*grid.movedim(-1, 0), surface, levels=15)
    picture.colorbar(filled, label="training loss")
    dotted = {"levels": filled.levels, "colors": "white", "linestyles": "dotted"}
    axes.contour(*grid.movedim(-1, 0), taylor, **dotted)
    axes.plot(0, 0, "+", color="white", markersize=10)
    axes.set(title="Loss about the trained weights (+)\ndotted: to second order")
    axes.set(xlabel="along eigenvector 1", ylabel="along eigenvector 2")
    axes.grid(False)
    picture.savefig(path)


def main() -> None:
    args = arguments()
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = small(load()[0])
    params = fresnet.init(generator, SPEC, num_classes=10, dtype=torch.float64)
    steps, lanczos_steps = (20, 12) if args.quick else (STEPS, LANCZOS_STEPS)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (BATCH,), generator=generator)
        grads, stats = grad(loss_fn, has_aux=True)(*params, images[chosen], labels[chosen])
        params = Params(tree.map(lambda w, g: w - RATE * g, params.weights, grads), stats)
    x, y, weights = images[:HESSIAN_BATCH], labels[:HESSIAN_BATCH], tree.ravel(params.weights)

    def loss(vector: Tensor) -> Tensor:
        return loss_fn(tree.unravel(params.weights, vector), params.stats, x, y)[0]

    def hessian_product(vector: Tensor) -> Tensor:
        product: Tensor = jvp(grad(loss), (weights,), (vector,))[1]
        return product

    print(f"loss {loss(weights):.4f}, gradient norm {grad(loss)(weights).norm():.4f}")
    start = torch.randn(len(weights), dtype=weights.dtype, generator=generator)
    basis, tridiagonal = lanczos(hessian_product, start, lanczos_steps)
    values, mixtures = torch.linalg.eigh(tridiagonal)
    vectors = (mixtures.T @ basis).flip(0)[:EIGENPAIRS]
    for i, (value, vector) in enumerate(zip(values.flip(0), vectors, strict=False), start=1):
        residual = (hessian_product(vector) - value * vector).norm()
        print(f"eigenvalue {i}: {value:8.5f}, residual |Hv - λv| = {residual:.1e}")
    ritz = [torch.linalg.eigvalsh(tridiagonal[:i, :i]) for i in range(1, lanczos_steps + 1)]
    draw(loss, weights, ritz, vectors[:2], args.out / "hessian.png")
    print(f"wrote hessian.png to {args.out}")


if __name__ == "__main__":
    fresnet.keep_pages()
    main()
