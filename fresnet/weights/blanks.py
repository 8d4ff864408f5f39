"""Networks of nodes alone, with a blank in each leaf's place."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fresnet.network.nodes import (
    BATCH_NORMS,
    Bias,
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


@dataclass(frozen=True)
class Blanks:
    """Draws nodes with blanks for leaves."""

    kind: type[Any] = Layer
    norm: type[Any] = Norm

    def layer(
        self, channels: int, out: int, side: int, groups: int = 1, *, last: bool = False
    ) -> Layer:
        unit: Layer = self.kind(BLANK, self.norm(BLANK, BLANK))
        return unit

    def biased(self, channels: int, out: int) -> Layer:
        return Layer(BLANK, Bias(BLANK))

    def bare(self, channels: int, out: int, side: int, *, last: bool = False) -> Layer:
        unit: Layer = self.kind(BLANK, NoNorm())
        return unit

    def row(self, length: int) -> Layer:
        return Layer(BLANK, NoNorm())

    def normed(self, channels: int) -> Normed:
        return Normed(self.norm(BLANK, BLANK))


BLANKS = Blanks()


def blank_stats(unit: Unit) -> NormStats | tuple[()]:
    """The statistics beside a unit, with blanks for leaves."""
    return NormStats(BLANK, BLANK) if isinstance(unit.norm, BATCH_NORMS) else ()


def blank_block(
    block: type[Any], shortcut: type[Any], attention: type[Any], blanks: Blanks = BLANKS
) -> Any:
    """A block of these types."""
    return block.draw(blanks, Plan(0, 0, 0, 1, shortcut, attention))


def as_drawn(block: Any, blanks: Blanks = BLANKS) -> Any:
    """The block as `init` draws those of its types, with blanks for leaves."""
    return blank_block(type(block), type(block.shortcut), type(attention_of(block)), blanks)
