"""Transforms of one image, for training and for evaluation.

Each draws from its generator what torchvision's transform of the same name draws from the global
one, in the same order. With the same seed both make the same image, to the bit.
"""

from collections.abc import Iterator
from math import inf, sqrt
from typing import NamedTuple

import numpy as np
import torch
from einops import reduce
from PIL.Image import Image, Resampling, Transpose
from torch import Generator, Tensor

from fresnet.data.draws import (
    chance,
    check_image,
    check_numbers,
    check_values,
    integer,
    log_uniform,
    uniform,
)
from fresnet.data.preprocess import normalise, pixel_values, preprocess, refuse_huge
from fresnet.data.presets import Preset
from fresnet.data.trivial import trivial_augment
from fresnet.errors import FresnetError, check_type, describe


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


class Augmentation(NamedTuple):
    """What training does to an image, in the order of the fields.

    The paper's augmentation is `Augmentation(ScaleCrop(224), lighting=0.1)`.
    """

    crop: AreaCrop | ScaleCrop
    flip: float = 0.5  # the probability that left and right are exchanged
    trivial_augment: bool = False
    lighting: float = 0.0  # the standard deviation along the colours' principal components
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # for values from 0 to 1
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    erase: float = 0.0  # the probability of a rectangle of zeros


def augment(image: Image, generator: Generator, augmentation: Augmentation) -> Tensor:
    """An image as training sees it, float32 `[3 side side]`.

    >>> import PIL.Image, torch
    >>> photo, generator = PIL.Image.new("RGB", (400, 300)), torch.Generator().manual_seed(0)
    >>> augment(photo, generator, Augmentation(AreaCrop(224), trivial_augment=True)).shape
    torch.Size([3, 224, 224])

    Args:
      image: in RGB.
      generator: on the CPU.
    Raises:
      FresnetError: if a setting is out of its range, or if the image, resized, would have more
        pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    check_type("augment", Augmentation, "an Augmentation", augmentation=augmentation)
    check_image("augment", image, generator)
    _check(augmentation)
    crop, flip, trivial, lighting, mean, std, erasing = augmentation
    if isinstance(crop, AreaCrop):
        image = area_crop(image, generator, crop)
    else:
        image = scale_crop(image, generator, crop)
    if flip > 0:
        image = random_flip(image, generator, flip)
    if trivial:
        image = trivial_augment(image, generator)
    x = pixel_values(np.asarray(image))
    if lighting > 0:
        x = relight(x, generator, lighting)
    x = normalise(x, mean, std)
    return random_erase(x, generator, erasing) if erasing > 0 else x


def prepare(image: Image, generator: Generator, preset: str | Preset) -> Tensor:
    """An image as an evaluation sees it, `[3 crop crop]`: `fresnet.preprocess` of it alone.

    Nothing is drawn from the generator. The preset and the errors are those of `preprocess`.

    >>> import PIL.Image, torch
    >>> prepare(PIL.Image.new("RGB", (400, 300)), torch.Generator(), "imagenet-v1").shape
    torch.Size([3, 224, 224])
    """
    return preprocess([image], preset)[0]


def area_crop(image: Image, generator: Generator, crop: AreaCrop) -> Image:
    """Crop as torchvision's RandomResizedCrop does.

    >>> import PIL.Image, torch
    >>> area_crop(PIL.Image.new("RGB", (400, 300)), torch.Generator(), AreaCrop(224)).size
    (224, 224)
    """
    check_image("area_crop", image, generator)
    check_type("area_crop", AreaCrop, "an AreaCrop", crop=crop)
    width, height = image.size
    for w, h in _rectangles(width * height, crop.area, crop.ratio, generator):
        if 0 < w <= width and 0 < h <= height:
            top, left = integer(height - h + 1, generator), integer(width - w + 1, generator)
            break
    else:  # none fits: take the middle, as much of it as the ratios allow
        narrowest, widest = crop.ratio
        w, h = min(width, round(height * widest)), min(height, round(width / narrowest))
        top, left = (height - h) // 2, (width - w) // 2
    part = image.crop((left, top, left + w, top + h))
    return part.resize((crop.side, crop.side), Resampling.BILINEAR)


def scale_crop(image: Image, generator: Generator, crop: ScaleCrop) -> Image:
    """Draw a length, resize to it as torchvision's Resize does, and crop as its RandomCrop does.

    >>> import PIL.Image, torch
    >>> scale_crop(PIL.Image.new("RGB", (400, 300)), torch.Generator(), ScaleCrop(224)).size
    (224, 224)
    """
    check_image("scale_crop", image, generator)
    check_type("scale_crop", ScaleCrop, "a ScaleCrop", crop=crop)
    least, most = crop.shorter
    shorter = least + integer(most - least + 1, generator)
    width, height = (int(shorter * side / min(image.size)) for side in image.size)
    refuse_huge("it would be resized to", (width, height))
    image = image.resize((width, height), Resampling.BILINEAR)
    if width == height == crop.side:
        return image
    top = integer(height - crop.side + 1, generator)
    left = integer(width - crop.side + 1, generator)
    return image.crop((left, top, left + crop.side, top + crop.side))


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


EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = (  # each is a column
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)
"""The principal components of ImageNet's colours, as values from 0 to 1 (fb.resnet.torch)."""


