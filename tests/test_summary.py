"""The layer table is exact, and equals what other libraries count."""

from typing import Any

import pytest
import reference
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, seeds, small_specs, tiny_params
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fresnet
from fresnet import FresnetError, Params, Spec, tree
from fresnet.network.nodes import BasicBlock, LastNorm, NoShortcut, blocks_of

sides = st.integers(1, 300)


def multiply_adds(model: nn.Module, height: int, width: int) -> int:
    """The multiply-adds of another library's module, counted in a run on meta."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.to("meta").eval()(torch.empty(1, 3, height, width, device="meta"))
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize("name", reference.TORCHVISION)
def test_totals_are_those_in_torchvisions_metadata(name: str) -> None:
    """GMACs are equal to three decimals."""
    table = fresnet.summary(fresnet.init(0, fresnet.SPECS[name], device="meta"))
    for weights in reference.torchvision.models.get_model_weights(name):
        assert table.parameters == weights.meta["num_params"]
        assert round(table.multiply_adds / 1e9, 3) == weights.meta["_ops"]


@pytest.mark.slow
@examples(10)
@given(seed=seeds, spec=small_specs(), height=sides, width=sides)
def test_totals_are_torchvisions_at_any_size(
    seed: int, spec: Spec, height: int, width: int
) -> None:
    model = reference.module(spec, seed)
    table = fresnet.summary(reference.params(model), (height, width))
    assert table.parameters == sum(p.numel() for p in model.parameters())
    assert table.multiply_adds == multiply_adds(model, height, width)


@pytest.mark.parametrize("name", ["resnet26d", "resnet50d"])
def test_totals_are_timms(name: str) -> None:
    table = fresnet.summary(fresnet.init(0, fresnet.SPECS[name], device="meta"), (225, 130))
    assert table.multiply_adds == multiply_adds(timm.create_model(name), 225, 130)


@examples(40)
@given(params=tiny_params(), height=st.integers(1, 60), width=st.integers(1, 60), data=st.data())
def test_rows_are_what_the_network_is_and_does(
    params: Params, height: int, width: int, data: st.DataObject
) -> None:
    """Outputs are those of `features`. Blocks and parameters are those of the tree."""
    table = fresnet.summary(params, (height, width))
    x = torch.zeros(1, 3, height, width, dtype=torch.float64)
    stem, *stages = fresnet.features(params, x)
    first, *rows, last = table.rows
    if isinstance(params.weights.last, LastNorm):
        *rows, norm = rows
        assert norm.parameters == count(params.weights.last)
        assert norm.output == stages[-1].shape[1:]
    assert first.output == stem.shape[1:]
    assert last.output == fresnet.forward(params, x).shape[1:]
    assert last.layer == type(params.weights.head).__name__
    kinds = []
    for stage, output in zip(params.weights.stages, stages, strict=True):
        blocks = blocks_of(stage)
        kinds += [(type(b).__name__, tuple(output.shape[1:]), count(b)) for b in blocks]
    listed = [(row.layer, row.output, row.parameters) for row in rows for _ in range(row.blocks)]
    assert listed == kinds
    assert table.parameters == count(params.weights)


def count(node: Any) -> int:
    return sum(leaf.numel() for leaf in tree.leaves(node))


def test_alike_blocks_share_a_row_and_what_tells_others_apart_is_said() -> None:
    def notes(params: Params) -> list[str]:
        return [row.description.partition("; ")[2] for row in fresnet.summary(params).rows[1:-1]]

    spec = Spec(depths=(3, 2), width=8, groups=4, group_width=32)
    params = fresnet.init(0, spec, device="meta")
    rows = fresnet.summary(params).rows
    assert [row.blocks for row in rows] == [1, 1, 2, 1, 1, 1]
    assert rows[2].description == "1x1 16, 3x3 16 in 4 groups, 1x1 32"
    assert notes(params) == ["projection", "", "stride 2, projection", ""]
    dilated = fresnet.dilate(params, output_stride=4)
    assert notes(dilated) == ["projection", "", "dilation 2, projection", "dilation 2"]
    assert fresnet.summary(fresnet.freeze(params)) == fresnet.summary(params)


def test_blocks_that_differ_within_or_in_their_stride_have_rows_of_their_own() -> None:
    """Outputs of the same size do not make them alike."""
    wide, narrow = (
        fresnet.init(0, Spec(depths=(3,), width=8, group_width=width), device="meta")
        for width in (64, 32)
    )
    (a, _, b), (_, c, _) = wide.weights.stages[0], narrow.weights.stages[0]
    (one, _, three), (_, two, _) = wide.stats.stages[0], narrow.stats.stages[0]
    mixed = Params(
        wide.weights._replace(stages=((a, c, b),)), wide.stats._replace(stages=((one, two, three),))
    )
    assert [row.parameters for row in fresnet.summary(mixed).rows[1:-1]] == [*map(count, (a, c, b))]
    plain = fresnet.init(0, Spec(BasicBlock, (2,), 4, shortcut=NoShortcut), device="meta")
    stages, stats = plain.weights.stages * 2, plain.stats.stages * 2
    twice = Params(plain.weights._replace(stages=stages), plain.stats._replace(stages=stats))
    rows = fresnet.summary(twice, image_size=4).rows[1:-1]
    assert [(row.blocks, "stride 2" in row.description) for row in rows] == [
        (2, False),
        (1, True),
        (1, False),
    ]


@pytest.mark.parametrize("name", [name for name in fresnet.SPECS if "1202" not in name])
def test_tables_fit_80_columns_and_add_up(name: str) -> None:
    table = fresnet.summary(fresnet.init(0, fresnet.SPECS[name], device="meta"))
    lines = str(table).splitlines()
    assert max(map(len, lines)) <= 80
    assert f"{table.parameters:,}" in lines[-1]
    header, rule, *rows, total = table.markdown().splitlines()
    assert header.count("|") == rule.count("|") == total.count("|")
    assert len(rows) == len(table.rows)
    cells = [[cell.strip().replace(",", "") for cell in row.split("|")] for row in rows]
    exact = sum(int(row[3]) * int(row[5]) for row in cells)
    assert f"{exact:,}" in total


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "224", None, (1, 2, 3), (0, 1), [224, True]])
def test_sizes_that_are_none_are_refused(size: Any) -> None:
    params = fresnet.init(0, fresnet.RESNET18, device="meta")
    with pytest.raises(FresnetError, match="expects image_size to be an integer from 1"):
        fresnet.summary(params, size)
    with pytest.raises(FresnetError, match="summary expects Params"):
        fresnet.summary(params.weights)  # type: ignore[arg-type]
