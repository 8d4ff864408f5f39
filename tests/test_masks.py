"""Stochastic depth and dropout are timm's for the same masks, and masks are values like others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import pytest
import reference
import torch
from assertions import assert_close, assert_same, assert_trees_close
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import examples, images, labels, seeds, tiny_params, training_images
from timm.layers import DropPath as TimmsDropPath
from timm.models import resnet, resnetv2
from torch import Tensor, nn
from torch.func import grad, grad_and_value, vmap
from torch.nn import functional as F
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import FresnetError, Params, Spec, optim, training, tree
from fresnet.network import ops
from fresnet.network.nodes import (
    BasicBlock,
    Dropout,
    DropPath,
    NoHead,
    NoLastNorm,
    NoShortcut,
    PreActivation,
    PreActivationBasic,
    SqueezeExcite,
    Weights,
    blocks_of,
)
from fresnet.network.regimes import INFERENCE, Floating
from fresnet.training import Masks, draw_masks, make_train_step, masked, start
from fresnet.training.draws import drawn

SPEC = Spec(BasicBlock, (1, 2), width=4, attention=SqueezeExcite)
PARAMS = fresnet.init(0, SPEC, num_classes=5, dtype=torch.float64)
X = torch.randn(4, 3, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 4])


def draw(params: Params, x: Tensor, seed: int = 1, rate: float = 0.5) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    return draw_masks(generator, params.weights, len(x), drop_path=rate, dropout=rate)


def wear(params: Params, masks: Masks) -> Params:
    return params._replace(weights=masked(params.weights, masks))


MASKS = draw(PARAMS, X)

V1 = partial(resnet.ResNet, num_classes=7, channels=(8, 8, 16, 16))
V2 = partial(
    resnetv2.ResNetV2,
    num_classes=7,
    stem_chs=8,
    norm_layer=resnetv2.BatchNormAct2d,
    conv_layer=resnetv2.create_conv2d,
)
TIMMS: dict[str, Callable[..., nn.Module]] = {
    "basic": partial(V1, resnet.BasicBlock),
    "bottleneck": partial(V1, resnet.Bottleneck),
    "SE": partial(V1, resnet.Bottleneck, block_args={"attn_layer": "se"}),
    "V2": partial(V2, channels=[16, 16, 32, 32]),
    "V2, basic": partial(V2, channels=[8, 8, 16, 16], basic=True),
}


def assert_rate(keep: Tensor, rate: float) -> None:
    """timm computes some rates in float32."""
    assert keep[keep != 0].tolist() == pytest.approx([1 / (1 - rate)] * int(keep.count_nonzero()))


@contextmanager
def dropping(model: nn.Module, masks: Masks) -> Iterator[None]:
    """timm's model drops what these masks say."""
    keeps = [keep for stage in masks.paths for keep in stage if isinstance(keep, Tensor)]
    paths = [layer for layer in model.modules() if isinstance(layer, TimmsDropPath)]
    for layer, keep in zip(paths, keeps, strict=True):
        assert_rate(keep, layer.drop_prob)
        layer.forward = lambda x, keep=keep: x * keep[:, None, None, None]

    def dropout(x: Tensor, p: float, *_: Any, **__: Any) -> Tensor:
        assert_rate(masks.features, p)
        return x * masks.features.view(x.shape)

    with mock.patch.object(F, "dropout", dropout):
        yield


