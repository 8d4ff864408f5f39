"""Batches of pixels: normalised they are batches of floats, and read fast they are nearly so."""

import errno
import io
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assertions import assert_same, global_generators_untouched
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from strategies import examples, rgb_images, seeds
from torch import Generator, Tensor

from fresnet import PRESETS, FresnetError, Preset, preprocess
from fresnet.data import (
    AreaCrop,
    Augmentation,
    Images,
    Place,
    ScaleCrop,
    augment,
    augment_pixels,
    loader,
    normalise,
    prepare_pixels,
    read_image,
    read_pixels,
    scan,
)

PHOTOS = [Image.fromarray(photo).resize((125, 94)) for photo in load_sample_images().images]
CROPS = (AreaCrop(32), AreaCrop(224), ScaleCrop(24, (24, 40)), ScaleCrop(32, (32, 32)))


def encoded(image: Image.Image, kind: str = "jpeg", **options: Any) -> io.BytesIO:
    image.save(file := io.BytesIO(), kind, **options)
    file.seek(0)
    return file


def lying(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@examples(40)
@given(
    rgb_images(),
    st.sampled_from(CROPS),
    st.booleans(),
    st.sampled_from([0, 0.5, 1]),
    seeds,
)
def test_augment_is_augment_pixels_normalised(
    image: Image.Image, crop: Any, trivial: bool, flip: float, seed: int
) -> None:
    augmentation = Augmentation(crop, flip, trivial, mean=(0.1, 0.2, 0.7), std=(0.3, 0.1, 0.9))
    one, other = (Generator().manual_seed(seed) for _ in range(2))
    with global_generators_untouched():
        x = augment_pixels(image, one, augmentation)
    assert x.dtype == torch.uint8
    assert_same(normalise(x, augmentation), augment(image, other, augmentation))
    assert torch.equal(one.get_state(), other.get_state())


@pytest.mark.parametrize("preset", [*PRESETS, Preset(36, 32, "bilinear", channels="BGR")])
def test_preprocess_is_prepare_pixels_normalised(preset: Any) -> None:
    x = torch.stack([prepare_pixels(photo, Generator(), preset) for photo in PHOTOS])
    assert x.dtype == torch.uint8
    assert_same(normalise(x, preset), preprocess(PHOTOS, preset))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_level_is_normalised_as_torchvision_does_it(dtype: torch.dtype) -> None:
    """Whatever the layout and the defaults; the pixels are not written to."""
    x = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    augmentation = Augmentation(AreaCrop(16))
    mean, std = (torch.tensor(values)[:, None, None] for values in augmentation[4:6])
    torch.set_default_dtype(dtype)
    try:
        found = [
            normalise(x.contiguous(memory_format=layout), augmentation)
            for layout in (torch.contiguous_format, torch.channels_last)
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    for actual in found:
        assert_same(actual, (x / 255 - mean) / std)
    assert normalise(x.to("meta"), augmentation).is_meta
    assert torch.equal(x[0, 0].flatten(), torch.arange(256))


@examples(60)
@given(rgb_images(), st.sampled_from(CROPS), st.sampled_from([0, 0.5, 1]), seeds)
@example(PHOTOS[0], AreaCrop(224), 0.5, 0)
@example(PHOTOS[1], ScaleCrop(32, (32, 64)), 1, 0)
def test_pixels_are_cropped_and_flipped_where_images_are(
    image: Image.Image, crop: Any, flip: float, seed: int
) -> None:
    """Their generators end in the same state, and no value is off by more than two levels."""
    augmentation = Augmentation(crop, flip)
    before = (x := pixels(image)).clone()
    one, other = (Generator().manual_seed(seed) for _ in range(2))
    with global_generators_untouched():
        actual = augment_pixels(x, one, augmentation)
    expected = augment_pixels(image, other, augmentation)
    assert torch.equal(one.get_state(), other.get_state())
    assert actual.shape == expected.shape
    assert (actual.int() - expected.int()).abs().max() <= 2
    assert torch.equal(x, before)


def test_few_values_of_photographs_are_off() -> None:
    for photo in PHOTOS:
        one, other = (
            augment_pixels(image, Generator().manual_seed(0), Augmentation(AreaCrop(224)))
            for image in (photo, pixels(photo))
        )
        assert (one != other).float().mean() < 0.005


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 90},
        {"quality": 30, "subsampling": 0},
        {"quality": 75, "subsampling": 1, "progressive": True},
        {"quality": 95, "optimize": True, "comment": b"a comment"},
        {"quality": 90, "keep_rgb": True},
        *[{"exif": lying(orientation)} for orientation in (1, 3, 6, 9)],
    ],
)
def test_jpegs_are_decoded_as_pillow_decodes_them(options: dict[str, Any]) -> None:
    for photo in (*PHOTOS, PHOTOS[0].crop((0, 0, 1, 1)), PHOTOS[1].crop((3, 5, 20, 14))):
        file = encoded(photo, **options)
        assert_same(read_pixels(file), pixels(read_image(io.BytesIO(file.getvalue()))))


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (PHOTOS[0], "png"),
        (PHOTOS[0].convert("L"), "jpeg"),
        (PHOTOS[0].convert("CMYK"), "jpeg"),
        (PHOTOS[0].convert("P"), "png"),
        (PHOTOS[0].convert("RGBA"), "webp"),
        (Image.fromarray(np.arange(0, 60000, 100).astype(np.uint16).reshape(20, 30)), "png"),
    ],
)
def test_all_else_is_pillows(image: Image.Image, kind: str) -> None:
    file = encoded(image, kind)
    assert_same(read_pixels(file), pixels(read_image(io.BytesIO(file.getvalue()))))


