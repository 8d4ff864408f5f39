"""Networks put together of entries: nodes that are known, and tensors under canonical names."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError, describe, reason
from fresnet.network.check import DTYPES, first_conv, stats_dtype
from fresnet.network.net import run_network
from fresnet.network.nodes import (
    LAYERS,
    Geometry,
    Head,
    NormStats,
    Pair,
    Params,
    Stats,
    beside,
    blocks_of,
    norm_shape,
    units_of,
)
from fresnet.network.norm import inference_norm
from fresnet.network.regimes import INFERENCE, Composed
from fresnet.weights.layouts import name_in
from fresnet.weights.names import name_tree

SIDE = 64
"""Of the image by which layers are held against one another."""


class _Entry(NamedTuple):
    """What an entry has to be: `shape` in words, its sizes where another entry tells them."""

    shape: str
    sizes: tuple[int, ...] | None
    dims: int
    dtype: torch.dtype


def assemble(caller: str, nodes: Params, given: Mapping[str, Any], layout: str) -> Params:
    """The nodes around copies of the entries of their names.

    Args:
      caller: whom errors are to name.
      nodes: the network with anything for leaves.
      given: entries under canonical names.
      layout: in whose words errors name them.
    Raises:
      FresnetError: naming the entries that are missing, unexpected or misshapen; or the first
        layer that does not fit the one before it.
    """
    given = {name: value for name, value in given.items() if not _is_counter(name)}
    named = name_tree(nodes)
    means = _absorbed(named, given)
    expected = _expected(named, given, means)
    faults = [*_missing(expected, given, layout), *_misfits(expected, given, layout, named)]
    found = f"{caller} found {_described(named, given)}, but:"
    if faults:
        more = [f"and {len(faults) - 8} more"] if len(faults) > 8 else []
        raise FresnetError("\n  ".join([found, *faults[:8], *more]))
    leaves = {name: _copy(name, given[name], entry.dtype) for name, entry in expected.items()}
    for bias, mean in means.items():
        leaves[mean] = leaves[mean] - leaves[bias].to(leaves[mean].dtype)
    params = tree.unflatten(nodes, [leaves[str(name)] for name in tree.leaves(named)])
    try:
        check_fit(params, named, layout)
    except FresnetError as error:
        raise FresnetError(f"{found}\n  {error}") from error
    return params


def _absorbed(named: Params, given: Mapping[str, Any]) -> dict[str, str]:
    """The biases of convolutions, each with the running mean that absorbs it."""
    means: dict[str, str] = {}

    def look(unit: Any, stats: Any) -> None:
        if isinstance(unit, LAYERS) and isinstance(stats, NormStats):
            bias = str(unit.conv).removesuffix("weight") + "bias"
            if bias in given:
                means[bias] = str(stats.mean)

    beside(look, *named)
    return means


def _expected(
    named: Params, given: Mapping[str, Any], means: Mapping[str, str]
) -> dict[str, _Entry]:
    """Every entry that is expected, biases of convolutions last."""
    dtype = _dtype(given, [*map(str, tree.leaves(named.weights)), *means])
    weights: dict[str, _Entry] = {}
    stats: dict[str, _Entry] = {}

    def sizes_of(name: Any, dims: int) -> tuple[int, ...] | None:
        value = given.get(name)
        return tuple(value.shape[:1]) if _is_float(value) and value.ndim == dims else None

    def look(unit: Any, unit_stats: Any) -> None:
        if isinstance(unit, LAYERS):
            weights[str(unit.conv)] = _Entry("[o c k k]", None, 4, dtype)
            sizes = sizes_of(unit.conv, 4)
        else:
            sizes = sizes_of(unit.norm.scale, 1)
        in_groups = len(norm_shape(type(unit.norm), 1)) == 2  # of which no other entry tells
        for name in unit.norm:
            entry = ("[g c/g]", None, 2) if in_groups else ("[c]", sizes, 1)
            weights[name] = _Entry(*entry, dtype)
        for name in unit_stats:
            stats[name] = _Entry("[c]", sizes, 1, stats_dtype(dtype))

    beside(look, *named)
    match named.weights.head:
        case Head(weight, bias):
            weights[str(weight)] = _Entry("[k c]", None, 2, dtype)
            weights[str(bias)] = _Entry("[k]", sizes_of(weight, 2), 1, dtype)
    biases = {bias: stats[mean]._replace(dtype=dtype) for bias, mean in means.items()}
    return weights | stats | biases


def _dtype(given: Mapping[str, Any], names: Sequence[str]) -> torch.dtype:
    """The narrowest dtype that holds all these entries exactly."""
    dtypes = {value.dtype for name in names if _is_float(value := given.get(name))}
    return reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def _missing(
    expected: Mapping[str, _Entry], given: Mapping[str, Any], layout: str
) -> Iterator[str]:
    for name, entry in expected.items():
        if name not in given:
            yield f"{name_in(layout, name)} is missing: expected float {entry.sizes or entry.shape}"
    for name, value in given.items():
        if name not in expected:
            yield f"{name_in(layout, name)} is unexpected: got {describe(value)}"


def _misfits(
    expected: Mapping[str, _Entry], given: Mapping[str, Any], layout: str, named: Params
) -> Iterator[str]:
    """Entries of another shape than goes with their layer, or of another dtype or device."""
    stem = given.get(str(first_conv(named.weights)))
    device = stem.device if _is_float(stem) else None
    for name, entry in expected.items():
        if name not in given:
            continue
        value, theirs = given[name], name_in(layout, name)
        fits = _is_float(value) and value.ndim == entry.dims and 0 not in value.shape
        if not fits or (entry.sizes is not None and value.shape != entry.sizes):
            yield f"{theirs}: expected float {entry.sizes or entry.shape}, got {describe(value)}"
        elif torch.promote_types(value.dtype, entry.dtype) != entry.dtype:
            yield f"{theirs}: expected {entry.dtype}, to go with the weights, got {value.dtype}"
        elif device is not None and value.device != device:
            yield f"{theirs}: expected on {device}, to go with the stem, got {value.device}"


class _Beside(NamedTuple):
    """What stands beside a unit, and the unit's name."""

    stats: Any
    name: str


