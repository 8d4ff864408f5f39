"""Where images are cropped and flipped: what is drawn, and what is done to an image of Pillow."""

from collections.abc import Iterator
from math import sqrt
from typing import NamedTuple, TypeAlias

from PIL.Image import Image, Resampling, Transpose
from torch import Generator

from fresnet.data.draws import (
    chance,
    check_image,
    check_numbers,
    integer,
    log_uniform,
    uniform,
)
from fresnet.data.preprocess import refuse_huge
from fresnet.errors import check_type

Size: TypeAlias = tuple[int, int]
"""Width and height."""

Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right and bottom, as Pillow has them."""


class AreaCrop(NamedTuple):
    """Cut out a rectangle of the image and resize it to a square.

    `area` is the range for the rectangle's share of the image's area, `ratio` that for its width
    divided by its height.

    Source: Szegedy et al. 2015, arXiv:1409.4842, Sec. 6; torchvision's RandomResizedCrop.
    """

    side: int
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


class ScaleCrop(NamedTuple):
    """Resize the image so that its shorter side is in the range `shorter`, and cut out a square.

    Source: He et al. 2015, arXiv:1512.03385, Sec. 3.4; Simonyan & Zisserman 2014, arXiv:1409.1556.
    """

    side: int
    shorter: tuple[int, int] = (256, 480)


def area_crop(image: Image, generator: Generator, crop: AreaCrop) -> Image:
    """Crop as torchvision's RandomResizedCrop does.

    >>> import PIL.Image, torch
    >>> area_crop(PIL.Image.new("RGB", (400, 300)), torch.Generator(), AreaCrop(224)).size
    (224, 224)
    """
    check_image("area_crop", image, generator)
    check_type("area_crop", AreaCrop, "an AreaCrop", crop=crop)
    part = image.crop(area_box(image.size, generator, crop))
    return part.resize((crop.side, crop.side), Resampling.BILINEAR)


def area_box(size: Size, generator: Generator, crop: AreaCrop) -> Box:
    """The rectangle that is cut out of an image of this size."""
    width, height = size
    for w, h in rectangles(width * height, crop.area, crop.ratio, generator):
        if 0 < w <= width and 0 < h <= height:
            top, left = integer(height - h + 1, generator), integer(width - w + 1, generator)
            break
    else:  # none fits: take the middle, as much of it as the ratios allow
        narrowest, widest = crop.ratio
        w, h = min(width, round(height * widest)), min(height, round(width / narrowest))
        top, left = (height - h) // 2, (width - w) // 2
    return left, top, left + w, top + h


def scale_crop(image: Image, generator: Generator, crop: ScaleCrop) -> Image:
    """Draw a length, resize to it as torchvision's Resize does, and crop as its RandomCrop does.

    >>> import PIL.Image, torch
    >>> scale_crop(PIL.Image.new("RGB", (400, 300)), torch.Generator(), ScaleCrop(224)).size
    (224, 224)
    """
    check_image("scale_crop", image, generator)
    check_type("scale_crop", ScaleCrop, "a ScaleCrop", crop=crop)
    size, box = scale_box(image.size, generator, crop)
    return image.resize(size, Resampling.BILINEAR).crop(box)


def scale_box(size: Size, generator: Generator, crop: ScaleCrop) -> tuple[Size, Box]:
    """What an image of this size is resized to, and the square that is cut out of it then."""
    least, most = crop.shorter
    shorter = least + integer(most - least + 1, generator)
    width, height = (int(shorter * side / min(size)) for side in size)
    refuse_huge("it would be resized to", (width, height))
    left = top = 0
    if not width == height == crop.side:
        top = integer(height - crop.side + 1, generator)
        left = integer(width - crop.side + 1, generator)
    return (width, height), (left, top, left + crop.side, top + crop.side)


def random_flip(image: Image, generator: Generator, probability: float) -> Image:
    """Flip as torchvision's RandomHorizontalFlip does.

    >>> import PIL.Image, torch
    >>> image = PIL.Image.frombytes("RGB", (2, 1), bytes([1, 2, 3, 4, 5, 6]))
    >>> list(random_flip(image, torch.Generator(), probability=1.0).tobytes())
    [4, 5, 6, 1, 2, 3]
    """
    check_image("random_flip", image, generator)
    check_numbers("random_flip", 1, probability=probability)
    return image.transpose(Transpose.FLIP_LEFT_RIGHT) if chance(probability, generator) else image


def rectangles(
    area: int, scale: tuple[float, float], ratio: tuple[float, float], generator: Generator
) -> Iterator[tuple[int, int]]:
    """Ten drawn rectangles, each as height and width.

    `scale` is the range for a rectangle's share of the area, `ratio` that for the ratio of sides.
    """
    for _ in range(10):
        covered, elongation = area * uniform(*scale, generator), log_uniform(*ratio, generator)
        yield round(sqrt(covered * elongation)), round(sqrt(covered / elongation))
