"""Optimizers and schedules step as those of `torch.optim` do, and all are pure."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import reference  # noqa: F401  (before timm, which imports torchvision)
import timm.optim
import torch
from assertions import assert_close, assert_same, assert_trees_close, unmutated
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, seeds, tiny_params
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.optim import lr_scheduler

import fresnet
from fresnet import FresnetError, Params, optim, tree
from fresnet.optim import Optimizer

STEPS = 5
numbers = st.floats(0, 1)
wheres = st.sampled_from([optim.everywhere, optim.kernels])


def gradients(weights: Any, seed: int) -> list[Any]:
    """Gradients for each step, which do not depend on the weights."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(leaf: Tensor) -> Tensor:
        return torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)

    return [tree.map(drawn, weights) for _ in range(STEPS)]


def check_lockstep(
    optimizer: Optimizer,
    build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    weights: Any,
    seed: int,
    where: optim.Where,
) -> None:
    """`build` makes the truth from two groups: leaves where `where` holds, and the rest."""
    theirs = [leaf.clone().requires_grad_() for leaf in tree.leaves(weights)]
    held = [where(path) for path in tree.paths(weights)]
    inside, outside = (
        [p for p, holds in zip(theirs, held, strict=True) if holds is side]
        for side in (True, False)
    )
    truth = build(
        [{"params": inside}, *([{"params": outside, "weight_decay": 0.0}] * bool(outside))]
    )
    state = optimizer.init(weights)
    for grads in gradients(weights, seed):
        for p, g in zip(theirs, tree.leaves(grads), strict=True):
            p.grad = g.clone()
        truth.step()
        with unmutated(grads, state, weights):
            weights, state = optimizer.update(grads, state, weights)
        # All leaves together, because a single value may come near 0 while its rounding does not.
        expected = torch.cat([p.detach().flatten() for p in theirs])
        assert_close(tree.ravel(weights), expected, 1e-12)
    assert state.step == STEPS


@examples(25)
@given(
    params=tiny_params(),
    seed=seeds,
    rate=numbers,
    momentum=numbers,
    decay=numbers,
    nesterov=st.booleans(),
    where=wheres,
)
def test_sgd_is_torch_optims(
    params: Params,
    seed: int,
    rate: float,
    momentum: float,
    decay: float,
    nesterov: bool,
    where: optim.Where,
) -> None:
    options: Any = {"momentum": momentum, "weight_decay": decay}
    options["nesterov"] = nesterov and momentum > 0
    check_lockstep(
        optim.sgd(rate, **options, decay_where=where),
        lambda groups: torch.optim.SGD(groups, rate, **options),
        params.weights,
        seed,
        where,
    )


@pytest.mark.parametrize(
    ("ours", "theirs"), [(optim.adam, torch.optim.Adam), (optim.adamw, torch.optim.AdamW)]
)
@examples(20)
@given(
    params=tiny_params(),
    seed=seeds,
    rate=numbers,
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    eps=st.floats(1e-8, 1),
    decay=numbers,
    where=wheres,
)
def test_adam_and_adamw_are_torch_optims(
    ours: Callable[..., Optimizer],
    theirs: Callable[..., torch.optim.Optimizer],
    params: Params,
    seed: int,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    where: optim.Where,
) -> None:
    options: Any = {"betas": betas, "eps": eps, "weight_decay": decay}
    check_lockstep(
        ours(rate, **options, decay_where=where),
        lambda groups: theirs(groups, rate, **options),
        params.weights,
        seed,
        where,
    )


@examples(25)
@given(params=tiny_params(), seed=seeds, rate=numbers, momentum=numbers, decay=numbers)
def test_lars_is_timms(
    params: Params, seed: int, rate: float, momentum: float, decay: float
) -> None:
    """timm's adapts the groups that decay, and adds its eps to the norms' sum."""
    check_lockstep(
        optim.lars(rate, momentum=momentum, weight_decay=decay + 0.01),
        lambda groups: timm.optim.Lars(
            groups, rate, momentum, weight_decay=decay + 0.01, trust_coeff=0.001, eps=0.0
        ),
        params.weights,
        seed,
        optim.kernels,
    )


