"""Nodes that torchvision does not have equal timm's, and a norm that a regime does not know raises.

The other files test what holds for every node, under every transform and in every backend. Their
strategies draw these nodes too.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import reference
import timm
import torch
from assertions import assert_close, assert_same, assert_trees_close
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, seeds, training_images
from test_family import check
from timm import layers
from timm.layers import BlurPool2d, get_attn
from timm.models import resnet, resnetv2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import FresnetError, tree
from fresnet.gradients.listening import Listening
from fresnet.inference.cudnn import CuDNN
from fresnet.inference.int8 import _Packing
from fresnet.inference.onednn import OneDNN
from fresnet.network import norm as norms_of
from fresnet.network.init import fresh_stats
from fresnet.network.nodes import (
    EPS,
    PLACES,
    PLAIN,
    POOLED,
    AveragedStage,
    AveragedStem,
    BareDeepStem,
    BareStem7x7,
    BasicBlock,
    BlurredStage,
    BlurredStem,
    Bottleneck,
    DeepStem,
    FramedStem7x7,
    GroupNorm,
    LastNorm,
    Layer,
    NoAttention,
    Norm,
    Normed,
    NormStats,
    NoShortcut,
    Pair,
    PooledProjection,
    PreActivation,
    PreActivationBasic,
    Projection,
    Regime,
    SqueezeExcite,
    StandardisedLayer,
    Stem7x7,
    ZeroPad,
    kinds,
    over,
    replaced,
)
from fresnet.network.regimes import INFERENCE, TRAINING
from fresnet.network.rewrites import _folded
from fresnet.weights.qdq import _Counting

X = torch.randn(2, 3, 71, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@examples(8)
@given(
    x=training_images(),
    seed=seeds,
    depths=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    width=st.sampled_from([8, 16]),
)
def test_v2_equals_timm(x: Tensor, seed: int, depths: list[int], width: int) -> None:
    """Logits of inference and training, statistics and every gradient are equal."""
    model = resnetv2.ResNetV2(
        depths,
        channels=[4 * width << stage for stage in range(len(depths))],
        num_classes=7,
        stem_chs=width,
        norm_layer=resnetv2.BatchNormAct2d,
        conv_layer=resnetv2.create_conv2d,
    )
    check(reference.perturbed(model, seed), fresnet.from_state_dict, x)


@pytest.mark.parametrize("variant", ["basic", "deep", "tiered", "groups", "bit"])
@examples(6)
@given(x=training_images(), seed=seeds, depths=st.lists(st.integers(1, 2), min_size=1, max_size=3))
def test_variants_of_v2_equal_timms(variant: str, x: Tensor, seed: int, depths: list[int]) -> None:
    """timm's own networks go together in these ways; other ways are told by an architecture."""
    basic, deep = variant == "basic", variant in ("deep", "tiered", "groups")
    in_groups = variant in ("groups", "bit")
    standardised = partial(resnetv2.StdConv2d, eps=1e-8)
    model = resnetv2.ResNetV2(
        depths,
        channels=[(64 if basic else 256) << stage for stage in range(len(depths))],
        num_classes=7,
        basic=basic,
        bottle_ratio=1.0 if basic else 0.25,
        stem_type={"groups": "deep", "bit": "fixed", "basic": ""}.get(variant, variant),
        avg_down=deep,
        norm_layer=resnetv2.GroupNormAct if in_groups else resnetv2.BatchNormAct2d,
        conv_layer=standardised if variant == "bit" else resnetv2.create_conv2d,
    )
    spec = fresnet.Spec(
        PreActivationBasic if basic else PreActivation,
        tuple(depths),
        stem=BareDeepStem if deep else FramedStem7x7 if variant == "bit" else BareStem7x7,
        shortcut=PooledProjection if deep else Projection,
        last=LastNorm,
        layer=StandardisedLayer if variant == "bit" else Layer,
        norm=GroupNorm if in_groups else Norm,
    )
    check(reference.perturbed(model, seed), partial(read_both_ways, spec=spec), x)


def read_both_ways(state: Any, spec: fresnet.Spec) -> fresnet.Params:
    """What names alone tell, with a warning where norms are in groups; an architecture agrees."""
    params = fresnet.from_state_dict(state, architecture=spec)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert_same(fresnet.from_state_dict(state), params)
    assert bool(told) == (spec.norm is GroupNorm)
    back = fresnet.to_state_dict(params, "timm")
    assert back.keys() == state.keys()
    kept = [name for name in back if not name.endswith("num_batches_tracked")]
    assert_same({name: back[name] for name in kept}, {name: state[name] for name in kept})
    return params


