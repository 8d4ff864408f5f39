"""Each part of a network trains by an optimizer of its own, or stays as it is."""

import re
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from assertions import assert_close, assert_same, assert_trees_close, unmutated
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, seeds, tiny_params
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

import fresnet
from fresnet import FresnetError, Params, Spec, optim, training, tree
from fresnet.nodes import Bottleneck, FrozenNorm, Norm
from fresnet.training.plan import Run, assemble
from fresnet.training.processes import Processes
from fresnet.training.recipes import RECIPES

SMALL = fresnet.init(0, Spec(Bottleneck, (1, 1), width=4), num_classes=5, dtype=torch.float64)
X = torch.randn(4, 3, 33, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0])
STEPS = 3

momentums = st.sampled_from([0.0, 0.9])
groups = st.fixed_dictionaries(
    {"lr": st.floats(0, 1), "weight_decay": st.floats(0, 1), "momentum": momentums}
)


def sgd(lr: float, **options: Any) -> optim.Optimizer:
    return optim.sgd(lr, **options)


def some_grads(weights: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda w: torch.randn(w.shape, generator=generator, dtype=w.dtype), weights)


@examples(15)
@given(params=tiny_params(headed=True), settings=st.tuples(groups, groups, groups), seed=seeds)
def test_parts_step_as_param_groups_of_torch_optim_do(
    params: Params, settings: tuple[dict[str, Any], ...], seed: int
) -> None:
    """The head, all norms, frozen kernels of the stem, and the rest."""
    weights = params.weights
    optimizer = optim.by_path(
        {
            "head": sgd(**settings[0]),
            lambda path: "norm" in path: sgd(**settings[1]),
            "stem": optim.frozen,
            "*": sgd(**settings[2]),
        }
    )
    theirs = tree.map(lambda w: w.clone().requires_grad_(), weights)
    own: list[list[Tensor]] = [[], [], [], []]
    for name, leaf in tree.named(theirs).items():
        first, *_ = name.split(".")
        own[0 if first == "head" else 1 if ".norm." in name else 2 + (first != "stem")].append(leaf)
    chosen = zip((own[0], own[1], own[3]), settings, strict=True)
    truth = torch.optim.SGD([{"params": leaves, **group} for leaves, group in chosen if leaves])
    state = optimizer.init(weights)
    for step in range(STEPS):
        grads = some_grads(weights, seed + step)
        for p, g in zip(tree.leaves(theirs), tree.leaves(grads), strict=True):
            p.grad = g.clone()
        truth.step()
        with unmutated(weights, grads, state):
            weights, state = optimizer.update(grads, state, weights)
    assert_close(tree.ravel(weights), tree.ravel(theirs).detach(), 1e-12)
    for kernel in own[2]:
        assert any(torch.equal(kernel, leaf) for leaf in tree.leaves(weights.stem))
    assert state.step == STEPS


def test_whole_optimizers_of_different_kinds_keep_their_own_moments() -> None:
    weights = SMALL.weights
    momentum, adamw = optim.sgd(0.1, momentum=0.9), optim.adamw(0.01)
    optimizer = optim.by_path({"stem": optim.frozen, "stages": momentum, "*": adamw})
    state, *alone = (one.init(weights) for one in (optimizer, momentum, adamw))
    assert [len(moments) for moments in state.moments] == [0, 1, 2]
    held = [tree.dotted(path).partition(".")[0] for path in tree.paths(state.moments[1][0])]
    assert {*held} == {"stages"}
    both = [weights, weights]
    for step in range(STEPS):
        grads = some_grads(weights, step)
        weights, state = optimizer.update(grads, state, weights)
        for i, one in enumerate((momentum, adamw)):
            both[i], alone[i] = one.update(grads, alone[i], both[i])
    assert_same(weights.stem, SMALL.weights.stem)
    assert_same(weights.stages, both[0].stages)
    assert_same(weights.head, both[1].head)
    assert_same(state.moments[1][0].stages, alone[0].moments[0].stages)


def test_schedules_and_nested_parts_share_the_step() -> None:
    weights = {"a": {"x": torch.ones(2), "y": torch.ones(2)}, "b": torch.ones(2)}
    falling = optim.sgd(optim.steps(1.0, at=[1]))
    inner = optim.by_path({"a.x": optim.frozen, "*": falling})
    optimizer = optim.by_path({"a": inner, "b": falling})
    assert [*map(optimizer.trains, tree.paths(weights))] == [False, True, True]
    state, grads = optimizer.init(weights), tree.map(torch.ones_like, weights)
    for _ in range(2):
        weights, state = optimizer.update(grads, state, weights)
    left = torch.full((2,), -0.1)
    assert_trees_close(weights, {"a": {"x": torch.ones(2), "y": left}, "b": left}, 1e-6)


