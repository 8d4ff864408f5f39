"""Preprocessing equals that of torchvision, timm and Hugging Face, and refuses bad images."""

import re
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import timm.data
import torch
from assertions import assert_same
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from strategies import examples, pil_images, pixels
from torch import Tensor
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from fresnet import FresnetError
from fresnet.data.preprocess import preprocess
from fresnet.data.presets import PRESETS, Preset, preset_of

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (31, 47, 3), np.uint8)

Reference = Callable[[Image.Image], Tensor]


def of_torchvision(weights: str) -> Reference:
    transforms: Reference = reference.torchvision.models.get_weight(weights).transforms()
    return transforms


def of_timm(name: str, **kwargs: Any) -> Reference:
    weights = timm.create_model(name).pretrained_cfg
    reference: Reference = timm.data.create_transform(
        **timm.data.resolve_data_config(pretrained_cfg=weights, **kwargs)
    )
    return reference


def of_hugging_face() -> Reference:
    """Hugging Face's preprocessing, with the published configuration of microsoft/resnet-50."""
    processor = ConvNextImageProcessorPil(
        crop_pct=0.875,
        do_normalize=True,
        do_resize=True,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=3,
        size=224,
    )
    return lambda image: processor(image, return_tensors="pt")["pixel_values"][0]


REFERENCES: dict[str, Callable[[], Reference]] = {
    "imagenet-v1": lambda: of_torchvision("ResNet50_Weights.IMAGENET1K_V1"),
    "imagenet-v2": lambda: of_torchvision("ResNet50_Weights.IMAGENET1K_V2"),
    "timm": lambda: of_timm("resnet50.ram_in1k"),
    "timm-a1": lambda: of_timm("resnet50"),
    "timm-a1-288": lambda: of_timm("resnet50.a1_in1k", use_test_size=True),
    "huggingface": of_hugging_face,
}

every_preset = pytest.mark.parametrize("preset", PRESETS)


def rgb(image: Image.Image) -> Image.Image:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Palette images with Transparency")
        return image.convert("RGB")


@every_preset
def test_every_mode_and_size_as_the_libraries_do(preset: str) -> None:
    reference = REFERENCES[preset]()

    @examples(25)
    @given(pil_images())
    @example(Image.fromarray(PHOTO[:1]))
    @example(Image.fromarray(PHOTO[:, :1]))
    def compare(image: Image.Image) -> None:
        assert_same(preprocess([image], preset)[0], reference(rgb(image)))

    compare()


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_one_preset_for_all_depths(depth: int) -> None:
    image = Image.fromarray(PHOTO)
    for version in (1, 2) if depth >= 50 else (1,):
        reference = of_torchvision(f"ResNet{depth}_Weights.IMAGENET1K_V{version}")
        assert_same(preprocess([image], f"imagenet-v{version}")[0], reference(image))


@examples(15)
@given(st.data())
def test_arrays_are_images(data: st.DataObject) -> None:
    array = data.draw(pixels(data.draw(st.sampled_from([1, 3, 4]))))
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[array.shape[2]]
    image = Image.frombytes(mode, (array.shape[1], array.shape[0]), array.tobytes())
    expected = preprocess([image])
    assert_same(preprocess([array]), expected)
    assert_same(preprocess([np.asfortranarray(array)[::-1][::-1]]), expected)
    if mode == "L":
        assert_same(preprocess([array[..., 0]]), expected)


def test_a_mixed_batch(tmp_path: Path) -> None:
    small, path = Image.fromarray(PHOTO[:9, :5]), tmp_path / "photo.png"
    Image.fromarray(PHOTO).save(path)
    x = preprocess((str(path), small, PHOTO[..., 0], path))
    assert x.shape == (4, 3, 224, 224)
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    alone = [preprocess([image]) for image in (PHOTO, small, PHOTO[..., 0], PHOTO)]
    assert_same(x, torch.cat(alone))