class _Fitting(Composed):
    """Inference that names the layer which does not fit."""

    def layer(
        self,
        at: Pair,
        x: Tensor,
        how: Geometry,
        *,
        add: Tensor | None = None,
        relu: bool = True,
    ) -> tuple[Tensor, Any]:
        with _naming(at.beside.name):
            return super().layer(Pair(at.unit, at.beside.stats), x, how, add=add, relu=relu)

    def normed(self, at: Pair, x: Tensor) -> tuple[Tensor, Any]:
        with _naming(at.beside.name):
            return super().normed(Pair(at.unit, at.beside.stats), x)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except FresnetError as error:
        raise FresnetError(f"{name}: {error}") from error


def check_fit(params: Params, named: Params, layout: str = "torchvision") -> None:
    """Run a network on no images, so that layers which do not fit one another are refused.

    Nothing is computed, and shapes are known. On meta they would be too, but the first call there
    takes a second, in which PyTorch imports its compilers.

    Raises:
      FresnetError: naming the first layer that does not fit, and saying why.
    """

    def located(unit: Any, stats: Any, names: Any) -> _Beside:
        return _Beside(stats, name_in(layout, str(tree.leaves(names)[0])))

    weights, stats = params
    places = beside(located, weights, stats, Stats(*named.weights[:-1]))
    conv = first_conv(weights)
    x = conv.new_empty(0, conv.shape[1], SIDE, SIDE)
    with torch.no_grad():
        y = run_network(Params(weights, places), x, _Fitting(inference_norm)).y
        with _naming(name_in(layout, "fc.weight")):
            weights.head.run(y, INFERENCE)


def _described(named: Params, given: Mapping[str, Any]) -> str:
    """The network in words, as far as its entries tell."""

    def size(name: Any) -> str:
        shape = getattr(given.get(str(name)), "shape", ())
        return str(shape[0]) if shape else "?"

    stem = units_of(named.weights.stem)
    stages = [blocks_of(stage) for stage in named.weights.stages]
    depths = ", ".join(str(len(blocks)) for blocks in stages)
    head = named.weights.head
    classes = f"{size(head.weight)} classes" if isinstance(head, Head) else "no head"
    return (
        f"a ResNet of {type(stages[0][0]).__name__} blocks ({depths}), "
        f"width {size(stem[-1].conv)}, {classes}"
    )


def _copy(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Detached; a convolution channels last, its strides kept if they say so already.

    A 1x1 convolution fits several strides, and kernels choose by them: kept, a network rounds as
    the module did whose weights these were, and as the network did that was exported.
    """
    layout = torch.channels_last if value.ndim == 4 else torch.contiguous_format
    kept = torch.preserve_format if value.is_contiguous(memory_format=layout) else layout
    try:
        return value.detach().to(dtype, copy=True, memory_format=kept)
    except RuntimeError as error:  # a crafted entry may be expanded to more than there is memory
        raise FresnetError(f"{name} cannot be copied: {reason(error)}") from error


def _is_float(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dtype in DTYPES and value.layout is torch.strided


def _is_counter(name: str) -> bool:
    return name.endswith(".num_batches_tracked")
