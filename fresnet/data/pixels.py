"""Images as tensors of pixels: decoded and cropped fast, and off by two levels at most."""

from io import IOBase
from typing import BinaryIO

import torch
from einops import rearrange
from PIL import Image
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from fresnet.data.crops import AreaCrop, ScaleCrop, area_box, scale_box
from fresnet.data.draws import chance
from fresnet.data.preprocess import pixels_of, read_image, refuse_huge
from fresnet.errors import check_type

ORIENTATION = 0x0112
"""EXIF's tag for how an image lies; by 2 to 8 it is turned or mirrored."""


def read_pixels(file: BinaryIO) -> Tensor:
    """The pixels of the image in an open file, uint8 `[3 h w]`: those of `read_image`, faster.

    simplejpeg decodes JPEGs in RGB that lie upright. It gives the pixels that Pillow gives, because
    both stand on libjpeg-turbo. Pillow decodes all else, and judges what is damaged.

    >>> import io, PIL.Image
    >>> PIL.Image.new("RGB", (40, 30)).save(file := io.BytesIO(), "jpeg")
    >>> read_pixels(file).shape
    torch.Size([3, 30, 40])

    Raises:
      FresnetError: as `read_image` does.
      ImportError: without simplejpeg.
    """
    try:
        from simplejpeg import decode_jpeg
    except ImportError as error:
        raise ImportError("read_pixels needs simplejpeg: pip install 'fresnet[fast]'") from error
    check_type("read_pixels", IOBase, "a file opened in binary", file=file)
    if _is_plain_jpeg(file):
        file.seek(0)
        try:
            return rearrange(torch.from_numpy(decode_jpeg(file.read())), "h w c -> c h w")
        except (ValueError, OSError):
            pass  # it is damaged, or its disk
    return pixels_of(read_image(file))


def _is_plain_jpeg(file: BinaryIO) -> bool:
    """Whether `read_image` would only decode it: a JPEG in RGB that lies upright."""
    try:
        with Image.open(file) as opened:
            refuse_huge("it is", opened.size)
            turned = opened.getexif().get(ORIENTATION) in range(2, 9)
            return opened.format == "JPEG" and opened.mode == "RGB" and not turned
    except Exception:  # `read_image` raises it again
        return False


def cropped(x: Tensor, generator: Generator, crop: AreaCrop | ScaleCrop) -> Tensor:
    """Pixels cropped where `area_crop` and `scale_crop` crop an image, to two levels."""
    _, height, width = x.shape
    if isinstance(crop, AreaCrop):
        left, top, right, bottom = area_box((width, height), generator, crop)
        return _resized(x[:, top:bottom, left:right], crop.side, crop.side)
    (width, height), (left, top, right, bottom) = scale_box((width, height), generator, crop)
    return _resized(x, width, height)[:, top:bottom, left:right]


def flipped(x: Tensor, generator: Generator, probability: float) -> Tensor:
    """Pixels flipped where `random_flip` flips an image."""
    return x.flip(2) if chance(probability, generator) else x


def _resized(x: Tensor, width: int, height: int) -> Tensor:
    """As Pillow resizes: bilinear, over all pixels that an output covers."""
    batch = x[None].contiguous(memory_format=torch.channels_last)
    return interpolate(batch, (height, width), mode="bilinear", antialias=True)[0]
