"""Which nodes the entries of a state dict are of, told by their canonical names.

A block, with what is in it, is recognised as the one whose own names explain its entries best, so a
new type of block, shortcut or attention needs no case here. What names do not tell, kernels and
channels do.
"""

import re
from collections.abc import Mapping, Set
from functools import cache
from typing import Any, NamedTuple

from fresnet import tree
from fresnet.errors import FresnetError, listed
from fresnet.network.nodes import (
    BLOCKS,
    PLACES,
    PREACTIVATIONS,
    SHORTCUTS,
    BareDeepStem,
    BareStem7x7,
    Bottleneck,
    BottleneckV1,
    DeepStem,
    FramedStem7x7,
    GroupNorm,
    Head,
    Identity,
    LastNorm,
    Layer,
    NoAttention,
    NoHead,
    NoLastNorm,
    Norm,
    NoShortcut,
    Params,
    Projection,
    StandardisedLayer,
    Stem3x3,
    Stem7x7,
    StridedStem,
    Weights,
    ZeroPad,
    beside,
    last_layer,
    over,
)
from fresnet.network.specs import Spec
from fresnet.weights.blanks import BLANK, Blanks, blank_block, blank_stats
from fresnet.weights.names import named, stats_names


class _Candidate(NamedTuple):
    """A type of block with types for what is in it, and the names of all its entries."""

    block: type[Any]
    shortcut: type[Any]
    attention: type[Any]
    names: frozenset[str]

    def draw(self, blanks: Blanks) -> Any:
        return blank_block(self.block, self.shortcut, self.attention, blanks)


@cache
def _candidates(block: Any, attention: Any, norm: Any) -> list[_Candidate]:
    """One for each shortcut that names tell."""
    blanks = Blanks(norm=norm)
    shortcuts = [kind for kind in SHORTCUTS if kind is Identity or kind.names().units]
    return [
        _Candidate(block, kind, attention, _names_of(blank_block(block, kind, attention, blanks)))
        for kind in shortcuts
    ]


def _names_of(node: Any) -> frozenset[str]:
    found = named(node, "")
    stats = over(stats_names, found, over(blank_stats, node))
    return frozenset(map(str, tree.leaves((found, stats))))


def recognised(given: Mapping[str, Any], spec: Spec | None) -> Params:
    """The network that the entries are of, with blanks for leaves.

    Args:
      spec: says what names and shapes do not tell.
    Raises:
      FresnetError: if they are of none, or of another than the spec's.
    """
    stages = _stages(given)
    counted = (".running_mean", ".num_batches_tracked")  # which batch normalisation alone has
    norm = Norm if any(name.endswith(counted) for name in given) else GroupNorm
    types = [_block_types(list(stage.values()), norm) for stage in stages]
    is_v2 = any(block in PREACTIVATIONS for block, _ in types)
    stem_type = _stem_type(given, norm) if not is_v2 else _bare_stem(given, norm)
    # Names do not tell standardised weights. With such a stem they are BiT's.
    layer: Any = StandardisedLayer if stem_type is FramedStem7x7 else Layer
    if spec is not None:
        _check_agreed(spec, [len(stage) for stage in stages], stem_type, norm, types)
        types = [(spec.block, spec.attention)] * len(stages)
        stem_type, layer = spec.stem, spec.layer
    blanks = Blanks(layer, norm)
    stem = stem_type.draw(blanks, 0, 0)
    channels = _channels(given, stem, "")
    pool: Any = spec.stem_pool if spec else None
    if "maxpool.0.weight" in given:
        pool = StridedStem
    if pool is not None:
        stem = pool.around(stem, blanks, 0)
    if spec is not None:
        changing = spec.shortcut
    else:
        projects = any(".downsample." in name for name in given)
        changing = Projection if projects or stem_type is not Stem3x3 else ZeroPad
    drawn: list[tuple[Any, ...]] = []
    for stage, (block, attention) in zip(stages, types, strict=True):
        blocks: list[Any] = []
        for prefix, names in stage.items():
            best = _best(block, attention, norm, names)
            out = _channels(given, best.draw(blanks), prefix)
            changes = bool(drawn) or (None not in (out, channels) and out != channels)
            if changing is NoShortcut or (changes and not blocks and best.shortcut is Identity):
                best = best._replace(shortcut=changing)
            blocks.append(best.draw(blanks))
            channels = out
        drawn.append((spec.stage if spec and drawn else tuple)(tuple(blocks)))
    last = LastNorm.draw(blanks, 0) if is_v2 else NoLastNorm()
    head = NoHead() if {"fc.weight", "fc.bias"}.isdisjoint(given) else Head(BLANK, BLANK)
    weights = Weights(stem, tuple(drawn), last, head)
    return Params(weights, beside(blank_stats, weights))