@examples(8)
@given(
    x=training_images(),
    seed=seeds,
    depths=st.tuples(*[st.integers(1, 2)] * 4),
    block=st.sampled_from([BasicBlock, Bottleneck]),
)
def test_norms_in_groups_equal_timms(
    x: Tensor, seed: int, depths: tuple[int, ...], block: Any
) -> None:
    model = resnet.ResNet(getattr(resnet, block.__name__), depths, 10, norm_layer="groupnorm")
    spec = fresnet.Spec(block, depths, norm=GroupNorm)
    check(reference.perturbed(model, seed), partial(read_both_ways, spec=spec), x)


@pytest.mark.parametrize("name", ["V1", "V1 with attention", "V2", "groups"])
@examples(4)
@given(x=training_images(), seed=seeds, eps=st.floats(1e-8, 1e-1))
def test_norms_with_another_eps(name: str, x: Tensor, seed: int, eps: float) -> None:
    """Logits, statistics and the gradients of norms and head are those of a module with it."""
    depths, norm = (1, 1, 2, 1), partial(resnetv2.BatchNormAct2d, eps=eps)
    models: dict[str, Callable[[], nn.Module]] = {
        "V1": lambda: resnet.ResNet(
            resnet.Bottleneck, depths, 7, norm_layer=partial(nn.BatchNorm2d, eps=eps)
        ),
        "V1 with attention": lambda: resnet.ResNet(
            resnet.BasicBlock,
            depths,
            7,
            norm_layer=partial(nn.BatchNorm2d, eps=eps),
            block_args={"attn_layer": "eca"},
        ),
        "V2": lambda: resnetv2.ResNetV2(
            depths, num_classes=7, norm_layer=norm, conv_layer=resnetv2.create_conv2d
        ),
        "groups": lambda: resnet.ResNet(
            resnet.BasicBlock, depths, 7, norm_layer=partial(layers.GroupNorm, eps=eps)
        ),
    }
    block = Bottleneck if name == "V1" else BasicBlock
    spec = fresnet.Spec(block, depths, norm=GroupNorm) if name == "groups" else None
    model = reference.perturbed(models[name](), seed)
    read = partial(fresnet.from_state_dict, architecture=spec)
    params = fresnet.with_eps(read(model.state_dict()), eps)
    with torch.no_grad():
        assert_close(fresnet.forward(params, x), model.eval()(x), 1e-11)
    logits, stats = fresnet.forward_train(params, x)
    assert_close(logits, model.train()(x), 1e-11)
    after = fresnet.with_eps(read(model.state_dict()), eps)
    assert_trees_close(stats, after.stats, 1e-11)


def test_eps_of_a_folded_network_of_v2_in_groups() -> None:
    spec = fresnet.Spec(PreActivation, (1, 1), 6, stem=BareStem7x7, last=LastNorm, norm=GroupNorm)
    params = fresnet.init(0, spec, num_classes=5, dtype=torch.float64)
    expected = fresnet.forward(fresnet.with_eps(params, 0.1), X)
    assert_close(fresnet.forward(fresnet.with_eps(fresnet.fold(params), 0.1), X), expected, 1e-12)


@pytest.mark.parametrize("bad", [Tensor.int, Tensor.bfloat16, lambda leaf: leaf.to("meta")])
def test_a_standardised_weight_is_looked_at_as_others_are(bad: Callable[[Tensor], Tensor]) -> None:
    spec = fresnet.Spec(BasicBlock, (1,), 6, layer=StandardisedLayer)
    params = fresnet.init(0, spec, num_classes=5)
    path = "weights.stages.0.0.layer2.conv"
    wrong = tree.at(params, path, bad(params.weights.stages[0][0].layer2.conv))
    with pytest.raises(FresnetError, match=r"layer2.conv to be torch.float32 on cpu"):
        fresnet.forward(wrong, X.float())


def test_where_norms_do_not_see_convolutions_alone_eps_is_refused() -> None:
    bit = fresnet.init(0, fresnet.SPECS["resnetv2_50x1_bit"], device="meta")
    half = fresnet.init(0, fresnet.Spec(BasicBlock, (1,), 4, last=LastNorm))
    plain = fresnet.init(0, fresnet.Spec(BasicBlock, (1,), 4))
    for params, eps, message in (
        (bit, 1e-3, "norms after convolutions with a scale; got StandardisedLayer"),
        (fresnet.fold(plain), 1e-3, "norms after convolutions with a scale; got no norms"),
        (half, 1e-3, "all of ResNet V2 or all of V1"),
        (plain, 0.0, "eps to be a number from 1e-12 on"),
        (plain, float("inf"), "eps to be a number from 1e-12 on"),
    ):
        with pytest.raises(FresnetError, match=message):
            fresnet.with_eps(params, eps)


