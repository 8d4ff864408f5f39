"""The networks that `init` builds, with one line for each member of the family."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from fresnet.errors import FresnetError, shown
from fresnet.network.nodes import (
    ATTENTIONS,
    BARE_STEMS,
    BLOCKS,
    LASTS,
    LAYERS,
    PLACES,
    POOLED,
    POOLED_STEMS,
    PREACTIVATIONS,
    SHORTCUTS,
    STEMS,
    AveragedStage,
    AveragedStem,
    BareDeepStem,
    BareStem7x7,
    BasicBlock,
    Block,
    BlurredStage,
    BlurredStem,
    Bottleneck,
    BottleneckV1,
    CentredZeroPad,
    DeepStem,
    EfficientAttention,
    FramedStem7x7,
    GroupNorm,
    Identity,
    Last,
    LastNorm,
    Layer,
    NoAttention,
    NoLastNorm,
    Norm,
    NoShortcut,
    Plan,
    PooledProjection,
    PreActivation,
    PreActivationBasic,
    Projection,
    SqueezeExcite,
    StandardisedLayer,
    Stem,
    Stem3x3,
    Stem7x7,
    ZeroPad,
)
from fresnet.numbers import as_integer


@dataclass(frozen=True)
class Spec:
    """A network before it has weights.

    Args:
      block: the type of every block, such as `fresnet.nodes.Bottleneck`.
      depths: the number of blocks in each stage.
      width: the channels that the stem puts out; each stage after the first doubles them.
      stem: the type of the stem.
      shortcut: the type of the shortcuts that change channels or size. The others are `Identity`.
        `NoShortcut` replaces all of them, which makes a plain network.
      last: the type of the node before the head, such as `LastNorm` in ResNet V2.
      attention: the type of the node that changes a block's last result before the sum.
      groups: the groups of a bottleneck's 3x3 convolution, which is ResNeXt's cardinality
        (Xie et al. 2017, arXiv:1611.05431).
      group_width: the channels of a group for each 64 channels of the stage.
      stage: the type of the stages after the first: `tuple` if their first convolution strides,
        `AveragedStage` or `BlurredStage` if they pool against aliasing.
      stem_pool: what pools in the stem instead of the maximum, such as `AveragedStem`; or None.
      layer: the type of the layers of stem, blocks and shortcuts: `Layer` or `StandardisedLayer`.
      norm: the type of the norms: `Norm` or `GroupNorm`.
    Raises:
      FresnetError: if a type is none of `fresnet.nodes` or does not go with the block's, if a
        number is not positive, if a basic block is to be grouped or widened, or if a convolution
        would have no channels.
    """

    block: type[Block] = Bottleneck
    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    stem: type[Stem] = Stem7x7
    shortcut: type[Any] = Projection
    last: type[Last] = NoLastNorm
    attention: type[Any] = NoAttention
    groups: int = 1
    group_width: int = 64
    stage: type[Any] = tuple
    stem_pool: type[Any] | None = None
    layer: type[Any] = Layer
    norm: type[Any] = Norm

    def __post_init__(self) -> None:
        changing = tuple(kind for kind in SHORTCUTS if kind is not Identity)
        for field, kinds in (
            ("block", BLOCKS),
            ("stem", tuple(kind for kind in STEMS if kind not in POOLED_STEMS)),
            ("shortcut", changing),
            ("last", LASTS),
            ("attention", ATTENTIONS),
            ("stage", (tuple, *POOLED)),
            ("stem_pool", (None, *POOLED_STEMS)),
            ("layer", LAYERS),
            ("norm", (Norm, GroupNorm)),
        ):
            if getattr(self, field) not in kinds:
                names = " or ".join(getattr(kind, "__name__", "None") for kind in kinds)
                raise FresnetError(
                    f"Spec expects {field} {names}; got {shown(getattr(self, field))}"
                )
        sizes = [as_integer(n) for n in (self.width, self.groups, self.group_width)]
        depths = [as_integer(n) for n in self.depths] if isinstance(self.depths, tuple) else []
        if not depths or not all(size is not None and size > 0 for size in (*sizes, *depths)):
            fields = ("depths", "width", "groups", "group_width")
            got = ", ".join(f"{field} {shown(getattr(self, field))}" for field in fields)
            raise FresnetError(
                "Spec expects depths to be a tuple of positive integers, and width, groups and "
                f"group_width to be positive integers; got {got}"
            )
        for field, size in zip(("width", "groups", "group_width"), sizes, strict=True):
            object.__setattr__(self, field, size)
        object.__setattr__(self, "depths", tuple(depths))
        if self.attention not in PLACES[self.block].get("attention", (NoAttention,)):
            raise FresnetError(
                f"Spec expects no attention in a {self.block.__name__}; got {shown(self.attention)}"
            )
        if self.stem in BARE_STEMS and self.block not in PREACTIVATIONS:
            raise FresnetError(
                f"Spec expects blocks that begin with a norm after {self.stem.__name__}, such as "
                f"PreActivation; got {shown(self.block)}"
            )
        if self.stem_pool and self.stem not in PLACES[self.stem_pool]["stem"]:
            raise FresnetError(
                f"Spec expects a stem that pools with {self.stem_pool.__name__}; "
                f"got {shown(self.stem)}"
            )
        if self.block in (BasicBlock, PreActivationBasic) and (self.groups, self.group_width) != (
            1,
            64,
        ):
            raise FresnetError(f"Spec expects groups and group_width of bottlenecks; got {self}")
        if self.inner_width(0) < 1:
            raise FresnetError(f"Spec expects at least one channel in each group; got {self}")
        if self.stem in (DeepStem, BareDeepStem) and self.width < 2:
            raise FresnetError(
                f"Spec expects width to be at least 2 with a deep stem; got {self.width}"
            )
        if self.out_channels(len(self.depths)) >= 2**31:
            raise FresnetError(f"Spec expects fewer stages or a smaller width; got {self}")

    def inner_width(self, stage: int) -> int:
        """The channels between the convolutions of a block in this stage, counted from 0."""
        return self.groups * (self.group_width * (self.width << stage) // 64)

    def out_channels(self, stage: int) -> int:
        """The channels that a block in this stage puts out."""
        return self.block.expansion() * (self.width << stage)

    def plan(self, stage: int, channels: int, *, strides: bool) -> Plan:
        """What a node needs to draw a block in this stage, for an input of so many channels."""
        out, shortcut = self.out_channels(stage), self.shortcut
        if channels == out and not strides and shortcut is not NoShortcut:
            shortcut = Identity
        inner = self.inner_width(stage)
        return Plan(channels, inner, out, self.groups, shortcut, self.attention)


def _cifar(n: int, shortcut: type) -> Spec:
    """A network of the paper with 6n+2 layers for CIFAR, from its Sec. 4.2."""
    return Spec(BasicBlock, (n, n, n), width=16, stem=Stem3x3, shortcut=shortcut)


def _deep(block: type[Block], *depths: int, **more: Any) -> Spec:
    """ResNet-D (He et al. 2018, arXiv:1812.01187): a deep stem and pooled projections."""
    return Spec(block, depths, stem=DeepStem, shortcut=PooledProjection, **more)


def _averaged(spec: Spec) -> Spec:
    """timm's resnetaa (Zhang 2019, arXiv:1904.11486, against aliasing)."""
    return replace(spec, stage=AveragedStage, stem_pool=AveragedStem)


