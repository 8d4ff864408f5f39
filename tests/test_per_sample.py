"""Per-sample gradients in their three meanings, and ensembles trained at once."""

import re
from functools import partial
from typing import Any

import pytest
import torch
from assertions import assert_same
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, labels, targets, tiny_params, training_images
from torch import Tensor
from torch.func import grad, jacrev, vmap
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import FresnetError, Params, nodes, tree
from fresnet.gradients import per_sample
from fresnet.network import moments
from fresnet.network.nodes import BasicBlock, Weights


def batch_gradient(run: Any, params: Params, x: Tensor, y: Tensor) -> Weights:
    def loss(weights: Weights) -> Tensor:
        return cross_entropy(run(params._replace(weights=weights), x), y)

    gradient: Weights = grad(loss)(params.weights)
    return gradient


def train_logits(params: Params, x: Tensor) -> Tensor:
    return fresnet.forward_train(params, x)[0]


def assert_near(actual: Weights, expected: Weights, relative: float = 1e-8) -> None:
    """Leaves are near in the norm of the whole tree, because some are zero up to rounding."""
    scale = torch.stack([leaf.norm() for leaf in tree.leaves(expected)]).norm()
    for a, b in zip(tree.leaves(actual), tree.leaves(expected), strict=True):
        assert (a - b).norm() <= relative * scale


@examples(10)
@given(params=tiny_params(), x=training_images(), chunk_size=st.integers(1, 6) | st.none())
def test_by_running_statistics_and_by_the_batchs_they_are_a_loop(
    params: Params, x: Tensor, chunk_size: int | None
) -> None:
    y = targets(params, x)
    by_batch = params._replace(
        stats=moments.statistics(params.stats, fresnet.forward_moments(params, x)[1])
    )
    for norms, network in {"running": params, "batch": by_batch}.items():
        grads = fresnet.per_sample_grads(
            cross_entropy, params, x, y, norms=norms, chunk_size=chunk_size
        )
        for i, one in enumerate(tree.unstack(grads)):
            rows = slice(i, i + 1)
            assert_near(one, batch_gradient(fresnet.forward, network, x[rows], y[rows]))


@examples(10)
@given(params=tiny_params(), x=training_images(), chunk_size=st.integers(1, 6) | st.none())
def test_coupled_they_are_the_jacobian_and_their_mean_the_gradient_of_training(
    params: Params, x: Tensor, chunk_size: int | None
) -> None:
    y = targets(params, x)
    grads = fresnet.per_sample_grads(
        cross_entropy, params, x, y, norms="coupled", chunk_size=chunk_size
    )
    mean = tree.map(lambda leaf: leaf.mean(0), grads)
    assert_near(mean, batch_gradient(train_logits, params, x, y))

    def losses(weights: Weights) -> Tensor:
        logits = train_logits(params._replace(weights=weights), x)
        return cross_entropy(logits, y, reduction="none")

    assert_near(grads, jacrev(losses)(params.weights))


@examples(10)
@given(params=tiny_params(grouped=False), x=training_images())
def test_frozen_norms_go_by_running_statistics_in_every_meaning(params: Params, x: Tensor) -> None:
    """If all norms are frozen, the three meanings are one. A frozen norm keeps its statistics."""
    y = targets(params, x)
    frozen = fresnet.freeze(params)
    expected = fresnet.per_sample_grads(cross_entropy, params, x, y, norms="running")
    for norms in ("running", "batch", "coupled"):
        grads = fresnet.per_sample_grads(cross_entropy, frozen, x, y, norms=norms)
        assert_near(grads, expected)

    def sum_of_squares(stats: Any, norms: str) -> Tensor:
        network = frozen._replace(stats=stats)
        grads = fresnet.per_sample_grads(cross_entropy, network, x, y, norms=norms)
        return tree.ravel(grads).square().sum()

    by_stats = [grad(sum_of_squares)(frozen.stats, norms) for norms in ("running", "batch")]
    assert_near(by_stats[1], by_stats[0])

    partly = fresnet.freeze(params, lambda path: path[:3] == ("stages", 0, 0))
    seen = fresnet.forward_moments(partly, x)[1]
    stats = moments.statistics(params.stats, seen)
    first, kept = (nodes.blocks_of(s.stages[0])[0] for s in (stats, params.stats))
    assert_same(first, kept)
    by_batch = params._replace(stats=stats)
    expected = fresnet.per_sample_grads(cross_entropy, by_batch, x, y, norms="running")
    grads = fresnet.per_sample_grads(cross_entropy, partly, x, y, norms="batch")
    assert_near(grads, expected)


