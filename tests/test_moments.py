"""Batch statistics as a value, and norms that go by running statistics."""

import math
from typing import Any, cast

import pytest
import torch
from assertions import assert_close, assert_same
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import examples, seeds, tiny_params, training_images
from torch import Tensor
from torch.func import grad, vmap
from torch.utils.data import DataLoader, TensorDataset

import fresnet
from fresnet import FresnetError, Params, tree
from fresnet.network import moments
from fresnet.network.nodes import POOLED_STEMS, Moments, Norm, NormStats, Stem3x3, units_of
from fresnet.network.norm import fused_norm, training_norm


def first_of(stem: Any) -> Any:
    """What stands beside a stem's first layer."""
    return first_of(stem.stem) if isinstance(stem, POOLED_STEMS) else stem[0]


def moments_of(values: Tensor) -> Moments:
    """The moments of values `[n c]`, by definition."""
    mean = values.mean(0) if len(values) else values.new_zeros(values.shape[1])
    n = torch.tensor(len(values), dtype=values.dtype)
    return Moments(n, mean, (values - mean).square().sum(0))


@st.composite
def samples(draw: st.DrawFn) -> Tensor:
    """Values `[n 3]` of any location and scale, with n from 0 on."""
    generator = torch.Generator().manual_seed(draw(seeds))
    values = torch.randn(draw(st.integers(0, 12)), 3, generator=generator, dtype=torch.float64)
    return values * draw(st.floats(0.01, 100)) + draw(st.floats(-100, 100))


def assert_moments_close(actual: Moments, expected: Moments, scale: float) -> None:
    """The moments are equal up to rounding, for values with squares of at most `scale`."""
    assert torch.equal(actual.n, expected.n)
    for a, b in zip(actual[1:], expected[1:], strict=True):
        assert (a - b).abs().max() <= 1e-11 * (1 + scale)


@examples(200)
@given(a=samples(), b=samples(), c=samples())
def test_merging_is_a_commutative_monoid_and_is_taking_the_whole(
    a: Tensor, b: Tensor, c: Tensor
) -> None:
    whole = torch.cat([a, b, c])
    scale = float(whole.square().sum()) if len(whole) else 0.0
    ma, mb, mc = map(moments_of, (a, b, c))
    merge = moments.merge
    assert_moments_close(merge(merge(ma, mb), mc), moments_of(whole), scale)
    assert_moments_close(merge(ma, merge(mb, mc)), moments_of(whole), scale)
    assert_moments_close(merge(ma, mb), merge(mb, ma), scale)
    none = moments_of(whole[:0])
    assert_same(merge(ma, none), ma)
    assert_same(merge(none, ma), ma)


@pytest.mark.parametrize("n", range(4))
def test_statistics_of_few_values(n: int) -> None:
    """Of no values they are the old ones, and the unbiased variance of one value is 0."""
    values = torch.tensor([[3.0], [5.0], [10.0]])[:n]
    old, seen = NormStats(torch.tensor([7.0]), torch.tensor([2.0])), moments_of(values)
    mean, biased, unbiased = [(7, 2, 2), (3, 0, 0), (4, 1, 2), (6, 26 / 3, 13)][n]
    for found, var in (
        (moments.statistics(old, seen), biased),
        (moments.statistics(old, seen, correction=1), unbiased),
        (moments.update(old, seen, momentum=1.0), unbiased),
    ):
        assert_same(found, NormStats(torch.tensor([float(mean)]), torch.tensor([float(var)])))


