"""What `init` builds: a network before it has weights."""

from dataclasses import dataclass
from typing import Any

from fresnet.errors import FresnetError, shown
from fresnet.network.nodes import (
    ATTENTIONS,
    BARE_STEMS,
    BLOCKS,
    DRAWN_NORMS,
    LASTS,
    LAYERS,
    PLACES,
    POOLED,
    POOLED_STEMS,
    PREACTIVATIONS,
    SHORTCUTS,
    STEMS,
    BareDeepStem,
    BasicBlock,
    Block,
    Bottleneck,
    CentredZeroPad,
    DeepStem,
    Identity,
    Last,
    Layer,
    NoAttention,
    NoLastNorm,
    Norm,
    NoShortcut,
    Plan,
    PreActivationBasic,
    Projection,
    SqueezeExcite,
    Stem,
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
      stem_widths: the channels that each convolution of the stem puts out, if they are not `width`,
        and half of it in a deep stem before the last.
      reduction: how many times fewer channels are inside a `SqueezeExcite` than the block puts out.
      narrowing: how many times fewer channels a bottleneck's first convolution puts out than its
        3x3; SENet-154 has 2 (Hu et al. 2018, arXiv:1709.01507).
      projection: the side of a projection's kernel where the block strides; SENet-154 has 3.
      layer: the type of the layers of stem, blocks and shortcuts: `Layer` or `StandardisedLayer`.
      norm: the type of the norms: `Norm` or `GroupNorm`.
    Raises:
      FresnetError: if a type is none of `fresnet.nodes` or does not go with the block's, if a
        number is not positive or is of what the network does not have, or if a convolution would
        have no channels.
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
    stem_widths: tuple[int, ...] = ()
    reduction: int = 16
    narrowing: int = 1
    projection: int = 1
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
            ("norm", DRAWN_NORMS),
        ):
            if not any(getattr(self, field) is kind for kind in kinds):
                names = " or ".join(getattr(kind, "__name__", "None") for kind in kinds)
                raise FresnetError(
                    f"Spec expects {field} {names}; got {shown(getattr(self, field))}"
                )
        numbers = {field: as_integer(getattr(self, field)) for field in NUMBERS}
        rows = {field: _integers(getattr(self, field)) for field in ("depths", "stem_widths")}
        all_numbers = (*numbers.values(), *rows["depths"], *rows["stem_widths"])
        if not rows["depths"] or not all(n is not None and n > 0 for n in all_numbers):
            raise FresnetError(
                "Spec expects depths and stem_widths to be tuples of positive integers, and "
                f"{', '.join(NUMBERS)} to be positive integers; got {self._numbers()}"
            )
        for field, value in {**numbers, **rows}.items():
            object.__setattr__(self, field, value)
        if self.attention not in PLACES[self.block].get("attention", (NoAttention,)):
            raise FresnetError(
                f"Spec expects no attention in a {self.block.__name__}; got {shown(self.attention)}"
            )
        if self.reduction != 16 and self.attention is not SqueezeExcite:
            raise FresnetError(f"Spec expects reduction of SqueezeExcite; got {self}")
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
        of_bottlenecks = self.groups, self.group_width, self.narrowing
        basic = self.block in (BasicBlock, PreActivationBasic)
        if basic and of_bottlenecks != (1, 64, 1):
            raise FresnetError(
                f"Spec expects groups, group_width and narrowing of bottlenecks; got {self}"
            )
        inner = [self.inner_width(stage) // self.groups for stage in range(len(self.depths))]
        if not all(width and width % self.narrowing == 0 for width in inner):
            raise FresnetError(
                "Spec expects at least one channel in each group, and narrowing to divide them; "
                f"got {self}"
            )
        if self.projection % 2 == 0 or (self.projection > 1 and self.shortcut is not Projection):
            raise FresnetError(
                "Spec expects projection to be the odd side of a kernel, and more than 1 with "
                f"Projection alone; got {self}"
            )
        layers = self.stem._fields  # type: ignore[attr-defined]
        if self.stem_widths and len(self.stem_widths) != len(layers):
            raise FresnetError(
                f"Spec expects stem_widths to be {len(layers)} numbers in a "
                f"{self.stem.__name__}; got {self.stem_widths}"
            )
        if self.stem in (DeepStem, BareDeepStem) and self.width < 2 and not self.stem_widths:
            raise FresnetError(
                f"Spec expects width to be at least 2 with a deep stem; got {self.width}"
            )
        stem_out, zeros = (self.stem_widths or (self.width,))[-1], (ZeroPad, CentredZeroPad)
        if self.shortcut in zeros and stem_out > self.out_channels(0):
            raise FresnetError(
                "Spec expects a stem of at most as many channels as the first stage has, where "
                f"shortcuts are of zeros; got {self}"
            )
        if max(self.out_channels(len(self.depths)), *self.stem_widths, 0) >= 2**31:
            raise FresnetError(f"Spec expects fewer stages or a smaller width; got {self}")

    def _numbers(self) -> str:
        fields = ("depths", "stem_widths", *NUMBERS)
        return ", ".join(f"{field}={shown(getattr(self, field))}" for field in fields)

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
        return Plan(
            channels,
            self.inner_width(stage),
            out,
            self.groups,
            shortcut,
            self.attention,
            narrowing=self.narrowing,
            side=self.projection if strides else 1,
            reduction=self.reduction,
        )


NUMBERS = ("width", "groups", "group_width", "reduction", "narrowing", "projection")


def _integers(value: object) -> tuple[int | None, ...]:
    return tuple(map(as_integer, value)) if isinstance(value, tuple) else (None,)
