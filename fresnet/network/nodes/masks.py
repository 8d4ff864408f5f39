"""Masks: what is dropped of a batch, as nodes around blocks and heads.

A mask is of the images of one batch. So it stands in `weights` alone, and while they are run alone:
nothing stands beside it in `stats`, and whatever keeps a network refuses it.
"""

from typing import Any, NamedTuple

from torch import Tensor

from fresnet.network.nodes.protocols import Block, Grid, Regime


class DropPath(NamedTuple):
    """A block whose branch counts `keep` times, `[b]`, for each image: stochastic depth.

        y = keep * branch(x) + shortcut(x)

    Source: Huang et al. 2016, arXiv:1603.09382, Eq. 2.
    """

    block: Block | Any
    keep: Tensor

    def run(self, x: Tensor, grid: Grid, do: Regime) -> tuple[Tensor, Any]:
        """The activations, and what the block's units left behind, without the mask."""
        run: tuple[Tensor, Any] = self.block.run(x, grid, do.dropping(self.keep))
        return run


class Dropout(NamedTuple):
    """A head that sees each feature `keep` times, `[b c]`.

    Source: Srivastava et al. 2014, JMLR 15, Sec. 4.
    """

    head: Any  # a `Head`
    keep: Tensor

    def run(self, x: Tensor, do: Regime) -> Tensor:
        return do.head(self.head, do.drop(do.mean(x), self.keep))


MASKS = (DropPath, Dropout)


def bare(node: Any) -> Any:
    """The node without its mask, if it has one."""
    return node[0] if isinstance(node, MASKS) else node
