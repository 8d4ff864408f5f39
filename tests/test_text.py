"""Trees print themselves in a few lines; neither these nor error messages hold values."""

import copy
import io
import pickle
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
from fresnet import Params, Spec, nodes, optim, training, tree
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
    for kind in (*kinds, training.TrainState, training.Evaluation, optim.State):
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
