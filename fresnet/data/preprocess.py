"""Images prepared as for the evaluation of a network: resized, cropped and normalised."""

from collections.abc import Sequence
from io import IOBase
from os import PathLike
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from fresnet.data.presets import Preset, as_preset, pair
from fresnet.errors import FresnetError, check_type, describe, reason
from fresnet.reading import check_regular

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


def preprocess(images: Sequence[object], preset: str | Preset = "imagenet-v1") -> Tensor:
    """These images as a batch x `[b c h w]` for a network.

    Each image is turned upright as its EXIF orientation says, and converted as by Pillow's
    `convert("RGB")`: grey becomes three equal channels, and alpha is dropped, whatever colour it
    hid. Only 16-bit grey is different, because Pillow would clip it: 0 to 65535 is scaled to 0 to
    255. A preset of grey goes on with Pillow's `convert("L")`. Images of floats or 32-bit integers
    are refused, since nothing tells their range.

    >>> import numpy
    >>> from fresnet import preprocess
    >>> grey = numpy.full((300, 400), 124, dtype=numpy.uint8)
    >>> x = preprocess([grey], "imagenet-v2")
    >>> x.shape, x[0, :, 0, 0]
    (torch.Size([1, 3, 224, 224]), tensor([0.0056, 0.1352, 0.3568]))

    Args:
      images: PIL images, paths, and uint8 arrays `[h w]` or `[h w c]` with c of 1, 3 or 4. They may
        be mixed, and of any sizes.
      preset: the evaluation that goes with the weights: a key of `PRESETS`, or a `Preset`.
    Returns:
      x, float32 in channels_last memory format. A convolution of it follows its weight's layout.
    Raises:
      FresnetError: if Pillow is missing, if there is no such preset, if it has not a mean and a std
        for each of its channels, or if an image cannot be read, is empty, or has more pixels,
        before or after it is resized, than `PIL.Image.MAX_IMAGE_PIXELS`.
    Source: torchvision 0.28, timm 1.0 and the PIL processor of transformers 5, equal to the bit.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise FresnetError("preprocess needs Pillow: pip install 'fresnet[io]'") from error
    chosen = as_preset(preset)
    if not isinstance(images, Sequence) or isinstance(images, str | bytes):
        raise FresnetError(
            f"preprocess expects a sequence of images; got {_describe(images)} (one image? [image])"
        )
    if not images:
        raise FresnetError("preprocess expects at least one image; got none")

    pixels = torch.stack([_pixels(i, image, chosen) for i, image in enumerate(images)])
    x = unit_values(rearrange(pixels, "b h w c -> b c h w"))
    return standardise_(x, chosen.mean, chosen.std)


def _pixels(index: int, image: object, preset: Preset) -> Tensor:
    """One image as uint8 `[h w c]`; an error names the image."""
    try:
        return rearrange(prepared(upright_rgb(image), preset), "c h w -> h w c")
    except Exception as error:  # Pillow's decoders raise exceptions of any type
        name = f"images[{index}]" + (f", {image}" if isinstance(image, str | PathLike) else "")
        raise FresnetError(f"preprocess cannot read {name}: {reason(error)}") from error


def prepared(image: "PILImage", preset: Preset) -> Tensor:
    """The pixels of an RGB image that an evaluation sees, uint8 `[c h w]`."""
    if preset.channels == "L":
        return pixels_of(_crop(image.convert("L"), preset))
    pixels = pixels_of(_crop(image, preset))
    return pixels.flip(0) if preset.channels == "BGR" else pixels


def pixels_of(image: "PILImage") -> Tensor:
    """The pixels of an image, uint8 `[c h w]`, channels last."""
    pixels = torch.from_numpy(np.array(image))  # a copy: the image's own may not be written to
    return rearrange(pixels, "h w ... -> (...) h w")


def unit_values(pixels: Tensor) -> Tensor:
    """uint8 as float32 from 0 to 1."""
    # A tensor, since CUDA divides by a number as it multiplies by its rounded reciprocal.
    most = torch.full((), 255, dtype=torch.float32, device=pixels.device)
    return pixels.to(torch.float32).div_(most)


def standardise_(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std in each channel of values x `[... c h w]`, which is written over."""
    both = torch.tensor([mean, std], dtype=torch.float32, device="cpu")
    # As long as a row of x: where channels come last, PyTorch then takes a row in one piece, and
    # is eight times as fast.
    rows = repeat(both, "two c -> two w c", w=x.shape[-1]).contiguous()
    by_channel = rearrange(rows.to(x.device, non_blocking=True), "two w c -> two c 1 w")
    return x.sub_(by_channel[0]).div_(by_channel[1])


