"""What type checkers know of a node whose type is known only when a program runs.

`weights.stages[0][1]` may be any block. For a type checker it has the fields of all blocks, so a
field that no block has is an error before the program runs. Once `isinstance` has told which block
it is, it has the fields of that block alone.
"""

from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

from typing_extensions import Self

from fresnet.network.nodes.layers import Layer, Normed
from fresnet.network.nodes.protocols import Block, Last, Stem


class Node(tuple[Any, ...]):
    """What every NamedTuple has."""

    _fields: ClassVar[tuple[str, ...]]
    _replace: Callable[..., Self]
    _asdict: Callable[[], dict[str, Any]]


class StemFields(Node, Stem):
    """The fields of all stems."""

    layer: Layer
    layer1: Layer
    layer2: Layer
    layer3: Layer
    stem: "AnyStem"
    pool: Layer


class AttentionFields(Node):
    """The fields of all kinds of attention."""

    squeeze: Layer
    excite: Layer
    along: Layer


class ShortcutFields(Node):
    """The field of all shortcuts that have one."""

    layer: Layer


class BlockFields(Node, Block):
    """The fields of all blocks."""

    before: Normed
    layer1: Layer
    layer2: Layer
    layer3: Layer
    attention: AttentionFields | Any
    shortcut: ShortcutFields | Any


class StageFields(tuple["AnyBlock", ...]):
    """A tuple of blocks, or a node that holds one."""

    blocks: tuple["AnyBlock", ...]


class LastFields(Node, Last):
    """The field of what stands before the head."""

    normed: Normed


# `Any` lets a node of every type stand here. A field has to be one of these all the same.
AnyStem: TypeAlias = StemFields | Any
AnyBlock: TypeAlias = BlockFields | Any
AnyStage: TypeAlias = StageFields | Any
AnyLast: TypeAlias = LastFields | Any
