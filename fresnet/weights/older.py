"""Files that `save` wrote before trees held layers: their nodes' types in today's form."""

from typing import TypeAlias

from fresnet.network.nodes import BLOCKS, NORMS, UNITS

Structure: TypeAlias = "int | str | list[Structure]"
"""The types of nodes as JSON: a list of a node's name and its children, or 0 for a leaf."""

_UNITS = {unit.__name__ for unit in UNITS}
_NORMS = {norm.__name__ for norm in NORMS}
_BLOCKS = {block.__name__ for block in BLOCKS}


def with_layers(structure: Structure) -> Structure:
    """Put a layer around each convolution and norm that stand side by side in a structure.

    A structure in today's form comes back as it is.
    """
    if not isinstance(structure, list) or structure[0] in {*_UNITS, *_NORMS}:
        return structure
    name, *children = structure
    paired: list[Structure] = []
    for child in map(with_layers, children):
        norm = isinstance(child, list) and child[0] in _NORMS
        paired.append(["Layer", paired.pop(), child] if norm and paired[-1:] == [0] else child)
    if name in _BLOCKS and len(paired) == len(children) // 2 + 1 and paired != children:
        paired.insert(-1, ["NoAttention"])
    if name == "Weights" and len(paired) == 3:
        paired.insert(-1, ["NoLastNorm"])
    return [name, *paired]
