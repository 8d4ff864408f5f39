"""Stages: blocks in a row, of which the first makes maps smaller, and how it does."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from fresnet.network.nodes.protocols import Geometry, Grid, Names, Regime


class DilatedStage(NamedTuple):
    """Blocks that double the dilation of what follows instead of striding."""

    blocks: tuple[Any, ...]


class AveragedStage(NamedTuple):
    """Blocks of which the first has a 2x2 average pooling after its convolution, and no stride.

    Source: timm's resnetaa; Zhang 2019, arXiv:1904.11486, Sec. 3, for the reason.
    """

    blocks: tuple[Any, ...]

    @staticmethod
    def pool(x: Tensor, do: Regime) -> Tensor:
        return do.average_pool(x)

    @staticmethod
    def names() -> Names:
        return Names(libraries=("timm",))

    @staticmethod
    def note() -> str:
        return "2x2 average pool, stride 2"


class BlurredStage(NamedTuple):
    """The same with a blur: every second value of a map that is smoothed first.

    Source: Zhang 2019, arXiv:1904.11486, Sec. 3.3, with the binomial kernel of side 3.
    """

    blocks: tuple[Any, ...]

    @staticmethod
    def pool(x: Tensor, do: Regime) -> Tensor:
        return do.blur(x)

    @staticmethod
    def names() -> Names:
        return Names(libraries=("timm",))

    @staticmethod
    def note() -> str:
        return "blur, stride 2"


POOLED = (AveragedStage, BlurredStage)
STAGES = (DilatedStage, *POOLED)
"""The types of stages, besides a bare tuple of blocks, whose first convolution strides."""


def blocks_of(stage: Any) -> tuple[Any, ...]:
    """The blocks of a stage of whatever type.

    >>> import fresnet
    >>> params = fresnet.dilate(fresnet.init(0, fresnet.RESNET18), output_stride=8)
    >>> len(fresnet.nodes.blocks_of(params.weights.stages[3]))
    2
    """
    blocks: tuple[Any, ...] = stage.blocks if isinstance(stage, STAGES) else stage
    return blocks


def with_blocks(stage: Any, blocks: Iterable[Any]) -> Any:
    """A stage of this one's type, of these blocks."""
    return type(stage)(tuple(blocks))


def grids(stages: tuple[Any, ...]) -> list[list[Grid]]:
    """How each block reads activations: from the second stage on, the first block strides."""
    found, stride, dilation = [], 1, 1
    for stage in stages:
        if isinstance(stage, DilatedStage):
            first = Grid(1, dilation, dilation * stride)
        else:
            pooled = stage if stride > 1 and isinstance(stage, POOLED) else None
            first = Grid(stride, dilation, dilation, pooled)
        stride, dilation = 2, first.dilation_after
        found.append([first] + [Grid(1, dilation, dilation)] * (len(blocks_of(stage)) - 1))
    return found


def strided(
    at: Any, x: Tensor, grid: Grid, do: Regime, *, dilation: int, groups: int = 1
) -> tuple[Tensor, Any]:
    """A layer with the block's stride: its convolution's, or that of a pooling after it."""
    if grid.pooled is None:
        return do.layer(at, x, Geometry(grid.stride, dilation, groups))
    y, seen = do.layer(at, x, Geometry(1, dilation, groups))
    return grid.pooled.pool(y, do), seen