@pytest.mark.parametrize("name", TIMMS)
@examples(4)
@given(
    x=training_images(),
    seed=seeds,
    depths=st.tuples(*[st.integers(1, 2)] * 4),
    rates=st.tuples(*[st.sampled_from([0.25, 0.6])] * 2),
)
def test_masks_are_timms(
    name: str, x: Tensor, seed: int, depths: tuple[int, ...], rates: tuple[float, float]
) -> None:
    """Rates, logits in training, statistics and every gradient are equal, for the same masks."""
    drop_path, dropout = rates
    model = TIMMS[name](layers=depths, drop_path_rate=drop_path, drop_rate=dropout)
    reference.perturbed(model, seed)
    params = fresnet.from_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    masks = draw_masks(generator, params.weights, len(x), drop_path=drop_path, dropout=dropout)
    y = labels(x, 7)

    def loss_fn(weights: Weights) -> tuple[Tensor, tuple[Tensor, Any]]:
        logits, stats = fresnet.forward_train(params._replace(weights=masked(weights, masks)), x)
        return cross_entropy(logits, y), (logits, stats)

    grads, (_, (logits, stats)) = grad_and_value(loss_fn, has_aux=True)(params.weights)
    with dropping(model.train(), masks):
        expected = model(x)
    cross_entropy(expected, y).backward()
    assert_close(logits, expected, 1e-12)
    after = fresnet.from_state_dict({**model.state_dict(), **reference.gradients(model)})
    assert_trees_close(stats, after.stats, 1e-12)
    # What is dropped in all images has no gradient, which timm's BatchNorm rounds to almost none.
    assert_close(tree.ravel(grads), tree.ravel(after.weights), 1e-10)


def with_shortcuts(params: Params) -> Params:
    """The network, unless it has a block without one."""
    blocks = (block for stage in params.weights.stages for block in blocks_of(stage))
    assume(not any(isinstance(block.shortcut, NoShortcut) for block in blocks))
    return params


@examples(15)
@given(params=tiny_params(headed=True).map(with_shortcuts), x=training_images())
def test_masks_of_ones_and_no_masks_are_the_network_itself(params: Params, x: Tensor) -> None:
    none = draw(params, x, rate=0.0)
    assert not tree.leaves(none)
    assert_same(masked(params.weights, none), params.weights)
    ones = tree.map(torch.ones_like, draw(params, x))
    assert_same(fresnet.forward(wear(params, ones), x), fresnet.forward(params, x))
    actual, expected = (fresnet.forward_train(p, x) for p in (wear(params, ones), params))
    assert_same(actual, expected)


@examples(15)
@given(params=tiny_params(headed=True).map(with_shortcuts), x=images(batch=st.integers(2, 4)))
def test_a_mask_is_of_its_own_image_alone(params: Params, x: Tensor) -> None:
    masks = draw(params, x)
    worn = wear(params, masks)
    whole = fresnet.forward(worn, x)
    assert_same(fresnet.forward_head(worn, fresnet.features(worn, x)[-1]), whole)
    for i in range(len(x)):
        one = tree.map(lambda mask, i=i: mask[i : i + 1], masks)
        assert_close(fresnet.forward(wear(params, one), x[i : i + 1]), whole[i : i + 1], 1e-12)


@pytest.mark.parametrize("rate", [0.25, 0.6])
def test_the_mean_over_masks_is_the_network_where_it_is_linear_in_them(rate: float) -> None:
    """In V2 the last sum is linear in the last path, and logits are linear in features."""
    spec = Spec(PreActivationBasic, (1, 1), width=2, last=NoLastNorm)
    params = fresnet.init(0, spec, num_classes=3, dtype=torch.float64)
    values = {0.0: rate, 1 / (1 - rate): 1 - rate}
    mean = torch.zeros(4, 3, dtype=torch.float64)
    for chosen in product(values, repeat=5):  # the last path, and four features
        keep = X.new_tensor(chosen)
        masks = Masks((((),), (keep[:1].expand(4),)), keep[1:].expand(4, 4))
        likely = torch.tensor([values[value] for value in chosen]).prod()
        mean += likely * fresnet.forward(wear(params, masks), X)
    assert_close(mean, fresnet.forward(params, X), 1e-6)