def _blurred(spec: Spec) -> Spec:
    """timm's resnetblur."""
    return replace(spec, stage=BlurredStage, stem_pool=BlurredStem)


def _v2(block: type[Block], *depths: int, stem: type[Stem] = BareStem7x7, **more: Any) -> Spec:
    """ResNet V2 (He et al. 2016, arXiv:1603.05027), with the stride in the 3x3 as in timm."""
    shortcut = PooledProjection if stem is BareDeepStem else Projection
    return Spec(block, depths, stem=stem, shortcut=shortcut, last=LastNorm, **more)


def _bit(width: int, *depths: int) -> Spec:
    """BiT (Kolesnikov et al. 2019, arXiv:1912.11370), `width` times as wide as ResNet V2."""
    more = {"width": 64 * width, "layer": StandardisedLayer, "norm": GroupNorm}
    return _v2(PreActivation, *depths, stem=FramedStem7x7, **more)


RESNET18 = Spec(BasicBlock, (2, 2, 2, 2))
RESNET34 = Spec(BasicBlock, (3, 4, 6, 3))
RESNET50 = Spec(Bottleneck, (3, 4, 6, 3))
RESNET101 = Spec(Bottleneck, (3, 4, 23, 3))
RESNET152 = Spec(Bottleneck, (3, 8, 36, 3))

