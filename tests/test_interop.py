"""State dicts are exact in both directions, and refused with the names of what does not fit."""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import timm
import torch
import transformers
from assertions import assert_close, assert_same, assert_trees_close, unmutated
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, seeds, small_specs, tiny_params, training_images
from torch import Tensor, nn

import fresnet
from fresnet import FresnetError, Params, Spec, tree
from fresnet.network.nodes import (
    BARE_STEMS,
    POOLED,
    POOLED_STEMS,
    PREACTIVATIONS,
    BareDeepStem,
    BasicBlock,
    Bias,
    Bottleneck,
    BottleneckV1,
    CentredZeroPad,
    DeepStem,
    EfficientAttention,
    GroupNorm,
    LastNorm,
    Layer,
    NoNorm,
    NoShortcut,
    PooledProjection,
    PreActivationBasic,
    Projection,
    Rescale,
    SqueezeExcite,
    StandardisedLayer,
    Stem3x3,
    ZeroPad,
    kinds,
    over,
)


def has(params: Params, types: tuple[type, ...]) -> bool:
    """Whether some node is of one of these types."""
    return not kinds(params.weights).isdisjoint(types)


def is_grouped_or_wide(params: Params) -> bool:
    stages = [getattr(stage, "blocks", stage) for stage in params.weights.stages]
    return any(
        not isinstance(block, BasicBlock | PreActivationBasic)
        and not block.layer2.conv.shape[1]
        == block.layer1.conv.shape[0]
        == block.layer3.conv.shape[0] // 4
        for stage in stages
        for block in stage
    )


V2 = (PREACTIVATIONS, BARE_STEMS, (LastNorm,))
OPTION_A = (ZeroPad, CentredZeroPad)
OTHERS = (
    *POOLED,
    *POOLED_STEMS,
    DeepStem,
    PooledProjection,
    SqueezeExcite,
    EfficientAttention,
    NoShortcut,
    *OPTION_A,
    Stem3x3,
    *(kind for part in V2 for kind in part),
    StandardisedLayer,
)
FOREIGN = {
    "torchvision": OTHERS,
    "timm": (NoShortcut, *OPTION_A, Stem3x3),
    "huggingface": (*OTHERS, GroupNorm),
}


def is_foreign_to_timm(params: Params) -> bool:
    """Whether it is V2 in part, pools where V2's names do not tell it, or standardises V1."""
    there = [has(params, part) for part in V2]
    if not any(there):
        return has(params, (StandardisedLayer,))
    untold = Projection if has(params, (BareDeepStem,)) else PooledProjection
    return not all(there) or has(params, (untold, *POOLED))


@pytest.mark.parametrize("layout", FOREIGN)
@examples(40)
@given(params=tiny_params(dilated=False))
def test_round_trip_of_params_is_exact_or_refused(layout: str, params: Params) -> None:
    wide = layout == "huggingface" and is_grouped_or_wide(params)
    unnamed = is_foreign_to_timm(params) or wide
    if has(params, FOREIGN[layout]) or unnamed:
        with pytest.raises(FresnetError, match=f"expects a network that {layout} has; got"):
            fresnet.to_state_dict(params, layout)
        return
    with unmutated(params):
        state = fresnet.to_state_dict(params, layout)
    memory = {leaf.untyped_storage().data_ptr() for leaf in tree.leaves(params)}
    assert memory.isdisjoint(value.untyped_storage().data_ptr() for value in state.values())
    with unmutated(state):
        back = fresnet.from_state_dict(state, architecture=reference.architecture(params))
    assert_same(back, params)
    memory |= {value.untyped_storage().data_ptr() for value in state.values()}
    assert memory.isdisjoint(leaf.untyped_storage().data_ptr() for leaf in tree.leaves(back))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_what_is_loaded_is_laid_out_as_what_was_initialised(name: str) -> None:
    """Strides are the same too. PyTorch chooses kernels by them, and kernels round differently."""
    params = fresnet.init(0, fresnet.SPECS[name])
    loaded = fresnet.from_state_dict(fresnet.to_state_dict(params), architecture=name)
    layouts = [[leaf.stride() for leaf in tree.leaves(p)] for p in (loaded, params)]
    assert layouts[0] == layouts[1]