def test_draws_repeat_and_have_their_rates() -> None:
    """They are the same in every dtype, and for an image whatever images follow."""
    (first,), (second, third) = draw(PARAMS, X).paths
    assert first == ()
    many = draw_masks(
        torch.Generator().manual_seed(1), PARAMS.weights, 20_000, drop_path=0.6, dropout=0.2
    )
    for mask, rate in ((many.paths[1][0], 0.3), (many.paths[1][1], 0.6), (many.features, 0.2)):
        assert isinstance(mask, Tensor)
        assert mask.unique().tolist() == [0, 1 / (1 - rate)]
        assert abs((mask == 0).double().mean() - rate) < 0.015
    assert ((many.features[:, 1] == 0) & (many.paths[1][0] > 0)).any()  # other draws for each
    for params in (PARAMS, tree.stack([PARAMS, PARAMS])):
        assert_same(draw(params, X), MASKS)
    assert not tree.equal(draw(PARAMS, X, seed=2), MASKS)
    for count in (1, 3, 17, 40):
        drawn = draw(PARAMS, torch.empty(count))
        assert_same(drawn, tree.map(lambda mask, n=count: mask[:n], draw(PARAMS, torch.empty(90))))
    narrow = draw(fresnet.cast(PARAMS, torch.float32), X)
    assert_same(tree.map(torch.Tensor.bool, narrow), tree.map(torch.Tensor.bool, MASKS))
    assert second.dtype == third.dtype == torch.float64
    assert {leaf.dtype for leaf in tree.leaves(narrow)} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_masks_on_a_gpu_are_those_on_a_cpu() -> None:
    there = draw(tree.map(lambda leaf: leaf.cuda(), PARAMS), X)
    assert {leaf.device.type for leaf in tree.leaves(there)} == {"cuda"}
    assert_same(tree.map(torch.Tensor.cpu, there), MASKS)


def test_vmap_over_masks_is_a_loop_over_masks() -> None:
    drawn = [draw(PARAMS, X, seed) for seed in range(3)]
    logits = vmap(lambda masks: fresnet.forward(wear(PARAMS, masks), X))(tree.stack(drawn))
    for one, masks in zip(logits, drawn, strict=True):
        assert_close(one, fresnet.forward(wear(PARAMS, masks), X), 1e-12)


@pytest.mark.parametrize("block", [BasicBlock, PreActivation])
def test_per_sample_gradients_take_masks_as_data(block: type[Any]) -> None:
    params = fresnet.init(0, Spec(block, (1, 1), width=4), num_classes=5, dtype=torch.float64)
    masks = draw(params, X)

    def loss(weights: Weights, x: Tensor, y: Tensor, masks: Masks) -> Tensor:
        batch = tree.map(lambda leaf: leaf[None], (x, y, masks))
        wearing = params._replace(weights=masked(weights, batch[2]))
        return cross_entropy(fresnet.forward(wearing, batch[0]), batch[1])

    grads = vmap(grad(loss), (None, 0, 0, 0))(params.weights, X, Y, masks)
    for i, one in enumerate(tree.unstack(grads)):
        mask = tree.map(lambda leaf, i=i: leaf[i], masks)
        assert_trees_close(one, grad(loss)(params.weights, X[i], Y[i], mask), 1e-9)


def test_masks_widen_nothing() -> None:
    """In a step in bfloat16 they are as wide as the weights."""
    maps, keep = X.bfloat16(), MASKS.paths[1][0].bool().float()
    for dropped in (ops.drop(maps.clone(), keep), vmap(ops.drop)(maps[None], keep[None])[0]):
        assert_same(dropped, maps * keep.bfloat16()[:, None, None, None])


def test_masks_have_derivatives() -> None:
    """By `torch.func` and by `torch.autograd`, which finds no mask written over."""
    masks = tree.map(lambda mask: mask + 0.3, MASKS)  # at 0 there is a kink where a map is 0 too

    def loss(masks: Masks) -> Tensor:
        return fresnet.forward_train(wear(PARAMS, masks), X)[0].square().sum()

    expected = grad(loss)(masks)
    followed = tree.map(lambda mask: mask.clone().requires_grad_(), masks)
    loss(followed).backward()
    assert_trees_close(tree.map(lambda mask: mask.grad, followed), expected, 1e-12)
    ends = (loss(tree.map(lambda mask, h=h: mask + h, masks)) for h in (1e-6, -1e-6))
    assert_close(torch.sub(*ends) / 2e-6, tree.ravel(expected).sum(), 1e-6)


