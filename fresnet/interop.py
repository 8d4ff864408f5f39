"""Parameters from and to state dicts: torchvision's names appear here alone."""

import re
from collections.abc import Iterator, Mapping
from typing import TypeGuard

import torch
from torch import Tensor

from fresnet import tree
from fresnet.check import DTYPES, check_params
from fresnet.errors import FresnetError, describe
from fresnet.init import init
from fresnet.specs import Spec
from fresnet.types import BasicBlock, Bottleneck, Params


def from_state_dict(mapping: Mapping[str, Tensor]) -> Params:
    """The network in a torchvision state dict; depths, width and classes are read off the entries.

    Tensors are copied, convolutions into channels last. Weights take the dtype of
    `conv1.weight`, statistics the same but never narrower than float32; an entry that this dtype
    cannot hold exactly is refused. The counters `num_batches_tracked` may be
    there or not and are dropped: no BatchNorm with a fixed momentum reads them.

    Args:
      mapping: torchvision's names to tensors, as `model.state_dict()` gives them.
    Returns:
      `Params(weights, stats)`.
    Raises:
      FresnetError: naming the entries that are missing, unexpected, misshapen or of another dtype
        or device than the rest, with what was expected and what was found.
    """
    if not isinstance(mapping, Mapping):
        raise FresnetError(
            "from_state_dict expects a mapping of names to tensors, as model.state_dict() gives; "
            f"got {describe(mapping)}"
        )
    strange = [name for name in mapping if not isinstance(name, str)]
    if strange:
        raise FresnetError(f"from_state_dict expects names to be strings; got {strange[0]!r}")
    template = _template(mapping)
    expected = dict(zip(_names(template), tree.leaves(template), strict=True))
    given = {name: value for name, value in mapping.items() if not _is_counter(name)}
    faults = list(_faults(expected, given))
    if faults:
        shown = "\n  ".join(faults[:10])
        more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise FresnetError(
            f"from_state_dict found {_architecture(template)}, but:\n  {shown}{more}"
        )
    return tree.unflatten(
        template, [_copy(given[name], leaf.dtype) for name, leaf in expected.items()]
    )


def to_state_dict(params: Params) -> dict[str, Tensor]:
    """The network under torchvision's names, in torchvision's order, as its modules load it.

    Tensors are contiguous copies. Each norm gets a counter `num_batches_tracked` of 0. Which norms
    are frozen is not written.

    >>> import fresnet
    >>> len(fresnet.to_state_dict(fresnet.init(0, fresnet.RESNET50, device="meta")))
    320

    Args:
      params: the network.
    Returns:
      Names to tensors, for `load_state_dict(strict=True)`.
    Raises:
      FresnetError: if the tree is not a network.
    """
    check_params("to_state_dict", params)
    named = dict(zip(_names(params), tree.leaves(params), strict=True))
    modules = dict.fromkeys(name.rpartition(".")[0] for name in named)
    state: dict[str, Tensor] = {}
    device = params.weights.stem.conv.device
    for module in modules:
        for name in (f"{module}.{leaf}" for leaf in _LEAVES.values()):
            if name in named:
                value = named[name].detach()
                state[name] = value.clone(memory_format=torch.contiguous_format)
        if f"{module}.running_var" in state:
            state[f"{module}.num_batches_tracked"] = torch.tensor(0, device=device)
    return state


_LEAVES = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def _names(params: Params) -> list[str]:
    """torchvision's name of each leaf, in the order of `tree.leaves`."""
    return [_name(path) for path in tree.paths(params)]


def _name(path: tree.Path) -> str:
    match path[1:]:
        case ["stem", *node]:
            return _node_name(node, conv="conv1", norm="bn1")
        case ["stages", int(stage), block, "shortcut", *node]:
            prefix = f"layer{stage + 1}.{block}.downsample"
            return _node_name(node, conv=f"{prefix}.0", norm=f"{prefix}.1")
        case ["stages", int(stage), block, str(field), *leaf]:
            prefix, number = f"layer{stage + 1}.{block}", field[-1]
            return _node_name(
                [field[:-1], *leaf], conv=f"{prefix}.conv{number}", norm=f"{prefix}.bn{number}"
            )
        case ["head", leaf]:
            return f"fc.{leaf}"
    raise FresnetError(f"torchvision has no name for {path}")


