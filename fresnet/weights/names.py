"""The canonical names of a network's entries.

They are torchvision's, or timm's where only timm has such a node. Each node's type says what its
own entries are called; here is how a whole network's come together.
"""

from typing import Any

from fresnet import tree
from fresnet.errors import FresnetError
from fresnet.network.nodes import (
    LAYERS,
    UNITS,
    NormStats,
    Params,
    Weights,
    beside,
    blocks_of,
    with_blocks,
)

_LEAVES = {"scale": "weight", "bias": "bias"}


def names(params: Params) -> list[str]:
    """The canonical name of each leaf, in the order of `tree.leaves`."""
    named: list[Any] = tree.leaves(name_tree(params))
    return named


def check_distinct(listed: list[str]) -> None:
    """Refuse names of which two are the same, as where a norm stands in a bias's place.

    Raises:
      FresnetError: naming the entry.
    """
    if twice := [name for name in listed if listed.count(name) > 1]:
        raise FresnetError(f"an entry expects a name of its own; got two {twice[0]}")


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
    head = tree.rebuild(weights.head, [f"fc.{leaf}" for leaf in weights.head._fields])
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
    convs = (f"{conv}.weight",) if isinstance(unit, LAYERS) else ()
    return tree.rebuild(unit, (*convs, tree.rebuild(unit.norm, leaves)))


def stats_names(unit: Any, stats: Any) -> Any:
    if not stats:
        return ()
    norm = unit.norm.scale.removesuffix(".weight")
    return NormStats(f"{norm}.running_mean", f"{norm}.running_var")  # type: ignore[arg-type]
