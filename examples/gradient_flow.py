"""How gradients and responses vary with depth: plain and residual networks, and the paper's Fig. 7.

    python examples/gradient_flow.py

It draws the norm of the loss's gradient by each 3x3 convolution, before and after a short training.
It also draws the standard deviation of each such layer's responses, which are its outputs after
BatchNorm and before ReLU or addition (He et al. 2015, arXiv:1512.03385, Fig. 7). The deviation
follows from scale, bias and the moments that `forward_moments` returns.

Measured on 2 CPU cores, PyTorch 2.13, in a minute (seed 0): at initialisation the gradient grows
934-fold from the last layer of a plain network of 56 layers back to the first, and 4-fold in the
residual one. BatchNorm causes that growth (Yang et al. 2019, arXiv:1902.08129). The first steps
move the plain network's early weights far: the first layer's norm grows from 2.4 to 140. Their
gradients go as 1 / norm, so they are the least of all afterwards.
The plain network's early responses grow to 3.3. All of the residual networks' stay within 2% of 1,
where they began, so this short training does not show the smaller responses of the paper's Fig. 7.
"""

from pathlib import Path
from typing import Any

import torch
from digits import Digits, arguments, load
from matplotlib import colormaps
from style import figure
from torch import Tensor
from torch.func import grad
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import fresnet
from fresnet import Params, tree
from fresnet.network.nodes import EPS, Moments, Norm

BATCH, SAMPLE, RATE, MOMENTUM, WEIGHT_DECAY = 128, 512, 0.02, 0.9, 1e-4


def loss_fn(weights: Any, stats: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
    logits, stats = fresnet.forward_train(Params(weights, stats), x)
    return cross_entropy(logits, y), stats


def train_step(params: Params, velocity: Any, x: Tensor, y: Tensor) -> tuple[Params, Any]:
    """One step of SGD with momentum and weight decay."""
    grads, stats = grad(loss_fn, has_aux=True)(*params, x, y)
    velocity = tree.map(
        lambda v, g, w: MOMENTUM * v + g + WEIGHT_DECAY * w, velocity, grads, params.weights
    )
    return Params(tree.map(lambda w, v: w - RATE * v, params.weights, velocity), stats), velocity


def train(name: str, digits: Digits, seed: int, steps: int) -> tuple[Params, Params]:
    """The network of this name before and after training."""
    generator = torch.Generator().manual_seed(seed)
    first = params = fresnet.init(generator, fresnet.SPECS[name], num_classes=10)
    velocity = tree.map(torch.zeros_like, params.weights)
    for _ in tqdm(range(steps), desc=f"{name:8}", unit=" steps", leave=False, disable=None):
        chosen = torch.randperm(len(digits.labels), generator=generator)[:BATCH]
        batch = digits.images[chosen], digits.labels[chosen]
        params, velocity = train_step(params, velocity, *batch)
    return first, params


def gradient_norms(params: Params, digits: Digits) -> Tensor:
    """The norm of the loss's gradient by each 3x3 convolution, in order `[layers]`."""
    grads, _ = grad(loss_fn, has_aux=True)(*params, *digits)
    return torch.stack([g.norm() for g in tree.leaves(grads) if g.shape[-2:] == (3, 3)])


def layers(network: Any) -> list[Any]:
    """The layers or moments in each 3x3 layer's place, in order, from weights or from moments."""
    blocks = [block for stage in network.stages for block in stage]
    return [network.stem.layer, *(one for block in blocks for one in (block.layer1, block.layer2))]


def response_std(norm: Norm, moments: Moments) -> Tensor:
    """The standard deviation of a layer's responses, which are all values that its norm puts out.

    In channel c they have mean bias[c] and variance scale[c]^2 var[c] / (var[c] + eps). So the
    variance of all is the mean of these variances plus the variance of these means.
    """
    var = moments.m2 / moments.n
    within = norm.scale**2 * var / (var + EPS)
    return (within.mean() + norm.bias.var(correction=0)).sqrt()


def response_stds(params: Params, x: Tensor) -> Tensor:
    """The `response_std` of every 3x3 layer, in order `[layers]`."""
    _, moments = fresnet.forward_moments(params, x)
    pairs = zip(layers(params.weights), layers(moments), strict=True)
    return torch.stack([response_std(layer.norm, seen) for layer, seen in pairs])


def draw(measured: dict[str, list[Tensor]], steps: int, path: Path) -> None:
    """Draw gradients above and responses below. Deeper networks have darker lines."""
    shades = torch.linspace(0.45, 0.9, len(measured) // 2)
    colors = [color for shade_map in ("Oranges", "Blues") for color in colormaps[shade_map](shades)]
    titles = (
        "Gradient of each layer's weights, at first",
        f"Gradient of each layer's weights after {steps} steps",
        f"Responses of each layer after {steps} steps",
        "The same responses, the largest first",
    )
    picture = figure(13.0)
    panels: list[Any] = []
    for i in range(4):  # the second and the fourth have the scale of the one above
        panels.append(picture.add_subplot(4, 1, i + 1, sharey=panels[-1] if i % 2 else None))
    for i, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        for color, (name, curves) in zip(colors, measured.items(), strict=True):
            length = len(curves[i])
            above = 3 - length / 1000  # No short curve is hidden by a long one.
            axes.plot(range(1, length + 1), curves[i], color=color, label=name, zorder=above)
        axes.set(title=title, xlabel="rank" if i == 3 else "layer")
        axes.set_ylabel("norm" if i < 2 else "standard deviation")
        axes.set_yscale("log" if i < 2 else "linear")
    panels[0].legend()
    picture.savefig(path)


def main() -> None:
    args = arguments(full="20, 56 and 110 layers and ten times the steps")
    torch.set_num_threads(1)  # On images this small a second thread gains nothing.
    depths, steps = ((20, 56, 110), 600) if args.full else ((20, 56), 60)
    steps = 3 if args.quick else steps
    digits, _ = load(size=8)
    sample = Digits(digits.images[:SAMPLE], digits.labels[:SAMPLE])
    measured = {}
    print(f"          first layer's gradient / the last's   std of responses after {steps} steps")
    print(f"          at initialisation   after {steps} steps    smallest    mean    largest")
    for name in [f"{kind}{depth}" for kind in ("plain", "resnet") for depth in depths]:
        first, trained = train(name, digits, args.seed, steps)
        before, after = (gradient_norms(params, sample) for params in (first, trained))
        std = response_stds(trained, sample.images)
        measured[name] = [before, after, std, std.sort(descending=True).values]
        ratios = f"{before[0] / before[-1]:17.1f}{after[0] / after[-1]:17.2f}"
        print(f"{name:10}{ratios}{std.min():12.2f}{std.mean():8.2f}{std.max():11.2f}")
    draw(measured, steps, args.out / "gradient_flow.png")
    print(f"wrote gradient_flow.png to {args.out}")


if __name__ == "__main__":
    fresnet.keep_pages()
    main()
