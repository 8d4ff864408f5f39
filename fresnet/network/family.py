"""The family: networks by name, with one line for those that differ in depth alone."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from fresnet.errors import suggestion
from fresnet.network.nodes import (
    AveragedStage,
    AveragedStem,
    BareDeepStem,
    BareStem7x7,
    BasicBlock,
    BlurredStage,
    BlurredStem,
    Bottleneck,
    BottleneckV1,
    CentredZeroPad,
    DeepStem,
    EfficientAttention,
    FramedStem7x7,
    GroupNorm,
    LastNorm,
    NoShortcut,
    PooledProjection,
    PreActivation,
    PreActivationBasic,
    Projection,
    SqueezeExcite,
    StandardisedLayer,
    Stem3x3,
    StridedStem,
    ZeroPad,
)
from fresnet.network.specs import Spec

Part: TypeAlias = Mapping[str, Any]
"""Some arguments of a `Spec`."""

LAYERS: Mapping[int, Part] = {
    10: {"block": BasicBlock, "depths": (1, 1, 1, 1)},
    14: {"block": Bottleneck, "depths": (1, 1, 1, 1)},
    18: {"block": BasicBlock, "depths": (2, 2, 2, 2)},
    26: {"block": Bottleneck, "depths": (2, 2, 2, 2)},
    34: {"block": BasicBlock, "depths": (3, 4, 6, 3)},
    50: {"block": Bottleneck, "depths": (3, 4, 6, 3)},
    101: {"block": Bottleneck, "depths": (3, 4, 23, 3)},
    152: {"block": Bottleneck, "depths": (3, 8, 36, 3)},
    200: {"block": Bottleneck, "depths": (3, 24, 36, 3)},
    201: {"block": Bottleneck, "depths": (3, 24, 36, 4)},
    269: {"block": Bottleneck, "depths": (3, 30, 48, 8)},
    270: {"block": Bottleneck, "depths": (4, 29, 53, 4)},
    350: {"block": Bottleneck, "depths": (4, 36, 72, 4)},
    420: {"block": Bottleneck, "depths": (4, 44, 87, 4)},
}
"""What a number of layers in a member's name says."""


def _family(name: str, *layers: int, **same: Any) -> dict[str, Spec]:
    """Members that differ in depth alone; their name has a place for the number of layers."""
    return {name.format(n): Spec(**{**LAYERS[n], **same}) for n in layers}


def _cifar(n: int, shortcut: type) -> Spec:
    """A network of the paper with 6n+2 layers for CIFAR, from its Sec. 4.2."""
    return Spec(BasicBlock, (n, n, n), width=16, stem=Stem3x3, shortcut=shortcut)


def _groups(groups: int, width: int) -> Part:
    """ResNeXt's groups: 32x4d are 32 of 4 channels each."""
    return {"groups": groups, "group_width": width}


C: Part = {"stem": DeepStem}
D: Part = {**C, "shortcut": PooledProjection}
WIDE: Part = {"stem_widths": (64, 64, 128)}
S: Part = {**C, **WIDE}
T: Part = {**D, "stem_widths": (24, 32, 64)}
"""timm's letters behind a number of layers: ResNet-C, ResNet-D (He et al. 2018, arXiv:1812.01187),
a wide stem, and ResNet-D with a tiered stem."""

SE: Part = {"attention": SqueezeExcite}
ECA: Part = {"attention": EfficientAttention}

AA: Part = {"stage": AveragedStage, "stem_pool": AveragedStem}
BLUR: Part = {"stage": BlurredStage, "stem_pool": BlurredStem}
"""Against aliasing (Zhang 2019, arXiv:1904.11486)."""

RS: Part = {**D, **SE, "reduction": 4, "stem_pool": StridedStem}
"""ResNet-RS (Bello et al. 2021, arXiv:2103.07579)."""

SENET: Part = {**S, **SE, **_groups(64, 4), "narrowing": 2, "projection": 3}
"""SENet-154 (Hu et al. 2018, arXiv:1709.01507)."""

V2: Part = {"block": PreActivation, "stem": BareStem7x7, "last": LastNorm}
V2_BASIC: Part = {**V2, "block": PreActivationBasic}
V2_D: Part = {"stem": BareDeepStem, "shortcut": PooledProjection}
"""ResNet V2 (He et al. 2016, arXiv:1603.05027), with the stride in the 3x3 as in timm."""

GN: Part = {"norm": GroupNorm}
BIT: Part = {**V2, **GN, "stem": FramedStem7x7, "layer": StandardisedLayer}
"""Norms in groups (Wu & He 2018, arXiv:1803.08494), and BiT (Kolesnikov et al. 2019,
arXiv:1912.11370)."""


class _ByName(dict[str, Spec]):
    """A mapping whose KeyError says which names may have been meant."""

    def __missing__(self, name: object) -> Spec:
        raise KeyError(f"unknown network {name!r}; {suggestion(str(name), self)}")