@examples(60)
@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_what_is_damaged_is_pillows_to_judge(at: int, value: int, cut: bool) -> None:
    """Both refuse it in the same words, or both read the same."""
    content = bytearray(encoded(PHOTOS[0]).getvalue())
    at %= len(content)
    if cut:
        del content[at:]
    else:
        content[at] = value
    found: list[Tensor | str] = []
    for read in (read_image, read_pixels):
        try:
            image = read(io.BytesIO(content))
            found.append(image if isinstance(image, Tensor) else pixels(image))
        except FresnetError as error:
            found.append(str(error))
    if isinstance(found[0], str):
        assert found[1] == found[0]
    else:
        assert_same(found[1], found[0])


def test_an_image_outlives_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where turning it upright reads no pixels, as before Pillow 10.1."""
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda image, in_place: None)
    with encoded(PHOTOS[0], "png") as file:
        image = read_image(file)
    assert_same(pixels(image), pixels(PHOTOS[0]))


class Unreadable(io.BytesIO):
    """A file of which no more than the headers can be read."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size < 2000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(size)


@pytest.mark.parametrize("read", [read_image, read_pixels])
def test_a_file_that_cannot_be_read_is_refused(read: Any) -> None:
    with pytest.raises(FresnetError, match=r"^Input/output error$"):
        read(Unreadable(encoded(PHOTOS[0]).getvalue()))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("read", [read_image, read_pixels])
def test_huge_images_are_refused(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 125 * 94 - 1)
    with pytest.raises(FresnetError, match="it is 125x94, more pixels than"):
        read(encoded(PHOTOS[0]))


# Loaders


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(6):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        image = PHOTOS[i % 2].rotate(15 * i)
        image.save(tmp_path / str(i % 2) / f"{i}.{'png' if i == 5 else 'jpg'}")
    return tmp_path


def places(images: Images) -> list[list[Place]]:
    return [[Place(epoch, i, i) for i in range(len(images))] for epoch in (0, 1)]


