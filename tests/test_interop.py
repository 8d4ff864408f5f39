"""State dicts: exact in both directions, and refused by name."""

import re
from typing import Any

import numpy as np
import pytest
import reference
import torch
from assertions import assert_same
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, seeds, small_specs, tiny_params
from torch import Tensor

import fresnet
from fresnet import FresnetError, Params, Spec, tree
from fresnet.types import BasicBlock, Bottleneck


@examples(30)
@given(params=tiny_params())
def test_round_trip_of_params_is_exact(params: Params) -> None:
    assert_same(fresnet.from_state_dict(fresnet.to_state_dict(params)), params)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_what_is_loaded_is_laid_out_as_what_was_initialised(name: str) -> None:
    """Strides included: kernels choose by them, and another kernel is another rounding."""
    params = fresnet.init(0, fresnet.SPECS[name])
    loaded = fresnet.from_state_dict(fresnet.to_state_dict(params))
    layouts = [[leaf.stride() for leaf in tree.leaves(p)] for p in (loaded, params)]
    assert layouts[0] == layouts[1]


@examples(15)
@given(seed=seeds, spec=small_specs(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_round_trip_of_a_state_dict_is_exact(
    seed: int, spec: fresnet.Spec, dtype: torch.dtype
) -> None:
    model = reference.module(spec, seed, dtype=dtype)
    state = fresnet.to_state_dict(reference.params(model))
    assert list(state) == list(model.state_dict())
    assert_same(state, model.state_dict())


@pytest.mark.parametrize("name", fresnet.SPECS)
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
    """As in the files of torchvision's first releases, and in modules after `.bfloat16()`."""
    state = reference.module(fresnet.RESNET18, 0, dtype=torch.bfloat16).state_dict()
    bare = {name: value for name, value in state.items() if "num_batches" not in name}
    params = fresnet.from_state_dict(bare)
    assert_same(params, fresnet.from_state_dict(state))
    assert {leaf.dtype for leaf in tree.leaves(params.weights)} == {torch.bfloat16}
    assert {leaf.dtype for leaf in tree.leaves(params.stats)} == {torch.float32}
    assert torch.equal(params.stats.stem.norm.mean, bare["bn1.running_mean"].float())


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

    def message(changed: dict[str, Any]) -> str:
        with pytest.raises(FresnetError) as caught:
            fresnet.from_state_dict(changed)
        _, *faults = str(caught.value).split("\n  ")
        assert len(faults) == 1
        return faults[0]

    without = {n: v for n, v in state.items() if n != name}
    assert message(without) == f"{name} is missing: expected {shape}"
    assert message({**state, f"{name}.extra": value}) == (
        f"{name}.extra is unexpected: got float32 {shape}"
    )
    assert message({**state, name: value[..., None]}) == (
        f"{name}: expected float {shape}, got float32 {(*shape, 1)}"
    )


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.zeros(1000, 256), "expected float (1000, 512), got float32 (1000, 256)"),
        (torch.zeros(1000, 512, dtype=torch.int64), "expected float (1000, 512), got int64"),
        (
            torch.zeros(1000, 512, dtype=torch.float64),
            "expected torch.float32, to go with the stem",
        ),
        (
            torch.zeros(1000, 512, device="meta"),
            "expected on cpu, to go with the stem, got meta",
        ),
        (None, "expected float (1000, 512), got None"),
        ([1.0], "expected float (1000, 512), got a list"),
        (np.zeros((1000, 512)), "expected float (1000, 512), got a ndarray"),
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
    assert faults[0] == "  layer2.1.conv1.weight is missing: expected (128, 512, 1, 1)"
    assert len(faults) == 10
    assert last == "  and 5 more"


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
        ({7: torch.zeros(1)}, "expects names to be strings; got 7"),
        ({"fc.bias": torch.zeros(1000).to(torch.float8_e4m3fn)}, "got float8_e4m3fn (1000,)"),
        ({"fc.bias": torch.zeros(1000).to_sparse()}, "fc.bias: expected float (1000,), got"),
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