@pytest.mark.slow
@examples(15)
@given(seed=seeds, spec=small_specs(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_round_trip_of_a_state_dict_is_exact(
    seed: int, spec: fresnet.Spec, dtype: torch.dtype
) -> None:
    model = reference.module(spec, seed, dtype=dtype)
    state = fresnet.to_state_dict(reference.params(model))
    assert list(state) == list(model.state_dict())
    assert_same(state, model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*reference.PAPERS, "resnext50_32x4d", "wide_resnet50_2"])
def test_torchvision_loads_what_is_exported(name: str) -> None:
    params = fresnet.init(0, fresnet.SPECS[name])
    model = reference.torchvision.models.get_model(name)
    state = fresnet.to_state_dict(params)
    model.load_state_dict(state, strict=True)
    assert_same(reference.params(model), params)
    assert all(value.is_contiguous() for value in state.values())
    if name == "resnet50":
        assert len(state) == 320


def test_convolutions_arrive_channels_last_and_detached() -> None:
    model = reference.module(fresnet.RESNET18, 0).to(memory_format=torch.contiguous_format)
    params = reference.params(model)
    for leaf in tree.leaves(params):
        assert type(leaf) is Tensor
        assert not leaf.requires_grad
        assert leaf.ndim != 4 or leaf.is_contiguous(memory_format=torch.channels_last)


def test_counters_may_be_missing_and_half_precision_statistics_are_widened() -> None:
    """torchvision's first releases have no counters. `.bfloat16()` narrows statistics."""
    state = reference.module(fresnet.RESNET18, 0, dtype=torch.bfloat16).state_dict()
    bare = {name: value for name, value in state.items() if "num_batches" not in name}
    params = fresnet.from_state_dict(bare, architecture="resnet18")
    assert_same(params, fresnet.from_state_dict(state))
    assert {leaf.dtype for leaf in tree.leaves(params.weights)} == {torch.bfloat16}
    assert {leaf.dtype for leaf in tree.leaves(params.stats)} == {torch.float32}
    assert torch.equal(params.stats.stem.layer.mean, bare["bn1.running_mean"].float())


def check_forward(model: torch.nn.Module, params: Params, x: Tensor) -> None:
    def logits(output: Any) -> Tensor:
        result: Tensor = getattr(output, "logits", output)
        return result

    with torch.no_grad():
        assert_close(fresnet.forward(params, x), logits(model.eval()(x)), 1e-12, "evaluation")
        assert_close(fresnet.forward_train(params, x)[0], logits(model.train()(x)), 1e-12)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet26d",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("resnet34d", "resnet50", "resnet50d", "resnext50_32x4d", "wide_resnet50_2")
        ),
    ],
)
def test_timms_networks_run_as_they_did_and_go_back(name: str) -> None:
    model = reference.perturbed(timm.create_model(name, num_classes=7), seed=0)
    state = model.state_dict()
    x = torch.randn(2, 3, 71, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    params = fresnet.from_state_dict(state, architecture=fresnet.SPECS.get(name))
    back = fresnet.to_state_dict(params, "timm")
    assert list(back) == list(state)
    assert_same(back, state)
    model.load_state_dict(back, strict=True)
    check_forward(model, params, x)


@examples(20)
@given(
    x=training_images(),
    seed=seeds,
    depths=st.lists(st.integers(1, 2), min_size=1, max_size=4),
    layer_type=st.sampled_from(["basic", "bottleneck"]),
    in_bottleneck=st.booleans(),
    width=st.sampled_from([4, 64]),
    classes=st.integers(1, 9),
)
def test_hugging_faces_networks_run_as_they_did_and_go_back(
    x: Tensor,
    seed: int,
    depths: list[int],
    layer_type: str,
    in_bottleneck: bool,
    width: int,
    classes: int,
) -> None:
    expansion = 4 if layer_type == "bottleneck" else 1
    config = transformers.ResNetConfig(
        embedding_size=width,
        hidden_sizes=[expansion * width << stage for stage in range(len(depths))],
        depths=depths,
        layer_type=layer_type,
        downsample_in_bottleneck=in_bottleneck,
        num_labels=classes,
    )
    model = reference.perturbed(transformers.ResNetForImageClassification(config), seed)
    state = model.state_dict()
    spec = Spec(BottleneckV1, tuple(depths)) if in_bottleneck and expansion == 4 else None
    params = fresnet.from_state_dict(state, architecture=spec)
    back = fresnet.to_state_dict(params, "huggingface")
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(back[name], value), name
    model.load_state_dict(back, strict=True)
    check_forward(model, params, x)


@examples(20)
@given(
    layout=st.sampled_from(["torchvision", "huggingface"]),
    wrappers=st.lists(
        st.sampled_from(
            [
                *("state_dict", "model_state_dict", "model_state", "model"),
                *("module.", "backbone.", "_orig_mod.", "averaged"),
            ]
        ),
        max_size=4,
    ),
)
def test_wrappers_and_prefixes_of_training_scripts_are_taken_off(
    layout: str, wrappers: list[str]
) -> None:
    params = fresnet.init(0, Spec(BasicBlock, (1, 1), width=4), num_classes=3)
    mapping: dict[str, Any] = fresnet.to_state_dict(params, layout)
    for wrapper in wrappers:
        wrapped = "epoch" in mapping
        if wrapper == "averaged" and not wrapped:
            mapping = {f"module.{name}": value for name, value in mapping.items()}
            mapping["n_averaged"] = torch.tensor(3)
        elif wrapper in ("state_dict", "model_state_dict", "model_state", "model"):
            mapping = {"epoch": 3, wrapper: mapping, "optimizer": {"state": {}}}
        elif not wrapped:
            mapping = {f"{wrapper}{name}": value for name, value in mapping.items()}
    assert_same(fresnet.from_state_dict(mapping), params)


def test_entries_are_named_as_they_came() -> None:
    params = fresnet.init(0, Spec(BasicBlock, (1, 1), width=4), num_classes=3)
    state = fresnet.to_state_dict(params, "huggingface")
    name = "resnet.encoder.stages.1.layers.0.shortcut.convolution.weight"
    del state[name]
    with pytest.raises(FresnetError, match=re.escape(f"{name} is missing: expected float [o c k")):
        fresnet.from_state_dict(state)


@examples(20)
@given(params=tiny_params(dilated=False))
def test_float16_is_storage_alone(params: Params) -> None:
    """It is loaded as float32, to the bit."""
    if has(params, FOREIGN["timm"]) or is_foreign_to_timm(params):
        return
    told = {"architecture": reference.architecture(params)}
    half = {
        n: v.half() if v.dtype.is_floating_point else v
        for n, v in fresnet.to_state_dict(params, "timm").items()
    }
    single = {n: v.float() if v.dtype == torch.float16 else v for n, v in half.items()}
    loaded = fresnet.from_state_dict(half, **told)
    assert_same(loaded, fresnet.from_state_dict(single, **told))
    assert {leaf.dtype for leaf in tree.leaves(loaded)} == {torch.float32}


def give_biases(model: torch.nn.Module, seed: int) -> None:
    """Give every convolution a bias, as implementations from scratch often do."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            bias = torch.randn(layer.out_channels, generator=generator, dtype=torch.float64)
            layer.bias = torch.nn.Parameter(bias)


@pytest.mark.slow
@examples(8)
@given(x=training_images(), seed=seeds, spec=small_specs())
def test_biases_of_convolutions_are_absorbed_into_the_running_means(
    x: Tensor, seed: int, spec: Spec
) -> None:
    """This holds in evaluation, in training, and for the statistics that training leaves."""
    model = reference.module(spec, seed)
    give_biases(model, seed)
    params = reference.params(model)
    _, stats = fresnet.forward_train(params, x)
    check_forward(model, params, x)
    assert_trees_close(stats, reference.params(model).stats, 1e-12)


@pytest.mark.parametrize("name", ["resnet26d", "resnet18"])
def test_biases_of_timms_networks_too(name: str) -> None:
    model = reference.perturbed(timm.create_model(name, num_classes=7), seed=0)
    give_biases(model, 0)
    x = torch.randn(2, 3, 40, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check_forward(model, fresnet.from_state_dict(model.state_dict()), x)


def test_a_misshapen_bias_is_named() -> None:
    state = fresnet.to_state_dict(fresnet.init(0, Spec(BasicBlock, (1,), width=4)))
    message = "layer1.0.conv2.bias: expected float (4,), got float32 (3,)"
    with pytest.raises(FresnetError, match=re.escape(message)):
        fresnet.from_state_dict({**state, "layer1.0.conv2.bias": torch.zeros(3)})


def test_a_bias_is_held_to_the_device_of_the_rest() -> None:
    state = fresnet.to_state_dict(fresnet.init(0, Spec(BasicBlock, (1,), width=4)))
    bias = torch.zeros(4)
    for wrong, message in (
        (bias.to("meta"), "conv1.bias: expected on cpu, to go with the stem, got meta"),
        (None, "conv1.bias: expected float (4,), got None"),
    ):
        with pytest.raises(FresnetError, match=re.escape(message)):
            fresnet.from_state_dict({**state, "conv1.bias": wrong})


def test_crafted_names_and_sizes_are_refused() -> None:
    state: dict[str, Any] = fresnet.to_state_dict(
        fresnet.init(0, Spec(BasicBlock, (1,), width=4), num_classes=2)
    )
    conv = state["layer1.0.conv1.weight"]
    own: dict[str, Any] = {"weight": conv}
    own["model"] = own
    theirs = "resnet.encoder.stages.{}.layers.0.layer.0.convolution.weight"
    for crafted, message in (
        ({n: v for n, v in state.items() if n != "fc.weight"}, "fc.weight is missing"),
        ({n: v for n, v in state.items() if n != "fc.bias"}, "fc.bias is missing"),
        (
            {**state, "layer60.0.conv1.weight": conv},
            "layer3.0.conv1.weight, layer4.0.conv1.weight and 55",
        ),
        ({**state, **{f"layer{i}.0.conv1.weight": conv for i in range(2, 99)}}, "is missing"),
        ({**state, "layer1.999.conv1.weight": conv}, "names of 1000 blocks"),
        ({**state, "fc.bias": torch.zeros(1).expand(2**40)}, "fc.bias: expected float (2,)"),
        (
            {**state, "fc.weight": torch.zeros(1, 1).expand(2**40, 1)},
            "float (1099511627776",
        ),
        (
            {
                **state,
                "fc.weight": torch.zeros(1, 1).expand(2**50, 4),
                "fc.bias": torch.zeros(1).expand(2**50),
            },
            "fc.weight cannot be copied",
        ),
        ({**state, theirs.format("9" * 900): conv}, "is unexpected"),
        ({**state, theirs.format("9" * 5000): conv}, "names of at most 1000 letters"),
        ({**state, "classifier.1.bias": state["fc.bias"]}, "classifier.1.bias is unexpected"),
        (own, "expects the names of torchvision, timm or Hugging Face"),
    ):
        with pytest.raises(FresnetError, match=re.escape(message)):
            fresnet.from_state_dict(crafted)


def test_what_hugging_face_has_not_is_not_written_for_it() -> None:
    for name in ("resnext50_32x4d", "wide_resnet50_2"):
        params = fresnet.init(0, fresnet.SPECS[name], device="meta")
        with pytest.raises(FresnetError, match="huggingface has; got bottlenecks that are grouped"):
            fresnet.to_state_dict(params, "huggingface")


def test_a_norm_where_others_have_none_or_another_is_not_written_for_them() -> None:
    params = fresnet.init(0, fresnet.SPECS["resnet18"], num_classes=3)
    stem, stats = params.weights.stem, params.stats.stem
    bare = Params(
        params.weights._replace(stem=stem._replace(layer=stem.layer._replace(norm=NoNorm()))),
        params.stats._replace(stem=stats._replace(layer=())),
    )
    v2 = fresnet.init(0, fresnet.SPECS["resnetv2_50"], num_classes=3)
    for layout, network, found in (
        ("torchvision", fresnet.fold(params), "Bias"),
        ("timm", fresnet.fold(params), "Bias"),
        ("torchvision", bare, "NoNorm"),
        ("timm", fresnet.fold(v2), "Bias and Rescale"),
    ):
        message = f"to_state_dict expects a network that {layout} has; got {found}"
        with pytest.raises(FresnetError, match=re.escape(message)):
            fresnet.to_state_dict(network, layout)
    frozen = fresnet.freeze(params)
    assert_same(fresnet.to_state_dict(frozen), fresnet.to_state_dict(params))


def test_no_two_leaves_are_saved_under_one_name(tmp_path: Path) -> None:
    """Of the two values one would be lost."""
    params = fresnet.init(0, fresnet.SPECS["seresnet18"], num_classes=3)

    def scaled(unit: Any) -> Any:
        if isinstance(unit, Layer) and isinstance(unit.norm, Bias):
            return unit._replace(norm=Rescale(torch.ones_like(unit.norm.bias), unit.norm.bias))
        return unit

    scaled_gates = params._replace(weights=over(scaled, params.weights))
    with pytest.raises(FresnetError, match="an entry expects a name of its own; got two"):
        fresnet.save(scaled_gates, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_entries_of_attention_that_are_lost_are_missed() -> None:
    """Whether blocks have attention is told by all of them, not by each for itself."""
    params = fresnet.init(0, fresnet.SPECS["seresnet18"], num_classes=3)
    state = fresnet.to_state_dict(params, "timm")
    kept = {name: value for name, value in state.items() if not name.startswith("layer2.1.se.")}
    assert len(kept) == len(state) - 4
    with pytest.raises(FresnetError, match=re.escape("layer2.1.se.fc1.weight is missing")):
        fresnet.from_state_dict(kept)


def test_a_v2_network_is_told_by_its_names_and_its_stem_by_its_shape() -> None:
    params = fresnet.init(0, fresnet.SPECS["resnetv2_50"], num_classes=3)
    state = fresnet.to_state_dict(params, "timm")
    prefixed = {f"module.backbone.{name}": value for name, value in state.items()}
    assert_same(fresnet.from_state_dict(prefixed), params)
    state["stem.conv.weight"] = torch.ones(64, 3, 3, 3)
    with pytest.raises(FresnetError, match=r"7x7 convolution in the stem of V2; got \(3, 3\)"):
        fresnet.from_state_dict(state)


def test_the_paper_and_its_successors_share_names() -> None:
    """So the caller has to say where bottlenecks stride."""
    spec = Spec(BottleneckV1, (1, 1), width=4)
    params = fresnet.init(0, spec)
    state = fresnet.to_state_dict(params)
    assert_same(fresnet.from_state_dict(state, architecture=spec), params)
    block = fresnet.from_state_dict(state).weights.stages[0]
    assert type(block[0]) is Bottleneck


@pytest.mark.parametrize(
    "name",
    [
        "resnet10t",
        "resnet26t",
        "resnet50s",
        "resnet50t",
        pytest.param("ecaresnet50d_pruned", marks=pytest.mark.slow),
    ],
)
def test_tiered_wide_and_pruned_networks_take_their_sizes_from_shapes(name: str) -> None:
    model = reference.perturbed(timm.create_model(name, num_classes=7), seed=0)
    x = torch.randn(2, 3, 71, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    params = fresnet.from_state_dict(model.state_dict())
    assert_same(fresnet.to_state_dict(params, "timm"), model.state_dict())
    check_forward(model, params, x)


def pruned(model: Any, keep: Callable[[int], int]) -> Any:
    """The same network with fewer channels inside each block, and a different number in each."""
    blocks = [block for i in range(1, 5) for block in getattr(model, f"layer{i}")]
    for number, block in enumerate(blocks):
        convs = [getattr(block, f"conv{i}") for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
        for i, (conv, following) in enumerate(pairwise(convs), start=1):
            width = keep(number + i) % conv.out_channels + 1
            following.weight = nn.Parameter(following.weight[:, :width].clone())
            conv.weight = nn.Parameter(conv.weight[:width].clone())
            norm = nn.BatchNorm2d(width, dtype=conv.weight.dtype)
            setattr(block, f"bn{i}", norm)
    return reference.perturbed(model, seed=1)


@pytest.mark.slow
@examples(10)
@given(x=training_images(), seed=seeds, spec=small_specs(), start=st.integers(0, 50))
def test_pruned_networks_take_their_widths_from_shapes(
    x: Tensor, seed: int, spec: Spec, start: int
) -> None:
    """Every block has widths of its own, as in networks with pruned channels."""
    spec = Spec(spec.block, spec.depths)  # shapes do not tell which groups are left after pruning
    model = pruned(reference.module(spec, seed), lambda i: 7 * (i + start))
    params = reference.params(model)
    assert_same(fresnet.to_state_dict(params), model.state_dict())
    check_forward(model, params, x)


@examples(15)
@given(
    x=training_images(),
    seed=seeds,
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    embedding=st.integers(1, 20),
    layer_type=st.sampled_from(["basic", "bottleneck"]),
)
def test_hugging_faces_networks_of_any_sizes(
    x: Tensor, seed: int, widths: list[int], embedding: int, layer_type: str
) -> None:
    expansion = 4 if layer_type == "bottleneck" else 1
    config = transformers.ResNetConfig(
        embedding_size=embedding,
        hidden_sizes=[expansion * width for width in widths],
        depths=[1 + width % 2 for width in widths],
        layer_type=layer_type,
        num_labels=3,
    )
    model = reference.perturbed(transformers.ResNetForImageClassification(config), seed)
    check_forward(model, fresnet.from_state_dict(model.state_dict()), x)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer1.0.conv1", "layer1.0.conv2.weight: a convolution of activations (0, 3, 16, 16) "),
        ("layer1.1.conv2", "layer1.1.conv2.weight: a block with output (0, 3, 16, 16) expects a"),
        ("layer2.0.conv2", "layer2.0.conv2.weight: a block with output (0, 7, 8, 8) expects a s"),
        ("conv1", "layer1.0.downsample.0.weight is missing"),
        ("layer1.0.conv2", "layer1.0.downsample.0.weight is missing"),
    ],
)
def test_layers_that_do_not_fit_one_another_are_refused_in_those_words(
    name: str, message: str
) -> None:
    """One layer has lost a channel, and its norm too."""
    state = fresnet.to_state_dict(fresnet.init(0, Spec(BasicBlock, (2, 1), width=4)))
    norm = re.sub(r"conv(\d)$", r"bn\1", name)
    for entry, value in state.items():
        if entry.startswith((f"{name}.", f"{norm}.")) and value.ndim:
            state[entry] = value[:-1]
    with pytest.raises(FresnetError) as caught:
        fresnet.from_state_dict(state)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "unexpected"),
    [
        ("resnetv2_50d_frn", "what looks like a ResNet V2 with FRN or EvoNorm"),
        ("skresnet18", "what looks like a ResNet with selective kernels"),
    ],
)
def test_other_architectures_are_refused_by_what_tells_them_apart(
    name: str, unexpected: str
) -> None:
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    with pytest.raises(FresnetError) as caught:
        fresnet.from_state_dict(state)
    assert unexpected in str(caught.value)


def test_a_layout_of_no_library_is_refused() -> None:
    params = fresnet.init(0, Spec(BasicBlock, (1,), width=4))
    with pytest.raises(FresnetError, match=r"layout to be one of \('torchvision', .*; got 'keras'"):
        fresnet.to_state_dict(params, "keras")


def with_entry(value: object) -> dict[str, Any]:
    return {**fresnet.to_state_dict(fresnet.init(0, fresnet.RESNET18)), "fc.weight": value}


STATES = {
    spec.block.__name__: fresnet.to_state_dict(fresnet.init(0, spec, num_classes=5))
    for spec in (Spec(BasicBlock, (2, 2), width=4), Spec(Bottleneck, (1, 2), width=4))
}
ENTRIES = [
    (block, name) for block, state in STATES.items() for name in state if "num_batches" not in name
]


@pytest.mark.parametrize(("block", "name"), ENTRIES)
def test_a_missing_an_unexpected_and_a_misshapen_entry_are_named(block: str, name: str) -> None:
    state = STATES[block]
    value, shape = state[name], tuple(state[name].shape)
    words = {4: "[o c k k]", 2: "[k c]", 1: shape}[value.ndim]

    def message(changed: dict[str, Any]) -> str:
        with pytest.raises(FresnetError) as caught:
            fresnet.from_state_dict(changed)
        _, *faults = str(caught.value).split("\n  ")
        assert len(faults) == 1
        return faults[0]

    without = {n: v for n, v in state.items() if n != name}
    assert message(without) == f"{name} is missing: expected float {words}"
    assert message({**state, f"{name}.extra": value}) == (
        f"{name}.extra is unexpected: got float32 {shape}"
    )
    assert message({**state, name: value[..., None]}) == (
        f"{name}: expected float {words}, got float32 {(*shape, 1)}"
    )


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (
            torch.zeros(1000, 256),
            "a head on activations (0, 512) expects a weight [k 512] and a bias [k]; "
            "got (1000, 256) and (1000,)",
        ),
        (torch.zeros(1000, 512, dtype=torch.int64), "expected float [k c], got int64"),
        (
            torch.zeros(1000, 512, device="meta"),
            "expected on cpu, to go with the stem, got meta",
        ),
        (None, "expected float [k c], got None"),
        ([1.0], "expected float [k c], got a list"),
        (np.zeros((1000, 512)), "expected float [k c], got a ndarray"),
    ],
)
def test_a_wrong_entry_is_told_as_expected_and_found(value: object, found: str) -> None:
    with pytest.raises(FresnetError) as caught:
        fresnet.from_state_dict(with_entry(value))
    assert f"fc.weight: {found}" in str(caught.value)


def test_many_faults_are_counted() -> None:
    state = fresnet.to_state_dict(fresnet.init(0, fresnet.RESNET50, num_classes=10))
    for name in [name for name in state if name.startswith("layer2.1.")]:
        del state[name]
    with pytest.raises(FresnetError) as caught:
        fresnet.from_state_dict(state)
    first, *faults, last = str(caught.value).split("\n")
    assert "a ResNet of Bottleneck blocks (3, 4, 6, 3), width 64, 10 classes" in first
    assert faults[0] == "  layer2.1.conv1.weight is missing: expected float [o c k k]"
    assert len(faults) == 8
    assert last == "  and 7 more"


@pytest.mark.parametrize(
    "mapping",
    [
        {},
        {"a": torch.zeros(1)},
        {"layer0.0.conv1.weight": torch.zeros(1)},
        {"layer1.weight": torch.zeros(1)},
    ],
)
def test_names_of_another_library_are_refused(mapping: dict[str, Tensor]) -> None:
    with pytest.raises(
        FresnetError, match="expects the names of torchvision, timm or Hugging Face"
    ):
        fresnet.from_state_dict(mapping)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({7: torch.zeros(1)}, "expects names to be strings; got a int"),
        ({"fc.bias": torch.zeros(1000).to(torch.float8_e4m3fn)}, "got float8_e4m3fn (1000,)"),
        (
            {"fc.bias": torch.zeros(1000).to_sparse()},
            "fc.bias: expected float (1000,), got sparse_coo float32 (1000,)",
        ),
    ],
)
def test_strange_entries_are_refused(entry: dict[Any, Any], message: str) -> None:
    state = fresnet.to_state_dict(fresnet.init(0, fresnet.RESNET18))
    with pytest.raises(FresnetError, match=re.escape(message)):
        fresnet.from_state_dict({**state, **entry})


def test_ten_stages_round_trip() -> None:
    params = fresnet.init(0, Spec(BasicBlock, (1,) * 10, width=1), num_classes=1)
    assert_same(fresnet.from_state_dict(fresnet.to_state_dict(params)), params)


@pytest.mark.parametrize("mapping", [torch.nn.Linear(1, 1), "resnet50.pth", None])
def test_what_is_no_mapping_is_refused(mapping: Any) -> None:
    with pytest.raises(FresnetError, match="expects a mapping of names to tensors"):
        fresnet.from_state_dict(mapping)


def test_to_state_dict_refuses_what_is_no_network() -> None:
    with pytest.raises(FresnetError, match="to_state_dict expects Params"):
        fresnet.to_state_dict({})  # type: ignore[arg-type]
