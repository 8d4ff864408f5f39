"""The members beyond the paper's five equal independent implementations."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import reference
import timm
import torch
from assertions import assert_close, assert_same, assert_trees_close
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, images, labels, seeds, small_specs, tiny_params, training_images
from torch import Tensor, nn
from torch.func import grad_and_value
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import Params, Spec, tree
from fresnet.network.nodes import (
    POOLED,
    POOLED_STEMS,
    AveragedStage,
    AveragedStem,
    BasicBlock,
    BlurredStage,
    BlurredStem,
    Bottleneck,
    BottleneckV1,
    CentredZeroPad,
    DilatedStage,
    NoShortcut,
    PooledProjection,
    Projection,
    Stem3x3,
    Weights,
    ZeroPad,
    blocks_of,
)

Read = Callable[[Mapping[str, Tensor]], Params]


def check(model: nn.Module, read: Read, x: Tensor) -> None:
    """Logits of both modes are equal, and so are training's new statistics and every gradient."""
    params = read(model.state_dict())
    with torch.no_grad():
        assert_close(fresnet.forward(params, x), model.eval()(x), 1e-12, "logits in evaluation")
    y = labels(x, params.weights.head.bias.numel())

    def loss_fn(weights: Weights) -> tuple[Tensor, tuple[Tensor, Any]]:
        logits, stats = fresnet.forward_train(params._replace(weights=weights), x)
        return cross_entropy(logits, y), (logits, stats)

    grads, (_, (logits, stats)) = grad_and_value(loss_fn, has_aux=True)(params.weights)
    expected = model.train()(x)
    cross_entropy(expected, y).backward()
    assert_close(logits, expected, 1e-12, "logits in training")
    after = read({**model.state_dict(), **reference.gradients(model)})
    assert_trees_close(stats, after.stats, 1e-12)
    assert_trees_close(grads, after.weights, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnext50_32x4d", "wide_resnet50_2"])
def test_grouped_and_wide_members_equal_torchvision(name: str) -> None:
    x = torch.randn(2, 3, 45, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check(reference.module(fresnet.SPECS[name], 1), fresnet.from_state_dict, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnext101_32x8d", "resnext101_64x4d", "wide_resnet101_2"])
def test_their_deeper_forms_equal_torchvision_in_forward(name: str) -> None:
    x = torch.randn(1, 3, 45, 36, generator=torch.Generator().manual_seed(0))
    model = reference.module(fresnet.SPECS[name], 1, dtype=torch.float32).eval()
    with torch.no_grad():
        assert_same(fresnet.forward(reference.params(model), x), model(x))


@pytest.mark.slow
@examples(6)
@given(x=training_images(), seed=seeds, spec=small_specs(block=Bottleneck))
def test_v1_strides_in_the_first_convolution(x: Tensor, seed: int, spec: Spec) -> None:
    model = reference.v1(reference.module(spec, seed))
    v1 = replace(spec, block=BottleneckV1)
    check(model, partial(fresnet.from_state_dict, architecture=v1), x)


@pytest.mark.slow
@examples(8)
@given(
    x=training_images(),
    seed=seeds,
    depths=st.tuples(*[st.integers(1, 2)] * 4),
    block=st.sampled_from([timm.models.resnet.BasicBlock, timm.models.resnet.Bottleneck]),
)
def test_resnet_d_equals_timm(x: Tensor, seed: int, depths: tuple[int, ...], block: Any) -> None:
    model = timm.models.resnet.ResNet(
        block, depths, 10, stem_width=32, stem_type="deep", avg_down=True
    )
    check(reference.perturbed(model, seed), fresnet.from_state_dict, x)


@pytest.mark.parametrize("option", ["A", "B", "plain"])
@examples(6)
@given(
    x=images(batch=st.integers(2, 4), side=st.integers(5, 40)),
    seed=seeds,
    depths=st.lists(st.integers(1, 3), min_size=2, max_size=3),
    width=st.sampled_from([4, 16]),
)
def test_cifar_nets_equal_torchvisions_blocks(
    option: str, x: Tensor, seed: int, depths: list[int], width: int
) -> None:
    def read(state: Mapping[str, Tensor]) -> Params:
        shortcut = {"A": ZeroPad, "B": Projection, "plain": NoShortcut}[option]
        spec = Spec(BasicBlock, tuple(depths), stem=Stem3x3, shortcut=shortcut)
        return fresnet.from_state_dict(state, architecture=spec)

    check(reference.perturbed(reference.Cifar(depths, option, width, 10), seed), read, x)


CIFAR = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962, 1202: 19_421_274}
PROJECTIONS = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64


def count(name: str) -> int:
    weights = fresnet.init(0, fresnet.SPECS[name], num_classes=10, device="meta").weights
    return sum(leaf.numel() for leaf in tree.leaves(weights))


@pytest.mark.parametrize("depth", CIFAR)
def test_counts_of_cifar_nets(depth: int) -> None:
    """Plain nets and option A have the same counts. Option B has two projections more."""
    assert count(f"resnet{depth}") == CIFAR[depth]
    assert count(f"resnet{depth}b") == CIFAR[depth] + PROJECTIONS
    if depth < 1202:
        assert count(f"plain{depth}") == CIFAR[depth]
    params = fresnet.init(0, fresnet.SPECS[f"resnet{depth}"], device="meta")
    convolutions = sum(leaf.ndim == 4 for leaf in tree.leaves(params.weights))
    assert convolutions + 1 == depth


def test_a_name_that_no_network_has_gets_a_hint() -> None:
    with pytest.raises(KeyError, match="unknown network 'resnet5O'; did you mean 'resnet5"):
        fresnet.SPECS["resnet5O"]
    assert fresnet.SPECS.get("resnet5O") is None
    assert "resnet5O" not in fresnet.SPECS


def test_plain_and_v1_members_are_of_the_same_sizes() -> None:
    for depth in (18, 34):
        params = fresnet.init(0, fresnet.SPECS[f"resnet{depth}"], num_classes=10, device="meta")
        blocks = [block for stage in params.weights.stages for block in blocks_of(stage)]
        shortcuts = sum(leaf.numel() for b in blocks for leaf in tree.leaves(b.shortcut))
        assert count(f"plain{depth}") == count(f"resnet{depth}") - shortcuts
    for depth in (50, 101, 152):
        assert count(f"resnet{depth}_v1") == count(f"resnet{depth}")


@pytest.mark.parametrize("name", fresnet.SPECS)
def test_every_member_is_what_its_name_says(name: str) -> None:
    """The stem, the shortcuts and the sizes of an image of 64x64 are those of the name."""
    params = fresnet.init(0, fresnet.SPECS[name], num_classes=10, device="meta")
    weights = params.weights
    blocks = [block for stage in weights.stages for block in blocks_of(stage)]
    shortcuts = {type(block.shortcut) for block in blocks}
    assert (NoShortcut in shortcuts) == name.startswith("plain")
    pools = re.match(r"(se|eca)?resne[xt]+(v2_|aa|blur)?\d+[dt]|resnetrs|ecaresnetlight", name)
    assert (PooledProjection in shortcuts) == bool(pools)
    pooled = {"aa": (AveragedStage, AveragedStem), "blur": (BlurredStage, BlurredStem)}
    kinds = next((kinds for part, kinds in pooled.items() if part in name), (tuple, None))
    assert {type(stage) for stage in weights.stages[1:]} == {kinds[0]}
    if "rs" not in name:
        assert (type(weights.stem) if isinstance(weights.stem, POOLED_STEMS) else None) is kinds[1]
    assert {type(b).__name__ == "BottleneckV1" for b in blocks} == {name.endswith("_v1")}
    cifar = len(weights.stages) == 3
    assert (CentredZeroPad in shortcuts) == name.endswith("_centred")
    assert (ZeroPad in shortcuts) == (cifar and name[:6] == "resnet" and name[-1].isdecimal())
    assert isinstance(weights.stem, Stem3x3) == cifar
    if len(blocks) < 60:
        pyramid = fresnet.features(params, torch.empty(1, 3, 64, 64, device="meta"))
        sides = [64, 64, 32, 16] if cifar else [16, 16, 8, 4, 2]
        assert [activation.shape[-1] for activation in pyramid] == sides


@pytest.mark.slow
@examples(5)
@given(
    x=training_images(),
    seed=seeds,
    spec=small_specs(block=Bottleneck),
    output_stride=st.sampled_from([8, 16, 32]),
)
def test_dilated_stages_equal_torchvisions(
    x: Tensor, seed: int, spec: Spec, output_stride: int
) -> None:
    dilated = [False, output_stride <= 8, output_stride <= 16]
    model = reference.module(spec, seed, replace_stride_with_dilation=dilated)

    def read(state: Mapping[str, Tensor]) -> Params:
        return fresnet.dilate(fresnet.from_state_dict(state), output_stride=output_stride)

    check(model, read, x)


@examples(25)
@given(
    params=tiny_params(dilated=False, attention=False, grouped=False), x=images(), data=st.data()
)
def test_dilated_activations_at_every_second_place_are_those_of_the_strided_network(
    params: Params, x: Tensor, data: st.DataObject
) -> None:
    """This holds for blocks of every type, but not with shortcuts that dilate refuses."""
    stage = params.weights.stages[-1]
    match blocks_of(stage)[0].shortcut:
        case PooledProjection():
            return
        case Projection(layer) if layer.conv.shape[2] > 1:
            return
    if isinstance(stage, POOLED):
        return
    stem_stride = 1 if isinstance(params.weights.stem, Stem3x3) else 4
    last = len(params.weights.stages) - 1
    stage = data.draw(st.integers(0, last))
    dilated = fresnet.dilate(params, output_stride=stem_stride << stage)
    whole = fresnet.dilate(dilated, output_stride=stem_stride << last)
    assert sum(isinstance(s, DilatedStage) for s in dilated.weights.stages) == last - stage
    strided, fine = fresnet.features(params, x), fresnet.features(dilated, x)
    for i, (a, b) in enumerate(zip(strided[1:], fine[1:], strict=True)):
        step = 1 << max(0, i - stage)
        assert_close(b[:, :, ::step, ::step], a, 1e-12, f"stage {i}")
    assert_trees_close(fresnet.forward(whole, x), fresnet.forward(params, x), 0.0)


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilation_of_basic_blocks_equals_timm(output_stride: int) -> None:
    """The first convolution of a stage's first block still has the dilation of the stage before."""
    model = timm.create_model("resnet18", num_classes=10, output_stride=output_stride)
    x = torch.randn(2, 3, 70, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def read(state: Mapping[str, Tensor]) -> Params:
        return fresnet.dilate(
            fresnet.from_state_dict(state, architecture="resnet18"), output_stride=output_stride
        )

    check(reference.perturbed(model, 0), read, x)


def test_types_tell_networks_of_the_same_shapes_apart() -> None:
    """A map over V1 and V1.5 together is refused, because their weights mean different things."""
    one, other = (
        fresnet.init(0, Spec(block, (1,), width=4)) for block in (Bottleneck, BottleneckV1)
    )
    with pytest.raises(fresnet.FresnetError, match="differs from the first"):
        tree.map(torch.add, one, other)
