"""curvlinops, a library for second-order methods, takes fresnet's functions unpatched.

It knows parameters by their names in a module, so a module of a few lines holds the leaves. The
network that it differentiates is `forward` or `forward_train` as it is.
"""

from collections.abc import Callable

import pytest
import torch
from assertions import assert_close
from curvlinops import GGNLinearOperator, HessianLinearOperator
from torch import Tensor, nn
from torch.func import grad, jvp, vjp

import fresnet
from fresnet import Params, tree
from fresnet.network.nodes import Bottleneck, Weights

PARAMS = fresnet.init(
    0, fresnet.Spec(Bottleneck, (1, 1), width=3), num_classes=4, dtype=torch.float64
)
X = torch.randn(5, 3, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 0])
RUN: dict[str, Callable[[Params, Tensor], Tensor]] = {
    "forward": fresnet.forward,
    "forward_train": lambda params, x: fresnet.forward_train(params, x)[0],
}


class AsModule(nn.Module):
    def __init__(self, run: Callable[[Params, Tensor], Tensor], params: Params) -> None:
        super().__init__()
        self.run, self.like = run, params
        self.leaves = nn.ParameterList(tree.leaves(params.weights))

    def forward(self, x: Tensor) -> Tensor:
        weights = tree.unflatten(self.like.weights, list(self.leaves))
        return self.run(self.like._replace(weights=weights), x)


@pytest.mark.parametrize("name", RUN)
def test_hessian_and_ggn_products_equal_ours(name: str) -> None:
    weights, stats = PARAMS
    loss = nn.CrossEntropyLoss()

    def logits(weights: Weights) -> Tensor:
        return RUN[name](Params(weights, stats), X)

    model = AsModule(RUN[name], PARAMS)
    generator = torch.Generator().manual_seed(1)
    v = tree.map(lambda w: torch.randn(w.shape, generator=generator, dtype=w.dtype), weights)

    def whole(weights: Weights) -> Tensor:
        value: Tensor = loss(logits(weights), Y)
        return value

    def of_logits(z: Tensor) -> Tensor:
        value: Tensor = loss(z, Y)
        return value

    _, hessian_product, *_ = jvp(grad(whole), (weights,), (v,))
    value, pull, *_ = vjp(logits, weights)
    _, tangent, *_ = jvp(logits, (weights,), (v,))
    _, curved, *_ = jvp(grad(of_logits), (value,), (tangent,))
    (ggn_product,) = pull(curved)
    for operator, expected in (
        (HessianLinearOperator, hessian_product),
        (GGNLinearOperator, ggn_product),
    ):
        theirs = operator(model, loss, list(model.parameters()), [(X, Y)])
        assert_close(theirs @ tree.ravel(v), tree.ravel(expected), 1e-9, operator.__name__)