def test_a_masked_network_says_so() -> None:
    params = wear(PARAMS, MASKS)
    assert str(params) == str(PARAMS).replace("(1, 2), ", "(1, 2), masked, ")
    assert "head=Dropout(head=Head(" in str(params.weights)


KEEPS: Any = {
    name: getattr(fresnet, name)
    for name in ("fold", "freeze", "summary", "as_module", "to_state_dict")
}
KEEPS |= {
    "dilate": lambda params: fresnet.dilate(params, output_stride=4),
    "cast": lambda params: fresnet.cast(params, torch.float32),
    "with_eps": lambda params: fresnet.with_eps(params, 1e-3),
    "save": lambda params: fresnet.save(params, "never.safetensors"),
    "export": lambda params: fresnet.export(params, "never.pt2"),
    "compile_inference": lambda params: fresnet.compile_inference(params, X),
    "quantize": lambda params: fresnet.quantize(params, [X]),
    "recalibrate": lambda params: fresnet.recalibrate(params, [X]),
    "start": lambda params: start(params, optim.sgd(0.1)),
    "evaluate": lambda params: training.evaluate(params, [(X, Y)]),
    "a train step": lambda params: make_train_step(optim.sgd(0.1))(
        start(PARAMS, optim.sgd(0.1))._replace(params=params), (X, Y)
    ),
    "per_sample_grads": lambda params: fresnet.per_sample_grads(
        cross_entropy, params, X, Y, norms="running"
    ),
    "clipped_grads": lambda params: fresnet.clipped_grads(cross_entropy, params, X, Y, max_norm=1),
}


@pytest.mark.parametrize("name", KEEPS)
@pytest.mark.parametrize("kind", ["DropPath", "Dropout"])
def test_what_keeps_a_network_refuses_masks(name: str, kind: str) -> None:
    rates = {"DropPath": {"drop_path": 0.5}, "Dropout": {"dropout": 0.5}}[kind]
    masks = draw_masks(torch.Generator(), PARAMS.weights, 4, **rates)
    where = {"DropPath": r"stages\[1\]\[0\]", "Dropout": "head"}[kind]
    message = f"^{name} expects weights without masks, .* got a {kind} at weights.{where}: hand in"
    with pytest.raises(FresnetError, match=message):
        KEEPS[name](wear(PARAMS, masks))


G = torch.Generator()
PLAIN = fresnet.init(0, Spec(BasicBlock, (1, 1), width=4, shortcut=NoShortcut), num_classes=5)
ENCODER = PARAMS.weights._replace(head=NoHead())
BLOCK, HEAD = PARAMS.weights.stages[0][0], PARAMS.weights.head
ANY: Any = SPEC


