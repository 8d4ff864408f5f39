"""Processes that normalise by their common moments equal one process with the whole batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from assertions import assert_close
from torch import Tensor, distributed
from torch._dynamo.exc import Unsupported
from torch.func import grad, jvp, vmap
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import FresnetError, Params, tree
from fresnet.network import across, moments
from fresnet.network.nodes import Bottleneck, Stats, Weights

PARAMS = fresnet.init(
    0, fresnet.Spec(Bottleneck, (1, 1), width=3), num_classes=4, dtype=torch.float64
)
X = torch.randn(6, 3, 33, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 0, 1])
PARTS = (slice(0, 1), slice(1, 6))
"""The parts of the batch. They differ in length, so moments must be weighted by their counts."""
PIXELS = X[:2, :, :1, :1]
"""One image for each process, which alone has one value per channel."""


def loss_of(x: Tensor, y: Tensor, group: Any) -> Callable[[Weights], tuple[Tensor, Any]]:
    def loss(weights: Weights) -> tuple[Tensor, tuple[Tensor, Stats]]:
        params = PARAMS._replace(weights=weights)
        logits, stats = fresnet.forward_train(params, x, group=group)
        return cross_entropy(logits, y, reduction="sum"), (logits, stats)

    return loss


def derivatives(x: Tensor, y: Tensor, group: Any) -> dict[str, Any]:
    """Logits of this part of the batch, statistics, and the derivatives of this part's loss."""
    loss, weights = loss_of(x, y, group), PARAMS.weights
    direction = tree.map(torch.cos, weights)

    def slope(weights: Weights) -> Tensor:
        slope: Tensor = jvp(lambda w: loss(w)[0], (weights,), (direction,))[1]
        return slope

    grads, (logits, stats) = grad(loss, has_aux=True)(weights)
    network = Params(weights, PARAMS.stats)
    stacked = tree.stack([network, tree.map(lambda leaf: leaf * 1.1, network)])

    def gradient(weights: Weights) -> Any:
        return grad(lambda w: loss(w)[0])(weights)

    return {
        "logits": logits,
        "stats": stats,
        "grads": grads,
        "slope": slope(weights),
        "slope of the slope": jvp(slope, (weights,), (direction,))[1],
        "curvature": grad(slope)(weights),
        "curvature forwards": jvp(gradient, (weights,), (direction,))[1],
        "ensemble": vmap(lambda p: fresnet.forward_train(p, x, group=group)[0])(stacked),
    }


def work(rank: int, folder: Path) -> None:
    distributed.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=len(PARTS)
    )
    group = distributed.group.WORLD
    assert group is not None
    result = derivatives(X[PARTS[rank]], Y[PARTS[rank]], group)
    result["of pixels"] = fresnet.forward_train(PARAMS, PIXELS[rank : rank + 1], group=group)[0]
    with mock.patch.object(across, "GATHERED", 1):
        loss = loss_of(X[PARTS[rank]], Y[PARTS[rank]], group)
        result["grads by sums"], _ = grad(loss, has_aux=True)(PARAMS.weights)
    seen = fresnet.forward_moments(PARAMS, X[PARTS[rank]])[1]
    result["merged"] = moments.merge_across(seen, group)
    torch.save([leaf.clone() for leaf in tree.leaves(result)], folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_processes_with_one_group_are_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    spawn(work, (tmp_path,), nprocs=len(PARTS))
    expected = derivatives(X, Y, None)
    expected["of pixels"] = fresnet.forward_train(PARAMS, PIXELS)[0]
    expected["grads by sums"] = expected["grads"]
    parts = [fresnet.forward_moments(PARAMS, X[part])[1] for part in PARTS]
    expected["merged"] = moments.merge(*parts)
    a, b = (
        tree.unflatten(expected, torch.load(tmp_path / f"{rank}.pt")) for rank in range(len(PARTS))
    )

    def check(name: str, actual: Any, relative: float = 1e-10) -> None:
        for p, q in zip(tree.leaves(actual), tree.leaves(expected[name]), strict=True):
            assert (p - q).norm() <= relative * q.norm() + 1e-12, name

    check("logits", torch.cat([a["logits"], b["logits"]]))
    check("of pixels", torch.cat([a["of pixels"], b["of pixels"]]))
    check("ensemble", torch.cat([a["ensemble"], b["ensemble"]], dim=1))
    for name in (
        "grads",
        "grads by sums",
        "slope",
        "slope of the slope",
        "curvature",
        "curvature forwards",
    ):
        # of the sum of both losses
        check(name, tree.map(torch.add, a[name], b[name]))
    for name in ("stats", "merged"):
        check(name, a[name])
        for p, q in zip(tree.leaves(a[name]), tree.leaves(b[name]), strict=True):
            assert torch.equal(p, q), name


def test_apart_they_are_not() -> None:
    """If the results were the same without a group, the test above would show nothing."""
    whole, part = (fresnet.forward_train(PARAMS, x)[0] for x in (X, X[PARTS[1]]))
    with pytest.raises(AssertionError):
        assert_close(whole[PARTS[1]], part, 1e-2)


@pytest.mark.slow
def test_a_group_is_not_compiled(tmp_path: Path) -> None:
    """Derivatives would silently leave other processes out, so it runs eagerly or is refused."""
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = distributed.group.WORLD

        def slope(x: Tensor) -> Any:
            loss = loss_of(x, Y, group)
            direction = tree.map(torch.cos, PARAMS.weights)
            return jvp(lambda w: loss(w)[0], (PARAMS.weights,), (direction,))[1]

        compiled = torch.compile(slope, backend="aot_eager")
        assert_close(compiled(X), slope(X), 1e-10)
        torch.compiler.reset()
        with pytest.raises(Unsupported, match="leave other processes out"):
            torch.compile(slope, backend="aot_eager", fullgraph=True)(X)
    finally:
        distributed.destroy_process_group()


def test_what_is_no_group_is_refused() -> None:
    with pytest.raises(FresnetError, match=r"forward_train expects group to be .*; got a str"):
        fresnet.forward_train(PARAMS, X, group="world")  # type: ignore[arg-type]
