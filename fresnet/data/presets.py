"""Presets: how the evaluation of a network prepares images."""

from collections.abc import Callable, Mapping
from math import floor
from operator import le
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

from fresnet.errors import FresnetError, shown, suggestion

Sides: TypeAlias = int | tuple[int, int]
"""A length, or height and width."""


def pair(sides: Sides) -> tuple[int, int]:
    """Height and width."""
    return (sides, sides) if isinstance(sides, int) else sides


class Preset(NamedTuple):
    """What an evaluation does to an image, in the order of the fields."""

    resize: Sides  # the new length of the shorter side; a pair squashes to this height and width
    crop: Sides  # the side of the square that remains, from the middle, or its height and width
    interpolation: Literal["bilinear", "bicubic"]
    corner: Callable[[float], int] = round  # rounds the crop's corner to a pixel
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of each channel, for values from 0 to 1
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channels: Literal["RGB", "BGR", "L"] = "RGB"  # and their order; L is grey, as Pillow calls it


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
"""How the evaluations of well-known weights prepare images.

"imagenet-v1" and "imagenet-v2" go with torchvision's weights V1 and V2, also where timm ports them.
"timm" goes with the older recipes of timm, "timm-a1" with its recipe A1, which it takes for most
networks, and "timm-a1-288" with A1 at the larger test size. "huggingface" goes with
microsoft/resnet-50.
"""


def as_preset(preset: str | Preset) -> Preset:
    """A preset, or that of a name in `PRESETS`.

    Raises:
      FresnetError: if there is none of the name, or if the preset's parts do not go together.
    """
    chosen = preset if isinstance(preset, Preset) else _named(preset)
    if not len(chosen.mean) == len(chosen.std) == len(chosen.channels):
        raise FresnetError(
            f"a preset expects a mean and a std for each channel of {chosen.channels}; got "
            f"{shown(chosen.mean)} and {shown(chosen.std)}"
        )
    return chosen


def in_grey(preset: Preset) -> Preset:
    """The preset for a network of one channel, by the means of its channels' mean and std.

    >>> in_grey(PRESETS["timm"]).mean
    (0.449,)
    """
    mean, std = (round(sum(each) / len(each), 6) for each in (preset.mean, preset.std))
    return preset._replace(channels="L", mean=(mean,), std=(std,))


def text_of(preset: Preset) -> str:
    """A preset in words: its name, or what `preset_of` reads, but for unusual means.

    >>> text_of(PRESETS["timm"]), text_of(Preset((9, 8), 8, "bilinear", channels="BGR"))
    ('timm', '9x8,8,bilinear in BGR')
    """
    names = [name for name, one in PRESETS.items() if one == preset]
    half = ",0.5" if {*preset.mean, *preset.std} == {0.5} else ""
    order = {"RGB": "", "BGR": " in BGR", "L": " in grey"}[preset.channels]
    return names[0] if names else f"{sizes_of(preset)}{half}{order}"


def sizes_of(preset: Preset) -> str:
    """A preset's sizes and interpolation, as `preset_of` reads them."""
    resize, crop = (
        str(sides) if isinstance(sides, int) else "x".join(map(str, sides))
        for sides in (preset.resize, preset.crop)
    )
    return f"{resize},{crop},{preset.interpolation}"


def preset_of(text: str) -> Preset:
    """The preset of a name, or one made from a text such as "256,224,bilinear".

    "224x224,224,bilinear" squashes an image to 224x224 first. A last part of 0.5 is the mean and
    the deviation of every channel, as some of timm's weights have it: "288,288,bicubic,0.5".

    Raises:
      FresnetError: if it is neither.
    """
    if "," not in text:
        return _named(text)
    match [_sides(part) or part for part in text.split(",")]:
        case [resize, crop, "bilinear" | "bicubic" as interpolation, *half] if (
            not isinstance(resize, str)
            and not isinstance(crop, str)
            and all(map(le, pair(crop), pair(resize)))
            and half in ([], ["0.5"])
        ):
            preset = Preset(resize, crop, interpolation)
            return preset._replace(mean=(0.5,) * 3, std=(0.5,) * 3) if half else preset
    raise FresnetError(f"a preset is a name or, say, 256,224,bilinear; got {text}")


def _sides(text: str) -> Sides | None:
    """Positive lengths such as "224" or "224x160", or None."""
    match [int(part) if part.isdecimal() and len(part) < 7 else 0 for part in text.split("x")]:
        case [side] if side:
            return side
        case [height, width] if height and width:
            return height, width
    return None


def _named(preset: str) -> Preset:
    if (chosen := PRESETS.get(str(preset))) is None:
        raise FresnetError(f"unknown preset {shown(preset)}; {suggestion(str(preset), PRESETS)}")
    return chosen
