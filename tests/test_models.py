"""The family is timm's and torchvision's, and the table of its published weights is theirs too."""

from math import floor
from pathlib import Path

import pytest
import reference
import timm
import torch

import fresnet
from fresnet import FresnetError
from fresnet.data.presets import Preset, preset_of
from fresnet.weights import published
from fresnet.weights.published import Published

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
MODELS = reference.torchvision.models

LEFT_OUT = {"test_resnet", "ecaresnet50d_pruned", "ecaresnet101d_pruned"}
"""Networks in timm's resnet.py that no `Spec` can express; docs/models.md gives the reasons."""

OF_TIMM = [name for name in fresnet.SPECS if timm.is_model(name)]


def test_the_networks_of_timms_file_are_all_there() -> None:
    assert set(timm.list_models(module="resnet")) - {*fresnet.SPECS} == LEFT_OUT
    assert set(reference.TORCHVISION) <= {*OF_TIMM}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("resnet10t", "senet154")))
        for name in OF_TIMM
    ],
)
def test_a_network_has_timms_entries(name: str) -> None:
    """Names and shapes are the same, and so is the number of parameters in the table."""
    with torch.device("meta"):
        model = timm.create_model(name)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    params = fresnet.init(0, fresnet.SPECS[name], device="meta")
    state = fresnet.to_state_dict(params, "timm")
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    row, *_ = published.rows(name)
    assert row.parameters == sum(p.numel() for p in model.parameters())


def of(network: str, owner: str) -> dict[str, Published]:
    """A network's published weights by name: an owner's repositories, or those of no owner."""
    return {
        weights.name: weights
        for weights in published.published()
        if weights.network == network and weights.name.rpartition("/")[0] == owner
    }


@pytest.mark.parametrize("name", reference.TORCHVISION)
def test_torchvisions_weights_are_as_its_metadata_states_them(name: str) -> None:
    expected, ours = list(MODELS.get_model_weights(name)), of(name, "")
    assert [*ours] == [str(weights) for weights in expected]
    for weights in expected:
        found, transform = ours[str(weights)], weights.transforms()
        (resize,), (crop,) = transform.resize_size, transform.crop_size
        preset = Preset(resize, crop, transform.interpolation.value)
        assert preset_of(found.preset) == preset
        assert (tuple(transform.mean), tuple(transform.std)) == (preset.mean, preset.std)
        assert found.top1 == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]


@pytest.mark.parametrize("name", OF_TIMM)
def test_timms_weights_are_all_there_and_prepared_as_it_prepares_images(name: str) -> None:
    """Weights of other classes than ImageNet's 1,000 are not listed."""
    configs = {
        f"timm/{full}": timm.get_pretrained_cfg(full)
        for full in timm.list_models(f"{name}.*", pretrained=True)
    }
    configs = {full: config for full, config in configs.items() if config.num_classes == 1000}
    ours = of(name, "timm")
    assert [*ours] == [*configs]
    for full, config in configs.items():
        size = (config.test_input_size or config.input_size)[1]
        resize = floor(size / (config.test_crop_pct or config.crop_pct))
        expected = Preset(resize, size, config.interpolation, mean=config.mean, std=config.std)
        assert preset_of(ours[full].preset) == expected


def test_accuracies_are_plausible_and_missing_only_where_no_publisher_states_one() -> None:
    """timm's figures for its ports of torchvision's weights are near torchvision's own."""
    for weights in published.published():
        assert weights.network in fresnet.SPECS
        assert weights.top1 is None or 65 < weights.top1 < 88
    missing = [weights.name for weights in published.published() if weights.top1 is None]
    microsofts = [f"microsoft/resnet-{depth}" for depth in (18, 34, 50, 101, 152)]
    v2 = ("resnetv2_18", "resnetv2_34", "resnetv2_18d", "resnetv2_34d")
    new = [f"timm/{name}.ra4_e3600_r224_in1k" for name in ("resnet18d", "resnet34", *v2)]
    new.append("timm/resnetv2_34d.ra4_e3600_r384_in1k")
    assert sorted(missing) == sorted([*microsofts, *new])
    for name in reference.TORCHVISION:
        theirs = {key.rpartition("_")[2]: weights.top1 for key, weights in of(name, "").items()}
        for tag, version in (("tv", "V1"), ("tv2", "V2")):
            port = of(name, "timm").get(f"timm/{name}.{tag}_in1k")
            if port:
                assert port.top1 == pytest.approx(theirs[version], abs=0.3), port


@pytest.mark.slow
def test_the_document_has_the_table() -> None:
    """`python -m fresnet models --markdown` prints it."""
    assert DOCUMENT.read_text().endswith(f"\n\n{published.markdown(published.rows())}\n")


def test_rows_are_those_that_match_with_the_network_above_its_weights() -> None:
    def names(pattern: str) -> list[str]:
        return [row.weights.name if row.weights else row.network for row in published.rows(pattern)]

    assert names("resnet200*") == ["resnet200", "resnet200d", "timm/resnet200d.ra2_in1k"]
    assert names("*/resnet26*ra2*") == ["resnet26t", "timm/resnet26t.ra2_in1k"]
    assert names("resnet[23]0_c*") == ["resnet20_centred"]
    with pytest.raises(
        FresnetError, match="nothing matches 'resnet2O0d'; did you mean 'resnet200d"
    ):
        published.rows("resnet2O0d")


def test_multiply_adds_of_weights_are_those_at_the_size_of_their_preset() -> None:
    network, weights = published.rows("resnet200d")
    params = fresnet.init(0, fresnet.SPECS["resnet200d"], device="meta")
    for row, size in ((network, 224), (weights, 320)):
        assert (row.size, row.multiply_adds) == (size, fresnet.summary(params, size).multiply_adds)
    (paper,) = published.rows("resnet20")
    assert (paper.size, paper.parameters, paper.multiply_adds) == (32, 269_722, 40_551_040)


@pytest.mark.parametrize("pattern", ["resnet18*", "resnetv2_152*", "resnet20"])
def test_a_table_is_80_columns_wide_and_names_its_sources(pattern: str) -> None:
    """A name that is too long has a line of its own, and the rest stands below it."""
    found = published.rows(pattern)
    lines = published.table(found).splitlines()
    assert max(map(len, lines)) <= 80
    words = [word for line in lines for word in line.split()]
    for row in found:
        if row.weights is None:
            assert f"{row.parameters:,}" in words
            continue
        at = words.index(row.weights.name)
        macs, top1 = f"{row.multiply_adds / 1e6:,.0f}", row.weights.top1
        shown = [] if top1 is None else [f"{top1:.3f}"]
        assert words[at + 1 : at + 3 + len(shown)] == [row.weights.preset, macs, *shown]
    sources = " ".join(lines[-4:])
    assert f"torchvision {reference.torchvision.__version__.rpartition('.')[0]}" in sources
    assert timm.__version__ in sources
    assert "results/results-imagenet.csv" in sources