@pytest.mark.parametrize("attention", ["se", "eca"])
@examples(8)
@given(
    x=training_images(),
    seed=seeds,
    depths=st.tuples(*[st.integers(1, 2)] * 4),
    block=st.sampled_from([resnet.BasicBlock, resnet.Bottleneck]),
    deep=st.booleans(),
)
def test_attention_equals_timm(
    attention: str, x: Tensor, seed: int, depths: tuple[int, ...], block: Any, deep: bool
) -> None:
    stem = {"stem_width": 32, "stem_type": "deep", "avg_down": True} if deep else {}
    model = resnet.ResNet(block, depths, 10, block_args={"attn_layer": attention}, **stem)
    check(reference.perturbed(model, seed), fresnet.from_state_dict, x)


@pytest.mark.parametrize("pooling", ["averaged", "blurred"])
@examples(8)
@given(
    data=st.data(),
    seed=seeds,
    depths=st.tuples(*[st.integers(1, 2)] * 4),
    block=st.sampled_from([BasicBlock, Bottleneck]),
    deep=st.booleans(),
    excited=st.booleans(),
)
def test_pooling_against_aliasing_equals_timm(
    pooling: str,
    data: st.DataObject,
    seed: int,
    depths: tuple[int, ...],
    block: Any,
    deep: bool,
    excited: bool,
) -> None:
    """timm averages maps of even sides alone, and blurs those of two and more."""
    averaged = pooling == "averaged"
    stem = {"stem_width": 32, "stem_type": "deep", "avg_down": True} if deep else {}
    model = resnet.ResNet(
        getattr(resnet, block.__name__),
        depths,
        10,
        block_args={"attn_layer": "se"} if excited else {},
        aa_layer=nn.AvgPool2d if averaged else BlurPool2d,
        **stem,
    )
    spec = fresnet.Spec(
        block,
        depths,
        stem=DeepStem if deep else Stem7x7,
        shortcut=PooledProjection if deep else Projection,
        attention=SqueezeExcite if excited else NoAttention,
        stage=AveragedStage if averaged else BlurredStage,
        stem_pool=AveragedStem if averaged else BlurredStem,
    )
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64) if averaged else data.draw(training_images())
    read = partial(fresnet.from_state_dict, architecture=spec)
    check(reference.perturbed(model, seed), read, x)


@examples(8)
@given(x=training_images(), seed=seeds, block=st.sampled_from([BasicBlock, Bottleneck]))
def test_a_convolution_that_pools_equals_timm(x: Tensor, seed: int, block: Any) -> None:
    """As in ResNet-RS, which names tell."""
    model = resnet.ResNet(
        getattr(resnet, block.__name__),
        (1, 2, 1, 1),
        10,
        stem_width=32,
        stem_type="deep",
        replace_stem_pool=True,
        avg_down=True,
        block_args={"attn_layer": partial(get_attn("se"), rd_ratio=0.25)},
    )
    check(reference.perturbed(model, seed), fresnet.from_state_dict, x)


def test_what_pools_against_aliasing_is_asked_for_where_names_do_not_tell(tmp_path: Path) -> None:
    """timm's state dicts list modules, of which only a blur shows; torchvision has no such network.

    Without modules a network may be any of those that share its names.
    """
    for name, expected in (("resnet50d", "resnetaa50d"), ("resnetaa50", "resnetaa50")):
        with torch.device("meta"):
            state = timm.create_model(name).state_dict()
        with pytest.warns(UserWarning, match=rf"do not tell this network from {expected}\. "):
            params = fresnet.from_state_dict(state)
        assert kinds(params.weights).isdisjoint(POOLED)
        fresnet.from_state_dict(state, architecture=name)
    for name, expected in (
        ("resnet50d", "resnetaa50d and resnetblur50d"),
        ("resnetaa50", "resnet50_v1, resnetaa50 and resnetblur50"),
    ):
        with torch.device("meta"):
            entries = dict(timm.create_model(name).state_dict())
        usual = name.replace("aa", "")
        with pytest.warns(UserWarning, match=f"from {expected}.*architecture='{usual}' says so"):
            fresnet.from_state_dict(entries)
        fresnet.from_state_dict(entries, architecture=name)
    state = timm.create_model("resnetblur18").state_dict()
    torch.save({"model": state}, tmp_path / "blurs.pth")
    for read in (
        lambda **told: fresnet.from_state_dict(state, **told),
        lambda **told: fresnet.load(tmp_path / "blurs.pth", **told),
    ):
        for told in ({}, {"architecture": "resnet18"}):
            with pytest.raises(FresnetError, match=r"blur.*pass architecture='resnetblur18'"):
                read(**told)
        assert BlurredStage in kinds(read(architecture="resnetblur18").weights)
    fresnet.from_state_dict(timm.create_model("resnext50_32x4d").state_dict())  # there is no other


