"""A training step is torchvision's and `torch.optim`'s, and a pure function of state and batch."""

import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import torch
from assertions import assert_all_close, assert_close, assert_same, assert_trees_close, unmutated
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    examples,
    images,
    labels,
    seeds,
    small_specs,
    targets,
    tiny_params,
    training_images,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, linearize, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

import fresnet
from fresnet import FresnetError, Params, optim, training, tree
from fresnet.network import moments
from fresnet.network.net import run_training
from fresnet.network.nodes import BasicBlock
from fresnet.network.recompute import recomputed
from fresnet.network.regimes import TRAINING
from fresnet.training import TrainState, gradients, make_train_step, start
from fresnet.training.step import TrainStep

SGD = optim.sgd(0.05, momentum=0.9, weight_decay=1e-3)
MIXINGS = {
    "mixup": training.mixup(0.2),
    "cutmix": training.cutmix(1.0),
    "one": training.one_of(training.mixup(0.2), training.cutmix(1.0)),
}


def batches(params: Params, x: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    classes = len(params.weights.head.bias)
    return [(x * (1 - 0.1 * i), (labels(x, classes) + i) % classes) for i in range(count)]


def run(
    train_step: TrainStep, state: TrainState, steps: list[tuple[Tensor, Tensor]]
) -> tuple[TrainState, list[Any]]:
    seen = []
    for batch in steps:
        state, metrics = train_step(state, batch)
        seen.append(metrics)
    return state, seen


def loss_of(params: Params, recompute: bool = False) -> Callable[[Any, Tensor, Tensor], Any]:
    def loss(weights: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        now = params._replace(weights=weights)
        logits, seen = fresnet.forward_moments(now, x, recompute=recompute)
        return F.cross_entropy(logits, y, reduction="sum"), seen

    return loss


@pytest.mark.slow
@examples(3)
@given(x=training_images(), seed=seeds, spec=small_specs(), smoothing=st.floats(0, 0.9))
def test_steps_equal_torchvision_and_torch_optim(
    x: Tensor, seed: int, spec: fresnet.Spec, smoothing: float
) -> None:
    model = reference.module(spec, seed).train()
    truth = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-3)
    state = start(reference.params(model), SGD)
    train_step = make_train_step(
        SGD, loss_fn=partial(training.cross_entropy, label_smoothing=smoothing)
    )
    for batch_x, y in batches(state.params, x, 3):
        logits = model(batch_x)
        expected = F.cross_entropy(logits, y, label_smoothing=smoothing)
        truth.zero_grad()
        expected.backward()
        truth.step()
        state, metrics = train_step(state, (batch_x, y))
        assert_close(metrics.loss, expected.detach(), 1e-9)
        assert metrics.accuracy == (logits.argmax(1) == y).double().mean()
        assert metrics.images == len(x)
    here = fresnet.to_state_dict(state.params)
    there = {n: v for n, v in model.state_dict().items() if "batches" not in n}
    assert_all_close({n: here[n] for n in there}, there, 1e-7)


@examples(10)
@given(
    params=tiny_params(headed=True),
    x=training_images(),
    mixing=st.sampled_from([None, *MIXINGS.values()]),
    micro_batches=st.integers(1, 2),
    dropout=st.sampled_from([0.0, 0.4]),
    average=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_step_is_a_pure_function(
    params: Params,
    x: Tensor,
    mixing: Any,
    micro_batches: int,
    dropout: float,
    average: bool,
    seed: int,
) -> None:
    train_step = make_train_step(
        SGD, mixing=mixing, dropout=dropout, micro_batches=micro_batches, max_norm=1.0
    )
    state, steps = start(params, SGD, seed=seed, average=average), batches(params, x, 2)
    rng = torch.get_rng_state()
    with unmutated(state, steps):
        first, second = (run(train_step, state, steps) for _ in range(2))
    assert_same(first, second)
    assert torch.equal(torch.get_rng_state(), rng)
    end, _ = first
    assert end.step == end.position == 2
    assert torch.equal(end.rng, state.rng) is (mixing is None and not dropout)
    assert tree.paths(end) == tree.paths(state)


def test_a_step_copies_no_number_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy would wait for a GPU, and could not be recorded in a CUDA graph."""
    rate = optim.warm_up(optim.steps(0.1, at=(1, 2)), over=2, start=0.1)
    optimizer = optim.sgd(rate, momentum=0.9, weight_decay=1e-4)
    spec = fresnet.Spec(BasicBlock, (1,), width=4)
    state = start(fresnet.init(0, spec, num_classes=3), optimizer, average=True)
    train_step = make_train_step(optimizer, precision=torch.bfloat16, max_norm=1.0)
    batch = torch.ones(2, 3, 8, 8), torch.tensor([0, 1])

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("a number is copied")

    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, refuse)
    train_step(state, batch)


@examples(20)
@given(params=tiny_params(), x=training_images(), parts=st.integers(1, 2), recompute=st.booleans())
def test_gradients_are_those_of_torch_func(
    params: Params, x: Tensor, parts: int, recompute: bool
) -> None:
    y = targets(params, x)
    cut = list(zip(x.tensor_split(parts), y.tensor_split(parts), strict=True))
    grads, found = gradients(loss_of(params, recompute), params.weights, cut)
    each = [grad(loss_of(params), has_aux=True)(params.weights, *part) for part in cut]
    expected = tree.map(lambda *leaves: sum(leaves), *(one for one, _ in each))
    assert_gradients_close(grads, expected)
    for (loss, seen), part, (_, expected_seen) in zip(found, cut, each, strict=True):
        assert_close(loss, loss_of(params)(params.weights, *part)[0], 1e-12)
        assert_trees_close(seen, expected_seen, 1e-10)


def assert_gradients_close(actual: Any, expected: Any) -> None:
    """The gradients are close as a whole. Single leaves may have gradients of nothing."""
    assert_close(tree.ravel(actual), tree.ravel(expected), 1e-10)


def test_gradients_of_weights_that_a_loss_does_not_use_are_zero() -> None:
    def loss(weights: Any, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return (weights["used"] * x).sum(), ()

    weights = {"used": torch.ones(2), "unused": torch.ones(3)}
    grads, _ = gradients(loss, weights, [(torch.ones(2),)])
    assert_same(grads, {"used": torch.ones(2), "unused": torch.zeros(3)})


PARAMS = fresnet.init(
    0, fresnet.Spec(fresnet.nodes.Bottleneck, (2, 1), width=4), num_classes=5, dtype=torch.float64
)
X = torch.randn(4, 3, 37, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([3, 1, 4, 1])


def kept_bytes(recompute: bool) -> int:
    """The bytes that are saved for the pass back, storage by storage."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = tree.map(lambda leaf: leaf.clone().requires_grad_(), PARAMS.weights)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = loss_of(PARAMS, recompute)(weights, X, Y)
    assert loss.requires_grad
    return sum(saved.values())


def test_recomputing_keeps_a_fraction() -> None:
    assert kept_bytes(recompute=True) < 0.5 * kept_bytes(recompute=False)


def test_recomputing_lets_go_of_what_it_is_through_with() -> None:
    """When the pass back comes to the first function, the input of the second is gone."""
    alive: list[bool] = []

    def first(x: Tensor) -> tuple[Tensor, tuple[()]]:
        if middle:
            alive.append(middle[0]() is not None)
        return x.sin(), ()

    middle: list[Any] = []
    x = torch.ones(3, requires_grad=True)
    y, _ = recomputed(first, x)
    z, _ = recomputed(lambda y: (y.cos(), ()), y)
    middle.append(weakref.ref(y))
    del y
    (slope,) = torch.autograd.grad(z.sum(), x)
    assert alive == [False]
    assert_close(slope, -x.sin().sin() * x.cos(), 1e-6)


def graph_survives(differentiate: Callable[..., Any]) -> bool:
    """Whether the last layers' part of a graph outlives the pass to the first layers."""
    alive = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            ctx.save_for_backward(output)
            nodes.append(ctx)

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            for node in nodes[nodes.index(ctx) + 1 :]:
                try:
                    node.saved_tensors  # noqa: B018
                    alive.append(node)
                except RuntimeError:  # freed
                    pass
            return cotangent

    nodes: list[Any] = []

    def loss(weights: Any, x: Tensor) -> tuple[Tensor, tuple[()]]:
        for _ in range(3):
            x = Watch.apply(x * weights[0])
        return x.sum(), ()

    differentiate(loss)
    assert len(nodes) == 3
    return bool(alive)


def test_a_graph_is_freed_as_the_pass_goes() -> None:
    weights, x = (torch.ones(2),), torch.ones(2)
    assert not graph_survives(lambda loss: gradients(loss, weights, [(x,)]))

    def keeping(loss: Any) -> None:
        leaf = weights[0].clone().requires_grad_()
        torch.autograd.grad(loss((leaf,), x)[0], leaf, create_graph=True)

    assert graph_survives(keeping)


@examples(5)
@given(params=tiny_params(headed=True), x=training_images())
def test_micro_batches_are_normalised_apart_and_seen_as_one(params: Params, x: Tensor) -> None:
    y = labels(x, len(params.weights.head.bias))
    train_step = make_train_step(optim.sgd(1.0), micro_batches=2, momentum=0.3)
    state, metrics = train_step(start(params, optim.sgd(1.0)), (x, y))
    cut = list(zip(x.tensor_split(2), y.tensor_split(2), strict=True))
    each = [grad(loss_of(params), has_aux=True)(params.weights, *part) for part in cut]
    mean = tree.map(lambda a, b: (a + b) / len(x), *(one for one, _ in each))
    moved = tree.map(torch.sub, params.weights, mean)
    assert_trees_close(state.params.weights, moved, 1e-10)
    seen = moments.merge(*(one for _, one in each))
    assert_trees_close(state.params.stats, moments.update(params.stats, seen, momentum=0.3), 1e-12)
    losses = [loss_of(params)(params.weights, *part)[0] for part in cut]
    assert_close(metrics.loss, torch.stack(losses).sum() / len(x), 1e-12)


def test_where_norms_are_frozen_micro_batches_are_the_batch() -> None:
    params = fresnet.freeze(PARAMS)
    whole, cut = (
        make_train_step(SGD, micro_batches=parts)(start(params, SGD), (X, Y)) for parts in (1, 3)
    )
    assert_trees_close(cut[0].params, whole[0].params, 1e-10)
    assert_close(cut[1].loss, whole[1].loss, 1e-12)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
@examples(30)
@given(
    x=images(batch=st.integers(1, 5)),
    alpha=st.floats(0.1, 5),
    seed=st.integers(0, 2**63 - 1),
)
def test_mixing_is_that_of_torchvision(name: str, x: Tensor, alpha: float, seed: int) -> None:
    y, classes = labels(x, 7), 7
    kind = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        expected_x, expected_targets = kind(alpha=alpha, num_classes=classes)(x, y)
    mixing = {"mixup": training.mixup, "cutmix": training.cutmix}[name](alpha)
    generator = torch.Generator().manual_seed(seed)
    with unmutated(x):
        mixed, targets = mixing(x, F.one_hot(y, classes).double(), generator)
    assert_close(mixed, expected_x, 1e-15)
    assert_close(targets, expected_targets.double(), 1e-6)  # theirs are float32


@examples(30)
@given(seed=seeds)
def test_one_of_draws_as_torchvision(seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mixings = [v2.MixUp(alpha=0.2, num_classes=5), v2.CutMix(alpha=1.0, num_classes=5)]
        expected, _ = v2.RandomChoice(mixings)(X, Y)
    generator = torch.Generator().manual_seed(seed)
    mixed, _ = MIXINGS["one"](X, F.one_hot(Y, 5).double(), generator)
    assert_close(mixed, expected, 1e-15)


def test_mixed_batches_are_what_a_step_trains_on() -> None:
    state = start(PARAMS, SGD, seed=7)
    generator = torch.Generator().manual_seed(7)
    x, targets = MIXINGS["cutmix"](X, F.one_hot(Y, 5).double(), generator)
    _, metrics = make_train_step(SGD, mixing=MIXINGS["cutmix"])(state, (X, Y))
    logits, _ = fresnet.forward_train(PARAMS, x)
    assert_close(metrics.loss, F.cross_entropy(logits, targets), 1e-12)
    assert metrics.accuracy == (logits.argmax(1) == targets.argmax(1)).double().mean()


def test_the_average_is_of_weights_and_statistics() -> None:
    train_step = make_train_step(SGD, average_decay=0.3)
    state = start(PARAMS, SGD, average=True)
    assert_same(state.average, PARAMS)
    expected = PARAMS
    for step in range(6):
        state, _ = train_step(state, (X, Y))
        d = min(0.3, (1 + step) / (10 + step))
        expected = tree.map(lambda e, p, d=d: d * e + (1 - d) * p, expected, state.params)
        assert_trees_close(state.average, expected, 1e-12)


def test_clipping_bounds_the_gradient() -> None:
    plain = optim.sgd(1.0)
    state, _ = make_train_step(plain, max_norm=0.01)(start(PARAMS, plain), (X, Y))
    moved = tree.map(torch.sub, PARAMS.weights, state.params.weights)
    assert abs(tree.ravel(moved).norm() - 0.01) < 1e-6


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_in_bfloat16_all_but_the_network_stays_wide(wide: torch.dtype) -> None:
    params, x = tree.map(lambda leaf: leaf.to(wide), PARAMS), X.to(wide)
    plain = optim.sgd(1.0)
    state, metrics = make_train_step(plain, precision=torch.bfloat16)(start(params, plain), (x, Y))
    assert {leaf.dtype for leaf in tree.leaves(state.params)} == {wide}

    def loss(weights: Any) -> tuple[Tensor, Any]:
        rounded = [
            leaf.bfloat16() if optim.all_but_norms(path) else leaf.float()
            for path, leaf in zip(tree.paths(weights), tree.leaves(weights), strict=True)
        ]
        stats = tree.map(lambda leaf: leaf.float(), params.stats)
        narrow = Params(tree.unflatten(weights, rounded), stats)
        logits, seen = run_training(narrow, x.bfloat16(), TRAINING)
        return F.cross_entropy(logits.to(wide), Y), seen

    grads, seen = grad(loss, has_aux=True)(params.weights)
    assert_close(metrics.loss, loss(params.weights)[0], 1e-6)
    assert_close(
        tree.ravel(state.params.weights), tree.ravel(params.weights) - tree.ravel(grads), 1e-6
    )
    seen = tree.map(lambda leaf: leaf.to(wide), seen)
    assert_trees_close(state.params.stats, moments.update(params.stats, seen), 1e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_in_float64_a_step_is_that_of_the_widened_network(frozen: bool) -> None:
    params, x = tree.map(torch.Tensor.float, PARAMS), X.float()
    params = fresnet.freeze(params) if frozen else params
    wide = tree.map(torch.Tensor.double, params)
    plain = optim.sgd(0.1)
    state, metrics = make_train_step(plain, precision=torch.float64)(start(params, plain), (x, Y))
    truth, expected = make_train_step(plain)(start(wide, plain), (x.double(), Y))
    assert {leaf.dtype for leaf in tree.leaves(state.params)} == {torch.float32}
    assert_close(metrics.loss, expected.loss.float(), 1e-6)
    assert_trees_close(state.params, tree.map(torch.Tensor.float, truth.params), 1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")  # of linearize
def test_in_forward_mode_recomputing_changes_nothing() -> None:
    weights, direction = PARAMS.weights, tree.map(torch.cos, PARAMS.weights)
    plain, twice = ((lambda w, r=r: loss_of(PARAMS, r)(w, X, Y)[0]) for r in (False, True))

    def slope(function: Any) -> Callable[[Any], Tensor]:
        return lambda w: jvp(function, (w,), (direction,))[1]

    for expected, actual in (
        (slope(slope(plain)), slope(slope(twice))),
        (lambda w: linearize(plain, w)[1](direction), lambda w: linearize(twice, w)[1](direction)),
        (lambda w: tree.ravel(grad(slope(plain))(w)), lambda w: tree.ravel(grad(slope(twice))(w))),
    ):
        assert_close(actual(weights), expected(weights), 1e-10)
    with forward_ad.dual_level():
        dual = tree.map(forward_ad.make_dual, weights, direction)
        tangents = [forward_ad.unpack_dual(f(dual)).tangent for f in (plain, twice)]
        assert_close(tangents[1], tangents[0], 1e-10)


def test_probabilities_are_targets_too() -> None:
    train_step, state = make_train_step(SGD), start(PARAMS, SGD)
    hard = train_step(state, (X, Y))
    soft = train_step(state, (X, F.one_hot(Y, 5).double()))
    assert_trees_close(soft[0].params, hard[0].params, 1e-10)
    assert soft[1].accuracy == hard[1].accuracy


def test_mixing_does_not_go_by_defaults() -> None:
    """Anybody may set PyTorch's defaults for devices and dtypes."""
    targets, generators = F.one_hot(Y, 5).double(), [torch.Generator().manual_seed(1)] * 2
    state = generators[0].get_state()
    expected = MIXINGS["one"](X, targets, generators[0])
    generators[1].set_state(state)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(MIXINGS["one"](X, targets, generators[1]), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_ensemble_of_rates_trains_in_one_vmap() -> None:
    def step(rate: Tensor) -> TrainState:
        optimizer = optim.sgd(rate)
        return make_train_step(optimizer)(start(PARAMS, optimizer), (X, Y))[0]

    rates = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    together = vmap(step)(rates)
    for i, rate in enumerate(rates):
        alone = step(rate)
        member = tree.map(lambda leaf, i=i: leaf[i], together.params)
        assert_trees_close(member, alone.params, 1e-10)


def test_a_step_is_differentiable_in_what_it_depends_on() -> None:
    """Meta-learning by `torch.func` and by `torch.autograd` equals finite differences."""

    def loss_after(rate: Tensor) -> Tensor:
        optimizer = optim.sgd(rate, momentum=0.9)
        train_step = make_train_step(optimizer)
        _, metrics = run(train_step, start(PARAMS, optimizer), [(X, Y)] * 3)
        loss: Tensor = metrics[-1].loss
        return loss

    rate = torch.tensor(0.01, dtype=torch.float64)
    slope = grad(loss_after)(rate)
    (same,) = torch.autograd.grad(loss_after(leaf := rate.clone().requires_grad_()), leaf)
    h = 1e-6
    difference = (loss_after(rate + h) - loss_after(rate - h)) / (2 * h)
    assert_close(slope, difference, 1e-5)
    assert_close(same, slope, 1e-10)


@pytest.mark.slow
def test_a_compiled_step_is_the_step() -> None:
    train_step = make_train_step(SGD, max_norm=1.0)
    compiled = torch.compile(train_step, fullgraph=True, backend="aot_eager")
    small = fresnet.Spec(fresnet.nodes.BasicBlock, (1, 1), width=2)
    params = fresnet.init(0, small, num_classes=5, dtype=torch.float64)
    state = start(params, SGD, average=True)
    expected, actual = (run(step, state, [(X, Y)] * 2) for step in (train_step, compiled))
    assert_trees_close(actual[0].params, expected[0].params, 1e-9)
    assert_trees_close(actual[0].average, expected[0].average, 1e-9)
    assert_close(actual[1][1].loss, expected[1][1].loss, 1e-9)


@examples(10)
@given(
    params=tiny_params(headed=True),
    x=images(batch=st.integers(2, 6), side=st.integers(33, 40)),
)
def test_evaluation_counts(params: Params, x: Tensor) -> None:
    classes = len(params.weights.head.bias)
    y = labels(x, classes)
    found = training.evaluate(params, [(x[:1], y[:1]), (x[1:], y[1:])])
    logits = fresnet.forward(params, x)
    ranks = (logits > logits.gather(1, y[:, None])).sum(1)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for true, taken in zip(y.tolist(), logits.argmax(1).tolist(), strict=True):
        confusion[true, taken] += 1
    assert found.images == len(x)
    assert abs(found.loss - F.cross_entropy(logits, y)) <= 1e-9 * abs(found.loss)
    assert found.top1 == (ranks == 0).double().mean()
    assert found.top5 == (ranks < 5).double().mean()
    assert torch.equal(found.confusion, confusion)


def test_losses_are_those_of_float32_logits_in_float64() -> None:
    params, x = tree.map(Tensor.float, (PARAMS, X))
    found = training.evaluate(params, [(x[:1], Y[:1]), (x[1:], Y[1:])])
    logits = torch.cat([fresnet.forward(params, part) for part in (x[:1], x[1:])])
    exact = F.cross_entropy(logits.double(), Y)
    assert abs(found.loss - exact) <= 1e-14 * exact


NARROW = tree.map(lambda leaf: leaf.bfloat16(), PARAMS.weights)
STATE = start(PARAMS, SGD)
STEP = make_train_step(SGD)
OTHER: Any = SimpleNamespace(x=None, params=PARAMS, weights=PARAMS.weights, group="all")
"""Arguments that the types forbid."""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: STEP(STATE, (X, Y + 1)), "a train step expects classes from 0 to 4; got 5"),
        (lambda: STEP(STATE, (X, Y - 2)), "a train step expects classes from 0 to 4; got -1"),
        (lambda: STEP(STATE, (X, Y.int())), r"4 classes, int64 \(4,\), .*; got int32 \(4,\)"),
        (lambda: STEP(STATE, (X, Y[:3])), r"4 classes, int64 \(4,\), .*; got int64 \(3,\)"),
        (lambda: STEP(STATE, (X.float(), Y)), "in the weights' torch.float64; got torch.float32"),
        (lambda: STEP(OTHER.params, (X, Y)), "a TrainState, as training.start makes it; got a P"),
        (lambda: STEP(STATE, OTHER.x), r"a train step expects a batch \(x, y\); got None"),
        (lambda: STEP(STATE, X), r"a train step expects a batch \(x, y\); got float64 \(4, "),  # type: ignore[arg-type]
        (lambda: STEP(STATE, [(X, Y)]), r"a train step expects a batch \(x, y\); got a list"),  # type: ignore[arg-type]
        (
            lambda: STEP(STATE, (X, F.one_hot(Y, 5))),
            r"or probabilities, float64 \(4, 5\); got int64 \(4, 5\)",
        ),
        (
            lambda: make_train_step(OTHER.group),
            "make_train_step expects optimizer to be one of fresnet.optim, .*; got 'all",
        ),
        (
            lambda: start(PARAMS, optim.sgd),  # type: ignore[arg-type]
            "start expects optimizer to be one of fresnet.optim, .*; got a function",
        ),
        (
            lambda: make_train_step(SGD, micro_batches=5)(STATE, (X, Y)),
            "of 5 micro-batches expects as many images; got 4",
        ),
        (lambda: make_train_step(SGD, micro_batches=0), "a positive integer; got 0"),
        (lambda: make_train_step(SGD, norms_across=True), "the number of processes, 1; got True"),
        (lambda: make_train_step(SGD, norms_across=2), "the number of processes, 1; got 2"),
        (lambda: make_train_step(SGD, group=OTHER.group), "to be a process group .*; got a str"),
        (lambda: start(OTHER.weights, SGD), "start expects Params"),
        (lambda: start(Params(NARROW, PARAMS.stats), SGD), "start expects"),
        (
            lambda: make_train_step(SGD, loss_fn=F.cross_entropy)(STATE, (X, Y)),
            r"a loss for each image, \(4,\); got \(\)",
        ),
        (
            lambda: make_train_step(SGD, loss_fn=lambda logits, y: logits)(STATE, (X, Y)),
            r"a loss for each image, \(4,\); got \(4, 5\)",
        ),
        (
            lambda: make_train_step(SGD, loss_fn=lambda logits, y: 1.0)(STATE, (X, Y)),  # type: ignore[arg-type,return-value]
            r"a loss for each image, \(4,\); got a float",
        ),
        (
            lambda: make_train_step(SGD, loss_fn=lambda logits, y: logits.detach().sum(1))(
                STATE, (X, Y)
            ),
            "gradients expects a loss that depends on the weights",
        ),
        (lambda: make_train_step(SGD, precision=torch.float16), "got torch.float16"),
        (lambda: make_train_step(SGD, average_decay=2.0), "average_decay from 0 to 1; got 2.0"),
        (lambda: make_train_step(SGD, momentum=2.0), "momentum to be a number from 0 to 1"),
        (
            lambda: vmap(make_train_step(SGD, mixing=MIXINGS["one"]), (0, None))(
                tree.stack([STATE, STATE]), (X, Y)
            ),
            "a train step that mixes or drops does not map",
        ),
        (
            lambda: SGD.update(PARAMS.weights, optim.sgd(0.1).init(PARAMS.weights), PARAMS.weights),
            "a state with 1 moments, as its own init makes it; got one with 0",
        ),
        (lambda: training.evaluate(PARAMS, [(OTHER.x, Y)]), "x to be a tensor"),
        (lambda: training.mixup(float("inf")), "mixup expects alpha to be a positive number"),
        (lambda: training.mixup(0.0), "mixup expects alpha to be a positive number; got 0.0"),
        (lambda: training.cutmix(-1), "cutmix expects alpha to be a positive number; got -1"),
        *(
            (partial(training.evaluate, PARAMS, wrong), r"as in \[\(x, y\)\]; got float64 \(")  # type: ignore[arg-type]
            for wrong in ((X, Y), [X], X)
        ),
        (lambda: training.evaluate(PARAMS, [(X, Y[:, None])]), r"int64 \(4,\); got int64 \(4, 1\)"),
        (lambda: training.evaluate(PARAMS, []), "at least one image; got none"),
        (lambda: training.evaluate(PARAMS, [(X, Y + 1)]), "classes from 0 to 4; got 5"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(FresnetError, match=message):
        call()


SMALL = fresnet.Spec(fresnet.nodes.BasicBlock, (1, 1), width=4)
TINY = fresnet.init(0, SMALL, num_classes=3)
TINY_X = torch.randn(4, 3, 20, 20, generator=torch.Generator().manual_seed(0))
TINY_Y = torch.tensor([0, 1, 2, 1])


def test_a_state_keeps_no_graph_of_what_a_loss_reads() -> None:
    """Whatever the loss depends on besides is a constant, so a run does not grow."""
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)

    def loss_fn(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits * factor, y, reduction="none")

    found = make_train_step(SGD, loss_fn=loss_fn)(STATE, (X, Y))
    assert not any(leaf.requires_grad for leaf in tree.leaves(found))


def test_inference_mode_is_refused_in_words() -> None:
    optimizer = optim.sgd(0.1)
    state, train_step = start(TINY, optimizer), make_train_step(optimizer)
    with torch.inference_mode():
        inside = tree.map(torch.clone, state)
        with pytest.raises(FresnetError, match=r"outside of torch.inference_mode; got it on"):
            train_step(state, (TINY_X, TINY_Y))
        x = TINY_X.clone()
    for wrong, images_of in ((inside, TINY_X), (state, x)):
        with pytest.raises(FresnetError, match=r"torch.inference_mode: make them, or clone\(\)"):
            train_step(wrong, (images_of, TINY_Y))


def test_an_ensemble_trains_under_autocast() -> None:
    """Each member's step is that of the member alone, to the rounding of bfloat16."""
    optimizer = optim.sgd(0.1, momentum=0.9)
    members = [start(fresnet.init(seed, SMALL, num_classes=3), optimizer) for seed in (0, 1)]
    train_step = make_train_step(optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        together, metrics = vmap(train_step, (0, None))(tree.stack(members), (TINY_X, TINY_Y))
        apart = [train_step(member, (TINY_X, TINY_Y)) for member in members]
    for one, (alone, _) in zip(tree.unstack(together), apart, strict=True):
        change, expected = tree.ravel(one.params), tree.ravel(alone.params)
        assert_close(change, expected, 1e-3)
    wide = [train_step(member, (TINY_X, TINY_Y))[1].loss for member in members]
    assert_close(metrics.loss, torch.stack(wide), 0.05)


@pytest.mark.parametrize("inside", [True, False])
def test_recomputing_under_autocast_computes_the_same_again(inside: bool) -> None:
    """The pass back may come when autocast is off."""
    found = []
    for recompute in (False, True):
        weights = tree.map(lambda leaf: leaf.clone().requires_grad_(), TINY.weights)
        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = fresnet.forward_moments(
                TINY._replace(weights=weights), TINY_X, recompute=recompute
            )
            loss = F.cross_entropy(logits, TINY_Y)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append(tree.map(lambda leaf: leaf.grad, weights))
    assert_trees_close(found[1], found[0], 1e-6)


def test_evaluation_makes_one_table_for_all_batches() -> None:
    """One for each batch would double what 21,841 classes take, 3.8 GB."""
    classes = 50
    spec = fresnet.Spec(BasicBlock, (1,), width=2)
    params = fresnet.init(0, spec, num_classes=classes)
    tables: dict[int, Tensor] = {}

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **kwargs or {})
            if isinstance(out, Tensor) and out.numel() == classes**2:
                tables[out.untyped_storage().data_ptr()] = out
            return out

    batches = [(torch.randn(3, 3, 16, 16), torch.arange(i, i + 3)) for i in range(4)]
    with Allocations():
        found = training.evaluate(params, batches)
    assert len(tables) == 1
    assert found.confusion.sum(1).tolist() == [1, 2, 3, 3, 2, 1] + [0] * 44


def test_evaluation_is_not_mapped() -> None:
    networks = tree.stack([TINY, TINY])
    with pytest.raises(FresnetError, match=r"no transform of torch.func may go over it"):
        vmap(lambda params: torch.tensor(training.evaluate(params, [(TINY_X, TINY_Y)]).top1))(
            networks
        )


def test_a_recomputed_graph_is_pulled_back_under_vmap() -> None:
    """`torch.vmap` of `torch.autograd.grad` is PyTorch's way to the rows of a Jacobian."""
    found = []
    for recompute in (False, True):
        weights = tree.map(lambda leaf: leaf.clone().requires_grad_(), TINY.weights)
        network = TINY._replace(weights=weights)
        logits, _ = fresnet.forward_moments(network, TINY_X, recompute=recompute)
        rows = torch.eye(logits.numel()).view(-1, *logits.shape)
        leaves = tree.leaves(weights)
        found.append(
            torch.vmap(partial(torch.autograd.grad, logits, leaves, retain_graph=True))(rows)
        )
    assert_trees_close(found[1], found[0], 1e-4)