def _node_name(node: list[str | int], *, conv: str, norm: str) -> str:
    match node:
        case ["conv"]:
            return f"{conv}.weight"
        case ["norm", str(leaf)]:
            return f"{norm}.{_LEAVES[leaf]}"
    raise FresnetError(f"torchvision has no name for {node}")


def _template(mapping: Mapping[str, Tensor]) -> Params:
    """The network that the names describe, on meta: every shape, no values."""
    blocks = [m for name in mapping if (m := re.match(r"layer([1-9]\d?)\.(\d{1,3})\.", name))]
    if not blocks:
        names = ", ".join(map(str, list(mapping)[:3])) or "none"
        raise FresnetError(
            "from_state_dict expects torchvision's names (conv1.weight, layer1.0.conv1.weight, "
            f"..., fc.bias); got {len(mapping)} entries: {names}"
        )
    stages = range(1, 1 + max(int(match[1]) for match in blocks))
    spec = Spec(
        block=Bottleneck if any(".conv3." in name for name in mapping) else BasicBlock,
        depths=tuple(
            1 + max((int(match[2]) for match in blocks if int(match[1]) == stage), default=0)
            for stage in stages
        ),
        width=_size(mapping, ("conv1.weight", 0), ("bn1.weight", 0), default=64),
    )
    stem = mapping.get("conv1.weight")
    dtype = stem.dtype if _is_float(stem) else torch.float32
    return init(
        0,
        spec,
        num_classes=_size(mapping, ("fc.weight", 0), ("fc.bias", 0), default=1000),
        in_channels=_size(mapping, ("conv1.weight", 1), default=3),
        dtype=dtype,
        device="meta",
    )


def _faults(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Iterator[str]:
    for name, leaf in expected.items():
        if name not in given:
            yield f"{name} is missing: expected {tuple(leaf.shape)}"
    for name, value in given.items():
        if name not in expected:
            yield f"{name} is unexpected: got {describe(value)}"
    stem = given.get("conv1.weight")
    device = stem.device if _is_float(stem) else None
    for name in (name for name in expected if name in given):
        value, leaf = given[name], expected[name]
        if not _is_float(value) or value.shape != leaf.shape:
            yield f"{name}: expected float {tuple(leaf.shape)}, got {describe(value)}"
        elif torch.promote_types(value.dtype, leaf.dtype) != leaf.dtype:
            yield f"{name}: expected {leaf.dtype}, to go with conv1.weight, got {value.dtype}"
        elif device is not None and value.device != device:
            yield f"{name}: expected on {device}, to go with conv1.weight, got {value.device}"


def _architecture(params: Params) -> str:
    stages = params.weights.stages
    depths = ", ".join(str(len(blocks)) for blocks in stages)
    classes = params.weights.head.weight.shape[0]
    width = params.weights.stem.conv.shape[0]
    return (
        f"a ResNet of {type(stages[0][0]).__name__} blocks ({depths}), "
        f"width {width}, {classes} classes"
    )


def _copy(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Detached; a convolution channels last, its strides kept if they say so already.

    A 1x1 convolution fits several strides, and kernels choose by them: kept, a network rounds as
    the module did whose weights these were, and as the network did that was exported.
    """
    copy = value.detach().to(dtype).clone()
    layout = torch.channels_last if copy.ndim == 4 else torch.contiguous_format
    return copy.contiguous(memory_format=layout)


def _size(mapping: Mapping[str, Tensor], *places: tuple[str, int], default: int) -> int:
    """A size read off the first of these entries' dimensions that is there."""
    for name, dim in places:
        value = mapping.get(name)
        if _is_float(value) and value.ndim > dim and value.shape[dim] > 0:
            return value.shape[dim]
    return default


def _is_float(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dtype in DTYPES and value.layout is torch.strided


def _is_counter(name: str) -> bool:
    return name.endswith(".num_batches_tracked")
