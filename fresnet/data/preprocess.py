"""Images as a network's evaluation prepares them: resized, cropped and normalised."""

from collections.abc import Callable, Mapping, Sequence
from math import floor
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fresnet.errors import FresnetError, describe, reason, suggestion

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


class Preset(NamedTuple):
    """What an evaluation does to an image, in this order."""

    resize: int  # its shorter side becomes this
    crop: int  # a square of this side remains, from its middle
    interpolation: Literal["bilinear", "bicubic"]
    corner: Callable[[float], int] = round  # how the crop falls on whole pixels
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of values from 0 to 1
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "imagenet-v1": Preset(256, 224, "bilinear"),
        "imagenet-v2": Preset(232, 224, "bilinear"),
        "timm": Preset(floor(224 / 0.875), 224, "bicubic"),
        "timm-a1": Preset(floor(224 / 0.95), 224, "bicubic"),
        "timm-a1-288": Preset(288, 288, "bicubic"),
        "huggingface": Preset(floor(224 / 0.875), 224, "bicubic", corner=floor),
    }
)
"""torchvision's weights V1 and V2; timm's of its older recipes, of A1 (its default for most), and
of A1 at its larger test size; microsoft/resnet-50. timm ports of torchvision's are as those."""


def preprocess(images: Sequence[Any], preset: str | Preset = "imagenet-v1") -> Tensor:
    """The batch x `[b 3 h w]` that a network expects of these images.

    Each is turned upright as its EXIF orientation says and converted as by Pillow's
    `convert("RGB")`: grey becomes three equal channels; alpha is dropped, whatever colour it hid.
    Only 16-bit grey, which Pillow would clip, is scaled: 0 to 65535 becomes 0 to 255.

    >>> import numpy
    >>> from fresnet import preprocess
    >>> grey = numpy.full((300, 400), 124, dtype=numpy.uint8)
    >>> x = preprocess([grey], "imagenet-v2")
    >>> x.shape, x[0, :, 0, 0]
    (torch.Size([1, 3, 224, 224]), tensor([0.0056, 0.1352, 0.3568]))

    Args:
      images: PIL images, paths, and uint8 arrays `[h w]` or `[h w c]` with c of 1, 3 or 4: mixed
        freely, of any sizes.
      preset: the evaluation that goes with the weights: a key of `PRESETS`, or a `Preset`.
    Returns:
      float32 in channels_last memory format. A convolution follows its weight's layout.
    Raises:
      FresnetError: if Pillow is missing, if there is no such preset, or if an image cannot be read,
        is empty, or has, as it comes or resized, more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    Source: torchvision 0.28, timm 1.0 and the PIL processor of transformers 5, equal to the bit.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise FresnetError("preprocess needs Pillow: pip install 'fresnet[io]'") from error
    chosen = preset if isinstance(preset, Preset) else PRESETS.get(str(preset))
    if chosen is None:
        raise FresnetError(f"unknown preset {preset!r}; {suggestion(str(preset), PRESETS)}")
    if not isinstance(images, Sequence) or isinstance(images, str | bytes):
        raise FresnetError(
            f"preprocess expects a sequence of images; got {_describe(images)} (one image? [image])"
        )
    if not images:
        raise FresnetError("preprocess expects at least one image; got none")

    pixels = np.stack([_pixels(i, image, chosen) for i, image in enumerate(images)])
    return normalise(pixel_values(pixels), chosen.mean, chosen.std)


def _pixels(index: int, image: Any, preset: Preset) -> np.ndarray:
    """One image as uint8 `[crop crop 3]`, or one error that names it."""
    try:
        return np.asarray(_crop(upright_rgb(image), preset))
    except Exception as error:  # of any type: it is Pillow's decoders that raise
        name = f"images[{index}]" + (f", {image}" if isinstance(image, str | PathLike) else "")
        raise FresnetError(f"preprocess cannot read {name}: {reason(error)}") from error


def pixel_values(pixels: np.ndarray) -> Tensor:
    """uint8 `[... h w 3]` as values from 0 to 1, float32 `[... 3 h w]`, lying as they did."""
    return torch.from_numpy(pixels / np.float32(255)).movedim(-1, -3)


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std in each channel of x `[... 3 h w]`."""
    by_channel = torch.tensor([mean, std], dtype=torch.float32, device="cpu")[..., None, None]
    return (x - by_channel[0]) / by_channel[1]


def upright_rgb(image: Any) -> "PILImage":
    """The image, or what its file holds, upright and its pixels in RGB."""
    from PIL import Image, ImageOps

    if isinstance(image, str | PathLike):
        with Image.open(image) as opened:
            refuse_huge("it is", opened.size)
            return upright_rgb(opened)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(_grey_or_colour(image))
    if not isinstance(image, Image.Image):
        raise FresnetError(f"expected a PIL image, uint8 array or path; got {_describe(image)}")
    if 0 in image.size:
        raise FresnetError(f"an image of {image.width}x{image.height} is empty")
    upright = ImageOps.exif_transpose(image)  # a copy, whatever the orientation
    # Transparency goes like alpha. Pillow would carry it along, and warns where it cannot.
    upright.info.pop("transparency", None)
    if upright.mode == "F":
        raise FresnetError("floats have no fixed range: scale the image to uint8 first")
    if upright.mode == "I" or upright.mode.startswith("I;16"):
        upright = Image.fromarray(_eight_bits(np.asarray(upright)))
    return upright.convert("RGB")


def _grey_or_colour(array: np.ndarray) -> np.ndarray:
    """The array as Pillow takes it: grey without a channel."""
    if array.dtype != np.uint8 or array.ndim < 2 or array.shape[2:] not in ((), (1,), (3,), (4,)):
        hint = ""
        if array.dtype.kind == "f":
            hint = " (floats from 0 to 1? (255 * array).round().astype(numpy.uint8))"
        elif array.ndim == 3 and array.shape[0] in (1, 3, 4):
            hint = " (channels first? array.transpose(1, 2, 0))"
        raise FresnetError(
            f"expected uint8 [h w] or [h w c], c of 1, 3 or 4; got {_describe(array)}{hint}"
        )
    return array[..., 0] if array.shape[2:] == (1,) else array


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    """16-bit grey in the nearest of 256 levels: 257 v becomes v."""
    if grey.min() < 0 or grey.max() > 65535:
        raise FresnetError(f"expected grey of 0 to 65535; got {grey.min()} to {grey.max()}")
    return np.rint(grey / 257).astype(np.uint8)


def _crop(image: "PILImage", preset: Preset) -> "PILImage":
    """The middle of the resized image."""
    from PIL.Image import Resampling

    width, height = (int(preset.resize * side / min(image.size)) for side in image.size)
    refuse_huge("it would be resized to", (width, height))
    left, top = (preset.corner((side - preset.crop) / 2) for side in (width, height))
    resized = image.resize((width, height), Resampling[preset.interpolation.upper()])
    return resized.crop((left, top, left + preset.crop, top + preset.crop))


def refuse_huge(which: str, size: tuple[int, int]) -> None:
    """Hold to the limit at which Pillow itself only warns."""
    from PIL.Image import MAX_IMAGE_PIXELS as LIMIT

    if LIMIT is not None and size[0] * size[1] > LIMIT:
        got = f"{which} {size[0]}x{size[1]}"
        raise FresnetError(f"{got}, more pixels than PIL.Image.MAX_IMAGE_PIXELS = {LIMIT}")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {describe(value)} (image.numpy()?)"
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else describe(value)
