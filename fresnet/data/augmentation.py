"""Transforms of one image, for training and for evaluation.

Each draws from its generator what torchvision's transform of the same name draws from the global
one, in the same order. With the same seed both make the same image, to the bit.
"""

from math import inf
from typing import NamedTuple

import torch
from einops import reduce
from PIL.Image import Image
from torch import Generator, Tensor

from fresnet.data import pixels
from fresnet.data.crops import (
    AreaCrop,
    ScaleCrop,
    area_crop,
    random_flip,
    rectangles,
    scale_crop,
)
from fresnet.data.draws import chance, check_image, check_numbers, check_values, integer
from fresnet.data.preprocess import (
    pixels_of,
    prepared,
    preprocess,
    standardise_,
    unit_values,
)
from fresnet.data.presets import Preset, as_preset
from fresnet.data.trivial import trivial_augment
from fresnet.errors import FresnetError, check_type, describe


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
    _check("augment", augmentation)
    x = unit_values(pixels_of(_drawn("augment", image, generator, augmentation)))
    if augmentation.lighting > 0:
        x = relight(x, generator, augmentation.lighting)
    x = standardise_(x, augmentation.mean, augmentation.std)
    return random_erase(x, generator, augmentation.erase) if augmentation.erase > 0 else x


def augment_pixels(
    image: Image | Tensor, generator: Generator, augmentation: Augmentation
) -> Tensor:
    """What `augment` makes before it normalises, uint8 `[3 side side]`; `normalise` does the rest.

        Images(train, partial(augment_pixels, augmentation=augmentation), seed=0, read=read_pixels)

    >>> import PIL.Image, torch
    >>> photo, augmentation = PIL.Image.new("RGB", (400, 300)), Augmentation(AreaCrop(224))
    >>> x = augment_pixels(photo, torch.Generator().manual_seed(0), augmentation)
    >>> one = augment(photo, torch.Generator().manual_seed(0), augmentation)
    >>> x.dtype, torch.equal(normalise(x, augmentation), one)
    (torch.uint8, True)

    Args:
      image: in RGB, or its pixels `[3 h w]` as `read_pixels` gives them. Of pixels the same
        rectangle is cropped, and flipped alike. They are resized several times faster, by PyTorch.
        One value in some hundreds then differs by one level of 255, and hardly any by two.
      generator: on the CPU.
    Raises:
      FresnetError: as `augment` does; if light is changed or a rectangle erased, which is not done
        to pixels; if TrivialAugment is asked for pixels, since it takes images of Pillow.
    """
    _check("augment_pixels", augmentation)
    if augmentation.lighting > 0 or augmentation.erase > 0:
        raise FresnetError(
            "augment_pixels expects neither lighting nor erase, which change values and not "
            f"pixels; got {augmentation}: use augment"
        )
    if not isinstance(image, Tensor):
        return pixels_of(_drawn("augment_pixels", image, generator, augmentation))
    check_type("augment_pixels", Generator, "a torch.Generator", generator=generator)
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3 or not image.numel():
        raise FresnetError(
            f"augment_pixels expects an image, or uint8 [3 h w]; got {describe(image)}"
        )
    if augmentation.trivial_augment:
        raise FresnetError(
            "augment_pixels expects an image of Pillow for TrivialAugment; got a tensor: leave out "
            "read=read_pixels"
        )
    x = pixels.cropped(image, generator, augmentation.crop)
    return pixels.flipped(x, generator, augmentation.flip) if augmentation.flip > 0 else x


def _drawn(caller: str, image: Image, generator: Generator, augmentation: Augmentation) -> Image:
    """The image cropped, flipped and changed by TrivialAugment."""
    check_image(caller, image, generator)
    crop = augmentation.crop
    if isinstance(crop, AreaCrop):
        image = area_crop(image, generator, crop)
    else:
        image = scale_crop(image, generator, crop)
    if augmentation.flip > 0:
        image = random_flip(image, generator, augmentation.flip)
    return trivial_augment(image, generator) if augmentation.trivial_augment else image


def prepare(image: Image, generator: Generator, preset: str | Preset) -> Tensor:
    """An image as an evaluation sees it, `[3 crop crop]`: `fresnet.preprocess` of it alone.

    Nothing is drawn from the generator. The preset and the errors are those of `preprocess`.

    >>> import PIL.Image, torch
    >>> prepare(PIL.Image.new("RGB", (400, 300)), torch.Generator(), "imagenet-v1").shape
    torch.Size([3, 224, 224])
    """
    return preprocess([image], preset)[0]


def prepare_pixels(image: Image, generator: Generator, preset: str | Preset) -> Tensor:
    """What `prepare` makes before it normalises, uint8 `[3 crop crop]`; `normalise` does the rest.

    >>> import PIL.Image, torch
    >>> image, generator = PIL.Image.new("RGB", (400, 300)), torch.Generator()
    >>> x = prepare_pixels(image, generator, "imagenet-v1")
    >>> torch.equal(normalise(x, "imagenet-v1"), prepare(image, generator, "imagenet-v1"))
    True
    """
    check_image("prepare_pixels", image, generator)
    return prepared(image, as_preset(preset))


def normalise(x: Tensor, like: str | Preset | Augmentation) -> Tensor:
    """(x / 255 - mean) / std in each channel of pixels x, uint8 `[... c h w]`, in float32.

        for x, y, *_ in loader(...):
            x = normalise(x.cuda(non_blocking=True), augmentation)

    >>> import torch
    >>> normalise(torch.full((1, 3, 8, 8), 124, dtype=torch.uint8), "imagenet-v1")[0, :, 0, 0]
    tensor([0.0056, 0.1352, 0.3568])

    Args:
      x: on any device. A CPU and CUDA round alike, so they give the same bits.
      like: the augmentation or the preset that has mean and std.
    Raises:
      FresnetError: if x is no uint8, or has not a channel for each mean.
    """
    chosen = like if isinstance(like, Augmentation) else as_preset(like)
    channels = len(chosen.mean)
    if not isinstance(x, Tensor) or x.dtype != torch.uint8 or x.shape[-3:-2] != (channels,):
        raise FresnetError(
            f"normalise expects x to be uint8 [... {channels} h w]; got {describe(x)}"
        )
    return standardise_(unit_values(x), chosen.mean, chosen.std)


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
    for h, w in rectangles(height * width, (0.02, 0.33), (0.3, 3.3), generator):
        if h < height and w < width:
            top, left = integer(height - h + 1, generator), integer(width - w + 1, generator)
            erased = x.clone()
            erased[:, top : top + h, left : left + w] = 0
            return erased
    return x


def _check(caller: str, augmentation: Augmentation) -> None:
    check_type(caller, Augmentation, "an Augmentation", augmentation=augmentation)
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
        raise FresnetError(f"{caller} expects an AreaCrop or a ScaleCrop; got {describe(crop)}")
    fits |= {
        "a side of at least 1": crop.side >= 1,
        "a flip from 0 to 1": 0 <= augmentation.flip <= 1,
        "a lighting of at least 0": augmentation.lighting >= 0,
        "a std above 0": min(augmentation.std) > 0,
        "an erase from 0 to 1": 0 <= augmentation.erase <= 1,
    }
    for expected, fit in fits.items():
        if not fit:
            raise FresnetError(f"{caller} expects {expected}; got {augmentation}")
