"""The nodes of a network's tree. Sizes come from shapes, behaviour comes from node types.

Every node is a NamedTuple, so it is a pytree node for `torch.func` without registration, and its
type is part of the tree's structure: a block's behaviour cannot come loose from its weights. What a
node holds, how it runs, how it begins and what checkpoints call it stand on its type.

A network is two such trees of the same types, `weights` and `stats`: where the one has a layer with
`layer1.conv`, `layer1.norm.scale` and `layer1.norm.bias`, the other has `layer1.mean` and
`layer1.var`.
"""

from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fresnet.network.nodes.attention import (
    Attention,
    EfficientAttention,
    NoAttention,
    SqueezeExcite,
)
from fresnet.network.nodes.blocks import (
    BasicBlock,
    Bottleneck,
    BottleneckV1,
    attention_of,
    last_layer,
)
from fresnet.network.nodes.layers import (
    AFFINE,
    BATCH_NORMS,
    DRAWN_NORMS,
    EPS,
    LAYERS,
    NORMS,
    UNITS,
    AnyNorm,
    Bias,
    FrozenNorm,
    GroupNorm,
    Layer,
    Moments,
    N,
    NoNorm,
    Norm,
    Normed,
    NormStats,
    Pair,
    Rescale,
    StandardisedLayer,
    T,
    Unit,
    kinds,
    norm_shape,
    over,
    units_of,
)
from fresnet.network.nodes.masks import MASKS, Dropout, DropPath
from fresnet.network.nodes.params import (
    Head,
    NoHead,
    NoLastNorm,
    Params,
    Quantized,
    Stats,
    Weights,
    beside,
    features_in,
    paired,
    replaced,
)
from fresnet.network.nodes.preactivation import (
    BareDeepStem,
    BareStem7x7,
    FramedStem7x7,
    LastNorm,
    PreActivation,
    PreActivationBasic,
)
from fresnet.network.nodes.protocols import (
    PLAIN,
    Block,
    Drawer,
    Geometry,
    Grid,
    Last,
    Names,
    Plan,
    Regime,
    Stem,
)
from fresnet.network.nodes.shortcuts import (
    CentredZeroPad,
    Identity,
    NoShortcut,
    PooledProjection,
    Projection,
    Shortcut,
    ZeroPad,
)
from fresnet.network.nodes.stages import (
    POOLED,
    STAGES,
    AveragedStage,
    BlurredStage,
    DilatedStage,
    blocks_of,
    grids,
    with_blocks,
)
from fresnet.network.nodes.stems import (
    AveragedStem,
    BlurredStem,
    DeepStem,
    Stem3x3,
    Stem7x7,
    StridedStem,
)
from fresnet.pytorch import pytrees
from fresnet.tree.text import register

POOLED_STEMS = (AveragedStem, BlurredStem, StridedStem)
BARE_STEMS = (BareStem7x7, BareDeepStem, FramedStem7x7)
STEMS = (Stem7x7, DeepStem, Stem3x3, *BARE_STEMS, *POOLED_STEMS)
PREACTIVATIONS = (PreActivationBasic, PreActivation)
BLOCKS = (BasicBlock, Bottleneck, BottleneckV1, *PREACTIVATIONS)
LASTS = (NoLastNorm, LastNorm)
HEADS = (Head, NoHead)
SHORTCUTS = (Identity, Projection, PooledProjection, ZeroPad, CentredZeroPad, NoShortcut)
ATTENTIONS = (NoAttention, SqueezeExcite, EfficientAttention)
NODES = (*STEMS, *BLOCKS, *LASTS, *SHORTCUTS, *ATTENTIONS)

register(*NODES, *STAGES, *UNITS, *NORMS, NormStats, Moments, Pair, *HEADS)
register(Weights, Stats, Params, Quantized, *MASKS)
pytrees.register(*NODES, *MASKS)


def _places(kind: type) -> dict[str, tuple[type, ...]]:
    """The types that each field of a node takes, by its annotation."""
    units: Mapping[Any, tuple[type, ...]] = {T: LAYERS, N: (Normed,)}
    return {
        field: units[hint]
        if isinstance(hint, TypeVar)
        else tuple(get_origin(one) or one for one in get_args(hint))
        for field, hint in get_type_hints(kind).items()
    }


PLACES: Mapping[type, Mapping[str, tuple[type, ...]]] = {
    **{kind: _places(kind) for kind in NODES},
    **{kind: {"norm": NORMS} for kind in LAYERS},
    Normed: {"norm": tuple(norm for norm in NORMS if norm not in (Bias, NoNorm))},
}
"""For each type of node, which fields hold nodes, and of which types; other fields hold leaves."""

__all__ = [
    "AFFINE",
    "ATTENTIONS",
    "BARE_STEMS",
    "BATCH_NORMS",
    "BLOCKS",
    "DRAWN_NORMS",
    "EPS",
    "HEADS",
    "LASTS",
    "LAYERS",
    "MASKS",
    "NODES",
    "NORMS",
    "PLACES",
    "PLAIN",
    "POOLED",
    "POOLED_STEMS",
    "PREACTIVATIONS",
    "SHORTCUTS",
    "STAGES",
    "STEMS",
    "UNITS",
    "AnyNorm",
    "Attention",
    "AveragedStage",
    "AveragedStem",
    "BareDeepStem",
    "BareStem7x7",
    "BasicBlock",
    "Bias",
    "Block",
    "BlurredStage",
    "BlurredStem",
    "Bottleneck",
    "BottleneckV1",
    "CentredZeroPad",
    "DeepStem",
    "DilatedStage",
    "Drawer",
    "DropPath",
    "Dropout",
    "EfficientAttention",
    "FramedStem7x7",
    "FrozenNorm",
    "Geometry",
    "Grid",
    "GroupNorm",
    "Head",
    "Identity",
    "Last",
    "LastNorm",
    "Layer",
    "Moments",
    "Names",
    "NoAttention",
    "NoHead",
    "NoLastNorm",
    "NoNorm",
    "NoShortcut",
    "Norm",
    "NormStats",
    "Normed",
    "Pair",
    "Params",
    "Plan",
    "PooledProjection",
    "PreActivation",
    "PreActivationBasic",
    "Projection",
    "Quantized",
    "Regime",
    "Rescale",
    "Shortcut",
    "SqueezeExcite",
    "StandardisedLayer",
    "Stats",
    "Stem",
    "Stem3x3",
    "Stem7x7",
    "StridedStem",
    "Unit",
    "Weights",
    "ZeroPad",
    "attention_of",
    "beside",
    "blocks_of",
    "features_in",
    "grids",
    "kinds",
    "last_layer",
    "norm_shape",
    "over",
    "paired",
    "replaced",
    "units_of",
    "with_blocks",
]
