"""`init` is deterministic, pure, and distributed as torchvision's initialisation."""

from itertools import pairwise
from typing import Any

import pytest
import reference
import torch
from assertions import assert_same
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from strategies import examples, seeds, tiny_specs

import fresnet
from fresnet import Spec, tree
from fresnet.network.check import first_conv
from fresnet.network.nodes import BasicBlock, Bottleneck

named = pytest.mark.parametrize("name", reference.TORCHVISION)


def torchvision_model(name: str, **kwargs: object) -> reference.ResNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return reference.torchvision.models.get_model(name, **kwargs)


@named
@pytest.mark.parametrize("classes", [10, 1000])
def test_counts_equal_torchvision(name: str, classes: int) -> None:
    with torch.device("meta"):
        model = reference.torchvision.models.get_model(name, num_classes=classes)
    params = fresnet.init(0, fresnet.SPECS[name], num_classes=classes, device="meta")
    count = sum(leaf.numel() for leaf in tree.leaves(params.weights))
    assert count == sum(p.numel() for p in model.parameters())
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    state = fresnet.to_state_dict(params)
    assert {name: tuple(value.shape) for name, value in state.items()} == shapes


def test_counts_of_resnet50_with_ten_classes() -> None:
    weights = fresnet.init(0, num_classes=10, device="meta").weights
    assert sum(leaf.numel() for leaf in tree.leaves(weights)) == 23_528_522
    assert weights.stem.layer.conv.numel() == 9_408
    assert weights.head.weight.numel() + weights.head.bias.numel() == 20_490


@examples(30)
@given(seed=seeds, spec=tiny_specs(), classes=st.integers(1, 9), channels=st.integers(1, 5))
def test_the_seed_determines_every_bit(seed: int, spec: Spec, classes: int, channels: int) -> None:
    def build(generator: torch.Generator | int) -> fresnet.Params:
        return fresnet.init(generator, spec, num_classes=classes, in_channels=channels)

    params = build(seed)
    assert_same(build(seed), params)
    assert_same(build(torch.Generator().manual_seed(seed)), params)
    assert first_conv(params.weights).shape[1] == channels
    assert params.weights.head.bias.shape == (classes,)


def test_a_generator_is_advanced_and_another_seed_gives_other_weights() -> None:
    spec, generator = Spec(BasicBlock, (1,), width=4), torch.Generator().manual_seed(0)
    convs = [fresnet.init(g, spec).weights.stem.layer.conv for g in (generator, generator, 1)]
    assert not any(torch.equal(a, b) for a, b in pairwise((*convs, convs[0])))


@pytest.mark.slow
@pytest.mark.parametrize("zero_init_residual", [False, True])
@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_every_tensor_is_distributed_as_torchvisions(name: str, zero_init_residual: bool) -> None:
    """Constant tensors are equal. Drawn ones pass the two-sample Kolmogorov-Smirnov test."""
    model = torchvision_model(name, zero_init_residual=zero_init_residual)
    params = fresnet.init(1, fresnet.SPECS[name], zero_init_residual=zero_init_residual)
    state = fresnet.to_state_dict(params)
    for entry, expected in model.state_dict().items():
        actual = state[entry]
        if expected.unique().numel() == 1:
            assert torch.equal(actual, expected), entry
        else:
            a, b = (t.flatten()[:20_000].numpy() for t in (actual, expected))
            assert ks_2samp(a, b).pvalue > 1e-5, entry
            std = pytest.approx(expected.std().item(), rel=5 / len(a) ** 0.5)
            assert actual.std().item() == std, entry


def test_layout_dtype_and_device() -> None:
    spec = Spec(Bottleneck, (1, 1), width=4)
    weights, stats = fresnet.init(0, spec, dtype=torch.bfloat16)
    on_meta = fresnet.init(0, spec, dtype=torch.bfloat16, device="meta")
    for leaf in tree.leaves((weights, on_meta.weights)):
        assert leaf.dtype == torch.bfloat16
        assert leaf.ndim != 4 or leaf.is_contiguous(memory_format=torch.channels_last)
    assert {leaf.dtype for leaf in tree.leaves(stats)} == {torch.float32}
    assert {leaf.device.type for leaf in tree.leaves(on_meta)} == {"meta"}


@examples(30)
@given(seed=seeds, spec=tiny_specs(), classes=st.integers(1, 9))
def test_a_new_head_is_the_one_that_init_draws(seed: int, spec: Spec, classes: int) -> None:
    """Whatever the network ends with; the rest of it is not copied."""
    generator = torch.Generator().manual_seed(seed)
    encoder = fresnet.init(generator, spec, num_classes=0)
    params = fresnet.with_head(encoder, num_classes=classes, generator=generator)
    assert_same(params, fresnet.init(seed, spec, num_classes=classes))
    again = fresnet.with_head(params, num_classes=classes, generator=seed)
    assert not tree.equal(again.weights.head, params.weights.head)
    assert again.weights.stages is params.weights.stages is encoder.weights.stages
    assert again.stats is encoder.stats


@pytest.mark.parametrize("like", [{"dtype": torch.bfloat16}, {"device": "meta"}], ids=str)
def test_a_new_head_is_of_the_networks_dtype_and_on_its_device(like: dict[str, Any]) -> None:
    params = fresnet.init(0, Spec(BasicBlock, (1,), width=4), **like)
    head = fresnet.with_head(params, num_classes=3, generator=1).weights.head
    assert (head.bias.dtype, head.weight.device) == (
        params.weights.head.bias.dtype,
        params.weights.head.weight.device,
    )
