"""What other libraries have, and what they call it.

A layout is a library's names. Rules turn them into the canonical names and back.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fresnet.errors import FresnetError
from fresnet.network.nodes import (
    AFFINE,
    BARE_STEMS,
    BATCH_NORMS,
    LAYERS,
    NORMS,
    POOLED,
    PREACTIVATIONS,
    BareDeepStem,
    LastNorm,
    Norm,
    Params,
    PooledProjection,
    Projection,
    StandardisedLayer,
    Stats,
    Unit,
    Weights,
    beside,
    blocks_of,
    kinds,
    norm_shape,
    units_of,
    with_blocks,
)
from fresnet.weights.blanks import Blanks, as_drawn
from fresnet.weights.spellings import DETECTRON2, SEQUENTIAL, Rule, respelled

LAYOUTS = ("torchvision", "timm", "huggingface")

V2_PARTS: tuple[set[type], ...] = ({*PREACTIVATIONS}, {*BARE_STEMS}, {LastNorm})
"""Of these a library has one of each together, or none."""

V2: set[type] = {*PREACTIVATIONS, *BARE_STEMS, LastNorm}


def foreign_to(layout: str, params: Params) -> str:
    """What the layout's library does not have of this network; empty if it has all."""
    foreign = {
        type(node) for node in _nodes(params.weights) if layout not in node.names().libraries
    }
    beside(lambda unit, drawn: foreign.update(_foreign_norm(unit, drawn)), *_and_as_drawn(params))
    found = kinds(params.weights)
    if not all(map(_is_shaped_as_usual, units_of(params.weights))):
        return "norms of another number of groups than 32"
    if layout == "huggingface":
        foreign |= found.intersection(NORMS) - {*BATCH_NORMS, *AFFINE}
    if not is_v2(params):
        foreign |= found & {StandardisedLayer}
    if foreign:
        return _listed(foreign)
    if is_v2(params):
        if missing := [group for group in V2_PARTS if not found & group]:
            return f"{_listed(found & V2)} without {_listed(missing[0])}"
        # After a deep stem timm's projections pool, and else they stride: names do not say it.
        told = PooledProjection if BareDeepStem in found else Projection
        if untold := found & ({Projection, PooledProjection, *POOLED} - {told}):
            blocks, stem, _ = (_listed(found & part) for part in V2_PARTS)
            return f"{_listed(untold)} in {blocks} after {stem}"
    each = (block for stage in params.weights.stages for block in blocks_of(stage))
    if layout == "huggingface" and not all(map(_is_plain, each)):
        return "bottlenecks that are grouped or wide"
    return ""


def _and_as_drawn(params: Params) -> tuple[Weights, Stats]:
    """The network, and beside it the same nodes as `init` draws them."""
    weights = params.weights
    stages = (with_blocks(stage, map(as_drawn, blocks_of(stage))) for stage in weights.stages)
    stem, last = weights.stem.draw(Blanks(), 0, 0), weights.last.draw(Blanks(), 0)
    return weights, Stats(stem, tuple(stages), last)


def _foreign_norm(unit: Unit, drawn: Unit) -> set[type]:
    """The type of the unit's norm, if others do not have that there."""
    same = type(unit.norm) is type(drawn.norm)
    other = isinstance(drawn.norm, Norm) and not isinstance(unit.norm, AFFINE)
    return set() if same or other else {type(unit.norm)}


def _is_shaped_as_usual(unit: Unit) -> bool:
    """Whether a norm has as many groups as what reads `[c]` makes of it."""
    kind = type(unit.norm)
    return all(leaf.shape == norm_shape(kind, leaf.numel()) for leaf in unit.norm)


def is_v2(params: Params) -> bool:
    """Whether there is anything of ResNet V2 in a network."""
    return bool(kinds(params.weights) & V2)


def _listed(types: set[type]) -> str:
    return " and ".join(sorted(kind.__name__ for kind in types))


def _is_plain(block: Any) -> bool:
    """Whether Hugging Face has such a block: bottlenecks are neither grouped nor wide."""
    convs = [node.conv for node in block if isinstance(node, LAYERS)]
    first, second, *last = (conv.shape for conv in convs)
    return not last or last[0][0] == 4 * first[0] == 4 * second[1]


def _nodes(weights: Weights) -> list[Any]:
    """Stem, blocks, what is in them, and the last norm."""
    blocks = [block for stage in weights.stages for block in blocks_of(stage)]
    within = [node for block in blocks for node in block if hasattr(node, "names")]
    pooled = [stage for stage in weights.stages if isinstance(stage, POOLED)]
    return [weights.stem, *pooled, *blocks, *within, weights.last]


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


def _timm_v2(projection: int) -> tuple[Rule, ...]:
    """For everything but the stem; `projection` is its number in the canonical names."""
    return (
        Rule(
            r"stages\.(\d{1,2})\.blocks\.(\d{1,3})\.downsample\.conv\.",
            lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.{projection}.",
            rf"layer(\d+)\.(\d+)\.downsample\.{projection}\.",
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


TIMM_V2 = (
    Rule(r"stem\.conv\.", lambda m: "conv1.", r"conv1\.", lambda m: "stem.conv."),
    *_timm_v2(projection=0),
)

_DEEP = {"conv1": "0", "norm1": "1", "conv2": "3", "norm2": "4", "conv3": "6"}
_FLAT = {ours: theirs for theirs, ours in _DEEP.items()}

TIMM_V2_DEEP = (
    Rule(
        r"stem\.(conv[123]|norm[12])\.",
        lambda m: f"conv1.{_DEEP[m[1]]}.",
        r"conv1\.([01346])\.",
        lambda m: f"stem.{_FLAT[m[1]]}.",
    ),
    *_timm_v2(projection=1),
)

RULES: Mapping[str, tuple[Rule, ...]] = {
    "huggingface": HUGGINGFACE,
    "timm": TIMM_V2,
    "timm, deep": TIMM_V2_DEEP,
    "detectron2": DETECTRON2,
    "sequential": SEQUENTIAL,
}
"""The rules of layouts whose names are not the canonical ones. The last two are read alone."""

TELLTALES: Mapping[str, str] = {
    "huggingface": r"embedder\.embedder\.",
    "timm": r"stem\.conv\.weight$",
    "detectron2": r"res2\.",
    "timm, deep": r"stem\.conv1\.weight$",
    "sequential": r"4\.\d+\.conv1\.",
    "torchvision": r"layer\d",
}
"""How a name begins that shows whose the names are."""


def layout_of(params: Params, library: str) -> str:
    """Which rules a library's names of this network follow."""
    if library == "timm" and not is_v2(params):
        return "torchvision"  # timm's other networks have torchvision's names
    return "timm, deep" if BareDeepStem in kinds(params.weights) else library


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