@pytest.mark.parametrize("norms", ["running", "batch", "coupled"])
def test_bfloat16_weights(norms: str) -> None:
    """They are as near those in float64 as three digits allow after four norms."""
    spec = fresnet.Spec(BasicBlock, (1, 1), width=8)
    params = fresnet.init(0, spec, num_classes=5, dtype=torch.bfloat16)
    exact = tree.map(torch.Tensor.double, params)
    x = torch.randn(4, 3, 40, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = labels(x, 5)
    grads, expected = (
        tree.ravel(fresnet.per_sample_grads(cross_entropy, p, x.to(dtype), y, norms=norms))
        for p, dtype in ((params, torch.bfloat16), (exact, torch.float64))
    )
    assert (grads.double() - expected).norm() <= 0.2 * expected.norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "'running', 'batch', 'coupled'; got None"),
        ({"norms": "train"}, "'running', 'batch', 'coupled'; got 'train'"),
        ({"norms": "running", "chunk_size": 0}, "chunk_size to be a positive integer; got 0"),
        ({"norms": "running", "chunk_size": 2.0}, "chunk_size to be a positive integer; got 2.0"),
        ({"norms": "running", "chunk_size": True}, "chunk_size to be a positive integer; got True"),
        (
            {"norms": "running", "y": torch.zeros(3)},
            "one for each image; got float32 (3,)",
        ),
        ({"norms": "batch", "y": torch.tensor(3)}, "one for each image; got int64 ()"),
        ({"norms": "coupled", "y": [3, 4]}, "one for each image; got a list"),
        (
            {"norms": "running", "x": torch.zeros(2, 3, 0, 8)},
            "x [b 3 h w] with at least one image",
        ),
        ({"norms": "running", "x": torch.zeros(3, 8, 8)}, "got (3, 8, 8) (one image? x[None])"),
        ({"norms": "batch", "params": (1, 2)}, "per_sample_grads expects Params(weights, stats)"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "params": fresnet.init(0, fresnet.Spec(BasicBlock, (1,), width=2)),
        "x": torch.zeros(2, 3, 16, 16),
        "y": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(FresnetError, match=re.escape(message)):
        fresnet.per_sample_grads(cross_entropy, **given | arguments)


@pytest.mark.parametrize("norms", ["running", "batch", "coupled"])
@pytest.mark.parametrize(
    ("loss_fn", "got"),
    [
        (lambda logits, target: logits - target, "float32 (5,)"),
        (lambda logits, target: logits.sum(0, keepdim=True), "float32 (1,)"),
        (lambda logits, target: (logits.sum(), target), "a tuple"),
        (lambda logits, target: 1.0, "a float"),
    ],
)
def test_a_loss_that_is_no_number_is_refused(norms: str, loss_fn: Any, got: str) -> None:
    params = fresnet.init(0, fresnet.Spec(BasicBlock, (1,), width=2), num_classes=5)
    message = f"loss_fn(logits [k], target) to return a 0-d tensor; got {got}"
    with pytest.raises(FresnetError, match=re.escape(message)):
        fresnet.per_sample_grads(
            loss_fn, params, torch.zeros(2, 3, 16, 16), torch.ones(2), norms=norms
        )


def test_vmap_over_the_wrong_axis_is_told() -> None:
    params = fresnet.init(0, fresnet.Spec(BasicBlock, (1,), width=2), num_classes=2)
    x = torch.zeros(5, 3, 16, 16)
    with pytest.raises(FresnetError, match=re.escape("expects x [b 3 h w]; got (5, 16, 16)")):
        vmap(fresnet.forward, (None, 1))(params, x)
    unstacked = re.escape("expects the stem's first convolution to be a float tensor")
    with pytest.raises(FresnetError, match=unstacked):
        vmap(fresnet.forward, (0, None))(params, x)
    with pytest.raises(FresnetError, match=re.escape("(a stack of networks? use vmap)")):
        fresnet.forward(tree.stack([params, params]), x)


@examples(5)
@given(x=training_images(), depth=st.integers(1, 2))
def test_models_trained_at_once_are_models_trained_apart(x: Tensor, depth: int) -> None:
    """Three networks with their own seeds and rates take four vmapped steps."""
    spec, y = fresnet.Spec(BasicBlock, (depth,), width=4), labels(x, 5)

    def step(params: Params, rate: Tensor) -> Params:
        def loss(weights: Weights, stats: fresnet.nodes.Stats) -> Any:
            logits, stats = fresnet.forward_train(Params(weights, stats), x)
            return cross_entropy(logits, y), stats

        grads, stats = grad(loss, has_aux=True)(*params)
        weights = tree.map(lambda w, g: w - rate * g, params.weights, grads)
        return Params(weights, stats)

    members = [fresnet.init(s, spec, num_classes=5, dtype=torch.float64) for s in range(3)]
    rates = torch.tensor([0.1, 0.03, 0.01], dtype=torch.float64)
    together = tree.stack(members)
    for _ in range(4):
        together = vmap(step)(together, rates)
        members = [step(member, rate) for member, rate in zip(members, rates, strict=True)]
    for a, b in zip(tree.unstack(together), members, strict=True):
        assert_near(a.weights, b.weights)
        assert_near(a.stats, b.stats)  # type: ignore[arg-type]


MEANINGS = ["running", "batch", "coupled"]
PARAMS = fresnet.init(0, fresnet.Spec(BasicBlock, (1, 1), 4), num_classes=3)


@pytest.mark.parametrize("norms", MEANINGS)
def test_a_batch_without_images_has_gradients_without_images(norms: str) -> None:
    x, y = torch.ones(0, 3, 16, 16), torch.zeros(0, dtype=torch.int64)
    grads = fresnet.per_sample_grads(cross_entropy, PARAMS, x, y, norms=norms)
    shapes = tree.map(lambda leaf: (0, *leaf.shape), PARAMS.weights)
    assert tree.map(lambda leaf: tuple(leaf.shape), grads) == shapes


def with_dropout(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(torch.nn.functional.dropout(logits, 0.5), target)


@pytest.mark.parametrize("norms", MEANINGS)
def test_a_loss_may_draw(norms: str) -> None:
    """Images that are alike have one gradient if all draw the same, and else several."""
    x, y = torch.ones(6, 3, 16, 16), torch.zeros(6, dtype=torch.int64)
    x = x + torch.linspace(0, 1, 16)  # else no norm has anything to divide by
    call = partial(fresnet.per_sample_grads, with_dropout, PARAMS, x, y, norms=norms)
    torch.manual_seed(0)
    same = call(randomness="same").head.bias
    assert (same - same[:1]).norm() <= 1e-5 * same.norm()
    different = call(randomness="different").head.bias
    assert (different - different[:1]).norm() > 0.1 * different.norm()
    with pytest.raises(FresnetError, match="expects randomness to be 'different' or 'same'"):
        call()
    with pytest.raises(FresnetError, match="randomness to be one of 'error', 'different', 'same'"):
        call(randomness="none")


def loop(params: Params, x: Tensor, y: Tensor, norms: str) -> Weights:
    """Each image's gradient by `torch.func.grad`, one after the other."""
    if norms == "batch":
        seen = fresnet.forward_moments(params, x)[1]
        params = params._replace(stats=moments.statistics(params.stats, seen))

    def loss(weights: Weights, i: int) -> Tensor:
        network = params._replace(weights=weights)
        if norms == "coupled":
            return cross_entropy(train_logits(network, x)[i], y[i])
        return cross_entropy(fresnet.forward(network, x[i : i + 1])[0], y[i])

    each: Weights = tree.stack([grad(loss)(params.weights, i) for i in range(len(x))])
    return each


@pytest.mark.parametrize("side", [5, 16, 33])
@pytest.mark.parametrize("block", [BasicBlock, nodes.Bottleneck, nodes.PreActivation])
@pytest.mark.parametrize("norms", MEANINGS)
def test_under_autocast_they_are_a_loop_under_autocast(norms: str, block: Any, side: int) -> None:
    """Convolutions run in bfloat16, as `forward`'s do, and gradients have the weights' dtype."""
    v2: dict[str, Any] = {"stem": nodes.BareStem7x7, "last": nodes.LastNorm}
    spec = fresnet.Spec(block, (1, 1), 4, **(v2 if block is nodes.PreActivation else {}))
    params = fresnet.init(0, spec, num_classes=3)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 3, side, side, generator=generator), torch.tensor([0, 1, 2] * 2)
    call = partial(fresnet.per_sample_grads, cross_entropy, params, x, y, norms=norms)
    with torch.autocast("cpu", torch.bfloat16):
        grads, chunks, expected = call(), call(chunk_size=4), loop(params, x, y, norms)
    assert {leaf.dtype for leaf in tree.leaves(grads)} == {torch.float32}
    assert_near(grads, expected, 0.01)
    assert_near(chunks, expected, 0.01)
    assert (tree.ravel(call()) - tree.ravel(grads)).norm() > 0.01 * tree.ravel(grads).norm()


def test_tensors_of_inference_mode_are_refused_outside_of_it() -> None:
    with torch.inference_mode():
        x = torch.ones(2, 3, 16, 16)
    y = torch.zeros(2, dtype=torch.int64)
    for function in (fresnet.per_sample_grads, fresnet.per_sample_norms):
        with pytest.raises(FresnetError, match=r"torch.inference_mode: make them, or clone\(\)"):
            function(cross_entropy, PARAMS, x, y, norms="running")


@pytest.mark.parametrize("norms", per_sample.MEANINGS)
def test_derivatives_are_taken_outside_of_inference_mode(
    norms: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before PyTorch 2.12 they are zeros there, without an error."""
    modes = []

    def watched(*arguments: Any, **options: Any) -> Any:
        modes.append(torch.is_inference_mode_enabled())
        return vmap(*arguments, **options)

    monkeypatch.setattr(per_sample, "vmap", watched)
    params = fresnet.init(0, fresnet.Spec(BasicBlock, (1,), width=4), num_classes=3)
    x, y = torch.ones(2, 3, 8, 8), torch.arange(2)
    with torch.inference_mode():
        grads = fresnet.per_sample_grads(cross_entropy, params, x, y, norms=norms)
        assert torch.is_inference_mode_enabled()
    assert {*modes} == {False}
    assert not any(leaf.requires_grad for leaf in tree.leaves(grads))