@examples(8)
@given(x=training_images(), seed=seeds)
def test_a_narrow_first_convolution_and_wide_projections_equal_timm(x: Tensor, seed: int) -> None:
    """As in SENet-154, which shapes tell."""
    model = resnet.ResNet(
        resnet.Bottleneck,
        (1, 2, 1, 1),
        10,
        cardinality=8,
        base_width=4,
        stem_type="deep",
        down_kernel_size=3,
        block_reduce_first=2,
        block_args={"attn_layer": get_attn("se")},
    )
    check(reference.perturbed(model, seed), fresnet.from_state_dict, x)


@pytest.mark.parametrize("name", ["resnetaa50d", "resnetblur18", "resnetrs50"])
def test_networks_that_pool_otherwise_go_back_to_timm(name: str) -> None:
    """An architecture that does not go with the entries is refused."""
    model = reference.perturbed(timm.create_model(name, num_classes=7), seed=0)
    state = model.state_dict()
    params = fresnet.from_state_dict(state, architecture=name)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert_close(fresnet.forward(params, x), model.eval()(x), 1e-12)
    back = fresnet.to_state_dict(params, "timm")
    assert list(back) == list(state)
    assert_same(back, {key: state[key] for key in back})
    with pytest.raises(FresnetError, match="expects a network that torchvision has; got"):
        fresnet.to_state_dict(params)
    with pytest.raises(FresnetError, match="as architecture says"):
        fresnet.from_state_dict(state, architecture="resnetblur101d")


@pytest.mark.parametrize(
    "name",
    [
        "resnetv2_50",
        "resnetv2_18d",
        "resnet50_gn",
        "seresnet18",
        "ecaresnetlight",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("seresnet50", "ecaresnet50d", "resnetv2_50x1_bit", "resnetv2_50d_gn")
        ),
    ],
)
def test_timms_networks_run_as_they_did_and_go_back(name: str) -> None:
    model = reference.perturbed(timm.create_model(name, num_classes=7), seed=0)
    state = model.state_dict()
    params = fresnet.from_state_dict(state, architecture=name)
    with torch.no_grad():
        assert_close(fresnet.forward(params, X), model.eval()(X), 1e-12)
    back = fresnet.to_state_dict(params, "timm")
    assert back.keys() == state.keys() if "v2" in name else list(back) == list(state)
    assert_same(back, {key: state[key] for key in back})
    drawn = fresnet.init(0, fresnet.SPECS[name], num_classes=7, device="meta")
    shapes = [leaf.shape for leaf in tree.leaves(drawn)]
    assert [leaf.shape for leaf in tree.leaves(params)] == shapes


COMPILED = ["resnetv2_50", "seresnet18", "ecaresnetlight", "resnetblur18", "resnetv2_50x1_bit"]


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_compiled(name: str, dtype: torch.dtype) -> None:
    """These have the published sizes; other tests draw small ones. A warning would be an error."""
    params = fresnet.init(0, fresnet.SPECS[name], num_classes=5)
    x = X.float()
    folded = tree.map(lambda leaf: leaf.to(dtype), fresnet.fold(params))
    exact, narrow = fresnet.forward(params, x), x.to(dtype)
    bound = 1e-5 if dtype is torch.float32 else 3e-2
    if name.endswith("_bit"):  # its norms in groups make more of rounding, uncompiled too
        rounding = (fresnet.forward(folded, narrow) - exact).norm() / exact.norm()
        bound = max(bound, 2 * float(rounding))
    logits = fresnet.compile_inference(folded, narrow)(narrow).float()
    assert_close(logits, exact, bound)


