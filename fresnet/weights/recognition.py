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
    SHORTCUTS,
    BareStem7x7,
    Bottleneck,
    BottleneckV1,
    DeepStem,
    Head,
    Identity,
    LastNorm,
    NoAttention,
    NoLastNorm,
    NoShortcut,
    Params,
    PreActivation,
    Projection,
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

    def draw(self) -> Any:
        return blank_block(self.block, self.shortcut, self.attention)


@cache
def _candidates(block: Any, attention: Any) -> list[_Candidate]:
    """One for each shortcut that names tell."""
    shortcuts = [kind for kind in SHORTCUTS if kind is Identity or kind.names().units]
    return [
        _Candidate(block, kind, attention, _names_of(blank_block(block, kind, attention)))
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
      FresnetError: if they are of none, of one without a head, or of another than the spec's.
    """
    stages = _stages(given)
    if not any(name.startswith("fc.") for name in given):
        raise FresnetError(
            "from_state_dict expects a head; got none: add an fc.weight [k c] and fc.bias [k]"
        )
    block, attention = _block_types([found for stage in stages for found in stage.values()])
    stem_type = _stem_type(given, block)
    if spec is not None:
        found = [len(stage) for stage in stages], stem_type, block, attention
        block = _agreed(spec, *found)
    stem = stem_type.draw(Blanks(), 0, 0)
    channels = _channels(given, stem, "")
    pool: Any = spec.stem_pool if spec else None
    if "maxpool.0.weight" in given:
        pool = StridedStem
    if pool is not None:
        stem = pool.around(stem, Blanks(), 0)
    if spec is not None:
        changing = spec.shortcut
    else:
        projects = any(".downsample." in name for name in given)
        changing = Projection if projects or stem_type is not Stem3x3 else ZeroPad
    drawn: list[tuple[Any, ...]] = []
    for stage in stages:
        blocks: list[Any] = []
        for prefix, names in stage.items():
            best = _best(block, attention, names)
            out = _channels(given, best.draw(), prefix)
            changes = bool(drawn) or (None not in (out, channels) and out != channels)
            if changing is NoShortcut or (changes and not blocks and best.shortcut is Identity):
                best = best._replace(shortcut=changing)
            blocks.append(best.draw())
            channels = out
        drawn.append((spec.stage if spec and drawn else tuple)(tuple(blocks)))
    last = LastNorm.draw(Blanks(), 0) if block is PreActivation else NoLastNorm()
    weights = Weights(stem, tuple(drawn), last, Head(BLANK, BLANK))
    return Params(weights, beside(blank_stats, weights))


def _agreed(
    spec: Spec, depths: list[int], stem: type[Any], block: type[Any], attention: type[Any]
) -> type[Any]:
    """The block of a spec, of which names tell all but where bottlenecks stride.

    Raises:
      FresnetError: if the entries are of another network than the spec's.
    """
    alike = {block, spec.block} <= {Bottleneck, BottleneckV1}
    for what, expected, got in (
        ("stages of", spec.depths, tuple(depths)),
        ("the stem", spec.stem.__name__, stem.__name__),
        ("blocks", spec.block.__name__, spec.block.__name__ if alike else block.__name__),
        ("attention", spec.attention.__name__, attention.__name__),
    ):
        if expected != got:
            raise FresnetError(
                f"from_state_dict expects {what} {expected}, as architecture says; got entries of "
                f"{got}"
            )
    return spec.block


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


def _block_types(blocks: list[set[str]]) -> tuple[type[Any], type[Any]]:
    """The types of block and attention that explain the entries of all blocks best.

    Names do not tell V1 from V1.5, which is more common.
    """
    kinds: list[tuple[type[Any], type[Any]]] = [
        (block, attention)
        for block in BLOCKS
        if block is not BottleneckV1
        for attention in PLACES[block].get("attention", (NoAttention,))
    ]

    def explained(kind: tuple[type[Any], type[Any]]) -> int:
        return sum(_score(_best(*kind, found).names, found) for found in blocks)

    return max(kinds, key=explained)


def _best(block: Any, attention: Any, found: set[str]) -> _Candidate:
    return max(_candidates(block, attention), key=lambda one: _score(one.names, found))


def _score(names: Set[str], found: Set[str]) -> int:
    """How many entries these names explain, less those that they miss and those that are left."""
    return len(names & found) - len(names ^ found)


def _stem_type(given: Mapping[str, Any], block: type[Any]) -> type[Any]:
    kernel = getattr(given.get("conv1.weight"), "shape", ())[2:]
    if block is PreActivation:
        if kernel and kernel != (7, 7):
            raise FresnetError(
                f"from_state_dict expects a 7x7 convolution in the stem of V2; got {tuple(kernel)}"
            )
        return BareStem7x7
    entries = {name for name in given if re.match(r"(conv|bn)1\.", name)}
    kinds: tuple[type[Any], ...] = (Stem7x7, DeepStem)
    best = max(kinds, key=lambda kind: _score(_names_of(kind.draw(Blanks(), 0, 0)), entries))
    return Stem3x3 if best is Stem7x7 and kernel == (3, 3) else best


def _channels(given: Mapping[str, Any], node: Any, prefix: str) -> int | None:
    """The channels that the last layer of a stem or a block puts out, if an entry tells."""
    for name in map(str, tree.leaves(getattr(named(node, prefix), last_layer(node)))):
        shape: tuple[int, ...] = tuple(getattr(given.get(name), "shape", ()))
        if shape:
            return shape[0]
    return None
