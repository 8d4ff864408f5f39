"""scikit-learn's handwritten digits as images that a ResNet takes, shared by the examples.

They are 1,797 real scans of 8x8 pixels (Alpaydin & Kaynak 1998, UCI), enlarged to 32x32 unless an
example asks for another size. 360 of them are held out for testing.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from style import RED, figure
from torch import Tensor
from torch.nn.functional import interpolate

TEST_SIZE = 360


class Digits(NamedTuple):
    """Images `[n 3 size size]`, normalised; labels `[n]`."""

    images: Tensor
    labels: Tensor


def load(size: int = 32) -> tuple[Digits, Digits]:
    """The training and the test digits; the same split at every call."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    images = interpolate(images, size=(size, size), mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_SIZE], order[TEST_SIZE:]
    images = (images - images[train].mean()) / images[train].std()
    images, labels = images.repeat(1, 3, 1, 1), torch.tensor(labels)
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


def small(digits: Digits) -> Digits:
    """The same digits in float64 and 16x16 pixels, for computations that are costly or exact."""
    return Digits(digits.images[:, :, ::2, ::2].double(), digits.labels)


def arguments(full: str | None = None) -> argparse.Namespace:
    """Read --seed, --out and --quick of an example, and --full with this help if that is given.

    The first line of the example's docstring is the description in the help.
    """
    example = sys.modules["__main__"]
    parser = argparse.ArgumentParser(
        description=str(example.__doc__).splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    folder = Path("runs") / Path(str(example.__file__)).stem
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--out", type=Path, default=folder, help="output folder")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    if full is not None:
        parser.add_argument("--full", action="store_true", help=full)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def draw_predictions(digits: Digits, logits: Tensor, path: Path) -> None:
    """Draw 30 digits with prediction and confidence. Errors come first and are marked in red."""
    confidence, prediction = logits.softmax(1).max(1)
    wrong = prediction != digits.labels
    order = torch.argsort(wrong, descending=True, stable=True)[:30].tolist()
    picture = figure(8.0)
    right = len(wrong) - int(wrong.sum())
    picture.suptitle(
        f"{right} of {len(wrong)} test digits right: prediction, confidence; red: wrong"
    )
    for axes, i in zip(picture.subplots(5, 6).flat, order, strict=True):
        axes.imshow(digits.images[i, 0], cmap="gray_r", interpolation="nearest")
        axes.set_axis_off()
        text = f"{prediction[i]}, {confidence[i]:.0%}"
        if wrong[i]:
            axes.set_title(f"{text}\nis {digits.labels[i]}", color=RED)
        else:
            axes.set_title(text)
    picture.savefig(path)


def least_loss(smoothing: float, classes: int = 10) -> float:
    """The entropy of a smoothed label: no prediction has a lower loss."""
    off = smoothing / classes
    on = 1 - smoothing + off
    return -on * math.log(on) - (classes - 1) * off * math.log(off)


def draw_curves(
    history: Sequence[tuple[float, float]], per_epoch: int, smoothing: float, path: Path
) -> None:
    """Draw the loss and accuracy of each batch, and their means over the 11 batches around it."""
    picture = figure(7.0)
    epochs = [(step + 1) / per_epoch for step in range(len(history))]
    names = ("Loss on training digits, labels smoothed", "Share of training digits right, %")
    panels = picture.subplots(2, 1, sharex=True)
    for i, (axes, name) in enumerate(zip(panels, names, strict=True)):
        values = [record[i] * (1, 100)[i] for record in history]
        axes.plot(epochs, values, linewidth=0.8, alpha=0.4, color="C0", label="each batch")
        smooth = [mean(values[max(0, middle - 5) : middle + 6]) for middle in range(len(values))]
        axes.plot(epochs, smooth, color="C0", label="mean of 11")
        axes.set_title(name)
    loss_axes, accuracy_axes = panels
    accuracy_axes.set_xlabel("epoch")
    loss_axes.axhline(least_loss(smoothing), color="black", linestyle=":", label="least possible")
    loss_axes.legend()
    accuracy_axes.legend()
    picture.savefig(path)