def test_v2_runs_in_int8_and_attention_is_refused_there() -> None:
    x = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    params = fresnet.init(0, fresnet.SPECS["resnetv2_50"], num_classes=5)
    logits = fresnet.compile_inference(fresnet.quantize(params, [x]), x)(x)
    assert_close(logits, fresnet.forward(params, x), 0.1)
    params = fresnet.init(0, fresnet.SPECS["seresnet18"], num_classes=5)
    with pytest.raises(FresnetError, match="quantize expects blocks without attention"):
        fresnet.quantize(params, [x])
    params = fresnet.init(0, fresnet.Spec(BasicBlock, (1,), 6, norm=GroupNorm), num_classes=5)
    with pytest.raises(FresnetError, match="quantize expects norms that fold into convolutions"):
        fresnet.quantize(params, [x])


def test_a_gate_that_does_not_fit_is_refused() -> None:
    params = fresnet.init(0, fresnet.SPECS["seresnet18"], num_classes=5)

    def narrow(unit: Layer | Normed) -> Layer | Normed:
        if isinstance(unit, Layer) and unit.conv.shape[:2] == (64, 8):
            return tree.map(lambda leaf: leaf[:1], unit)
        return unit

    stages = over(narrow, params.weights.stages)
    unfit = params._replace(weights=params.weights._replace(stages=stages))
    with pytest.raises(FresnetError, match=r"a gate of activations \(2, 64, 12, 12\) is"):
        fresnet.forward(unfit, torch.ones(2, 3, 48, 48))


class Scale(NamedTuple):
    """A norm that fresnet does not know, with the fields of one that it knows."""

    scale: Tensor
    bias: Tensor


def run_by(regime: Regime, unit: Any, beside: Any) -> Any:
    at = Pair(unit, beside)
    if isinstance(unit, Normed):
        return regime.normed(at, torch.ones(2, 4, 5, 5))
    return regime.layer(at, torch.ones(2, 4, 5, 5), PLAIN)


REGIMES: dict[str, Callable[[], Regime]] = {
    "inference": lambda: INFERENCE,
    "training": lambda: TRAINING,
    "clipping": lambda: Listening(torch.ones(2, 3, 5, 5), sums=True),
    "oneDNN": OneDNN,
    "cuDNN": CuDNN,
    "int8": lambda: _Packing(2),
    "QDQ": _Counting,
}


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("stats", [True, False])
@pytest.mark.parametrize("normed", [True, False])
def test_a_norm_that_a_regime_does_not_know_is_refused(
    regime: str, stats: bool, normed: bool
) -> None:
    """Otherwise its scale would silently be ignored."""
    norm: Any = Scale(torch.ones(4), torch.zeros(4))
    unit = Normed(norm) if normed else Layer(torch.ones(4, 4, 3, 3), norm)
    beside = NormStats(torch.zeros(4), torch.ones(4)) if stats else ()
    with pytest.raises(FresnetError, match="Scale"):
        run_by(REGIMES[regime](), unit, beside)
    with pytest.raises(FresnetError, match="Scale"):
        _folded(unit, beside)