def test_defaults_of_torch_do_not_matter() -> None:
    expected = preprocess([PHOTO])
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert_same(preprocess([PHOTO]), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_alpha_is_dropped() -> None:
    hidden_red = np.full((3, 3, 4), (255, 0, 0, 0), np.uint8)
    assert_same(preprocess([hidden_red]), preprocess([hidden_red[..., :3]]))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
@pytest.mark.parametrize("saved", [False, True])
def test_16_bit_grey(mode: str, saved: bool, tmp_path: Path) -> None:
    """Older Pillows open 16-bit PNG in mode I, in which nothing else has a fixed range."""
    levels = np.arange(65536).reshape(256, 256)
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "=i4"}[mode]
    image = Image.frombytes(mode, (256, 256), levels.astype(dtype).tobytes())
    path = tmp_path / "grey.tiff"
    image.save(path)
    if mode == "I":
        for grey in (image, path):
            refused([grey], "integers of 32 bits have no fixed range")
        image.format, saved = "PNG", False
    nearest = ((levels * 255 + 32895) >> 16).astype(np.uint8)  # as the PNG specification rounds
    assert_same(preprocess([path if saved else image]), preprocess([nearest]))


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}
"""What turns a stored image upright, by EXIF's definition of its first row and column."""


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "jpeg"])
def test_exif_orientation(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(PHOTO).save(path, exif=exif)
    with Image.open(path) as image:
        expected = preprocess([UPRIGHT[orientation](np.asarray(image))])
        assert_same(preprocess([image]), expected)
    assert_same(preprocess([path]), expected)


@examples(15)
@given(pil_images(), pixels(3))
def test_inputs_stay_as_they_are(image: Image.Image, array: np.ndarray) -> None:
    exif = image.getexif()
    exif[0x0112] = 6
    image_before, array_before, palette = image.copy(), array.copy(), image.getpalette("RGBA")
    preprocess([image, array])
    assert image == image_before  # its pixels, palette and info
    assert image.getpalette("RGBA") == palette
    assert np.array_equal(array, array_before)
    assert exif[0x0112] == 6


def refused(images: Any, message: str, **kwargs: Any) -> None:
    with pytest.raises(FresnetError, match=re.escape(message)):
        preprocess(images, **kwargs)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (PHOTO, "a sequence of images; got uint8 (31, 47, 3) (one image? [image])"),
        (Image.fromarray(PHOTO), "a sequence of images; got a Image (one image? [image])"),
        ("photo.png", "a sequence of images; got a str (one image? [image])"),
        (Path("photo.png"), "(one image? [image])"),
        (None, "a sequence of images; got None"),
        ((), "at least one image; got none"),
        ([PHOTO, 3], "images[1]: expected a PIL image, uint8 array or path; got a int"),
        (
            [torch.zeros(3, 4, 4)],
            "images[0]: expected a PIL image, uint8 array or path; got a tensor",
        ),
        (
            [PHOTO[..., :2]],
            "uint8 [h w] or [h w c], c of 1, 3 or 4; got uint8 (31, 47, 2)",
        ),
        ([PHOTO[None]], "images[0]: expected uint8 [h w] or [h w c]"),
        ([PHOTO[0, :, 0]], "got uint8 (47,)"),
        ([PHOTO / 255], "got float64 (31, 47, 3) (floats from 0 to 1? (255 * array).round()"),
        ([PHOTO.astype(int)], "got int64 (31, 47, 3)"),
        ([PHOTO.transpose(2, 0, 1)], "(3, 31, 47) (channels first? array.transpose(1, 2, 0))"),
        ([PHOTO[:0]], "images[0]: an image of 47x0 is empty"),
        ([PHOTO[:, :0, 0]], "images[0]: an image of 0x31 is empty"),
        ([Image.new("RGB", (0, 4))], "images[0]: an image of 0x4 is empty"),
        ([Image.new("F", (4, 4))], "images[0]: floats have no fixed range"),
        ([Image.new("I", (4, 4), 255)], "images[0]: integers of 32 bits have no fixed range"),
        ([Image.fromarray(np.full((4, 4), 255, np.int32))], "integers of 32 bits have no fixed"),
        ([Image.new("La", (4, 4))], "images[0]: conversion from La"),
    ],
)
def test_bad_images(images: Any, message: str) -> None:
    refused(images, message)


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("imagenet-v3", "unknown preset 'imagenet-v3'; did you mean 'imagenet-v2'"),
        ("hugging-face", "unknown preset 'hugging-face'; did you mean 'huggingface'?"),
        ("?", "unknown preset '?'; there are imagenet-v1, imagenet-v2, timm, "),
        (["timm"], "unknown preset ['timm']; did you mean 'timm'"),
    ],
)
def test_bad_presets(preset: Any, message: str) -> None:
    refused([PHOTO], message, preset=preset)


SUFFIXES = ["png", "jpeg", "gif", "tiff", "webp", "bmp"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_files(suffix: str, tmp_path: Path) -> None:
    """A file may end anywhere: in a header, in the palette or in the pixels."""
    Image.fromarray(PHOTO).save(path := tmp_path / f"photo.{suffix}")
    whole = path.read_bytes()
    for length in (0, 1, 9, 40, len(whole) // 3, len(whole) // 2):
        path.write_bytes(whole[:length])
        refused([PHOTO, path], f"preprocess cannot read images[1], {path}: ")


@examples(60)
@given(st.sampled_from(SUFFIXES), st.data())
def test_corrupted_files(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject
) -> None:
    """They are either read or refused, and raise nothing else."""
    path = tmp_path_factory.getbasetemp() / f"corrupted.{suffix}"
    Image.fromarray(PHOTO).save(path)
    content = bytearray(path.read_bytes())
    places = st.integers(0, min(len(content), 200) - 1)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(places)] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)  # a header's nonsense may be large
            preprocess([path])
    except FresnetError as error:
        assert str(error).startswith(f"preprocess cannot read images[0], {path}: ")  # noqa: PT017


def test_bad_files(tmp_path: Path) -> None:
    (text := tmp_path / "text.png").write_text("not an image")
    missing = tmp_path / "missing.png"
    refused([missing], f"images[0], {missing}: No such file or directory")
    refused([PHOTO, str(tmp_path)], f"images[1], {tmp_path}: {tmp_path.name} is no regular")
    refused([text], f"images[0], {text}: cannot identify image file")
    refused(["\0"], "embedded null byte")