@examples(20)
@given(seed=seeds, rate=st.floats(0.01, 30), momentum=numbers, decay=numbers)
def test_lars_is_the_papers(seed: int, rate: float, momentum: float, decay: float) -> None:
    """Algorithm 1 written out for one layer, whose velocity holds the rate."""
    optimizer = optim.lars(rate, momentum=momentum, weight_decay=decay, trust=0.01)
    weights = {"conv": torch.linspace(-1, 2, 6, dtype=torch.float64).view(2, 3)}
    w, v, state = weights["conv"], torch.zeros(2, 3), optimizer.init(weights)
    for grads in gradients(weights, seed):
        g = grads["conv"]
        local = 0.01 * w.norm() / (g.norm() + decay * w.norm())
        v = momentum * v + rate * local * (g + decay * w)
        w = w - v
        weights, state = optimizer.update(grads, state, weights)
        assert_close(weights["conv"], w, 1e-12)


@examples(20)
@given(
    params=tiny_params(),
    seed=seeds,
    rate=numbers,
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    decay=numbers,
)
def test_lamb_is_timms(
    params: Params, seed: int, rate: float, betas: tuple[float, float], decay: float
) -> None:
    """timm's adapts the groups that decay, and clips gradients unless it is told not to."""
    options: Any = {"betas": betas, "weight_decay": decay + 0.01}
    check_lockstep(
        optim.lamb(rate, **options),
        lambda groups: timm.optim.Lamb(groups, rate, **options, max_grad_norm=None),
        params.weights,
        seed,
        optim.kernels,
    )