def by_root_mean_square(norm: Scale, x: Tensor) -> Tensor:
    factor = torch.rsqrt(x.square().mean((2, 3), keepdim=True) + EPS)
    return x * factor * norm.scale[:, None, None] + norm.bias[:, None, None]


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_18"])
def test_a_norm_of_ones_own_is_a_type_and_a_function(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inference, training, gradients and backends take it from the table, and need no line each."""
    monkeypatch.setitem(norms_of.WITHOUT_STATISTICS, Scale, by_root_mean_square)
    for kind, places in list(PLACES.items()):
        if "norm" in places:
            monkeypatch.setitem(PLACES, kind, {"norm": (*places["norm"], Scale)})
    spec = replace(fresnet.SPECS[name], depths=(1, 1), width=8)
    weights = fresnet.init(0, spec, num_classes=5).weights
    draw = torch.Generator().manual_seed(1)

    def scaled(unit: Any) -> Any:
        drawn = (torch.rand(leaf.shape, generator=draw) + 0.5 for leaf in unit.norm)
        return unit._replace(norm=Scale(*drawn)) if isinstance(unit.norm, Norm) else unit

    weights = replaced(scaled, weights)
    params = fresnet.Params(weights, fresh_stats(weights))
    wide, x = fresnet.cast(params, torch.float64), X[:, :, :40, :40]
    y = torch.tensor([1, 4])
    logits = fresnet.forward(wide, x)
    assert_close(fresnet.forward_train(wide, x)[0], logits, 0)
    assert_close(fresnet.forward(fresnet.fold(wide), x), logits, 1e-12)
    each = fresnet.per_sample_grads(cross_entropy, wide, x, y, norms="running")
    norms = torch.stack([g.flatten(1).square().sum(1) for g in tree.leaves(each)]).sum(0).sqrt()
    assert_close(fresnet.per_sample_norms(cross_entropy, wide, x, y), norms, 1e-12)
    clipped = fresnet.clipped_grads(cross_entropy, wide, x, y, max_norm=1.0)
    factors = (1 / norms).clamp(max=1)
    expected = tree.map(lambda g: torch.tensordot(factors, g, 1), each)
    assert_trees_close(clipped[0], expected, 1e-12)
    compiled = fresnet.compile_inference(params, x.float())
    assert_close(compiled(x.float()), logits.float(), 1e-4)


@pytest.mark.parametrize("regime", REGIMES)
def test_a_norm_without_its_statistics_is_refused(regime: str) -> None:
    unit = Layer(torch.ones(4, 4, 3, 3), Norm(torch.ones(4), torch.zeros(4)))
    with pytest.raises(FresnetError):
        run_by(REGIMES[regime](), unit, ())


def test_dilated_v2_equals_timms() -> None:
    model = timm.create_model("resnetv2_50", num_classes=7, output_stride=8)
    model = reference.perturbed(model, seed=0).eval()
    params = fresnet.dilate(fresnet.from_state_dict(model.state_dict()), output_stride=8)
    with torch.no_grad():
        assert_close(fresnet.forward(params, X), model(X), 1e-12)


def test_zero_init_makes_each_v2_block_its_shortcut() -> None:
    spec = fresnet.SPECS["resnetv2_50"]
    params = fresnet.init(0, spec, num_classes=5, zero_init_residual=True)
    for stage in params.weights.stages:
        for block in stage:
            assert not block.layer3.conv.any()
            assert block.layer2.norm.scale.all()


@pytest.mark.parametrize("shortcut", [ZeroPad, NoShortcut])
def test_a_v2_shortcut_that_changes_the_map_reads_it_activated(shortcut: type[Any]) -> None:
    """So does a projection, which is compared with timm's."""
    spec = fresnet.Spec(PreActivation, (1,), 4, stem=BareStem7x7, last=LastNorm, shortcut=shortcut)
    params = fresnet.init(0, spec, num_classes=5, zero_init_residual=True, dtype=torch.float64)
    block = over(Pair, params.weights.stages[0][0], params.stats.stages[0][0])
    x = X.new_zeros(2, 4, 6, 6) + torch.arange(-18.0, 18).reshape(6, 6)
    y, _ = block.run(x, fresnet.nodes.Grid(), INFERENCE)
    active = nn.functional.pad(x.relu(), (0, 0, 0, 0, 0, 12))
    assert_close(y, active if shortcut is ZeroPad else torch.zeros_like(y), 1e-4)


def test_a_v2_block_is_a_function_of_its_parts() -> None:
    """PyTorch's modules spell out He et al. 2016, Fig. 4e."""
    params = fresnet.init(0, fresnet.SPECS["resnetv2_50"], num_classes=5, dtype=torch.float64)
    block = params.weights.stages[1][1]
    x = torch.randn(2, 512, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x
    for norm, conv, padding in (
        (block.before.norm, block.layer1.conv, 0),
        (block.layer1.norm, block.layer2.conv, 1),
        (block.layer2.norm, block.layer3.conv, 0),
    ):
        y = nn.functional.batch_norm(y, None, None, norm.scale, norm.bias, training=True)
        y = nn.functional.conv2d(y.relu(), conv, padding=padding)
    paired = over(Pair, block, params.stats.stages[1][1])
    actual, _ = paired.run(x, fresnet.nodes.Grid(), TRAINING)
    assert_close(actual, x + y, 1e-12)


def test_a_small_v2_network_is_compiled_without_ending_the_process() -> None:
    """A map of one pixel with other strides than expected ended it, with a segmentation fault."""
    spec = fresnet.Spec(PreActivation, (2, 1, 2, 1), 6, stem=BareStem7x7, last=LastNorm)
    params = fresnet.init(0, spec, num_classes=8)
    x = torch.ones(1, 9, 8, 3).permute(0, 3, 1, 2)
    assert_close(fresnet.compile_inference(params, x)(x), fresnet.forward(params, x), 1e-5)