def check_step(optimizer: optim.Optimizer, groups: dict[str, Any], **options: Any) -> None:
    """A step equals autograd over the leaves of these groups, clipped together."""
    state = training.start(SMALL, optimizer)
    train_step = training.make_train_step(optimizer, **options)
    theirs = tree.map(Tensor.clone, SMALL.weights)
    own = {
        part: [leaf for name, leaf in tree.named(theirs).items() if name.startswith(part)]
        for part in groups
    }
    leaves = [leaf.requires_grad_() for part in own.values() for leaf in part]
    truth = torch.optim.SGD([{"params": own[part], **group} for part, group in groups.items()])
    stats = SMALL.stats
    for _ in range(STEPS):
        logits, stats = fresnet.forward_train(Params(theirs, stats), X)
        truth.zero_grad()
        F.cross_entropy(logits, Y).backward()
        norm = torch.nn.utils.clip_grad_norm_(leaves, options.get("max_norm", 1e9))
        assert norm > options.get("max_norm", 0)
        truth.step()
        state, _ = train_step(state, (X, Y))
    assert_trees_close(state.params.weights, tree.map(Tensor.detach, theirs), 1e-9)
    assert_trees_close(state.params.stats, stats, 1e-9)


@pytest.mark.parametrize("options", [{}, {"max_norm": 1e-2}, {"recompute": True}])
def test_a_step_of_frozen_parts_is_that_of_leaves_without_gradients(options: Any) -> None:
    """Frozen weights neither decay nor count in the norm of the gradient."""
    check_step(
        optim.by_path(
            {
                "stem": optim.frozen,
                "stages.0": optim.frozen,
                "head": optim.sgd(0.5, momentum=0.9, weight_decay=0.1),
                "*": optim.sgd(0.01, weight_decay=0.2),
            }
        ),
        {
            "head": {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1},
            "stages.1": {"lr": 0.01, "weight_decay": 0.2},
        },
        **options,
    )


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_takes_gradients_of_what_is_trained_alone(micro_batches: int) -> None:
    seen: list[Any] = []

    def update(grads: Any, state: optim.State, weights: Any) -> Any:
        seen.append(grads)
        return optim.frozen.update(grads, state, weights)

    listening = optim.Optimizer(optim.frozen.init, update)
    optimizer = optim.by_path({"head": listening, "*": optim.frozen})
    train_step = training.make_train_step(optimizer, micro_batches=micro_batches)
    state, _ = train_step(training.start(SMALL, optimizer), (X, Y))
    assert tree.paths(seen[0]) == [("head", "weight"), ("head", "bias")]
    assert_same(state.params.weights, SMALL.weights)
    for nothing in (optim.frozen, optim.by_path({"*": optim.frozen})):
        with pytest.raises(FresnetError, match="an optimizer that changes a weight; got frozen"):
            training.make_train_step(nothing)(training.start(SMALL, nothing), (X, Y))


def test_nothing_is_kept_of_what_lies_before_the_first_trained_weight() -> None:
    def kept(optimizer: optim.Optimizer) -> int:
        sizes: list[int] = []

        def pack(x: Tensor) -> Tensor:
            sizes.append(x.numel())
            return x

        state = training.start(SMALL, optimizer)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            training.make_train_step(optimizer)(state, (X, Y))
        return sum(sizes)

    head = optim.by_path({"head": optim.sgd(0.1), "*": optim.frozen})
    assert 0 < kept(head) < kept(optim.sgd(0.1)) / 20


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 holds what is passed")
def test_gradients_of_a_part_are_freed_before_the_next_is_updated() -> None:
    grads = [tree.map(torch.ones_like, SMALL.weights)]
    freed = weakref.ref(grads[0].stem.layer.conv)

    def update(grads: Any, state: optim.State, weights: Any) -> Any:
        assert freed() is None
        return optim.frozen.update(grads, state, weights)

    later = optim.Optimizer(optim.frozen.init, update)
    optimizer = optim.by_path({"stem": optim.sgd(0.1, weight_decay=0.1), "*": later})
    state = optimizer.init(SMALL.weights)
    optimizer.update(grads.pop(), state, SMALL.weights)


def test_an_ensemble_maps_over_the_rates_of_parts() -> None:
    def stepped(rate: Tensor) -> Any:
        optimizer = optim.by_path({"head": optim.sgd(rate), "*": optim.frozen})
        train_step = training.make_train_step(optimizer)
        return train_step(training.start(SMALL, optimizer), (X, Y))[0].params.weights

    rates = torch.tensor([0.1, 0.2], dtype=torch.float64)
    together = vmap(stepped)(rates)
    for i, member in enumerate(tree.unstack(together)):
        assert_trees_close(member, stepped(rates[i]), 1e-12)


