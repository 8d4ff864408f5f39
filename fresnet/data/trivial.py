"""TrivialAugment: one operation on an image, drawn together with its strength."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from PIL import ImageEnhance, ImageOps
from PIL.Image import Image, Resampling, Transform
from torch import Generator

from fresnet.data.draws import check_image, integer

BINS = 31


class Operation(NamedTuple):
    apply: Callable[..., Image]
    strengths: tuple[float, float] | None = None  # those of the first and of the last bin
    signed: bool = False  # whether a coin decides the sign of the strength


class Enhancer(Protocol):
    """What Pillow's `ImageEnhance` has for a quality of an image."""

    def enhance(self, factor: float) -> Image: ...


def trivial_augment(image: Image, generator: Generator) -> Image:
    """Do what torchvision's TrivialAugmentWide does with bilinear interpolation.

    >>> import PIL.Image, torch
    >>> trivial_augment(PIL.Image.new("RGB", (400, 300)), torch.Generator().manual_seed(0)).size
    (400, 300)

    Source: Müller & Hutter 2021, arXiv:2103.10158, the wide space of Table 1.
    """
    check_image("trivial_augment", image, generator)
    operation = OPERATIONS[integer(len(OPERATIONS), generator)]
    if operation.strengths is None:
        return operation.apply(image)
    bins = torch.linspace(*operation.strengths, BINS, dtype=torch.float32, device="cpu")
    strength = bins[integer(BINS, generator)].item()
    if operation.signed and integer(2, generator) == 1:
        strength = -strength
    return operation.apply(image, strength)


def _shear_x(image: Image, slope: float) -> Image:
    return _affine(image, (1, slope, 0, 0, 1, 0))


def _shear_y(image: Image, slope: float) -> Image:
    return _affine(image, (1, 0, 0, slope, 1, 0))


def _translate_x(image: Image, distance: float) -> Image:
    return _affine(image, (1, 0, -int(distance), 0, 1, 0))


def _translate_y(image: Image, distance: float) -> Image:
    return _affine(image, (1, 0, 0, 0, 1, -int(distance)))


def _affine(image: Image, matrix: tuple[float, ...]) -> Image:
    """Put at (x, y) the pixel at (a x + b y + c, d x + e y + f), or black if that lies outside."""
    return image.transform(image.size, Transform.AFFINE, matrix, Resampling.BILINEAR)


def _rotate(image: Image, degrees: float) -> Image:
    return image.rotate(degrees, Resampling.BILINEAR)


def _posterize(image: Image, bits: float) -> Image:
    return ImageOps.posterize(image, round(bits))


def _enhance(image: Image, change: float, quality: Callable[[Image], Enhancer]) -> Image:
    return quality(image).enhance(1 + change)


OPERATIONS = (
    Operation(Image.copy),
    Operation(_shear_x, (0, 0.99), signed=True),
    Operation(_shear_y, (0, 0.99), signed=True),
    Operation(_translate_x, (0, 32), signed=True),
    Operation(_translate_y, (0, 32), signed=True),
    Operation(_rotate, (0, 135), signed=True),
    Operation(partial(_enhance, quality=ImageEnhance.Brightness), (0, 0.99), signed=True),
    Operation(partial(_enhance, quality=ImageEnhance.Color), (0, 0.99), signed=True),
    Operation(partial(_enhance, quality=ImageEnhance.Contrast), (0, 0.99), signed=True),
    Operation(partial(_enhance, quality=ImageEnhance.Sharpness), (0, 0.99), signed=True),
    Operation(_posterize, (8, 2)),
    Operation(ImageOps.solarize, (255, 0)),
    Operation(ImageOps.autocontrast),
    Operation(ImageOps.equalize),
)
"""All operations, in torchvision's order. An operation is drawn by its index here."""