_SPECS = _ByName(
    {
        **_family("resnet{}", 18, 26, 34, 50, 101, 152, 200),
        **_family("resnet{}_v1", 50, 101, 152, block=BottleneckV1),
        **_family("resnet{}c", 50, 101, 152, **C),
        **_family("resnet{}d", 18, 26, 34, 50, 101, 152, 200, **D),
        **_family("resnet{}s", 50, 101, 152, **S),
        **_family("resnet{}t", 10, 14, 26, 50, **T),
        **_family("wide_resnet{}_2", 50, 101, group_width=128),
        **_family("resnext{}_32x4d", 50, 101, **_groups(32, 4)),
        **_family("resnext{}d_32x4d", 50, **D, **_groups(32, 4)),
        **_family("resnext{}_32x8d", 101, **_groups(32, 8)),
        **_family("resnext{}_32x16d", 101, **_groups(32, 16)),
        **_family("resnext{}_32x32d", 101, **_groups(32, 32)),
        **_family("resnext{}_64x4d", 101, **_groups(64, 4)),
        **_family("seresnet{}", 18, 34, 50, 101, 152, **SE),
        **_family("seresnet{}d", 152, 200, 269, **D, **SE),
        **_family("seresnet{}t", 50, **T, **SE),
        **_family("seresnext{}_32x4d", 50, 101, **SE, **_groups(32, 4)),
        **_family("seresnext{}d_32x4d", 26, **D, **SE, **_groups(32, 4)),
        **_family("seresnext{}t_32x4d", 26, **T, **SE, **_groups(32, 4)),
        **_family("seresnext{}_32x8d", 101, **SE, **_groups(32, 8)),
        **_family("seresnext{}d_32x8d", 101, **D, **SE, **_groups(32, 8)),
        **_family("seresnext{}_64x4d", 101, **SE, **_groups(64, 4)),
        **_family("senet154", 152, **SENET),
        **_family("ecaresnet{}d", 50, 101, 200, 269, **D, **ECA),
        **_family("ecaresnet{}t", 26, 50, **T, **ECA),
        **_family("ecaresnext{}t_32x4d", 26, 50, **T, **ECA, **_groups(32, 4)),
        "ecaresnetlight": Spec(Bottleneck, (1, 1, 11, 3), shortcut=PooledProjection, **ECA),
        **_family("resnetaa{}", 50, **AA),
        **_family("resnetaa{}d", 34, 50, 101, **D, **AA),
        **_family("seresnetaa{}d", 50, **D, **SE, **AA),
        **_family("seresnextaa{}d_32x8d", 101, **D, **SE, **AA, **_groups(32, 8)),
        **_family("seresnextaa{}d_32x8d", 201, **D, **WIDE, **SE, **AA, **_groups(32, 8)),
        **_family("resnetblur{}", 18, 50, **BLUR),
        **_family("resnetblur{}d", 50, 101, **D, **BLUR),
        **_family("resnetrs{}", 50, 101, 152, 200, 270, 350, 420, **RS),
        **_family("resnet{}_gn", 50, **GN),
        **_family("resnetv2_{}", 18, 34, **V2_BASIC),
        **_family("resnetv2_{}", 50, 101, 152, **V2),
        **_family("resnetv2_{}d", 18, 34, **{**V2_BASIC, **V2_D}),
        **_family("resnetv2_{}d", 50, 101, 152, **{**V2, **V2_D}),
        **_family("resnetv2_{}t", 50, **{**V2, **V2_D}, stem_widths=(24, 32, 64)),
        **_family("resnetv2_{}d_gn", 50, **{**V2, **V2_D, **GN}),
        **_family("resnetv2_{}x1_bit", 50, 101, **BIT),
        **_family("resnetv2_{}x2_bit", 152, **BIT, width=128),
        **_family("resnetv2_{}x3_bit", 50, 101, **BIT, width=192),
        **_family("resnetv2_{}x4_bit", 152, **BIT, width=256),
        **_family("plain{}", 18, 34, shortcut=NoShortcut),
        **{f"resnet{6 * n + 2}": _cifar(n, ZeroPad) for n in (3, 5, 7, 9, 18, 200)},
        **{f"resnet{6 * n + 2}_centred": _cifar(n, CentredZeroPad) for n in (3, 5, 7, 9, 18, 200)},
        **{f"resnet{6 * n + 2}b": _cifar(n, Projection) for n in (3, 5, 7, 9, 18, 200)},
        **{f"plain{6 * n + 2}": _cifar(n, NoShortcut) for n in (3, 5, 7, 9, 18)},
    }
)
SPECS: Mapping[str, Spec] = MappingProxyType(_SPECS)
"""Every member by name. Where torchvision or timm has the member, the name is theirs.

Members with `_v1` in the name stride in the first 1x1 convolution. resnet20 to resnet1202 are the
paper's for CIFAR, with shortcuts of option A, or of option B if the name ends in `b`. With
`_centred` in the name, half of option A's zeros stand before the channels, as in akamaster's code.
"""

RESNET18, RESNET34, RESNET50, RESNET101, RESNET152 = (
    SPECS[f"resnet{n}"] for n in (18, 34, 50, 101, 152)
)