def relight(x: Tensor, generator: Generator, std: float) -> Tensor:
    """Change the light on a scene: add one colour to its values x `[3 h w]`, which are from 0 to 1.

        x + sum_i a_i l_i v_i,   a_i ~ N(0, std^2),   l_i, v_i the eigenvalues and eigenvectors

    >>> import torch
    >>> x = relight(torch.zeros(3, 8, 8), torch.Generator().manual_seed(0), std=0.1)
    >>> bool((x == x[:, :1, :1]).all())  # one colour everywhere
    True

    Source: Krizhevsky et al. 2012, Sec. 4.1; fb.resnet.torch, datasets/transforms.lua.
    """
    check_values("relight", x, generator)
    check_numbers("relight", inf, std=std)
    axes = torch.tensor(EIGENVECTORS, dtype=torch.float32, device="cpu")
    lengths = torch.tensor(EIGENVALUES, dtype=torch.float32, device="cpu")
    amounts = torch.empty_like(lengths).normal_(0, std, generator=generator)
    return x + reduce(axes * amounts * lengths, "c i -> c 1 1", "sum")


def random_erase(x: Tensor, generator: Generator, probability: float) -> Tensor:
    """Set a rectangle to zero, as torchvision's RandomErasing does.

    >>> import torch
    >>> x = random_erase(torch.ones(3, 8, 8), torch.Generator().manual_seed(0), probability=1.0)
    >>> x.shape, bool(x.any()), bool(x.all())
    (torch.Size([3, 8, 8]), True, False)

    Source: Zhong et al. 2017, arXiv:1708.04896.
    """
    check_values("random_erase", x, generator)
    check_numbers("random_erase", 1, probability=probability)
    if not chance(probability, generator):
        return x
    height, width = x.shape[1:]
    for h, w in _rectangles(height * width, (0.02, 0.33), (0.3, 3.3), generator):
        if h < height and w < width:
            top, left = integer(height - h + 1, generator), integer(width - w + 1, generator)
            erased = x.clone()
            erased[:, top : top + h, left : left + w] = 0
            return erased
    return x


def _rectangles(
    area: int, scale: tuple[float, float], ratio: tuple[float, float], generator: Generator
) -> Iterator[tuple[int, int]]:
    """Ten drawn rectangles, each as height and width.

    `scale` is the range for a rectangle's share of the area, `ratio` that for the ratio of sides.
    """
    for _ in range(10):
        covered, elongation = area * uniform(*scale, generator), log_uniform(*ratio, generator)
        yield round(sqrt(covered * elongation)), round(sqrt(covered / elongation))


def _check(augmentation: Augmentation) -> None:
    crop = augmentation.crop
    if isinstance(crop, AreaCrop):
        (least, most), (narrowest, widest) = crop.area, crop.ratio
        fits = {
            "an area from above 0 to 1": 0 < least <= most <= 1,
            "a ratio from above 0": 0 < narrowest <= widest,
        }
    elif isinstance(crop, ScaleCrop):
        fits = {"a shorter side from crop.side": crop.side <= crop.shorter[0] <= crop.shorter[1]}
    else:
        raise FresnetError(f"augment expects an AreaCrop or a ScaleCrop; got {describe(crop)}")
    fits |= {
        "a side of at least 1": crop.side >= 1,
        "a flip from 0 to 1": 0 <= augmentation.flip <= 1,
        "a lighting of at least 0": augmentation.lighting >= 0,
        "a std above 0": min(augmentation.std) > 0,
        "an erase from 0 to 1": 0 <= augmentation.erase <= 1,
    }
    for expected, fit in fits.items():
        if not fit:
            raise FresnetError(f"augment expects {expected}; got {augmentation}")
