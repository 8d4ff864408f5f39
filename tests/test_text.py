"""Trees print themselves in a few lines; neither these nor error messages hold values."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from assertions import assert_identical
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, tiny_params, train_states, trees
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import FresnetError, Params, Spec, data, moments, nodes, optim, training, tree
from fresnet.nodes import Bottleneck, Grid
from fresnet.tree import pformat

RESNET50 = fresnet.init(0, device="meta")
SMALL = fresnet.init(0, Spec(Bottleneck, (1, 2), width=4), num_classes=5)

LINE = (
    "Params(ResNet of Bottleneck (3, 4, 6, 3), 1000 classes, 25,557,032 parameters, float32, meta)"
)
LAYER = "Layer(conv=f32[64,3,7,7], norm=Norm(scale=f32[64], bias=f32[64]))"
WEIGHTS = f"""\
Weights(
  stem=Stem7x7(
    layer={LAYER}
  ),
  stages=(3 Bottleneck, 4 Bottleneck, 6 Bottleneck, 3 Bottleneck),
  last=NoLastNorm(),
  head=Head(weight=f32[1000,2048], bias=f32[1000])
)"""
BLOCK = """\
Bottleneck(
  layer1=Layer(conv=f32[64,256,1,1], norm=Norm(scale=f32[64], bias=f32[64])),
  layer2=Layer(conv=f32[64,64,3,3], norm=Norm(scale=f32[64], bias=f32[64])),
  layer3=Layer(conv=f32[256,64,1,1], norm=Norm(scale=f32[256], bias=f32[256])),
  attention=NoAttention(),
  shortcut=Identity()
)"""


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (RESNET50, LINE),
        (RESNET50.weights, WEIGHTS),
        (RESNET50.weights.stem.layer, LAYER),
        (RESNET50.weights.stages[0][1], BLOCK),
        (RESNET50.stats.stem, "Stem7x7(layer=NormStats(mean=f32[64], var=f32[64]))"),
        (optim.adamw(1.0).init(RESNET50.weights), "State(step=f32[], moments=(2 Weights))"),
    ],
)
def test_networks_and_their_parts_print_as_the_guide_shows(one: object, text: str) -> None:
    assert repr(one) == str(one) == f"{one}" == text


@pytest.mark.parametrize("name", ["resnet50", "resnetv2_50", "seresnet50", "resnetaa50d"])
def test_parts_of_networks_print_within_80_columns(name: str) -> None:
    """Those of a wide layer do not fit in a line that begins with their name."""
    weights, stats = fresnet.init(0, fresnet.SPECS[name], device="meta")
    parts = [weights, stats, *(block for stage in weights.stages for block in stage)]
    for line in (line for part in parts for line in repr(part).splitlines()):
        assert len(line) <= 80, line


def test_a_training_state_prints_in_few_lines() -> None:
    state = training.start(RESNET50, optim.sgd(1.0, momentum=0.9), average=True)
    assert repr(state).splitlines() == [
        "TrainState(",
        "  step=i64[],",
        f"  params={LINE},",
        "  optimizer=State(step=f32[], moments=(Weights)),",
        f"  average={LINE},",
        "  rng=u8[5056],",
        "  position=i64[]",
        ")",
    ]


def test_other_trees_are_told_by_pformat() -> None:
    assert pformat({"a": [torch.zeros(2).bfloat16()], 3: (torch.tensor(True),)}) == (
        "{'a': [bf16[2]], 3: (bool[],)}"
    )
    assert pformat([torch.zeros(2, dtype=torch.uint8)] * 40 + [None, "x", 0.5, cross_entropy]) == (
        "[40 u8[2], None, 'x', 0.5, a function]"
    )
    assert pformat([torch.zeros(i) for i in range(40)]).endswith("f32[6], f32[7], 32 more]")
    by_name = pformat(tree.named(SMALL.weights)).splitlines()
    assert by_name[0] == "{"
    assert by_name[2] == "  'stem.layer.norm.scale': f32[4],"
    assert len(by_name) == len(tree.leaves(SMALL.weights)) + 2


@examples(30)
@given(params=tiny_params())
def test_a_text_is_short_and_says_nothing_of_values(params: Params) -> None:
    state = training.start(params, optim.adamw(1.0), average=True)
    for one in (params, *params, state, params.weights.stages[-1], tree.named(params.weights)):
        text = pformat(one)
        assert text == pformat(tree.map(lambda leaf: torch.zeros_like(leaf) + 7, one))
        assert max(map(len, text.splitlines())) <= 110
    for node in (params, *params, state):
        assert len(repr(node).splitlines()) <= 28


@examples(200)
@given(one=trees(st.integers(0, 99)))
def test_a_tree_of_numbers_that_fits_in_a_line_has_the_text_that_python_gives_it(one: Any) -> None:
    assert len(repr(one)) >= 80 or pformat(one) == repr(one)


def test_a_text_is_the_same_under_transforms_and_without_values() -> None:
    head = "Head(weight=f32[5,32], bias=f32[5])"
    line = "Params(ResNet of Bottleneck (1, 2), 5 classes, 3,945 parameters, float32, cpu)"
    seen = []

    def look(params: Params) -> torch.Tensor:
        seen.append((repr(params), repr(params.weights.head)))
        return params.weights.head.bias.sum()

    look(SMALL)
    grad(look)(SMALL)
    jvp(look, (SMALL,), (SMALL,))
    vmap(grad(look))(tree.stack([SMALL, SMALL]))
    with FakeTensorMode() as mode:
        look(tree.map(mode.from_tensor, SMALL))
    assert set(seen) == {(line, head)}
    assert "meta" in repr(tree.map(lambda leaf: leaf.to("meta"), SMALL))
    stacked = repr(tree.stack([SMALL, SMALL]).weights.head)
    assert stacked == "Head(weight=f32[2,5,32], bias=f32[2,5])"


def test_trees_that_are_like_a_network_print_too() -> None:
    shapes = tree.map(lambda leaf: leaf.shape, SMALL)
    assert repr(shapes) == "Params(ResNet of Bottleneck (1, 2))"
    assert repr(shapes.weights.head) == "Head(weight=Size(5, 32), bias=Size(5))"
    assert repr(Params(0, None)) == "Params(0, None)"  # type: ignore[arg-type]
    axes = Params(nodes.Weights(0, 1, None, nodes.Head(2, 3)), ())  # type: ignore[arg-type]
    assert (
        repr(axes)
        == "Params(Weights(stem=0, stages=1, last=None, head=Head(weight=2, bias=3)), ())"
    )


def test_every_type_of_node_prints_itself_and_comes_back_from_files_of_torch_save() -> None:
    kinds = {kind for kind in vars(nodes).values() if hasattr(kind, "_fields")} - {Grid}
    assert len(kinds) > 30
    for kind in (*kinds, training.TrainState, optim.State):
        assert kind.__repr__ is pformat
        assert kind in torch.serialization.get_safe_globals()


@examples(20)
@given(state=train_states())
def test_states_come_back_from_files_of_torch_save_pickles_and_copies(state: Any) -> None:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    for back in (
        torch.load(file, weights_only=True),
        pickle.loads(pickle.dumps(state)),
        copy.deepcopy(state),
    ):
        assert_identical(back, state)


VALUE = 0.12345
"""What stands in every tensor that the calls below are given, and in no message."""

X, Y = torch.zeros(2, 3, 16, 16), torch.tensor([0, 1])
SGD, ADAMW = optim.sgd(1.0), optim.adamw(1.0)
ORDER = data.Order(size=8, batch=2, seed=0)
FULL = tree.map(lambda leaf: torch.full_like(leaf, VALUE), SMALL)
BAD = {
    "a number": torch.tensor(-1),
    "a vector": torch.full((3,), VALUE),
    "a list": [torch.full((3,), VALUE)],
    "a pair": (torch.full((3,), VALUE), torch.full((3,), VALUE)),
    "a dict": {"a": torch.full((3,), VALUE)},
    "params": FULL,
    "weights": FULL.weights,
}


def _grads(**options: Any) -> object:
    return fresnet.per_sample_grads(cross_entropy, SMALL, X, Y, **{"norms": "running", **options})


CALLS: dict[str, Callable[[Any], object]] = {
    "init": lambda bad: fresnet.init(bad),
    "init, spec": lambda bad: fresnet.init(0, bad),
    "init, num_classes": lambda bad: fresnet.init(0, num_classes=bad),
    "init, in_channels": lambda bad: fresnet.init(0, in_channels=bad),
    "init, dtype": lambda bad: fresnet.init(0, dtype=bad),
    "init, device": lambda bad: fresnet.init(0, device=bad),
    "Spec, block": lambda bad: Spec(bad),
    "Spec, depths": lambda bad: Spec(depths=bad),
    "Spec, depth": lambda bad: Spec(depths=(1, bad)),
    "Spec, width": lambda bad: Spec(width=bad),
    "Spec, stem": lambda bad: Spec(stem=bad),
    "Spec, attention": lambda bad: Spec(attention=bad),
    "forward": lambda bad: fresnet.forward(bad, X),
    "forward, x": lambda bad: fresnet.forward(SMALL, bad),
    "forward_train, momentum": lambda bad: fresnet.forward_train(SMALL, X, momentum=bad),
    "forward_train, group": lambda bad: fresnet.forward_train(SMALL, X, group=bad),
    "as_module": lambda bad: fresnet.as_module(bad),
    "cast": lambda bad: fresnet.cast(bad, torch.float64),
    "cast, dtype": lambda bad: fresnet.cast(SMALL, bad),
    "freeze": lambda bad: fresnet.freeze(bad),
    "freeze, where": lambda bad: fresnet.freeze(SMALL, bad),
    "dilate": lambda bad: fresnet.dilate(SMALL, output_stride=bad),
    "recalibrate": lambda bad: fresnet.recalibrate(SMALL, bad),
    "summary": lambda bad: fresnet.summary(bad),
    "summary, image_size": lambda bad: fresnet.summary(SMALL, bad),
    "to_state_dict": lambda bad: fresnet.to_state_dict(bad),
    "to_state_dict, layout": lambda bad: fresnet.to_state_dict(SMALL, bad),
    "from_state_dict": lambda bad: fresnet.from_state_dict(bad),
    "from_state_dict, architecture": lambda bad: fresnet.from_state_dict({}, architecture=bad),
    "save": lambda bad: fresnet.save(bad, "/dev/null/never.safetensors"),
    "save, path": lambda bad: fresnet.save(SMALL, bad),
    "load": lambda bad: fresnet.load(bad),
    "export, path": lambda bad: fresnet.export(SMALL, bad),
    "export, opset": lambda bad: fresnet.export(SMALL, "never.onnx", opset=bad),
    "preprocess": lambda bad: fresnet.preprocess(bad),
    "preprocess, image": lambda bad: fresnet.preprocess([bad]),
    "preprocess, preset": lambda bad: fresnet.preprocess([], bad),
    "quantize": lambda bad: fresnet.quantize(bad, [X]),
    "compile_inference": lambda bad: fresnet.compile_inference(bad, X),
    "per_sample_grads, norms": lambda bad: _grads(norms=bad),
    "per_sample_grads, chunk_size": lambda bad: _grads(chunk_size=bad),
    "per_sample_grads, randomness": lambda bad: _grads(randomness=bad),
    "clipped_grads": lambda bad: fresnet.clipped_grads(
        cross_entropy, SMALL, X, Y, norms="running", max_norm=bad
    ),
    "merge": lambda bad: moments.merge(SMALL.stats, bad),
    "sgd": lambda bad: optim.sgd(bad),
    "sgd, momentum": lambda bad: optim.sgd(1.0, momentum=bad),
    "sgd, weight_decay": lambda bad: optim.sgd(1.0, weight_decay=bad),
    "adamw, betas": lambda bad: optim.adamw(1.0, betas=bad),
    "adamw, beta": lambda bad: optim.adamw(1.0, betas=(0.9, bad)),
    "adamw, betas of tensors": lambda bad: optim.adamw(
        1.0,
        betas=(torch.tensor(VALUE), torch.tensor(VALUE + 1)),  # type: ignore[arg-type]
    ),
    "adamw, eps": lambda bad: optim.adamw(1.0, eps=bad),
    "lars, trust": lambda bad: optim.lars(1.0, trust=bad),
    "clip_by_norm": lambda bad: optim.clip_by_norm(FULL.weights, bad),
    "cosine": lambda bad: optim.cosine(1.0, over=bad),
    "warm_up": lambda bad: optim.warm_up(optim.cosine(1.0, over=2), over=bad),
    "update": lambda bad: SGD.update(bad, SGD.init(SMALL.weights), SMALL.weights),
    "update, state": lambda bad: ADAMW.update(
        SMALL.weights, optim.State(torch.tensor(0.0), (bad, bad)), SMALL.weights
    ),
    "start": lambda bad: training.start(bad, SGD),
    "start, seed": lambda bad: training.start(SMALL, SGD, seed=bad),
    "train_step, precision": lambda bad: training.make_train_step(SGD, precision=bad),
    "train_step, micro_batches": lambda bad: training.make_train_step(SGD, micro_batches=bad),
    "train_step, momentum": lambda bad: training.make_train_step(SGD, momentum=bad),
    "train_step, average_decay": lambda bad: training.make_train_step(SGD, average_decay=bad),
    "train_step, group": lambda bad: training.make_train_step(SGD, group=bad),
    "train_step": lambda bad: training.make_train_step(SGD)(bad, (X, Y)),
    "train_step, x": lambda bad: training.make_train_step(SGD)(
        training.start(SMALL, SGD), (bad, Y)
    ),
    "mixup": lambda bad: training.mixup(bad),
    "cutmix": lambda bad: training.cutmix(bad),
    "save_state": lambda bad: training.save_state(bad, "/dev/null/never", step=0),
    "save_state, folder": lambda bad: training.save_state(SMALL, bad, step=0),
    "save_state, step": lambda bad: training.save_state(SMALL, "never", step=bad),
    "save_state, keep": lambda bad: training.save_state(SMALL, "never", step=0, keep=bad),
    "save_state, notes": lambda bad: training.save_state(SMALL, "/dev/null/n", step=0, notes=bad),
    "restore_state": lambda bad: training.restore_state(SMALL, bad),
    "Order": lambda bad: data.steps_per_epoch(ORDER._replace(batch=bad)),
    "batches": lambda bad: data.batches(ORDER, bad, 3),
    "batch_at": lambda bad: data.batch_at(ORDER, 0, ranks=bad),
    "stack": lambda bad: tree.stack(bad),
    "stack, two": lambda bad: tree.stack([SMALL, bad]),
    "unstack": lambda bad: tree.unstack((torch.tensor(VALUE), bad)),
    "ravel": lambda bad: tree.ravel((X.double(), bad)),
    "unravel": lambda bad: tree.unravel(bad, torch.full((1,), VALUE)),
    "map": lambda bad: tree.map(torch.add, SMALL.stats, bad),
    "unflatten": lambda bad: tree.unflatten(SMALL, tree.leaves(bad)),
    "unnamed": lambda bad: tree.unnamed(SMALL, {"x": bad}),
    "unnamed, entries": lambda bad: tree.unnamed(SMALL, bad),
    "by_path": lambda bad: optim.by_path(bad),
    "by_path, key": lambda bad: optim.by_path({(bad,): SGD}),  # type: ignore[dict-item]
    "by_path, optimizer": lambda bad: optim.by_path({"*": bad}),
    "at": lambda bad: tree.at(SMALL, bad, 1),
    "at, tree": lambda bad: tree.at(bad, "x.y", 1),
    "matching": lambda bad: tree.matching(bad),
    "partition": lambda bad: tree.partition(SMALL, bad),
    "combine": lambda bad: tree.combine(SMALL.stats, bad),
    "equal": lambda bad: tree.equal([None, bad], [None, bad]),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_message_holds_what_is_in_a_tensor(name: str) -> None:
    messages = []
    for bad in BAD.values():
        try:
            CALLS[name](bad)
        except FresnetError as error:
            messages.append(str(error))
        except (AttributeError, RuntimeError, TypeError, ValueError):  # Python's own, or PyTorch's
            pass
    assert messages
    for message in messages:
        assert "0.1234" not in message
        assert "tensor(" not in message
        assert len(message) < 1000