@pytest.mark.parametrize("workers", [0, 1])
def test_fast_batches_are_the_plain_ones(photos: Path, workers: int) -> None:
    """The same images, labels and draws, as pixels, to two levels of 255."""
    augmentation = Augmentation(AreaCrop(32))
    plain = Images(scan(photos), partial(augment, augmentation=augmentation), 3)
    exact = Images(scan(photos), partial(augment_pixels, augmentation=augmentation), 3)
    fast = Images(exact.folder, exact.transform, 3, read=read_pixels)
    batches = (loader(one, places(one), workers=workers) for one in (plain, exact, fast))
    for one, two, three in zip(*batches, strict=True):
        assert two.x.dtype == three.x.dtype == torch.uint8
        assert two.x.is_contiguous(memory_format=torch.channels_last)
        assert three.x.is_contiguous(memory_format=torch.channels_last)
        assert_same(normalise(two.x, augmentation), one.x)
        assert (two.x.int() - three.x.int()).abs().max() <= 2
        assert_same((two.y, three.y), (one.y, one.y))
        assert one.places == two.places == three.places


def test_a_broken_image_is_named_alike(photos: Path) -> None:
    folder = scan(photos)
    Path(folder.files[0]).write_bytes(Path(folder.files[0]).read_bytes()[:-400])
    Path(folder.files[1]).write_text("no image")
    Path(folder.files[2]).unlink()
    transform = partial(augment_pixels, augmentation=Augmentation(AreaCrop(32)))
    found = [
        next(loader(images, places(images), broken="skip")).broken
        for images in (Images(folder, transform, 0), Images(folder, transform, 0, read=read_pixels))
    ]
    assert found[0] == found[1]
    for line, why in zip(
        found[0], ("truncated", "cannot identify image file", "No such file"), strict=True
    ):
        assert why in line


def faulty(file: Any) -> Tensor:
    raise RuntimeError("a fault of the reader's own")


def test_a_faulty_reader_is_no_broken_image(photos: Path) -> None:
    images = Images(
        scan(photos), partial(augment, augmentation=Augmentation(AreaCrop(8))), 0, faulty
    )
    with pytest.raises(RuntimeError, match="a fault of the reader's own"):
        next(loader(images, places(images), broken="skip"))


def test_without_simplejpeg_it_is_asked_for(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    transform = partial(augment_pixels, augmentation=Augmentation(AreaCrop(8)))
    images = Images(scan(photos), transform, 0, read=read_pixels)
    with pytest.raises(ImportError, match=r"pip install 'fresnet\[fast\]'"):
        next(loader(images, places(images), broken="skip"))


PLAIN = Augmentation(AreaCrop(8))


@pytest.mark.parametrize(
    ("x", "augmentation", "message"),
    [
        (PHOTOS[0], PLAIN._replace(erase=0.1), "neither lighting nor erase, which change values"),
        (pixels(PHOTOS[0]), PLAIN._replace(lighting=0.1), "neither lighting nor erase"),
        (pixels(PHOTOS[0]), PLAIN._replace(trivial_augment=True), "an image of Pillow for Trivial"),
        (PHOTOS[0].convert("L"), PLAIN, "an RGB image; got L"),
        (pixels(PHOTOS[0]).float(), PLAIN, "an image, or uint8 [3 h w]; got float32 (3, 94, 125)"),
        (pixels(PHOTOS[0])[:1], PLAIN, "an image, or uint8 [3 h w]; got uint8 (1, 94, 125)"),
        (pixels(PHOTOS[0]), PLAIN._replace(flip=2), "a flip from 0 to 1"),
    ],
)
def test_what_cannot_be_done_to_pixels(x: Any, augmentation: Augmentation, message: str) -> None:
    with pytest.raises(FresnetError, match=re.escape(f"augment_pixels expects {message}")):
        augment_pixels(x, Generator(), augmentation)


def test_what_cannot_be_normalised() -> None:
    x = pixels(PHOTOS[0])[None]
    for wrong in (x.float(), x[0, 0], x[:, :1]):
        with pytest.raises(FresnetError, match=r"normalise expects x to be uint8 \[... 3 h w\]"):
            normalise(wrong, PLAIN)
