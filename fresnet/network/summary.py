"""The layer table of a network."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from itertools import groupby
from textwrap import wrap
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fresnet import tree
from fresnet.network.check import check_params, first_conv
from fresnet.network.nodes import (
    LAYERS,
    Geometry,
    Grid,
    Head,
    Pair,
    Params,
    attention_of,
    blocks_of,
    grids,
    paired,
    units_of,
)
from fresnet.network.norm import inference_norm
from fresnet.network.options import check_image_size
from fresnet.network.regimes import Composed


class Row(NamedTuple):
    """A layer, or several consecutive blocks that are alike.

    `parameters` is the number in one block. `multiply_adds` is the number in its convolutions, or
    in the head, for one image.
    """

    layer: str
    output: tuple[int, ...]  # [c h w], or [k] for the head, [c] for its absence
    blocks: int
    parameters: int
    multiply_adds: int
    description: str


class Summary(NamedTuple):
    """The layers of a network, first to last. `str` makes a table of them, 80 columns wide."""

    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        return sum(row.blocks * row.parameters for row in self.rows)

    @property
    def multiply_adds(self) -> int:
        return sum(row.blocks * row.multiply_adds for row in self.rows)

    def __str__(self) -> str:
        cells = self._cells("MACs (M)", "{} x".format, lambda n: f"{n / 1e6:,.1f}")
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)][:-1]
        margin = sum(widths) + 2 * len(widths)
        lines = []
        for *left, description in cells:
            first, *rest = _wrap(description, max(16, 80 - margin))
            pad = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust)
            columns = [f(cell, width) for f, cell, width in zip(pad, left, widths, strict=True)]
            lines.append("  ".join([*columns, first]).rstrip())
            lines += [" " * margin + line for line in rest]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])

    def markdown(self) -> str:
        """The table in Markdown, with every digit of the multiply-adds."""
        header, *rows = (
            f"| {' | '.join(cells)} |" for cells in self._cells("multiply-adds", str, "{:,}".format)
        )
        return "\n".join([header, "| --- | --- | ---: | ---: | ---: | --- |", *rows])

    def _cells(
        self, unit: str, blocks: Callable[[int], str], multiply_adds: Callable[[int], str]
    ) -> list[list[str]]:
        header = ["layer", "output", "blocks", "parameters", unit, "each block"]
        rows = [
            [
                row.layer,
                "x".join(map(str, row.output)),
                blocks(row.blocks),
                f"{row.parameters:,}",
                multiply_adds(row.multiply_adds),
                row.description,
            ]
            for row in self.rows
        ]
        total = ["total", "", "", f"{self.parameters:,}", multiply_adds(self.multiply_adds), ""]
        return [header, *rows, total]


def summary(params: Params, image_size: int | tuple[int, int] = 224) -> Summary:
    """The layers of a network, and their outputs and multiply-adds for one image.

    Blocks of a stage that are alike share a row, with the parameters and multiply-adds of each.

    >>> import fresnet
    >>> params = fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=10, device="meta")
    >>> print(fresnet.summary(params, image_size=32))
    layer       output    blocks  parameters  MACs (M)  each block
    --------------------------------------------------------------------------
    Stem3x3     16x32x32     1 x         464       0.4  3x3 16
    BasicBlock  16x32x32     3 x       4,672       4.7  3x3 16, 3x3 16
    BasicBlock  32x16x16     1 x      13,952       3.5  3x3 32, 3x3 32
                                                        stride 2, zero padding
    BasicBlock  32x16x16     2 x      18,560       4.7  3x3 32, 3x3 32
    BasicBlock  64x8x8       1 x      55,552       3.5  3x3 64, 3x3 64
                                                        stride 2, zero padding
    BasicBlock  64x8x8       2 x      73,984       4.7  3x3 64, 3x3 64
    Head        10           1 x         650       0.0  average pool, 64 to 10
    --------------------------------------------------------------------------
    total                            269,722      40.6

    Args:
      params: the network, on any device.
      image_size: the side of a square, or height and width, in pixels.
    Returns:
      A `Summary` with its `rows`, and with `parameters` and `multiply_adds` in total. `markdown()`
      is the table in Markdown.
    Raises:
      FresnetError: if params is not a network, or if image_size is not such a size.
    """
    check_params("summary", params)
    size = check_image_size("summary", image_size)
    weights, stats = tree.map(_unfilled, params)
    at, conv, do = paired(weights, stats), first_conv(weights), _Counting()
    x = conv.new_empty((0, conv.shape[1], *size))
    words = ", ".join(filter(None, [_convolutions(units_of(weights.stem)), weights.stem.note()]))
    x, row = _measure(weights.stem, partial(at.stem.run, x), do, words)
    rows = [row]
    stages = zip(weights.stages, at.stages, grids(weights.stages), strict=True)
    for stage, stage_at, stage_grids in stages:
        stage_rows = []
        each = zip(blocks_of(stage), blocks_of(stage_at), stage_grids, strict=True)
        last = ""
        for block, block_at, grid in each:
            like = f"{tree.map(lambda leaf: tuple(leaf.shape), block)}, {grid}, {x.shape}"
            if like != last:  # else it is the block before again
                run = partial(block_at.run, x, grid)
                x, row = _measure(block, run, do, _describe_block(block, grid))
            stage_rows.append(row)
            last = like
        rows += [row._replace(blocks=len(list(alike))) for row, alike in groupby(stage_rows)]
    if tree.leaves(weights.last):
        x, row = _measure(weights.last, partial(at.last.run, x), do, weights.last.note())
        rows.append(row)
    _, row = _measure(weights.head, partial(_run_head, weights.head, x), do, weights.head.note())
    return Summary((*rows, row))


class _Counting(Composed):
    """Inference that counts the multiply-adds of an image. Of none it computes nothing else."""

    def __init__(self) -> None:
        super().__init__(inference_norm)
        self.multiply_adds = 0

    def layer(
        self,
        at: Pair,
        x: Tensor,
        how: Geometry,
        *,
        add: Tensor | None = None,
        relu: bool = True,
    ) -> tuple[Tensor, Any]:
        y, seen = super().layer(at, x, how, add=add, relu=relu)
        self.multiply_adds += y.shape[1:].numel() * at.unit.conv[0].numel()
        return y, seen

    def head(self, at: Head, x: Tensor) -> Tensor:
        self.multiply_adds += at.weight.numel()
        return super().head(at, x)


def _unfilled(leaf: Tensor) -> Tensor:
    """As large, on the CPU: on meta, a network's first run imports PyTorch's compilers."""
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu")


def _run_head(head: Any, x: Tensor, do: Composed) -> tuple[Tensor, tuple[()]]:
    return head.run(x, do), ()


def _measure(
    node: object,
    run: Callable[[_Counting], tuple[Tensor, object]],
    do: _Counting,
    description: str,
) -> tuple[Tensor, Row]:
    """The node's output and its row in the table."""
    before = do.multiply_adds
    with torch.no_grad():
        y, _ = run(do)
    parameters = sum(leaf.numel() for leaf in tree.leaves(node))
    name, output = type(node).__name__, tuple(y.shape[1:])
    return y, Row(name, output, 1, parameters, do.multiply_adds - before, description)


def _describe_block(block: Any, grid: Grid) -> str:
    notes = [
        grid.pooled.note() if grid.pooled else "stride 2" if grid.stride == 2 else "",
        f"dilation {grid.dilation_after}" if grid.dilation_after > 1 else "",
        attention_of(block).note(),
        block.shortcut.note(),
    ]
    return "; ".join(filter(None, [_convolutions(block), ", ".join(filter(None, notes))]))


def _convolutions(node: Iterable[object]) -> str:
    """The convolutions of a node's layers in words, such as "1x1 64, 3x3 64, 1x1 256"."""
    found, channels = [], None
    for layer in node:
        if isinstance(layer, LAYERS):
            o, c, height, width = layer.conv.shape
            groups = 1 if channels is None else channels // c
            found.append(f"{height}x{width} {o}" + (f" in {groups} groups" if groups > 1 else ""))
            channels = o
    return ", ".join(found)


def _wrap(description: str, width: int) -> list[str]:
    """The description in lines. No line ends between a kernel and its channels."""
    parts = re.sub(r"(\dx\d) ", r"\1_", description).split("; ")
    return [line.replace("_", " ") for part in parts for line in wrap(part, width) or [""]]