@pytest.mark.parametrize("rate", [None, 0.5, 1.0])
def test_a_recipe_trains_the_head_at_its_rate_and_keeps_what_it_freezes(rate: float | None) -> None:
    """A norm that is frozen whole keeps its statistics, and no other does."""
    frozen = ("stem", "stages.0", "*.scale")
    recipe = RECIPES["v1"]._replace(batch=4, weight_decay=0.0, head_rate=rate, frozen=frozen)
    alone = Processes(None, 0, 1, torch.device("cpu"))
    state, train_step, _ = assemble(Run("parts", recipe), SMALL, 8, alone)
    weights, stats = train_step(state, (X, Y))[0].params
    still = tree.matching(*frozen)
    for path, leaf in zip(tree.paths(weights), tree.leaves(weights), strict=True):
        assert torch.equal(leaf, tree.named(SMALL.weights)[tree.dotted(path)]) is still(path)
    assert_same(stats.stem, SMALL.stats.stem)
    assert_same(stats.stages[0], SMALL.stats.stages[0])
    assert not tree.equal(stats.stages[1], SMALL.stats.stages[1])
    kinds = [type(weights.stages[i][0].layer1.norm) for i in (0, 1)]
    assert kinds == [FrozenNorm, Norm]
    logits, _ = fresnet.forward_train(state.params, X)
    slope = (logits.softmax(1) - F.one_hot(Y, 5)).mean(0)
    moved = weights.head.bias - SMALL.weights.head.bias
    assert_close(moved, -(recipe.rate if rate is None else rate) * slope, 1e-6)


@pytest.mark.slow
def test_an_update_of_parts_compiles_whole() -> None:
    weights = SMALL.weights.stem.layer
    optimizer = optim.by_path(
        {"conv": optim.frozen, "*.scale": optim.sgd(0.1), "*": optim.sgd(0.1, momentum=0.9)}
    )
    grads, state = some_grads(weights, 0), optimizer.init(weights)
    compiled = torch.compile(optimizer.update, fullgraph=True, backend="eager")
    assert_same(compiled(grads, state, weights), optimizer.update(grads, state, weights))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["head"], "a key for each leaf; got none for stem.layer.conv, stem.layer.norm.scale, "),
        (["head", "*"], None),
        (["stem", "stages", "head", "*"], None),
        (["haed", "*"], "a leaf that none before it chooses; got 'haed'; did you mean 'head'"),
        (["*", "head"], "to choose a leaf that none before it chooses; got 'head'"),
        (["head", lambda path: path[0] == "head", "*"], "chooses; got a function"),
    ],
)
def test_every_leaf_has_an_optimizer_and_every_key_a_leaf(keys: Any, message: str | None) -> None:
    optimizer = optim.by_path(dict.fromkeys(keys, optim.sgd(0.1)))
    if message is None:
        weights, _ = optimizer.update(SMALL.weights, optimizer.init(SMALL.weights), SMALL.weights)
        assert_trees_close(weights, tree.map(lambda w: 0.9 * w, SMALL.weights), 1e-12)
        return
    for call in (
        lambda: optimizer.init(SMALL.weights),
        lambda: optimizer.update(SMALL.weights, optim.sgd(0.1).init(SMALL.weights), SMALL.weights),
    ):
        with pytest.raises(FresnetError, match=re.escape(message)) as caught:
            call()
        assert ("did you mean" in str(caught.value)) is ("haed" in keys)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optim.by_path([("*", optim.sgd(0.1))]), "to optimizers; got a list"),  # type: ignore[arg-type]
        (lambda: optim.by_path({"*": 0.1}), "by_path expects a mapping .*; got a float"),  # type: ignore[dict-item]
        (lambda: optim.by_path({3: optim.sgd(0.1)}), "expects patterns as texts; got a int"),  # type: ignore[dict-item]
        (lambda: optim.by_path({}).init(SMALL.weights), "a key for each leaf; got none for"),
        (lambda: optim.sgd(0.1).init(()), "init expects a tree of float tensors; got no leaf"),
        (partial(optim.frozen.init, {}), "init expects a tree of float tensors; got no leaf"),
    ],
)
def test_what_is_no_mapping_to_optimizers_is_refused(
    call: Callable[[], object], message: str
) -> None:
    with pytest.raises(FresnetError, match=message):
        call()


def test_the_state_of_another_optimizer_is_refused() -> None:
    weights = SMALL.weights
    parts = optim.by_path({"head": optim.sgd(0.1, momentum=0.9), "*": optim.frozen})
    velocity = optim.sgd(0.1, momentum=0.9)
    for optimizer, other in ((parts, velocity), (velocity, parts), (optim.frozen, velocity)):
        with pytest.raises(FresnetError, match=r"update expects a state with \d moments"):
            optimizer.update(weights, other.init(weights), weights)
