"""Every cell of the matrix of transforms equals the textbook network in eager float64."""

import re

import matrix
import pytest
from torch._dynamo.exc import TorchRuntimeError, Unsupported


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch.fx's under linearize
@pytest.mark.filterwarnings("ignore:.*_prims_common.check:FutureWarning")  # the compiler's own
@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(
            cell,
            marks=[pytest.mark.long] * matrix.is_long(cell)
            + [pytest.mark.slow] * (cell[2:] != ("eager", "float64")),
        )
        for cell in matrix.CELLS
    ],
    ids="-".join,
)
def test_cell(cell: matrix.Cell) -> None:
    if cell.mode != "eager" and cell.transform in matrix.REFUSED:
        with pytest.raises((Unsupported, TorchRuntimeError), match=matrix.REFUSAL):
            matrix.error(cell)
    else:
        assert matrix.error(cell) <= matrix.BOUNDS[cell.dtype]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize(
    "forward", [pytest.param("forward", marks=pytest.mark.long), "forward_train"]
)
@pytest.mark.parametrize(
    "transform",
    [  # these trace for ten seconds
        pytest.param(name, marks=[pytest.mark.long] * (name in ("linearize", "make_fx")))
        for name in matrix.TRANSFORMS
    ],
)
@pytest.mark.parametrize("network", matrix.OTHERS)
def test_other_nodes_under_every_transform(network: str, transform: str, forward: str) -> None:
    cell = matrix.Cell(transform, forward, "eager", "float64")
    assert matrix.error(cell, network) <= matrix.BOUNDS["float64"]


@pytest.mark.slow
@pytest.mark.parametrize("network", matrix.OTHERS)
@pytest.mark.parametrize(
    "transform", ["grad", pytest.param("vmap of grad", marks=pytest.mark.long)]
)
def test_other_nodes_compiled(network: str, transform: str) -> None:
    cell = matrix.Cell(transform, "forward_train", "aot_eager", "float64")
    assert matrix.error(cell, network) <= matrix.BOUNDS["float64"]


def test_the_document_has_a_figure_within_bounds_for_every_cell() -> None:
    """Where a cell is not tested, the document has the reason instead."""
    rows = re.findall(r"^\| (.*) \|$", matrix.DOCUMENT.read_text(), re.M)
    found = {row.split(" | ")[0]: row.split(" | ") for row in rows}

    def mark(transform: str, mode: str, dtype: str) -> str:
        place = 1 + matrix.COLUMNS.index((mode, dtype))
        figure = found[transform][place]
        told = matrix.note(transform, mode, dtype)
        assert told is not None or float(figure) <= matrix.BOUNDS[dtype]
        return figure if told is None else told

    assert matrix.table(mark) in matrix.DOCUMENT.read_text()
