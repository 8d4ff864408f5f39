"""scikit-learn's handwritten digits as images that a ResNet takes, shared by the examples.

1,797 real scans of 8x8 pixels (Alpaydin & Kaynak 1998, UCI), enlarged to 32x32, of which 360 are
held out for testing.
"""

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate

TEST_SIZE = 360


class Digits(NamedTuple):
    """Images `[n 3 32 32]`, normalised; labels `[n]`."""

    images: Tensor
    labels: Tensor


def load(size: int = 32) -> tuple[Digits, Digits]:
    """The training and the test digits; the same split at every call."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    images = interpolate(images, size=(size, size), mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_SIZE], order[TEST_SIZE:]
    mean, std = images[train].mean(), images[train].std()
    images = ((images - mean) / std).repeat(1, 3, 1, 1)
    labels = torch.tensor(labels)
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])