@examples(20)
@given(seed=seeds, rate=numbers, decay=numbers, eps=st.floats(1e-8, 1))
def test_lamb_is_the_papers(seed: int, rate: float, decay: float, eps: float) -> None:
    """Algorithm 2 written out for one layer."""
    b1, b2 = 0.8, 0.9
    optimizer = optim.lamb(
        rate, betas=(b1, b2), eps=eps, weight_decay=decay, adapt_where=optim.everywhere
    )
    weights = x = torch.linspace(-1, 2, 6, dtype=torch.float64).view(2, 3)
    state, m, v = optimizer.init(weights), torch.zeros_like(x), torch.zeros_like(x)
    for t, g in enumerate(gradients(weights, seed), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        r = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        x = x - rate * x.norm() / (r + decay * x).norm() * (r + decay * x)
        weights, state = optimizer.update(g, state, weights)
        assert_close(weights, x, 1e-12)


def test_lamb_leaves_alone_what_has_no_size() -> None:
    weights = {"conv": torch.zeros(3), "other": torch.ones(3)}
    grads = {"conv": torch.ones(3), "other": torch.zeros(3)}
    optimizer = optim.lamb(0.5, weight_decay=0.0)
    moved, _ = optimizer.update(grads, optimizer.init(weights), weights)
    assert_trees_close(moved, {"conv": torch.full((3,), -0.5), "other": torch.ones(3)}, 1e-5)


def test_lars_leaves_alone_what_has_no_size() -> None:
    weights = {"conv": torch.zeros(3), "other": torch.ones(3)}
    grads = {"conv": torch.ones(3), "other": torch.zeros(3)}
    optimizer = optim.lars(0.5, weight_decay=0.1)
    moved, _ = optimizer.update(grads, optimizer.init(weights), weights)
    assert_same(moved, {"conv": torch.full((3,), -0.5), "other": torch.ones(3)})


@examples(20)
@given(params=tiny_params(), seed=seeds, rate=numbers, decay=numbers)
def test_decoupled_decay_shrinks_weights_apart_from_their_gradient(
    params: Params, seed: int, rate: float, decay: float
) -> None:
    weights, momentum = params.weights, 0.9
    optimizer = optim.sgd(rate, momentum=momentum, weight_decay=decay, decoupled=True)
    state, truth = optimizer.init(weights), weights
    velocity = tree.map(torch.zeros_like, weights)
    for grads in gradients(weights, seed):
        weights, state = optimizer.update(grads, state, weights)
        velocity = tree.map(lambda v, g: momentum * v + g, velocity, grads)
        truth = tree.map(lambda w, v: (1 - rate * decay) * w - rate * v, truth, velocity)
        assert_trees_close(weights, truth, 1e-12)


def scheduled(
    build: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], steps: int
) -> list[float]:
    """The rates of a scheduler that starts at 0.3."""
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.3)
    scheduler, rates = build(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def rates(schedule: optim.Schedule, steps: int) -> list[float]:
    return [float(schedule(torch.tensor(step, dtype=torch.float64))) for step in range(steps)]


@examples(20)
@given(over=st.integers(1, 20), end=st.floats(0, 0.2))
def test_cosine_is_torchs(over: int, end: float) -> None:
    expected = scheduled(lambda o: lr_scheduler.CosineAnnealingLR(o, over, end), over + 1)
    assert rates(optim.cosine(0.3, over=over, end=end), over + 1) == pytest.approx(expected)
    assert rates(optim.cosine(0.3, over=over, end=end), over + 5)[-1] == pytest.approx(end)


@examples(20)
@given(over=st.integers(1, 20), power=st.floats(0.5, 3))
def test_polynomial_is_torchs(over: int, power: float) -> None:
    expected = scheduled(lambda o: lr_scheduler.PolynomialLR(o, over, power), over + 5)
    assert rates(optim.polynomial(0.3, over=over, power=power), over + 5) == pytest.approx(expected)
    first, *_, last = rates(optim.polynomial(0.3, over=over, end=0.1), over + 5)
    assert (first, last) == pytest.approx((0.3, 0.1))


@examples(20)
@given(at=st.lists(st.integers(1, 20), unique=True, max_size=4), factor=st.floats(0.1, 1))
def test_steps_are_torchs(at: list[int], factor: float) -> None:
    expected = scheduled(lambda o: lr_scheduler.MultiStepLR(o, sorted(at), factor), 22)
    assert rates(optim.steps(0.3, at=at, factor=factor), 22) == pytest.approx(expected)


@examples(20)
@given(over=st.integers(1, 8), start=st.floats(0.01, 1), then=st.integers(1, 9))
def test_warm_up_is_torchs_before_a_cosine(over: int, start: float, then: int) -> None:
    def build(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        parts = [
            lr_scheduler.LinearLR(optimizer, start, total_iters=over),
            lr_scheduler.CosineAnnealingLR(optimizer, then),
        ]
        return lr_scheduler.SequentialLR(optimizer, parts, [over])

    schedule = optim.warm_up(optim.cosine(0.3, over=then), over=over, start=start)
    assert rates(schedule, over + then) == pytest.approx(scheduled(build, over + then))


@pytest.mark.parametrize("optimizer", [optim.sgd, optim.adam, optim.adamw, optim.lamb, optim.lars])
def test_a_schedule_is_read_at_every_step(optimizer: Callable[..., Optimizer]) -> None:
    """Each step equals one with the number that the schedule then gives."""
    schedule = optim.cosine(0.3, over=4)
    weights = {"w": torch.linspace(1, 2, 3, dtype=torch.float64)}
    by_schedule = optimizer(schedule)
    state, other = by_schedule.init(weights), weights
    for step, grads in enumerate(gradients(weights, 0)):
        fixed = optimizer(float(schedule(torch.tensor(step, dtype=torch.float64))))
        other, _ = fixed.update(grads, state, weights)
        weights, state = by_schedule.update(grads, state, weights)
        assert_trees_close(weights, other, 1e-14)


@examples(20)
@given(params=tiny_params(), seed=seeds, limit=st.floats(0.01, 100))
def test_clipping_is_torchs(params: Params, seed: int, limit: float) -> None:
    grads, *_ = gradients(params.weights, seed)
    theirs = [torch.zeros_like(g).requires_grad_() for g in tree.leaves(grads)]
    for p, g in zip(theirs, tree.leaves(grads), strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(theirs, limit)
    with unmutated(grads):
        clipped = optim.clip_by_norm(grads, limit)
    for a, p in zip(tree.leaves(clipped), theirs, strict=True):
        assert p.grad is not None
        assert_close(a, p.grad, 1e-12)


@pytest.mark.parametrize(
    "build",
    [
        lambda rate, decay: optim.sgd(rate, momentum=0.9, weight_decay=decay),
        lambda rate, decay: optim.sgd(rate, weight_decay=decay, decoupled=True),
        lambda rate, decay: optim.adam(rate, weight_decay=decay),
        lambda rate, decay: optim.adamw(rate, weight_decay=decay),
        lambda rate, decay: optim.lamb(rate, weight_decay=decay),
        lambda rate, decay: optim.lars(optim.cosine(rate, over=3), weight_decay=decay),
    ],
)
def test_an_ensemble_maps_over_rates_and_decays(build: Callable[..., Optimizer]) -> None:
    weights = fresnet.init(0, fresnet.Spec(depths=(1,), width=4), dtype=torch.float64).weights
    rates, decays = torch.tensor([0.1, 0.2, 0.0]), torch.tensor([0.0, 0.1, 0.3])
    members = tree.stack([weights] * 3)

    def run(rate: Tensor, decay: Tensor, weights: Any, all_grads: list[Any]) -> Any:
        optimizer = build(rate.double(), decay.double())
        state = optimizer.init(weights)
        for grads in all_grads:
            weights, state = optimizer.update(grads, state, weights)
        return weights

    all_grads = gradients(weights, 0)
    together = vmap(run, (0, 0, 0, None))(rates, decays, members, all_grads)
    for i, member in enumerate(tree.unstack(together)):
        assert_trees_close(member, run(rates[i], decays[i], weights, all_grads), 1e-12)


@pytest.mark.parametrize(
    "optimizer",
    [
        optim.sgd(0.1, momentum=0.9, weight_decay=0.1),
        optim.sgd(0.1, momentum=torch.tensor(0.9).double(), weight_decay=0.1),
        optim.adam(0.1, weight_decay=0.1),
        optim.adamw(0.1),
        optim.lamb(0.1),
        optim.lars(0.1, weight_decay=0.1),
    ],
)
def test_the_state_alone_is_mapped_over_and_differentiated(optimizer: Optimizer) -> None:
    """A sum of gradients and weights then has no mapped dimension, so none is written over."""
    weights = {"w": torch.linspace(1, 2, 3, dtype=torch.float64)}
    grads = tree.map(torch.cos, weights)

    def end(factor: Tensor) -> Tensor:
        state = optimizer.init(weights)
        moments = tree.map(lambda leaf: (1 + leaf) * factor, state.moments)
        new, after = optimizer.update(grads, state._replace(moments=moments), weights)
        return tree.ravel((new, after)).square().sum()

    factors = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    assert_close(vmap(end)(factors), torch.stack([*map(end, factors)]), 1e-12)
    one, h = factors[1], 1e-6
    difference = (end(one + h) - end(one - h)) / (2 * h)
    assert_close(grad(end)(one), difference, 1e-8)
    assert_close(jvp(end, (one,), (torch.ones_like(one),))[1], difference, 1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optim.sgd(-0.1), "sgd expects learning_rate to be a number from 0 on"),
        (lambda: optim.sgd(torch.ones(2)), "schedule; got float32 (2,)"),
        (lambda: optim.sgd(0.1, nesterov=True), "sgd expects a momentum above 0 with nesterov"),
        (lambda: optim.sgd(0.1, weight_decay="no"), "expects weight_decay to be a number from 0"),  # type: ignore[arg-type]
        (lambda: optim.adamw(0.1, betas=(0.9, 1.0)), "betas from 0 to below 1; got (0.9, 1.0)"),
        (lambda: optim.adam(0.1, betas=(0.9, 1.0)), "adam expects betas from 0 to below 1; got"),
        (lambda: optim.lamb(0.1, weight_decay=-1.0), "lamb expects weight_decay to be a number"),
        (lambda: optim.adamw(0.1, eps=-1.0), "adamw expects eps to be a number from 0 on"),
        (lambda: optim.lars(True), "lars expects learning_rate to be a number from 0 on"),
        (lambda: optim.clip_by_norm((torch.ones(1),), -1.0), "clip_by_norm expects max_norm to"),
    ],
)
def test_what_is_no_rate_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(FresnetError, match=re.escape(message)):
        call()


def test_gradients_of_another_network_are_refused() -> None:
    one, other = (
        fresnet.init(0, fresnet.Spec(depths=depths, width=4)).weights for depths in ((1,), (2,))
    )
    optimizer = optim.sgd(0.1)
    with pytest.raises(FresnetError, match="weights, grads and moments, expects trees of one str"):
        optimizer.update(other, optimizer.init(one), one)
    for updated in (optimizer, optim.by_path({"*": optimizer}), optim.frozen):
        with pytest.raises(FresnetError, match="in this order; got a Weights for the state"):
            updated.update(one, one, optimizer.init(one))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "law",
    [
        optim.sgd(
            torch.tensor(0.1), momentum=torch.tensor(0.9), weight_decay=optim.cosine(1, over=3)
        ),
        optim.adamw(optim.cosine(torch.tensor(0.1), over=3)),
        optim.lars(torch.tensor(0.1), weight_decay=torch.tensor(0.1)),
    ],
)
def test_leaves_without_dimensions_keep_their_dtype(
    law: optim.Optimizer, dtype: torch.dtype
) -> None:
    weights = (torch.tensor(1.0, dtype=dtype), torch.ones(2, dtype=dtype))
    state = law.init(weights)
    for _ in range(2):
        weights, state = law.update(weights, state, weights)
        assert {leaf.dtype for leaf in weights} == {dtype}
        assert {leaf.dtype for leaf in tree.leaves(state.moments)} == {dtype}