SPECS: Mapping[str, Spec] = MappingProxyType(
    {
        "resnet18": RESNET18,
        "resnet34": RESNET34,
        "resnet50": RESNET50,
        "resnet101": RESNET101,
        "resnet152": RESNET152,
        "resnet50_v1": Spec(BottleneckV1, (3, 4, 6, 3)),
        "resnet101_v1": Spec(BottleneckV1, (3, 4, 23, 3)),
        "resnet152_v1": Spec(BottleneckV1, (3, 8, 36, 3)),
        "resnext50_32x4d": Spec(Bottleneck, (3, 4, 6, 3), groups=32, group_width=4),
        "resnext101_32x8d": Spec(Bottleneck, (3, 4, 23, 3), groups=32, group_width=8),
        "resnext101_64x4d": Spec(Bottleneck, (3, 4, 23, 3), groups=64, group_width=4),
        "wide_resnet50_2": Spec(Bottleneck, (3, 4, 6, 3), group_width=128),
        "wide_resnet101_2": Spec(Bottleneck, (3, 4, 23, 3), group_width=128),
        "resnet18d": _deep(BasicBlock, 2, 2, 2, 2),
        "resnet34d": _deep(BasicBlock, 3, 4, 6, 3),
        "resnet26d": _deep(Bottleneck, 2, 2, 2, 2),
        "resnet50d": _deep(Bottleneck, 3, 4, 6, 3),
        "resnet101d": _deep(Bottleneck, 3, 4, 23, 3),
        "resnetaa34d": _averaged(_deep(BasicBlock, 3, 4, 6, 3)),
        "resnetaa50": _averaged(Spec(Bottleneck, (3, 4, 6, 3))),
        "resnetaa50d": _averaged(_deep(Bottleneck, 3, 4, 6, 3)),
        "resnetaa101d": _averaged(_deep(Bottleneck, 3, 4, 23, 3)),
        "resnetblur18": _blurred(Spec(BasicBlock, (2, 2, 2, 2))),
        "resnetblur50": _blurred(Spec(Bottleneck, (3, 4, 6, 3))),
        "resnetblur50d": _blurred(_deep(Bottleneck, 3, 4, 6, 3)),
        "resnetblur101d": _blurred(_deep(Bottleneck, 3, 4, 23, 3)),
        "seresnetaa50d": _averaged(_deep(Bottleneck, 3, 4, 6, 3, attention=SqueezeExcite)),
        "resnet50_gn": Spec(Bottleneck, (3, 4, 6, 3), norm=GroupNorm),
        "resnetv2_18": _v2(PreActivationBasic, 2, 2, 2, 2),
        "resnetv2_34": _v2(PreActivationBasic, 3, 4, 6, 3),
        "resnetv2_50": _v2(PreActivation, 3, 4, 6, 3),
        "resnetv2_101": _v2(PreActivation, 3, 4, 23, 3),
        "resnetv2_152": _v2(PreActivation, 3, 8, 36, 3),
        "resnetv2_18d": _v2(PreActivationBasic, 2, 2, 2, 2, stem=BareDeepStem),
        "resnetv2_34d": _v2(PreActivationBasic, 3, 4, 6, 3, stem=BareDeepStem),
        "resnetv2_50d": _v2(PreActivation, 3, 4, 6, 3, stem=BareDeepStem),
        "resnetv2_101d": _v2(PreActivation, 3, 4, 23, 3, stem=BareDeepStem),
        "resnetv2_152d": _v2(PreActivation, 3, 8, 36, 3, stem=BareDeepStem),
        "resnetv2_50d_gn": _v2(PreActivation, 3, 4, 6, 3, stem=BareDeepStem, norm=GroupNorm),
        "resnetv2_50x1_bit": _bit(1, 3, 4, 6, 3),
        "resnetv2_50x3_bit": _bit(3, 3, 4, 6, 3),
        "resnetv2_101x1_bit": _bit(1, 3, 4, 23, 3),
        "resnetv2_101x3_bit": _bit(3, 3, 4, 23, 3),
        "resnetv2_152x2_bit": _bit(2, 3, 8, 36, 3),
        "resnetv2_152x4_bit": _bit(4, 3, 8, 36, 3),
        "seresnet18": Spec(BasicBlock, (2, 2, 2, 2), attention=SqueezeExcite),
        "seresnet34": Spec(BasicBlock, (3, 4, 6, 3), attention=SqueezeExcite),
        "seresnet50": Spec(Bottleneck, (3, 4, 6, 3), attention=SqueezeExcite),
        "ecaresnet50d": _deep(Bottleneck, 3, 4, 6, 3, attention=EfficientAttention),
        "ecaresnet101d": _deep(Bottleneck, 3, 4, 23, 3, attention=EfficientAttention),
        "ecaresnetlight": Spec(
            Bottleneck,
            (1, 1, 11, 3),
            stem=Stem7x7,
            shortcut=PooledProjection,
            attention=EfficientAttention,
        ),
        "plain18": Spec(BasicBlock, (2, 2, 2, 2), shortcut=NoShortcut),
        "plain34": Spec(BasicBlock, (3, 4, 6, 3), shortcut=NoShortcut),
        **{f"resnet{6 * n + 2}": _cifar(n, ZeroPad) for n in (3, 5, 7, 9, 18, 200)},
        **{f"resnet{6 * n + 2}_centred": _cifar(n, CentredZeroPad) for n in (3, 5, 7, 9, 18, 200)},
        **{f"resnet{6 * n + 2}b": _cifar(n, Projection) for n in (3, 5, 7, 9, 18, 200)},
        **{f"plain{6 * n + 2}": _cifar(n, NoShortcut) for n in (3, 5, 7, 9, 18)},
    }
)
"""Every member by name. Where torchvision or timm has the member, the name is theirs.

Members with `_v1` in the name stride in the first 1x1 convolution. resnet20 to resnet1202 are the
paper's for CIFAR, with shortcuts of option A, or of option B if the name ends in `b`. With
`_centred` in the name, half of option A's zeros stand before the channels, as in akamaster's code.
"""
