"""Every cell of the matrix of transforms, against the textbook network in eager float64."""

import re
from collections.abc import Callable
from typing import Any

import matrix
import pytest
import textbook
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import Params, tree
from fresnet.types import BasicBlock, Weights


def network(*depths: int) -> Params:
    spec = fresnet.Spec(BasicBlock, depths, width=4)
    params = fresnet.init(0, spec, num_classes=5, dtype=torch.float64)
    return params._replace(stats=tree.map(lambda s: 0.7 * s + 0.2, params.stats))


NETWORKS = {"eager": network(1, 1), "aot_eager": network(1, 1), "inductor": network(1)}
"""By mode: inductor compiles each convolution for seconds."""
X = torch.randn(6, 3, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 4, 0])


def loss_of(run: Callable[[Params, Tensor], Tensor], params: Params) -> matrix.Loss:
    def loss(weights: Weights, x: Tensor) -> Tensor:
        return cross_entropy(run(Params(weights, params.stats), x), Y[: len(x)])

    return loss


def run(cell: matrix.Cell) -> Any:
    dtype = getattr(torch, cell.dtype)
    weights, stats = NETWORKS[cell.mode]
    wide = torch.promote_types(dtype, torch.float32)
    params = Params(tree.map(lambda w: w.to(dtype), weights), tree.map(lambda s: s.to(wide), stats))
    forward = {
        "forward": fresnet.forward,
        "forward_train": lambda params, x: fresnet.forward_train(params, x)[0],
    }[cell.forward]
    call: Any = lambda w, x: matrix.TRANSFORMS[cell.transform](loss_of(forward, params), w, x)  # noqa: E731
    if cell.mode != "eager":
        torch.compiler.reset()
        call = torch.compile(call, backend=cell.mode, fullgraph=True)
    return call(params.weights, X.to(dtype))


def truth(cell: matrix.Cell) -> Any:
    train = cell.forward == "forward_train"
    params = NETWORKS[cell.mode]
    loss = loss_of(lambda params, x: textbook.logits(params, x, train), params)
    return matrix.TRANSFORMS[cell.transform](loss, params.weights, X)


def flat(result: Any) -> Tensor:
    return torch.cat([leaf.flatten().double() for leaf in tree.leaves(result)])


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch.fx under linearize, of compilation
@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, marks=[] if cell.mode == "eager" else [pytest.mark.slow])
        for cell in matrix.CELLS
    ],
    ids="-".join,
)
def test_cell(cell: matrix.Cell) -> None:
    limit = matrix.LIMITS.get((cell.transform, cell.mode))
    if limit is None:
        expected = flat(truth(cell))
        error = (flat(run(cell)) - expected).norm() / expected.norm()
        assert error <= matrix.BOUNDS[cell.dtype]
    else:
        with pytest.raises(Exception, match=re.escape(limit)):
            run(cell)


def test_the_document_holds_the_matrix() -> None:
    assert matrix.table() in matrix.DOCUMENT.read_text()
