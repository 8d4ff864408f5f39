"""What the public functions refuse before they compute anything.

One walk goes down both trees. It reads types, dtypes and devices, and never values, so it does not
synchronise with a device and leaves no trace in a compiled graph. The operations themselves check
that channels fit from one to the next.
"""

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError, describe
from fresnet.network import hints
from fresnet.network.nodes import (
    BATCH_NORMS,
    BLOCKS,
    HEADS,
    LASTS,
    LAYERS,
    PLACES,
    STEMS,
    UNITS,
    Dropout,
    DropPath,
    NoHead,
    NormStats,
    NoShortcut,
    Params,
    Quantized,
    Stats,
    Weights,
    blocks_of,
    features_in,
)
from fresnet.tree.tensors import has_values

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that weights may have."""


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the statistics beside weights of `dtype`: never narrower than float32.

    >>> stats_dtype(torch.bfloat16), stats_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def check_call(caller: str, params: Params, x: Tensor) -> None:
    """Refuse a tree that is no network, and images that the network does not take.

    The network may have masks, since these are of a batch.

    Raises:
      FresnetError: naming what was expected, where, and what came.
    """
    check_params(caller, params, masks=True)
    check_images(caller, params, x)


def check_images(caller: str, params: Params | Quantized, x: Tensor, *, least: int = 1) -> None:
    """Refuse images that this network does not take, and fewer than so many.

    Raises:
      FresnetError: naming what was expected and what came.
    """
    if not isinstance(x, Tensor):
        raise FresnetError(f"{caller} expects x to be a tensor [b c h w]; got {describe(x)}")
    stem = first_conv(params.weights)
    like = stem if isinstance(params, Params) else params.images  # int8 convolutions do not say
    expected = f"{caller} expects x [b {stem.shape[1]} h w]"
    if x.ndim != 4 or x.shape[1] != stem.shape[1]:
        hint = hints.of_images(x, stem.shape[1])
        raise FresnetError(f"{expected}; got {tuple(x.shape)}{hint}")
    if x.shape[0] < least or 0 in x.shape[1:]:
        raise FresnetError(f"{expected} with at least one image and pixel; got {tuple(x.shape)}")
    if x.layout is not torch.strided:
        raise FresnetError(f"{expected} without gaps; got {describe(x)}: x.to_dense()?")
    if x.dtype != like.dtype:
        raise FresnetError(f"{expected} in the weights' {like.dtype}; got {x.dtype}")
    if x.device != like.device:
        raise FresnetError(f"{expected} on the weights' device {like.device}; got {x.device}")


def check_features(caller: str, params: Params, x: Tensor) -> None:
    """Refuse what the last stage of this network does not put out, under autocast or without.

    Raises:
      FresnetError: naming what was expected and what came.
    """
    like, channels = first_conv(params.weights), features_in(params.weights)
    expected = f"{caller} expects the last of features, activations [b {channels} h w]"
    fits = isinstance(x, Tensor) and x.layout is torch.strided and x.ndim == 4
    if not fits or x.shape[1] != channels or not x.numel():
        raise FresnetError(f"{expected} with at least one value; got {describe(x)}")
    same = x.device == like.device
    narrow = same and torch.is_autocast_enabled(x.device.type) and x.is_floating_point()
    if not same or not (narrow or x.dtype == like.dtype):
        got = f"{x.dtype} on {x.device}"
        raise FresnetError(f"{expected} of the weights' {like.dtype} on {like.device}; got {got}")


def check_device(caller: str, x: Tensor, y: Tensor) -> None:
    """Refuse targets on another device than the images.

    Raises:
      FresnetError: naming both devices.
    """
    if y.device != x.device:
        raise FresnetError(f"{caller} expects y on the images' device {x.device}; got {y.device}")


def check_differentiable(caller: str, *trees: object) -> None:
    """Refuse tensors of `torch.inference_mode`, of which PyTorch takes no derivative.

    Raises:
      FresnetError: saying what to do.
    """
    if torch.compiler.is_compiling():
        return
    if any(leaf.is_inference() for leaf in tree.leaves(trees)):
        raise FresnetError(
            f"{caller} expects tensors that can be differentiated; got some of "
            "torch.inference_mode: make them, or clone() them, outside of it, or under no_grad"
        )


def check_values(caller: str, *trees: object) -> None:
    """Refuse tensors without values.

    Raises:
      FresnetError: saying what to do.
    """
    if not all(map(has_values, tree.leaves(trees))):
        raise FresnetError(
            f"{caller} expects tensors with values; got some that are on meta or were made under "
            "FakeTensorMode"
        )


def first_conv(weights: Weights) -> Any:
    """The convolution that meets the images, or whatever stands in its place."""
    first = weights.stem
    while isinstance(first, tuple) and first:
        first = first[0]
    return first


def classes_of(caller: str, weights: Weights) -> int:
    """The number of classes that the network tells apart.

    Raises:
      FresnetError: if it has no head, saying what to do.
    """
    if isinstance(weights.head, NoHead):
        raise FresnetError(
            f"{caller} expects a network with a head; got NoHead: "
            "fresnet.with_head(params, num_classes=k, generator=0) draws one"
        )
    return len(weights.head.bias)


def check_params(caller: str, params: Params, *, masks: bool = False) -> None:
    """Refuse a tree that is no network, or that is not of one dtype on one device, or has masks.

    Args:
      masks: whether it may have masks after all.
    Raises:
      FresnetError: naming the node, what was expected there and what came.
    """
    if type(params) is not Params:
        raise FresnetError(
            f"{caller} expects Params(weights, stats); "
            f"got {describe(params)}{hints.of_network(params)}"
        )
    weights, stats = params
    if type(weights) is not Weights or type(stats) is not Stats:
        raise FresnetError(
            f"{caller} expects Params(weights, stats) to hold Weights and Stats; "
            f"got {describe(weights)} and {describe(stats)}"
        )
    stem = first_conv(weights)
    if not isinstance(stem, Tensor) or stem.ndim != 4 or not stem.is_floating_point():
        stacked = isinstance(stem, Tensor) and stem.ndim == 5
        hint = " (a stack of networks? use vmap)" if stacked else ""
        if type(stem) is tuple and not stem:
            hint = " (a part of a tree? tree.combine(part, rest))"
        raise FresnetError(
            f"{caller} expects the stem's first convolution to be a float tensor [o c k k]; "
            f"got {describe(stem)}{hint}"
        )
    walk = _Walk(caller, masks, stem.dtype, stats_dtype(stem.dtype), stem.device)
    walk.node("stem", weights.stem, stats.stem, STEMS)
    walk.same_length("stages", weights.stages, stats.stages)
    for i, (stage, stage_stats) in enumerate(zip(weights.stages, stats.stages, strict=True)):
        where = f"stages[{i}]"
        walk.same_type(where, stage, stage_stats)
        blocks, blocks_stats = blocks_of(stage), blocks_of(stage_stats)
        walk.same_length(where, blocks, blocks_stats)
        for j, (block, block_stats) in enumerate(zip(blocks, blocks_stats, strict=True)):
            place = f"{where}[{j}]"
            walk.node(place, walk.under(DropPath, place, block), block_stats, BLOCKS)
    walk.node("last", weights.last, stats.last, LASTS)
    head = walk.under(Dropout, "head", weights.head)
    if type(head) not in HEADS:
        walk.fail("weights.head", "Head or NoHead", describe(head))
    for field, leaf in zip(head._fields, head, strict=True):
        walk.leaf("weights", "head", field, leaf, walk.dtype)


class _Walk(NamedTuple):
    """A walk down both trees at once.

    Every node must be of a type that its place takes, and every leaf must be a tensor.
    """

    caller: str
    masks: bool
    dtype: torch.dtype
    stats_dtype: torch.dtype
    device: torch.device

    def under(self, mask: type[Any], where: str, node: Any) -> Any:
        """The node itself, or what is under the mask, if it is one of this type."""
        if type(node) is not mask:
            return node
        if not self.masks:
            raise FresnetError(
                f"{self.caller} expects weights without masks, which are of one batch; got a "
                f"{mask.__name__} at weights.{where}: hand in the weights from before `masked`"
            )
        inner, keep = node
        self.leaf("weights", where, "keep", keep, self.dtype)
        if isinstance(inner, NoHead) or isinstance(getattr(inner, "shortcut", ()), NoShortcut):
            self.fail(f"weights.{where}", "something that can be dropped", describe(inner))
        return inner

    def node(self, where: str, node: Any, stats: Any, kinds: tuple[type, ...]) -> None:
        if type(node) not in kinds:
            expected = " or ".join(kind.__name__ for kind in kinds)
            self.fail(f"weights.{where}", expected, describe(node))
        self.same_type(where, node, stats)
        places = PLACES[type(node)]
        for field, child, child_stats in zip(node._fields, node, stats, strict=True):
            below = f"{where}.{field}"
            check = self.unit if places[field][0] in UNITS else self.node
            check(below, child, child_stats, places[field])

    def unit(self, where: str, unit: Any, stats: Any, kinds: tuple[type, ...]) -> None:
        if type(unit) not in kinds:
            self.fail(f"weights.{where}", kinds[0].__name__, describe(unit))
        if type(unit) in LAYERS:
            self.leaf("weights", where, "conv", unit.conv, self.dtype)
        norm, norms = unit.norm, PLACES[type(unit)]["norm"]
        if type(norm) not in norms:
            expected = " or ".join(kind.__name__ for kind in norms)
            self.fail(f"weights.{where}.norm", expected, describe(norm))
        for field, leaf in zip(norm._fields, norm, strict=True):
            self.leaf("weights", f"{where}.norm", field, leaf, self.dtype)
        if isinstance(norm, BATCH_NORMS):
            if type(stats) is not NormStats:
                expected = f"NormStats beside {type(norm).__name__}"
                self.fail(f"stats.{where}", expected, describe(stats))
            self.leaf("stats", where, "mean", stats.mean, self.stats_dtype)
            self.leaf("stats", where, "var", stats.var, self.stats_dtype)
        elif type(stats) is not tuple or stats:
            self.fail(f"stats.{where}", f"() beside {type(norm).__name__}", describe(stats))

    def leaf(self, tree: str, where: str, field: str, leaf: object, dtype: torch.dtype) -> None:
        if not isinstance(leaf, Tensor):
            self.fail(f"{tree}.{where}.{field}", "a tensor", describe(leaf))
        if leaf.layout is not torch.strided:
            self.fail(f"{tree}.{where}.{field}", "a tensor without gaps", describe(leaf))
        if leaf.dtype != dtype or leaf.device != self.device:
            expected = f"{dtype} on {self.device}, to go with the stem"
            self.fail(f"{tree}.{where}.{field}", expected, f"{leaf.dtype} on {leaf.device}")

    def same_type(self, where: str, node: object, stats: object) -> None:
        if type(stats) is not type(node):
            self.fail(f"stats.{where}", f"as weights.{where}, {describe(node)}", describe(stats))

    def same_length(self, where: str, weights: Any, stats: Any) -> None:
        for which, nodes in (("weights", weights), ("stats", stats)):
            if type(nodes) is not tuple or not nodes:
                self.fail(f"{which}.{where}", "a tuple, not empty", describe(nodes))
        if len(stats) != len(weights):
            expected = f"as long as weights.{where}, {len(weights)}"
            self.fail(f"stats.{where}", expected, str(len(stats)))

    def fail(self, where: str, expected: str, got: str) -> NoReturn:
        raise FresnetError(f"{self.caller} expects {where} to be {expected}; got {got}")