def test_schedules_over_no_step() -> None:
    """No step of warm-up is none; a fall within no step is refused."""
    after = optim.cosine(1.0, over=4)
    assert optim.warm_up(after, over=0) is after
    for wrong in (0, -1, True, "4", float("nan")):
        for schedule in (optim.cosine, optim.polynomial):
            with pytest.raises(FresnetError, match=r"expects over to be at least 1 step; got"):
                schedule(1.0, over=wrong)  # type: ignore[arg-type]
    for negative in (-1, True, None):
        with pytest.raises(FresnetError, match="warm_up expects over to be a number of steps from"):
            optim.warm_up(after, over=negative)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "build", [optim.adamw, optim.lamb, optim.lars, partial(optim.sgd, momentum=0.9)]
)
def test_gradients_and_moments_are_refused_unless_they_are_like_the_weights(
    build: Callable[..., Optimizer],
) -> None:
    """None is taken by its place alone, and none is broadcast."""
    weights = {"a": torch.zeros(3), "b": torch.ones(3)}
    optimizer = build(0.1)
    state = optimizer.init(weights)
    other = {"b": torch.ones(3), "a": torch.zeros(3)}
    with pytest.raises(FresnetError, match="tree 2 differs from the first"):
        optimizer.update(other, state, weights)
    with pytest.raises(FresnetError, match="differs from the first"):
        optimizer.update(weights, optimizer.init(other), weights)
    for wrong in ({**weights, "b": torch.ones(5, 3)}, {**weights, "b": torch.ones(())}):
        with pytest.raises(FresnetError, match=r"of the weights' shapes; got float32 \("):
            optimizer.update(wrong, state, weights)
        with pytest.raises(FresnetError, match=r"got float32 .* for float32 \(3,\)"):
            optimizer.update(weights, optimizer.init(wrong), weights)
