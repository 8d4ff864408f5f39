"""Folding norms into convolutions changes how a network runs, not what it computes."""

from pathlib import Path

import pytest
import torch
from assertions import assert_close, assert_identical, assert_same, unmutated
from hypothesis import given
from strategies import examples, images, targets, tiny_params, training_images
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy

import fresnet
from fresnet import FresnetError, Params, Spec, tree
from fresnet.network.nodes import BasicBlock, Bias, Rescale


@examples(50)
@given(params=tiny_params(), x=images())
def test_a_folded_network_is_the_same_function(params: Params, x: Tensor) -> None:
    with unmutated(params, x):
        folded = fresnet.fold(params)
    assert_close(fresnet.forward(folded, x), fresnet.forward(params, x), 1e-12)
    pyramid = fresnet.features(folded, x)
    for actual, expected in zip(pyramid, fresnet.features(params, x), strict=True):
        assert_close(actual, expected, 1e-12)
    assert tree.leaves(folded.stats) == []


@examples(25)
@given(params=tiny_params(grouped=False), x=training_images())
def test_frozen_norms_fold_too_and_folding_again_changes_nothing(params: Params, x: Tensor) -> None:
    frozen = fresnet.freeze(params, lambda path: path[-2] != "layer2")
    folded = fresnet.fold(frozen)
    assert_same(folded, fresnet.fold(params))
    assert_identical(fresnet.fold(folded), folded)
    logits, stats = fresnet.forward_train(folded, x)
    assert_close(logits, fresnet.forward(params, x), 1e-12)
    assert_identical(stats, folded.stats)


@examples(25)
@given(params=tiny_params(), x=images())
def test_gradients_go_through_folding(params: Params, x: Tensor) -> None:
    y = targets(params, x)

    def loss(params: Params, *, folded: bool) -> Tensor:
        return cross_entropy(fresnet.forward(fresnet.fold(params) if folded else params, x), y)

    expected = tree.ravel(grad(loss)(params, folded=False))
    assert_close(tree.ravel(grad(loss)(params, folded=True)), expected, 1e-10)


@examples(10)
@given(params=tiny_params(), x=images())
def test_folding_maps_and_its_result_maps(params: Params, x: Tensor) -> None:
    other = tree.map(lambda leaf: 1.1 * leaf, params)
    stacked = vmap(fresnet.fold)(tree.stack([params, other]))
    logits = vmap(fresnet.forward, (0, None))(stacked, x)
    for actual, network in zip(logits, (params, other), strict=True):
        assert_close(actual, fresnet.forward(network, x), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_keep_their_dtype_and_layout(dtype: torch.dtype) -> None:
    params = fresnet.init(0, fresnet.RESNET18, num_classes=5)
    params = params._replace(weights=tree.map(lambda w: w.to(dtype), params.weights))
    folded = fresnet.fold(params)
    block, before = folded.weights.stages[1][0], params.weights.stages[1][0]
    assert block.layer2.conv.dtype == block.layer2.norm.bias.dtype == dtype
    assert block.layer2.conv.stride() == before.layer2.conv.stride()
    assert block.shortcut.layer.conv.stride() == before.shortcut.layer.conv.stride()
    assert isinstance(folded.weights.stem.layer.norm, Bias)


def test_a_folded_network_is_saved_described_and_refused_where_norms_are_asked_for(
    tmp_path: Path,
) -> None:
    params = fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=10)
    folded = fresnet.fold(params)
    fresnet.save(folded, tmp_path / "folded.safetensors")
    assert_identical(fresnet.load(tmp_path / "folded.safetensors"), folded)
    macs = fresnet.summary(folded, 32).multiply_adds
    assert macs == fresnet.summary(params, 32).multiply_adds
    x = torch.ones(2, 3, 32, 32)
    assert_identical(fresnet.recalibrate(folded, [x]), folded)
    for layout in ("torchvision", "timm", "huggingface"):
        standard = fresnet.fold(fresnet.init(0, fresnet.RESNET18, num_classes=2))
        with pytest.raises(FresnetError, match="got Bias; save keeps all"):
            fresnet.to_state_dict(standard, layout)
    with pytest.raises(FresnetError, match=r"choose a norm; got none of 0$"):
        fresnet.freeze(folded)
    with pytest.raises(FresnetError, match="fold expects Params"):
        fresnet.fold(x)  # type: ignore[arg-type]
    layer = folded.weights.stem.layer._replace(norm=Bias(torch.zeros(5)))
    short = folded.weights.stem._replace(layer=layer)
    with pytest.raises(FresnetError, match=r"a bias of activations \(2, 16, 32, 32\) is \[16\]"):
        fresnet.forward(folded._replace(weights=folded.weights._replace(stem=short)), x)
    unfit = params._replace(stats=params.stats._replace(stem=()))
    with pytest.raises(
        FresnetError, match=r"expects stats\.stem to be as weights\.stem, a Stem3x3; got a tuple"
    ):
        fresnet.forward(unfit, x)


def test_a_rescale_after_a_convolution_is_folded_into_it() -> None:
    """`quantize` makes such layers; kernels want a bias alone."""
    folded = fresnet.fold(fresnet.init(0, Spec(BasicBlock, (1,), width=4), num_classes=5))
    stem = folded.weights.stem
    scale = torch.linspace(0.5, 2, 4)
    scaled = stem.layer._replace(norm=Rescale(scale, stem.layer.norm.bias + 1))
    params = folded._replace(weights=folded.weights._replace(stem=stem._replace(layer=scaled)))
    again = fresnet.fold(params)
    assert type(again.weights.stem.layer.norm) is Bias
    x = torch.randn(2, 3, 40, 36, generator=torch.Generator().manual_seed(0))
    assert_close(fresnet.forward(again, x), fresnet.forward(params, x), 1e-5)
