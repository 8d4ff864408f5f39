"""What other libraries call the entries of a network.

The canonical names are torchvision's, or timm's where only timm has such a node. Each node's type
says what its own entries are called; here is how a whole network's come together, and which rules
turn canonical names into those of a layout and back.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError
from fresnet.network.nodes import (
    POOLED,
    UNITS,
    BareStem7x7,
    FrozenNorm,
    Head,
    LastNorm,
    Layer,
    Norm,
    NormStats,
    Params,
    PooledProjection,
    PreActivation,
    Stats,
    Unit,
    Weights,
    beside,
    blocks_of,
    with_blocks,
)
from fresnet.weights.blanks import Blanks, as_drawn
from fresnet.weights.layouts import DETECTRON2, SEQUENTIAL, Rule, respelled

LAYOUTS = ("torchvision", "timm", "huggingface")

V2: set[type] = {PreActivation, BareStem7x7, LastNorm}
"""What a library that has one of these has together."""

_LEAVES = {"scale": "weight", "bias": "bias"}


def names(params: Params) -> list[str]:
    """The canonical name of each leaf, in the order of `tree.leaves`."""
    named: list[Any] = tree.leaves(name_tree(params))
    return named


def name_tree(params: Params) -> Params:
    """The network with the canonical name of each leaf in the leaf's place."""
    weights, stats = params
    stages = tuple(
        with_blocks(
            stage,
            (named(block, f"layer{i}.{j}.") for j, block in enumerate(blocks_of(stage))),
        )
        for i, stage in enumerate(weights.stages, start=1)
    )
    head: Any = Head("fc.weight", "fc.bias")  # type: ignore[arg-type]
    found = Weights(named(weights.stem, ""), stages, named(weights.last, ""), head)
    return Params(found, beside(stats_names, found, stats) if stats else stats)


def named(node: Any, prefix: str) -> Any:
    """The node with its entries' names for leaves; nodes within share its prefix."""
    units = node.names().units
    return tree.rebuild(
        node,
        [
            _unit(child, *(prefix + module for module in units[field]))
            if isinstance(child, UNITS)
            else named(child, prefix)
            for field, child in zip(node._fields, node, strict=True)
        ],
    )


def _unit(unit: Any, conv: str, norm: str) -> Any:
    leaves = (f"{norm}.{_LEAVES[field]}" for field in unit.norm._fields)
    convs = (f"{conv}.weight",) if isinstance(unit, Layer) else ()
    return tree.rebuild(unit, (*convs, tree.rebuild(unit.norm, leaves)))


def stats_names(unit: Any, stats: Any) -> Any:
    if not stats:
        return ()
    norm = unit.norm.scale.removesuffix(".weight")
    return NormStats(f"{norm}.running_mean", f"{norm}.running_var")  # type: ignore[arg-type]


def foreign_to(layout: str, params: Params) -> str:
    """What the layout's library does not have of this network; empty if it has all."""
    foreign = {
        type(node) for node in _nodes(params.weights) if layout not in node.names().libraries
    }
    beside(lambda unit, drawn: foreign.update(_foreign_norm(unit, drawn)), *_and_as_drawn(params))
    if foreign:
        return _listed(foreign)
    found = kinds(params.weights)
    if found & V2 and not found >= V2:
        return f"{_listed(found & V2)} without {_listed(V2 - found)}"
    if found & V2 and (pooling := found & {PooledProjection, *POOLED}):
        return f"{_listed(pooling)} in PreActivation, where names tell no pooling"
    blocks = [block for stage in params.weights.stages for block in blocks_of(stage)]
    if layout == "huggingface" and not all(map(_is_plain, blocks)):
        return "bottlenecks that are grouped or wide"
    return ""


def _and_as_drawn(params: Params) -> tuple[Weights, Stats]:
    """The network, and beside it the same nodes as `init` draws them."""
    weights = params.weights
    stages = (with_blocks(stage, map(as_drawn, blocks_of(stage))) for stage in weights.stages)
    stem, last = weights.stem.draw(Blanks(), 0, 0), weights.last.draw(Blanks(), 0)
    return weights, Stats(stem, tuple(stages), last)


def _foreign_norm(unit: Unit, drawn: Unit) -> set[type]:
    """The type of the unit's norm, if others do not have that there; a frozen norm is a norm."""
    same = type(unit.norm) is type(drawn.norm)
    frozen = isinstance(unit.norm, FrozenNorm) and isinstance(drawn.norm, Norm)
    return set() if same or frozen else {type(unit.norm)}


def _listed(types: set[type]) -> str:
    return " and ".join(sorted(kind.__name__ for kind in types))


def _is_plain(block: Any) -> bool:
    """Whether Hugging Face has such a block: bottlenecks are neither grouped nor wide."""
    convs = [node.conv for node in block if isinstance(node, Layer)]
    first, second, *last = (conv.shape for conv in convs)
    return not last or last[0][0] == 4 * first[0] == 4 * second[1]


