"""What names and shapes do not tell of a network, and how a user is told so."""

import warnings
from collections.abc import Set
from dataclasses import replace
from typing import Any

from fresnet import tree
from fresnet.errors import FresnetError, listed
from fresnet.network.check import first_conv
from fresnet.network.family import SPECS
from fresnet.network.init import init
from fresnet.network.nodes import (
    STAGES,
    AveragedStage,
    AveragedStem,
    BlurredStage,
    BlurredStem,
    Bottleneck,
    BottleneckV1,
    FramedStem7x7,
    FrozenNorm,
    GroupNorm,
    NoHead,
    Params,
    StandardisedLayer,
    Stem3x3,
    StridedStem,
    ZeroPad,
    blocks_of,
    kinds,
)
from fresnet.network.specs import Spec

UNTOLD = (
    *(BottleneckV1, *STAGES, AveragedStem, BlurredStem),
    *(FramedStem7x7, StandardisedLayer, FrozenNorm),
)
"""What names do not tell of a network."""


def untold(params: Params) -> list[str]:
    """The node types of a network that names do not tell: lost from a state dict."""
    found = kinds(params.weights)
    return [kind.__name__ for kind in UNTOLD if kind in found]


def check_modules(params: Params, modules: Set[str]) -> None:
    """Refuse a network that its modules contradict, if a state dict of timm's module lists them.

    Raises:
      FresnetError: if the modules blur against aliasing and the network does not.
    """
    blurs = "maxpool.0" in modules and _is_of_timm(modules)
    if blurs and kinds(params.weights).isdisjoint((BlurredStem, StridedStem)):
        raise FresnetError(
            "the modules of this state dict blur, against aliasing, which names do not tell: pass "
            f"architecture={' or '.join(map(repr, _twins(params, (BlurredStage,)))) or 'a Spec'}"
        )


def tell_what_is_assumed(params: Params, layout: str, modules: Set[str]) -> None:
    """Warn where several published networks share the names that were found.

    Args:
      params: the network that fresnet takes them for.
      layout: whose the names are.
      modules: those of the network, where a state dict lists them.
    """
    found = kinds(params.weights)
    if ZeroPad in found:
        _tell(
            "names do not tell how shortcuts get more channels. fresnet appends zeros, as "
            "architecture='resnet20' says; 'resnet20_centred' puts half of them before, and "
            "'plain20' has no shortcuts"
        )
    stages, width = len(params.weights.stages), len(first_conv(params.weights))
    if NoHead in found and Stem3x3 not in found and stages < 4 and width >= 64:
        _tell(
            f"there are entries of {stages} stages and of no head. fresnet takes them for an "
            "encoder of so many stages; published ones of this width have four"
        )
    if GroupNorm in found:
        bit = " and weights for standardised, as in BiT" if StandardisedLayer in found else ""
        named = [name for name, spec in SPECS.items() if _is_of(spec, params)]
        _tell(
            f"there are no running statistics, so norms are taken for GroupNorm of 32 groups{bit}. "
            f"An architecture says so, such as {', '.join(map(repr, named)) or 'a Spec'}; if they "
            "are BatchNorm, its statistics are missing"
        )
    twins = []
    if _is_of_timm(modules):  # which has no strides in first convolutions, and whose blurs show
        twins = _twins(params, (AveragedStage,))
    elif layout == "torchvision" and not modules:
        twins = _twins(params, (AveragedStage, BlurredStage, tuple))
    if twins:
        plain = _plain(SPECS[twins[0]])
        named = [repr(name) for name, spec in SPECS.items() if spec == plain] or ["a Spec"]
        _tell(
            f"names do not tell this network from {listed(twins)}. fresnet takes it for the usual "
            f"one; architecture={' or '.join(named)} says so"
        )


def _is_of_timm(modules: Set[str]) -> bool:
    """timm alone has such a module, whether it pools or not."""
    return any(name.endswith(".aa") for name in modules)


def _twins(params: Params, stages: tuple[type[Any], ...]) -> list[str]:
    """The members of the family with such stages that are not this network, but for its names."""
    twins = {
        name: _plain(spec)
        for name, spec in SPECS.items()
        if spec.stage in stages and spec != _plain(spec)
    }
    ours = {plain for plain in set(twins.values()) if _is_of(plain, params)}
    return [name for name, plain in twins.items() if plain in ours]


def _plain(spec: Spec) -> Spec:
    """The usual one of those architectures that names do not tell from this one."""
    block = Bottleneck if spec.block is BottleneckV1 else spec.block
    return replace(spec, block=block, stage=tuple, stem_pool=None)


def _is_of(spec: Spec, params: Params) -> bool:
    """Whether this is a network of the spec, whatever its classes."""
    if spec.depths != tuple(len(blocks_of(stage)) for stage in params.weights.stages):
        return False
    drawn = like(spec, params)
    shapes = [[leaf.shape for leaf in tree.leaves(one)] for one in (drawn, params)]
    return shapes[0] == shapes[1] and kinds(drawn.weights) == kinds(params.weights)


def like(spec: Spec, params: Params) -> Params:
    """A network of a spec on meta, for the classes and the channels of this one."""
    head, channels = params.weights.head, first_conv(params.weights).shape[1]
    classes = 0 if isinstance(head, NoHead) else len(head.bias)
    return init(0, spec, num_classes=classes, in_channels=channels, device="meta")


def _tell(what: str) -> None:
    warnings.warn(what, stacklevel=4)
