"""What others call the entries of a network, where fresnet reads their names and writes none.

Canonical names are torchvision's, as in `names`.
"""

import re
from collections.abc import Callable
from typing import NamedTuple


class Rule(NamedTuple):
    """A layout's name to the canonical one, and back."""

    theirs: str
    to_ours: Callable[[re.Match[str]], str]
    ours: str
    to_theirs: Callable[[re.Match[str]], str]


_STAGE = r"res(\d)\.(\d{1,3})\."

DETECTRON2 = (
    Rule(
        r"stem\.conv1\.(norm\.)?",
        lambda m: "bn1." if m[1] else "conv1.",
        r"(conv|bn)1\.(?=\D)",
        lambda m: "stem.conv1." if m[1] == "conv" else "stem.conv1.norm.",
    ),
    Rule(
        _STAGE + r"conv(\d)\.(norm\.)?",
        lambda m: f"layer{int(m[1]) - 1}.{m[2]}.{'bn' if m[4] else 'conv'}{m[3]}.",
        r"layer(\d+)\.(\d+)\.(conv|bn)(\d)\.",
        lambda m: f"res{int(m[1]) + 1}.{m[2]}.conv{m[4]}.{'norm.' if m[3] == 'bn' else ''}",
    ),
    Rule(
        _STAGE + r"shortcut\.(norm\.)?",
        lambda m: f"layer{int(m[1]) - 1}.{m[2]}.downsample.{1 if m[3] else 0}.",
        r"layer(\d+)\.(\d+)\.downsample\.([01])\.",
        lambda m: f"res{int(m[1]) + 1}.{m[2]}.shortcut.{'norm.' if m[3] == '1' else ''}",
    ),
)
"""detectron2's, in which a convolution holds the norm after it."""

_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_PLACES = {child: place for place, child in _CHILDREN.items()}

SEQUENTIAL = (
    Rule(
        r"([014567])\.",
        lambda m: f"{_CHILDREN[m[1]]}.",
        rf"({'|'.join(_PLACES)})\.",
        lambda m: f"{_PLACES[m[1]]}.",
    ),
)
"""Of a module's children in an `nn.Sequential`, as fastai cuts a body from a network."""

_RESPELLED = (
    # kuangliu's pytorch-cifar, and much that follows it: projections
    (r"(layer\d+\.\d+\.)shortcut\.", lambda m: f"{m[1]}downsample."),
    # OpenMMLab: the deep stem, which is either a list of layers or one of convolutions with norms
    (r"stem\.(2\.bn|7)\.", lambda m: "bn1."),
    (r"stem\.(\d)\.conv\.", lambda m: f"conv1.{3 * int(m[1])}."),
    (r"stem\.(\d)\.bn\.", lambda m: f"conv1.{3 * int(m[1]) + 1}."),
    (r"stem\.(\d)\.", lambda m: f"conv1.{m[1]}."),
)


def respelled(name: str) -> str:
    """A name that differs from torchvision's in one place, as torchvision's.

    >>> respelled("layer2.0.shortcut.0.weight"), respelled("stem.1.bn.bias")
    ('layer2.0.downsample.0.weight', 'conv1.4.bias')
    """
    for theirs, ours in _RESPELLED:
        if match := re.match(theirs, name):
            return ours(match) + name[match.end() :]
    return name
