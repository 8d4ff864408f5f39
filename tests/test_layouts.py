"""How leaves lie in memory changes no result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, relaid, targets, tiny_params, training_images
from torch import Tensor
from torch.func import grad
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import Params, optim, tree
from fresnet.training import make_train_step, start

LAW = optim.sgd(0.1, momentum=0.9, weight_decay=1e-3)


def by_torch_func(params: Params, x: Tensor, y: Tensor) -> Any:
    def loss(weights: Any) -> Tensor:
        logits, _ = fresnet.forward_train(params._replace(weights=weights), x)
        return cross_entropy(logits, y)

    return grad(loss)(params.weights)


def by_autograd(params: Params, x: Tensor, y: Tensor) -> Any:
    leaves = [leaf.detach().requires_grad_() for leaf in tree.leaves(params.weights)]
    weights = tree.unflatten(params.weights, leaves)
    logits, _ = fresnet.forward_train(params._replace(weights=weights), x)
    return torch.autograd.grad(cross_entropy(logits, y), leaves)


def by_step(params: Params, x: Tensor, y: Tensor) -> Any:
    return make_train_step(LAW)(start(params, LAW), (x, y))[0].params


RESULTS: dict[str, Callable[[Params, Tensor, Tensor], Any]] = {
    "forward": lambda params, x, y: fresnet.forward(params, x),
    "forward_train": lambda params, x, y: fresnet.forward_train(params, x),
    "torch.func": by_torch_func,
    "autograd": by_autograd,
    "step": by_step,
    "per_sample_grads": lambda params, x, y: fresnet.per_sample_grads(
        cross_entropy, params, x, y, norms="coupled"
    ),
    "clipped_grads": lambda params, x, y: fresnet.clipped_grads(
        cross_entropy, params, x, y, max_norm=0.1
    ),
    "fold": lambda params, x, y: fresnet.forward(fresnet.fold(params), x),
    "clones": lambda params, x, y: fresnet.forward(tree.map(torch.clone, params), x),
}


TOLERANCES = {torch.float64: 1e-9, torch.float32: 0.03}
"""Two kernels' rounding in gradients, relative to the norm of the whole."""


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", RESULTS)
@examples(25)
@given(data=st.data(), x=training_images())
def test_results_do_not_depend_on_strides(
    name: str, dtype: torch.dtype, data: st.DataObject, x: Tensor
) -> None:
    params = data.draw(tiny_params(headed=name == "step"))
    params, x = tree.map(lambda leaf: leaf.to(dtype), params), x.to(dtype)
    views = data.draw(relaid(params))
    plain = tree.map(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), views)
    y = targets(params, x)
    found, expected = (tree.ravel(RESULTS[name](one, x, y)) for one in (views, plain))
    assert (found - expected).norm() <= TOLERANCES[dtype] * (expected.norm() + 1e-6)
