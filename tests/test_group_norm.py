"""Norms in groups have derivatives of every order, however a map is laid out and differentiated."""

from typing import Any

import pytest
import torch
from assertions import assert_close, assert_trees_close
from torch import Tensor
from torch.func import grad
from torch.nn import functional as F

import fresnet
from fresnet import FresnetError, Params, tree
from fresnet.network.group_norm import _composed, group_norm
from fresnet.network.nodes import Bottleneck, GroupNorm

GENERATOR = torch.Generator().manual_seed(0)
NORM = GroupNorm(*(torch.rand(2, 4, dtype=torch.float64, generator=GENERATOR) for _ in range(2)))
BASE = torch.randn(2, 8, 12, 12, dtype=torch.float64, generator=GENERATOR)

LAYOUTS = {
    "contiguous": BASE,
    "channels last": BASE.contiguous(memory_format=torch.channels_last),
    "every second": BASE[:, :, ::2, ::2],
    "transposed": BASE.mT,
    "one pixel": BASE[..., :1, :1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernel_and_its_derivatives_are_those_of_the_formula(layout: str) -> None:
    """A second derivative must not end where the map is copied for the kernel."""
    x = LAYOUTS[layout].detach().requires_grad_()
    leaves = [x, *(leaf.detach().requires_grad_() for leaf in NORM)]

    def orders(y: Tensor) -> tuple[Any, ...]:
        first = torch.autograd.grad((y**3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(torch.stack([(g**2).sum() for g in first]).sum(), leaves)
        return (y, first, second)

    found = orders(group_norm(GroupNorm(*leaves[1:]), x))
    expected = orders(_composed(*leaves))
    for actual, true in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        assert_close(actual, true, 1e-10)
    scale, bias = (leaf.flatten() for leaf in NORM)
    assert_close(found[0], F.group_norm(x, 2, scale, bias), 1e-12)


def test_large_means_do_not_cancel_in_any_layout() -> None:
    x = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0)) + 1e3
    norm = GroupNorm(torch.ones(32, 2), torch.zeros(32, 2))
    exact = F.group_norm(x.double(), 32)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = group_norm(norm, x.contiguous(memory_format=layout))
        assert (y - exact).abs().max() < 1e-3
        assert y.is_contiguous(memory_format=layout)


def test_a_batch_of_cotangents_goes_back_at_once() -> None:
    params = fresnet.init(
        0, fresnet.Spec(Bottleneck, (1,), 6, norm=GroupNorm), num_classes=3, dtype=torch.float64
    )
    leaves = [leaf.detach().requires_grad_() for leaf in tree.leaves(params.weights)]
    x = torch.randn(2, 3, 24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = fresnet.forward(params._replace(weights=tree.unflatten(params.weights, leaves)), x)[0]
    together = torch.autograd.grad(
        logits, leaves, torch.eye(3, dtype=torch.float64), is_grads_batched=True, retain_graph=True
    )
    for i in range(3):
        one = torch.autograd.grad(logits[i], leaves, retain_graph=True)
        for a, b in zip(together, one, strict=True):
            assert_close(a[i], b, 1e-10)


def test_gradients_are_the_same_by_autograd_and_by_transforms() -> None:
    params = fresnet.init(
        0, fresnet.Spec(Bottleneck, (1, 1), 6, norm=GroupNorm), num_classes=3, dtype=torch.float64
    )
    x = torch.randn(2, 3, 24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(weights: Any) -> Tensor:
        return fresnet.forward(Params(weights, params.stats), x).square().sum()

    followed = tree.map(lambda leaf: leaf.detach().requires_grad_(), params.weights)
    loss(followed).backward()
    grads = tree.map(lambda leaf: leaf.grad, followed)
    assert_trees_close(grads, grad(loss)(params.weights), 1e-12)


def test_state_dicts_do_not_tell_another_number_of_groups() -> None:
    spec = fresnet.Spec(Bottleneck, (1,), 8, norm=GroupNorm)
    params = fresnet.init(0, spec, num_classes=3)
    norm = params.weights.stem.layer.norm
    four = tree.map(lambda leaf: leaf.reshape(4, 2), norm)
    params = tree.at(params, "weights.stem.layer.norm", four)
    with pytest.raises(FresnetError, match="norms of another number of groups than 32"):
        fresnet.to_state_dict(params)


def test_norms_without_statistics_are_told_from_lost_ones() -> None:
    """A counter is batch normalisation's; then its statistics are missing."""
    state = fresnet.to_state_dict(fresnet.init(0, fresnet.Spec(Bottleneck, (1,), 8)))
    with pytest.raises(FresnetError, match=r"bn1\.running_mean is missing"):
        fresnet.from_state_dict({n: v for n, v in state.items() if "running" not in n})
    bare = {n: v for n, v in state.items() if "running" not in n and "num_" not in n}
    with pytest.warns(UserWarning, match="norms are taken for GroupNorm of 32 groups"):
        assert type(fresnet.from_state_dict(bare).weights.stem.layer.norm) is GroupNorm
