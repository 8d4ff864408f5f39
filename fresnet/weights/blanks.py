"""Networks of nodes alone, with a blank in each leaf's place."""

from typing import Any

import torch
from torch import Tensor

from fresnet.network.nodes import (
    Bias,
    FrozenNorm,
    Layer,
    NoNorm,
    Norm,
    Normed,
    NormStats,
    Plan,
    Unit,
    attention_of,
)

BLANK: Tensor = torch.empty(1, 1, 1, 1, dtype=torch.float32, device="meta")
"""What stands in a leaf's place. A network of blanks passes the checks of types."""


class Blanks:
    """Draws nodes with blanks for leaves."""

    def layer(
        self, channels: int, out: int, side: int, groups: int = 1, *, last: bool = False
    ) -> Layer:
        return Layer(BLANK, Norm(BLANK, BLANK))

    def biased(self, channels: int, out: int) -> Layer:
        return Layer(BLANK, Bias(BLANK))

    def bare(self, channels: int, out: int, side: int, *, last: bool = False) -> Layer:
        return Layer(BLANK, NoNorm())

    def row(self, length: int) -> Layer:
        return Layer(BLANK, NoNorm())

    def normed(self, channels: int) -> Normed:
        return Normed(Norm(BLANK, BLANK))


def blank_stats(unit: Unit) -> NormStats | tuple[()]:
    """The statistics beside a unit, with blanks for leaves."""
    return NormStats(BLANK, BLANK) if isinstance(unit.norm, Norm | FrozenNorm) else ()


def blank_block(block: type[Any], shortcut: type[Any], attention: type[Any]) -> Any:
    """A block of these types."""
    return block.draw(Blanks(), Plan(0, 0, 0, 1, shortcut, attention))


def as_drawn(block: Any) -> Any:
    """The block as `init` draws those of its types, with blanks for leaves."""
    return blank_block(type(block), type(block.shortcut), type(attention_of(block)))