def test_a_kernel_that_rounds_makes_no_variance_negative() -> None:
    """Channels are constant, and 1 / std comes out a little too large."""

    def rounding(x: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, inverse_std = fused_norm(x, scale, bias)
        return y, mean, inverse_std.nextafter(torch.tensor(torch.inf))

    stats = NormStats(torch.zeros(3), torch.ones(3))
    x = torch.arange(3.0)[:, None, None].expand(2, 3, 4, 4).contiguous()
    _, seen = training_norm(Norm(torch.ones(3), torch.zeros(3)), stats, x, kernel=rounding)
    assert_same(moments.update(stats, seen, momentum=1.0).var, torch.zeros(3))


@examples(20)
@given(params=tiny_params(grouped=False), x=training_images(), momentum=st.floats(0, 1))
def test_forward_train_is_forward_moments_and_update(
    params: Params, x: Tensor, momentum: float
) -> None:
    logits, seen = fresnet.forward_moments(params, x)
    expected = (logits, moments.update(params.stats, seen, momentum=momentum))
    assert_same(fresnet.forward_train(params, x, momentum=momentum), expected)


@examples(20)
@given(params=tiny_params(grouped=False), x=training_images())
def test_forward_by_the_statistics_of_the_batch_is_training(params: Params, x: Tensor) -> None:
    logits, seen = fresnet.forward_moments(params, x)
    by_batch = params._replace(stats=moments.statistics(params.stats, seen))
    assert_close(fresnet.forward(by_batch, x), logits, 1e-9)


@examples(20)
@given(params=tiny_params(grouped=False), x=training_images())
def test_ghost_batches_merge_into_the_whole_batch_at_the_stem(params: Params, x: Tensor) -> None:
    """Each half is normalised by itself. Before any norm, the stem's activations are the same."""
    x = torch.cat([x, 2 * x + 1])
    halves = x.unflatten(0, (2, -1))
    _, whole = fresnet.forward_moments(params, x)
    _, ghosts = vmap(fresnet.forward_moments, (None, 0))(params, halves)
    merged = moments.merge(*tree.unstack(ghosts))
    if tree.leaves(whole.stem):  # V2's stem has no norm
        stem: Any = first_of(whole.stem)
        assert_moments_close(cast(Moments, first_of(merged.stem)), stem, float(stem.m2.max()))
    assert torch.equal(tree.leaves(merged)[-3], tree.leaves(whole)[-3])  # n of the last norm


@examples(15)
@given(
    params=tiny_params(grouped=False), batches=st.lists(training_images(), min_size=1, max_size=3)
)
def test_recalibration(params: Params, batches: list[Tensor]) -> None:
    """One batch is training with momentum 1. For several, the stem sees all images as one."""
    calibrated = fresnet.recalibrate(params, batches)
    assert_same(calibrated.weights, params.weights)
    if len(batches) == 1:
        _, stats = fresnet.forward_train(params, batches[0], momentum=1.0)
        assert_same(calibrated.stats, stats)
    stem = params.weights.stem
    conv, stride = units_of(stem)[0].kernel(), 1 if isinstance(stem, Stem3x3) else 2
    values = [
        torch.nn.functional.conv2d(x, conv, None, stride, len(conv[0, 0]) // 2) for x in batches
    ]
    flat = torch.cat([v.movedim(1, -1).flatten(0, -2) for v in values])
    if tree.leaves(calibrated.stats.stem):  # V2's stem has none
        mean, var = first_of(calibrated.stats.stem)
        assert_close(mean, flat.mean(0), 1e-9)
        assert_close(var, flat.var(0), 1e-9)


def test_recalibration_takes_the_images_of_a_loader() -> None:
    params = fresnet.init(0, fresnet.Spec(depths=(1,), width=4), num_classes=3)
    x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    expected = fresnet.recalibrate(params, [x[:4], x[4:]])
    for beside in ((), (y,), (torch.nn.functional.one_hot(y, 3),), (y, y, y)):
        loader = DataLoader(TensorDataset(x, *beside), batch_size=4)
        assert_same(fresnet.recalibrate(params, loader), expected)


@examples(20)
@given(params=tiny_params(grouped=False), x=training_images())
def test_a_frozen_network_trains_as_it_infers(params: Params, x: Tensor) -> None:
    frozen = fresnet.freeze(params)
    logits, stats = fresnet.forward_train(frozen, x)
    assert_same(logits, fresnet.forward(params, x))
    assert_same(stats, params.stats)
    assert_same(fresnet.forward(frozen, x), logits)
    assert_same(fresnet.recalibrate(frozen, [x]).stats, params.stats)
    assert_same(tree.leaves(frozen), tree.leaves(params))

    def total(run: Any, template: Params) -> Any:
        return lambda weights: run(template._replace(weights=weights), x)[0].square().sum()

    grads = grad(total(fresnet.forward_train, frozen))(frozen.weights)
    expected = grad(total(lambda p, x: (fresnet.forward(p, x),), params))(params.weights)
    for a, b in zip(tree.leaves(grads), tree.leaves(expected), strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


@examples(20)
@given(params=tiny_params(grouped=False), x=training_images())
def test_freezing_some_norms_leaves_the_others_training(params: Params, x: Tensor) -> None:
    assume(tree.leaves(params.stats.stem))  # V2's stem has no norm
    frozen = fresnet.freeze(params, lambda path: path[0] == "stem")
    _, stats = fresnet.forward_train(frozen, x)
    assert_same(stats.stem, params.stats.stem)
    moved = [
        not torch.equal(a, b)
        for a, b in zip(tree.leaves(stats.stages), tree.leaves(params.stats.stages), strict=True)
    ]
    assert all(moved)


@examples(10)
@given(
    params=tiny_params(grouped=False),
    x=training_images(),
    lost=st.sampled_from([math.nan, math.inf]),
)
def test_recalibration_mends_statistics_that_are_lost(
    params: Params, x: Tensor, lost: float
) -> None:
    broken = params._replace(stats=tree.map(lambda s: s * lost, params.stats))
    assert_same(fresnet.recalibrate(broken, [x]), fresnet.recalibrate(params, [x]))
    frozen = fresnet.freeze(params)
    _, none = fresnet.forward_moments(frozen, x)
    kept = moments.update(broken.stats, none)
    assert_same(tree.map(torch.isfinite, kept), tree.map(torch.isfinite, broken.stats))
    assert_same(tree.map(torch.isnan, kept), tree.map(torch.isnan, broken.stats))


@examples(10)
@given(params=tiny_params(grouped=False), x=training_images())
def test_momentum_may_be_a_tensor_and_be_mapped_over_and_differentiated(
    params: Params, x: Tensor
) -> None:
    momenta = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)

    def stats(momentum: Tensor) -> Any:
        return fresnet.forward_train(params, x, momentum=momentum)[1]

    for one, momentum in zip(tree.unstack(vmap(stats)(momenta)), momenta, strict=True):
        expected = fresnet.forward_train(params, x, momentum=momentum.item())[1]
        for a, b in zip(tree.leaves(one), tree.leaves(expected), strict=True):
            assert_close(a, b, 1e-12)
    slope = grad(lambda momentum: tree.ravel(stats(momentum)).sum())(momenta[1])
    ends = [tree.ravel(stats(m)).sum() for m in (momenta[0], momenta[2])]
    assert_close(slope, ends[1] - ends[0], 1e-9)


def test_wrong_moments_are_refused() -> None:
    params = fresnet.init(0, fresnet.Spec(fresnet.nodes.BasicBlock, (1,), width=2))
    x = torch.randn(2, 3, 16, 16)
    _, seen = fresnet.forward_moments(params, x)
    _, stacked = vmap(fresnet.forward_moments, (None, 0))(params, torch.stack([x, x]))
    for call, message in (
        (lambda: moments.merge(seen, seen.stem), "got a Stats, a Stem7x7"),
        (lambda: moments.merge(seen, params.stats), "merge expects Moments, Moments; got a Mom"),
        (lambda: moments.merge(params.stats, seen), "merge expects Moments, Moments; got a Norm"),
        (lambda: moments.update(seen, seen), "update expects NormStats, Moments; got a Moments"),
        (lambda: moments.statistics(seen, seen), "statistics expects NormStats, Moments"),
        (lambda: moments.update(params.stats, stacked), r"got \(2,\), \(2, 2\): unstack and merge"),
        (lambda: fresnet.recalibrate(params, []), "at least one batch; got none"),
        (lambda: fresnet.recalibrate(params, x), "expects an iterable of batches .*; got float32"),
        (lambda: fresnet.recalibrate(params, [(x, x)]), "recalibrate expects x .*; got a tuple"),
        (lambda: fresnet.recalibrate(params, [()]), "recalibrate expects x .*; got a tuple"),
        (lambda: fresnet.recalibrate(params, (x, torch.arange(len(x)))), r"expects x \[b 3 h w\]"),
        (
            lambda: fresnet.freeze(params, lambda path: path[0] == "layer4"),
            r"none of 3, such as \('st",
        ),
        (lambda: fresnet.freeze(params, "stem"), r"such as tree.matching\('stem'\); got 'stem'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(FresnetError, match=message):
            call()