def read_image(file: BinaryIO) -> "PILImage":
    """The image in an open file, as Pillow decodes it, turned upright and in RGB.

    16-bit grey is scaled and transparency dropped, as `fresnet.preprocess` does.

    >>> import io, PIL.Image
    >>> PIL.Image.new("L", (40, 30)).save(file := io.BytesIO(), "png")
    >>> image = read_image(file)
    >>> image.size, image.mode
    ((40, 30), 'RGB')

    Raises:
      FresnetError: if it cannot be read, is empty, or has more pixels than
        `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    check_type("read_image", IOBase, "a file opened in binary", file=file)
    try:
        with Image.open(file) as opened:
            refuse_huge("it is", opened.size)
            _check_image(opened)
            opened.load()  # Pillow's function below does so from 10.1 on
            ImageOps.exif_transpose(opened, in_place=True)
            return _in_rgb(opened)
    except UnidentifiedImageError as error:  # its message has the address of the file object
        raise FresnetError("cannot identify image file") from error
    except Exception as error:  # Pillow's decoders raise exceptions of any type
        raise FresnetError(reason(error)) from error


def upright_rgb(image: object) -> "PILImage":
    """An image, or the image in a file, turned upright and in RGB."""
    from PIL import Image, ImageOps

    if isinstance(image, str | PathLike):
        check_regular(image)
        with open(image, "rb") as file:
            return read_image(file)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(_grey_or_colour(image))
    if not isinstance(image, Image.Image):
        raise FresnetError(f"expected a PIL image, uint8 array or path; got {_describe(image)}")
    _check_image(image)
    return _in_rgb(ImageOps.exif_transpose(image))  # a copy, whatever the orientation


def _in_rgb(upright: "PILImage") -> "PILImage":
    """An image of our own in RGB."""
    from PIL import Image

    # Transparency is dropped as alpha is. Pillow would keep it, and warns where it cannot.
    upright.info.pop("transparency", None)
    if upright.mode == "I" or upright.mode.startswith("I;16"):
        upright = Image.fromarray(_eight_bits(np.asarray(upright)))
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _check_image(image: "PILImage") -> None:
    if 0 in image.size:
        raise FresnetError(f"an image of {image.width}x{image.height} is empty")
    _check_range(image)


def _check_range(image: "PILImage") -> None:
    """Refuse images whose values have no fixed range; older Pillows read a 16-bit PNG so too."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        what = {"F": "floats", "I": "integers of 32 bits"}[image.mode]
        raise FresnetError(
            f"{what} have no fixed range, such as 0 to 255 or to 65535: scale the image to uint8 "
            "first, or 16-bit grey to uint16"
        )


def _grey_or_colour(array: np.ndarray) -> np.ndarray:
    """The array as Pillow takes it: a single channel has no axis."""
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
    """16-bit grey at the nearest of 256 levels: 257 v becomes v."""
    if grey.min() < 0 or grey.max() > 65535:
        raise FresnetError(f"expected grey of 0 to 65535; got {grey.min()} to {grey.max()}")
    return np.rint(grey / 257).astype(np.uint8)


def _crop(image: "PILImage", preset: Preset) -> "PILImage":
    """The middle of the resized image."""
    from PIL.Image import Resampling

    width, height = image.size
    if isinstance(preset.resize, int):
        short = min(image.size)
        height, width = (int(preset.resize * side / short) for side in (height, width))
    else:
        height, width = preset.resize
    refuse_huge("it would be resized to", (width, height))
    crop_height, crop_width = pair(preset.crop)
    left, top = preset.corner((width - crop_width) / 2), preset.corner((height - crop_height) / 2)
    resized = image.resize((width, height), Resampling[preset.interpolation.upper()])
    return resized.crop((left, top, left + crop_width, top + crop_height))


def refuse_huge(which: str, size: tuple[int, int]) -> None:
    """Refuse images above the limit at which Pillow itself only warns."""
    from PIL.Image import MAX_IMAGE_PIXELS as LIMIT

    if LIMIT is not None and size[0] * size[1] > LIMIT:
        got = f"{which} {size[0]}x{size[1]}"
        raise FresnetError(f"{got}, more pixels than PIL.Image.MAX_IMAGE_PIXELS = {LIMIT}")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {describe(value)} (image.numpy()?)"
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else describe(value)