ALIKE: tuple[set[type], ...] = ({Bottleneck, BottleneckV1}, {BareStem7x7, FramedStem7x7})
"""Types that have the same names."""


def _check_agreed(
    spec: Spec,
    depths: list[int],
    stem: type[Any],
    norm: type[Any],
    types: list[tuple[type[Any], type[Any]]],
) -> None:
    """Refuse a spec that says otherwise than the names do.

    Raises:
      FresnetError: saying what differs.
    """
    if spec.depths != tuple(depths):
        raise FresnetError(
            f"from_state_dict expects stages of {spec.depths}, as architecture says; got entries "
            f"of {tuple(depths)}"
        )
    for what, expected, got in (
        ("the stem", spec.stem, stem),
        ("norms", spec.norm, norm),
        *(("blocks", spec.block, block) for block, _ in types),
        *(("attention", spec.attention, attention) for _, attention in types),
    ):
        if expected is not got and not any({expected, got} <= alike for alike in ALIKE):
            raise FresnetError(
                f"from_state_dict expects {what} {expected.__name__}, as architecture says; got "
                f"entries of {got.__name__}"
            )


def _stages(given: Mapping[str, Any]) -> list[dict[str, set[str]]]:
    """For each stage its blocks' prefixes, each with the names of its entries behind it."""
    found: dict[tuple[int, int], set[str]] = {}
    for name in given:
        if match := re.match(r"layer([1-9]\d?)\.(\d{1,3})\.", name):
            place = int(match[1]), int(match[2])
            found.setdefault(place, set()).add(name[match.end() :])
    if not found:
        shown = listed(list(map(str, given))) if given else "none"
        raise FresnetError(
            "from_state_dict expects the names of torchvision, timm or Hugging Face "
            f"(conv1.weight, layer1.0.conv1.weight, ..., fc.bias); "
            f"got {len(given)} entries: {shown}"
        )
    last = max(stage for stage, _ in found)
    depths = [
        1 + max((block for of, block in found if of == stage), default=0)
        for stage in range(1, 1 + last)
    ]
    if sum(depths) > len(given):
        raise FresnetError(
            f"from_state_dict expects entries of every block; got {len(given)} entries, and names "
            f"of {sum(depths)} blocks"
        )
    return [
        {f"layer{stage}.{block}.": found.get((stage, block), set()) for block in range(depth)}
        for stage, depth in enumerate(depths, start=1)
    ]


def _block_types(blocks: list[set[str]], norm: type[Any]) -> tuple[type[Any], type[Any]]:
    """The types of block and attention that explain the entries of a stage's blocks best.

    Names do not tell V1 from V1.5, which is more common.
    """
    kinds: list[tuple[type[Any], type[Any]]] = [
        (block, attention)
        for block in BLOCKS
        if block is not BottleneckV1
        for attention in PLACES[block].get("attention", (NoAttention,))
    ]

    def explained(kind: tuple[type[Any], type[Any]]) -> int:
        return sum(_score(_best(*kind, norm, found).names, found) for found in blocks)

    return max(kinds, key=explained)


def _best(block: Any, attention: Any, norm: Any, found: set[str]) -> _Candidate:
    return max(_candidates(block, attention, norm), key=lambda one: _score(one.names, found))


def _score(names: Set[str], found: Set[str]) -> int:
    """How many entries these names explain, less those that they miss and those that are left."""
    return len(names & found) - len(names ^ found)


def _stem_type(given: Mapping[str, Any], norm: type[Any]) -> type[Any]:
    entries = {name for name in given if re.match(r"(conv|bn)1\.", name)}
    kinds: tuple[type[Any], ...] = (Stem7x7, DeepStem)
    blanks = Blanks(norm=norm)
    best = max(kinds, key=lambda kind: _score(_names_of(kind.draw(blanks, 0, 0)), entries))
    return Stem3x3 if best is Stem7x7 and _kernel(given) == (3, 3) else best


def _bare_stem(given: Mapping[str, Any], norm: type[Any]) -> type[Any]:
    """V2's stem. BiT's has the same names, and norms in groups, which V2's has not."""
    if "conv1.0.weight" in given:
        return BareDeepStem
    if (kernel := _kernel(given)) and kernel != (7, 7):
        raise FresnetError(
            f"from_state_dict expects a 7x7 convolution in the stem of V2; got {kernel}"
        )
    return FramedStem7x7 if norm is GroupNorm else BareStem7x7


def _kernel(given: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(getattr(given.get("conv1.weight"), "shape", ())[2:])


def _channels(given: Mapping[str, Any], node: Any, prefix: str) -> int | None:
    """The channels that the last layer of a stem or a block puts out, if an entry tells."""
    for name in map(str, tree.leaves(getattr(named(node, prefix), last_layer(node)))):
        shape: tuple[int, ...] = tuple(getattr(given.get(name), "shape", ()))
        if shape:
            return shape[0]
    return None