def _nodes(weights: Weights) -> list[Any]:
    """Stem, blocks, what is in them, and the last norm."""
    blocks = [block for stage in weights.stages for block in blocks_of(stage)]
    within = [node for block in blocks for node in block if hasattr(node, "names")]
    pooled = [stage for stage in weights.stages if isinstance(stage, POOLED)]
    return [weights.stem, *pooled, *blocks, *within, weights.last]


def kinds(node: Any) -> set[type]:
    """The types of a tree's nodes."""
    if not isinstance(node, tuple):
        return set()
    return {type(node)}.union(*map(kinds, node))


_HF_WORD: Mapping[str, str] = {"conv": "convolution", "bn": "normalization"}
_OUR_WORD: Mapping[str, str] = {theirs: ours for ours, theirs in _HF_WORD.items()}
_SHORTCUT = ("convolution", "normalization")
_PLACE = r"encoder\.stages\.(\d{1,2})\.layers\.(\d{1,3})\."

HUGGINGFACE = (
    Rule(
        r"embedder\.embedder\.(convolution|normalization)\.",
        lambda m: {"convolution": "conv1.", "normalization": "bn1."}[m[1]],
        r"(conv|bn)1\.(?=\D)",
        lambda m: f"resnet.embedder.embedder.{_HF_WORD[m[1]]}.",
    ),
    Rule(
        _PLACE + r"layer\.(\d)\.(convolution|normalization)\.",
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.{_OUR_WORD[m[4]]}{int(m[3]) + 1}.",
        r"layer(\d+)\.(\d+)\.(conv|bn)(\d)\.",
        lambda m: (
            f"resnet.encoder.stages.{int(m[1]) - 1}.layers.{m[2]}"
            f".layer.{int(m[4]) - 1}.{_HF_WORD[m[3]]}."
        ),
    ),
    Rule(
        _PLACE + r"shortcut\.(convolution|normalization)\.",
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.{_SHORTCUT.index(m[3])}.",
        r"layer(\d+)\.(\d+)\.downsample\.([01])\.",
        lambda m: (
            f"resnet.encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.shortcut.{_SHORTCUT[int(m[3])]}."
        ),
    ),
    Rule(r"classifier\.1\.", lambda m: "fc.", r"fc\.", lambda m: "classifier.1."),
)

TIMM_V2 = (
    Rule(r"stem\.conv\.", lambda m: "conv1.", r"conv1\.", lambda m: "stem.conv."),
    Rule(
        r"stages\.(\d{1,2})\.blocks\.(\d{1,3})\.downsample\.conv\.",
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.0.",
        r"layer(\d+)\.(\d+)\.downsample\.0\.",
        lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.downsample.conv.",
    ),
    Rule(
        r"stages\.(\d{1,2})\.blocks\.(\d{1,3})\.",
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.",
        r"layer(\d+)\.(\d+)\.",
        lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.",
    ),
    Rule(r"head\.fc\.", lambda m: "fc.", r"fc\.", lambda m: "head.fc."),
)

RULES: Mapping[str, tuple[Rule, ...]] = {
    "huggingface": HUGGINGFACE,
    "timm": TIMM_V2,
    "detectron2": DETECTRON2,
    "sequential": SEQUENTIAL,
}
"""The rules of layouts whose names are not the canonical ones. The last two are read alone."""

TELLTALES: Mapping[str, str] = {
    "huggingface": r"embedder\.embedder\.",
    "timm": r"stem\.conv\.weight$",
    "detectron2": r"res2\.",
    "sequential": r"4\.\d+\.conv1\.",
    "torchvision": r"layer\d",
}
"""How a name begins that shows whose the names are."""


def layout_of(params: Params, library: str) -> str:
    """Which rules a library's names of this network follow."""
    if library == "timm" and not kinds(params.weights) & V2:
        return "torchvision"  # timm's other networks have torchvision's names
    return library


def name_in(layout: str, name: str) -> str:
    """The canonical name in a layout's own words."""
    for rule in RULES.get(layout, ()):
        if match := re.match(rule.ours, name):
            return rule.to_theirs(match) + name[match.end() :]
    return name


def _as_row(value: Any) -> Any:
    """A kernel along channels, `[1 1 k]`, as one of a single row, `[1 1 1 k]`."""
    one = isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == (1, 1)
    return value[:, :, None] if one else value


def canonical(mapping: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The layout found, if any, and the entries under canonical names; unknown ones keep theirs."""
    layout = next(
        (layout for layout, start in TELLTALES.items() if any(re.match(start, n) for n in mapping)),
        "",
    )
    found: dict[str, Any] = {}
    for theirs, value in mapping.items():
        name = respelled(theirs) if layout == "torchvision" else theirs
        for rule in RULES.get(layout, ()):
            if match := re.match(rule.theirs, name):
                name = rule.to_ours(match) + name[match.end() :]
                break
        if name == "fc.weight" and isinstance(value, Tensor) and value.shape[2:] == (1, 1):
            value = value.flatten(1)  # timm's V2 has a convolution there
        if name in found:
            raise FresnetError(
                f"from_state_dict expects the names of one library; got two entries that are {name}"
                f", one of them called {theirs}"
            )
        found[name] = _as_row(value)
    return layout, found