def test_closed_images(tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(path := tmp_path / "photo.png")
    with Image.open(path) as image:
        pass
    refused([image], "preprocess cannot read images[0]: ")


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and holds no more."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + body + struct.pack(">I", 0) + b"IDAT"


@pytest.mark.parametrize("action", ["error", "ignore"])
@pytest.mark.parametrize("side", [10_000, 100_000])
def test_huge_files(action: Any, side: int, tmp_path: Path) -> None:
    """They are refused both where Pillow only warns and where it raises."""
    (path := tmp_path / "bomb.png").write_bytes(png_header(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        refused([path], f"images[0], {path}: ")
        if action == "ignore" and side == 10_000:
            refused([path], "it is 10000x10000, more pixels than PIL.Image.MAX_IMAGE_PIXELS")


def test_limit_is_pillows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(path := tmp_path / "photo.png")
    for limit, message in ((31 * 47 - 1, "exceeds limit"), (256 * 388 - 1, "resized to 388x256")):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        refused([path], message)
    for enough in (256 * 388, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", enough)
        preprocess([path])


def test_long_and_thin_images() -> None:
    refused([np.zeros((1, 1400), np.uint8)], "it would be resized to 358400x256, more pixels")


def test_pillow_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused([PHOTO], "preprocess needs Pillow: pip install 'fresnet[io]'")


@pytest.mark.slow
def test_pillow_is_imported_at_the_first_call() -> None:
    program = "import sys, fresnet; sys.exit('PIL' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_preset_of_ones_own() -> None:
    """This one is for CIFAR, with 32 pixels and CIFAR's mean and deviation."""
    own = Preset(32, 32, "bilinear", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    array = RNG.integers(0, 256, (32, 32, 3), np.uint8)
    expected = (torch.from_numpy(array).permute(2, 0, 1) / 255 - 0.5) / 0.25
    assert torch.allclose(preprocess([array], own)[0], expected, atol=1e-6)


T = reference.torchvision.transforms
CAFFE = Preset(
    (20, 31),
    (18, 26),
    "bilinear",
    mean=(103.939 / 255, 116.779 / 255, 123.68 / 255),
    std=(1 / 255, 1 / 255, 1 / 255),
    channels="BGR",
)
GREY = Preset(28, 24, "bicubic", mean=(0.25,), std=(0.5,), channels="L")


@pytest.mark.parametrize("image", [PHOTO, PHOTO[..., 0]])
def test_squashed_grey_and_in_the_order_of_caffe(image: np.ndarray) -> None:
    photo = Image.fromarray(image)
    squashed = T.CenterCrop((18, 26))(T.Resize((20, 31))(photo.convert("RGB")))
    pixels = torch.from_numpy(np.array(squashed)).permute(2, 0, 1).float().flip(0)
    expected = pixels - torch.tensor([103.939, 116.779, 123.68])[:, None, None]
    assert torch.allclose(preprocess([image], CAFFE)[0], expected, atol=1e-4)
    grey = [T.Resize(28, T.InterpolationMode.BICUBIC), T.CenterCrop(24), T.ToTensor()]
    of_grey = T.Compose([*grey, T.Normalize((0.25,), (0.5,))])
    assert_same(preprocess([photo], GREY)[0], of_grey(photo.convert("L")))


@pytest.mark.parametrize("odd", [{"channels": "L"}, {"mean": (0.5,)}, {"std": (1, 1)}])
def test_means_of_other_channels_are_refused(odd: Any) -> None:
    with pytest.raises(FresnetError, match="expects a mean and a std for each channel of"):
        preprocess([PHOTO], PRESETS["timm"]._replace(**odd))


def test_a_tensor_is_told_from_an_array() -> None:
    with pytest.raises(
        FresnetError, match=re.escape("got a tensor uint8 (4, 4, 3) (image.numpy()?)")
    ):
        preprocess([torch.zeros(4, 4, 3, dtype=torch.uint8)])


def test_a_preset_of_a_text() -> None:
    assert preset_of("256,224,bilinear") == PRESETS["imagenet-v1"]
    assert preset_of("9x7,8x6,bilinear") == Preset((9, 7), (8, 6), "bilinear")
    assert preset_of("9x9,8,bilinear") == Preset((9, 9), 8, "bilinear")
    half = (0.5, 0.5, 0.5)
    assert preset_of("9,8,bicubic,0.5") == Preset(9, 8, "bicubic", mean=half, std=half)


@pytest.mark.parametrize(
    "text",
    [
        "9" * 5000 + ",1,bilinear",
        "256,300,bilinear",
        "256,0,bilinear",
        "256,224,bilinear,0.4",
        "256x200,224,bilinear",
        "256,224x300,bilinear",
        "256,224x224x1,bilinear",
        "256x0,1,bilinear",
        "256,224,bilinear,0.5,0.5",
    ],
)
def test_presets_that_no_text_makes(text: str) -> None:
    with pytest.raises(FresnetError, match="a preset is a name or, say, 256,224,bilinear"):
        preset_of(text)