def forward_of(*, block: Any = BLOCK, head: Any = HEAD) -> Tensor:
    stages = ((block,), *PARAMS.weights.stages[1:])
    weights = PARAMS.weights._replace(stages=stages, head=head)
    return fresnet.forward(PARAMS._replace(weights=weights), X)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fresnet.forward(wear(PARAMS, MASKS), X[:3]), r"a mask .* is \(3,\); got \(4,\)"),
        (
            lambda: fresnet.forward(wear(PARAMS, Masks((((),), ((), ())), MASKS.features)), X[:3]),
            r"a mask of activations \(3, 8\) is \(3, 8\); got \(4, 8\)",
        ),
        (lambda: draw_masks(G, PARAMS.weights, 4, drop_path=1.0), "drop_path .* below 1; got 1.0"),
        (lambda: draw_masks(G, PARAMS.weights, 4, dropout=-0.1), "dropout .* below 1; got -0.1"),
        (lambda: draw_masks(G, PARAMS.weights, -1), "a number of images; got -1"),
        (lambda: draw_masks(ANY, PARAMS.weights, 4), "a torch.Generator; got a Spec"),
        (lambda: draw_masks(G, ANY, 4), "draw_masks expects Weights; got a Spec"),
        (lambda: draw_masks(G, PLAIN.weights, 4, drop_path=0.1), "shortcuts .* got NoShortcut"),
        (lambda: draw_masks(G, ENCODER, 4, dropout=0.1), "a head .* got NoHead"),
        (lambda: masked(wear(PARAMS, MASKS).weights, MASKS), "weights without masks"),
        (lambda: masked(ANY, MASKS), "masked expects Weights; got a Spec"),
        (lambda: masked(PLAIN.weights, MASKS), r"Masks of \[1, 1\] blocks .* got \[1, 2\]"),
        (
            lambda: masked(PARAMS.weights, MASKS._replace(features=MASKS.features[:, 1:])),
            r"Masks of \d+ features before the head; got float64",
        ),
        (lambda: masked(PLAIN.weights, ANY), r"Masks of \[1, 1\] blocks in each stage; got a Spec"),
        (
            lambda: forward_of(block=DropPath(BLOCK, X[:, 0, 0, 0].float())),
            r"weights.stages\[0\]\[0\].keep to be torch.float64 on cpu",
        ),
        (lambda: forward_of(block=DropPath(HEAD, X[:, 0, 0, 0])), "BasicBlock or .* got a Head"),
        (
            lambda: forward_of(
                block=DropPath(BLOCK._replace(shortcut=NoShortcut()), X[:, 0, 0, 0])
            ),
            "something that can be dropped; got a BasicBlock",
        ),
        (lambda: forward_of(block=Dropout(BLOCK, X[:, 0, 0, 0])), "BasicBlock or .* got a Dropout"),
        (lambda: forward_of(head=Dropout(NoHead(), X)), "can be dropped; got a NoHead"),
        (lambda: forward_of(head=DropPath(HEAD, X)), "Head or NoHead; got a DropPath"),
        (lambda: Floating.dropping(INFERENCE, X), "Composed runs networks without masks"),
        (lambda: make_train_step(optim.sgd(0.1), drop_path=1), "make_train_step expects drop_path"),
        (lambda: make_train_step(optim.sgd(0.1), dropout=ANY), "dropout .* below 1; got a Spec"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(FresnetError, match=message):
        call()


def test_a_step_drops_what_it_draws() -> None:
    """Micro-batches and recomputing change nothing where norms are frozen."""
    params = fresnet.freeze(PARAMS)
    optimizer, rates = optim.sgd(1.0), (0.5, 0.3)
    state = start(params, optimizer, seed=3)
    _, _, masks, rng = drawn(None, rates, 0, state, X, Y)
    assert isinstance(masks, Masks)
    for keep, rate in zip((masks.paths[1][1], masks.features), rates, strict=True):
        assert_rate(keep, rate)

    def loss(weights: Weights) -> Tensor:
        logits, _ = fresnet.forward_train(params._replace(weights=masked(weights, masks)), X)
        return cross_entropy(logits, Y)

    expected = tree.map(torch.sub, params.weights, grad(loss)(params.weights))
    for options in ({}, {"micro_batches": 3}, {"recompute": True}):
        step = make_train_step(optimizer, drop_path=0.5, dropout=0.3, **options)
        after, metrics = step(state, (X, Y))
        assert_close(metrics.loss, loss(params.weights), 1e-12)
        assert_trees_close(after.params.weights, expected, 1e-10)
        assert torch.equal(after.rng, rng)
        assert not tree.equal(step(after, (X, Y))[1].loss, step(state, (X, Y))[1].loss)


def test_processes_draw_masks_of_their_own_and_go_on_alike() -> None:
    """So shares may differ in size."""
    state = start(PARAMS, optim.sgd(0.1))
    _, _, first, rng = drawn(None, (0.5, 0.5), 0, state, X, Y)
    _, _, second, other = drawn(None, (0.5, 0.5), 1, state, X[:3], Y[:3])
    assert torch.equal(rng, other)
    assert isinstance(first, Masks)
    assert isinstance(second, Masks)
    assert not torch.equal(first.features[:3], second.features)
