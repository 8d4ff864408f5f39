"""Parameters from and to state dicts: the names of other libraries appear here alone.

A state dict is read in steps: unwrapped, its names brought to torchvision's, its architecture read
off them, and every entry held against what that architecture expects.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError, describe
from fresnet.network.check import DTYPES, check_params, first_conv
from fresnet.network.init import init
from fresnet.network.nodes import (
    BasicBlock,
    Bias,
    Bottleneck,
    BottleneckV1,
    DeepStem,
    DilatedStage,
    FrozenNorm,
    NoShortcut,
    Params,
    PooledProjection,
    Projection,
    Stem3x3,
    Stem7x7,
    ZeroPad,
    blocks_of,
)
from fresnet.network.specs import Spec

LAYOUTS = ("torchvision", "timm", "huggingface")

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model")
"""Under which training scripts keep a state dict in a checkpoint."""

WRAPPINGS = 10

STEM = re.compile(
    r"((?:(?!layer\d)\w+\.)*?)"
    r"(?:conv1\.(?:0\.)?weight|resnet\.embedder\.embedder\.convolution\.weight)"
)
"""The first convolution's name, behind the prefix that a parent module, DataParallel or
`torch.compile` puts before all names."""


def from_state_dict(mapping: Mapping[str, Any], *, stride_in_1x1: bool = False) -> Params:
    """The network in a state dict of torchvision, of timm or of Hugging Face.

    For Hugging Face that is `ResNetForImageClassification`. Whose names they are is found out,
    also behind a prefix of all (such as `module.`) and inside a checkpoint's
    `state_dict`, `model_state_dict`, `model_state` or `model`; so are depths, widths, groups,
    classes, stem and shortcuts. Tensors are copied, convolutions into channels last. Weights
    take the dtype of the first convolution, statistics the same but never narrower than float32,
    and float16 becomes float32; an entry that this dtype cannot hold exactly is refused. A
    convolution's bias is absorbed into the running mean after it. The counters
    `num_batches_tracked` are dropped: no BatchNorm with a fixed momentum reads them.

    Names and shapes do not tell everything. Taken for granted are strides of 2 in each stage but
    the first, pooling after a 7x7 stem and none after a 3x3 one, zero padding (option A) where a
    3x3 stem's network has no projections, ReLU, and an eps of 1e-5. A network trained otherwise,
    such as timm's resnetaa and resnetblur, or with dilation, loads but is another one;
    `dilate`, and other nodes in the tree, make of it what they can express.

    Args:
      mapping: names to tensors, as `model.state_dict()` gives them.
      stride_in_1x1: whether bottlenecks stride in their first convolution, as the paper's and
        Hugging Face's with `downsample_in_bottleneck` do.
    Returns:
      `Params(weights, stats)`.
    Raises:
      FresnetError: naming the entries that are missing, unexpected, misshapen or of another dtype
        or device than the rest, with what was expected and what was found.
    """
    layout, given = _canonical(_unwrapped(mapping))
    return assemble("from_state_dict", _template(given, stride_in_1x1), given, layout)


def to_state_dict(params: Params, layout: str = "torchvision") -> dict[str, Tensor]:
    """The network under another library's names, as its modules load it.

    Tensors are contiguous copies. Each norm gets a counter `num_batches_tracked` of 0. What names
    cannot say is not written: which norms are frozen, which stages dilated, and whether bottlenecks
    stride in their first convolution.

    >>> import fresnet
    >>> params = fresnet.init(0, fresnet.RESNET50, device="meta")
    >>> len(fresnet.to_state_dict(params))
    320
    >>> next(iter(fresnet.to_state_dict(params, "huggingface")))
    'resnet.embedder.embedder.convolution.weight'

    Args:
      params: the network.
      layout: whose names, "torchvision", "timm" or "huggingface".
    Returns:
      Names to tensors, for `load_state_dict(strict=True)`.
    Raises:
      FresnetError: if params is not a network, or has nodes that the layout's library does not
        have. Sizes are not held against what that library can build.
    """
    check_params("to_state_dict", params)
    if layout not in LAYOUTS:
        raise FresnetError(f"to_state_dict expects layout to be one of {LAYOUTS}; got {layout!r}")
    foreign = foreign_to(layout, params)
    if foreign:
        raise FresnetError(
            f"to_state_dict expects a network that {layout} has; got {foreign}; save keeps all"
        )
    return {_name_in(layout, name): value for name, value in named(params).items()}


def named(params: Params) -> dict[str, Tensor]:
    """Every network under torchvision's names, or timm's where only that has a name for a node."""
    leaves = dict(zip(names(params), tree.leaves(params), strict=True))
    modules = dict.fromkeys(name.rpartition(".")[0] for name in leaves)
    state: dict[str, Tensor] = {}
    device = first_conv(params.weights).device
    for module in modules:
        for name in (f"{module}.{leaf}" for leaf in _LEAVES.values()):
            if name in leaves:
                value = leaves[name].detach()
                state[name] = value.clone(memory_format=torch.contiguous_format)
        if f"{module}.running_var" in state:
            state[f"{module}.num_batches_tracked"] = torch.tensor(0, device=device)
    return state


def untold(params: Params) -> list[str]:
    """The node types of a network that names do not tell: lost from a state dict."""
    found = set(_kinds(params.weights))
    return [kind.__name__ for kind in (BottleneckV1, DilatedStage, FrozenNorm) if kind in found]


def _kinds(node: Any) -> Iterator[type]:
    """The types of a tree's nodes."""
    if isinstance(node, tuple):
        yield type(node)
        for child in node:
            yield from _kinds(child)


def assemble(caller: str, template: Params, given: Mapping[str, Any], layout: str) -> Params:
    """The template's nodes around copies of the entries of its names.

    Raises:
      FresnetError: naming the entries that do not fit.
    """
    given = {name: value for name, value in given.items() if not _is_counter(name)}
    expected = dict(zip(names(template), tree.leaves(template), strict=True))
    biases = {name: given.pop(name) for name in list(given) if _is_conv_bias(name, expected)}
    means = {name: expected[_mean_after(name)] for name in biases}
    faults = [*_faults(expected, given, layout), *_misfits(means, biases, given, layout)]
    if faults:
        shown = "\n  ".join(faults[:10])
        more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise FresnetError(f"{caller} found {_architecture(template)}, but:\n  {shown}{more}")
    leaves = {name: _copy(given[name], leaf.dtype) for name, leaf in expected.items()}
    for name, bias in biases.items():
        mean = _mean_after(name)
        leaves[mean] = leaves[mean] - bias.detach().to(leaves[mean].dtype)
    return tree.unflatten(template, list(leaves.values()))


# Names: a leaf's torchvision name is a function of its path; timm's extend them.

_LEAVES = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_DEEP_STEM = {"conv1": "conv1.0", "norm1": "conv1.1", "conv2": "conv1.3", "norm2": "conv1.4"}
_DEEP_STEM |= {"conv3": "conv1.6", "norm3": "bn1"}


def names(params: Params) -> list[str]:
    """The canonical name of each leaf, in the order of `tree.leaves`."""
    stages = [blocks_of(stage) for stage in params.weights.stages]
    return [_name(path, stages) for path in tree.paths(params)]


def _name(path: tree.Path, stages: Sequence[Sequence[Any]]) -> str:
    match [step for step in path[1:] if step != "blocks"]:
        case ["stem", ("conv" | "norm") as field, *leaf]:
            return _leaf_name({"conv": "conv1", "norm": "bn1"}[field], leaf)
        case ["stem", str(field), *leaf]:
            return _leaf_name(_DEEP_STEM[field], leaf)
        case ["stages", int(stage), int(block), "shortcut", str(field), *leaf]:
            pooled = isinstance(stages[stage][block].shortcut, PooledProjection)
            place = ("conv", "norm").index(field) + pooled
            return _leaf_name(f"layer{stage + 1}.{block}.downsample.{place}", leaf)
        case ["stages", int(stage), block, str(field), *leaf]:
            module = field.replace("norm", "bn")
            return _leaf_name(f"layer{stage + 1}.{block}.{module}", leaf)
        case ["head", leaf]:
            return f"fc.{leaf}"
    raise FresnetError(f"no library has a name for {path}")


def _leaf_name(module: str, leaf: list[Any]) -> str:
    return f"{module}.{_LEAVES[leaf[0]] if leaf else 'weight'}"


_HF_WORD: Mapping[str, str] = {"conv": "convolution", "bn": "normalization"}
_OUR_WORD: Mapping[str, str] = {theirs: ours for ours, theirs in _HF_WORD.items()}
_SHORTCUT = ("convolution", "normalization")


class _Rule(NamedTuple):
    """Hugging Face's name to torchvision's, and back."""

    theirs: str
    to_ours: Callable[[re.Match[str]], str]
    ours: str
    to_theirs: Callable[[re.Match[str]], str]


_PLACE = r"resnet\.encoder\.stages\.(\d{1,2})\.layers\.(\d{1,3})\."
_RULES = (
    _Rule(
        r"resnet\.embedder\.embedder\.(convolution|normalization)\.",
        lambda m: {"convolution": "conv1.", "normalization": "bn1."}[m[1]],
        r"(conv|bn)1\.(?=\D)",
        lambda m: f"resnet.embedder.embedder.{_HF_WORD[m[1]]}.",
    ),
    _Rule(
        _PLACE + r"layer\.(\d)\.(convolution|normalization)\.",
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.{_OUR_WORD[m[4]]}{int(m[3]) + 1}.",
        r"layer(\d+)\.(\d+)\.(conv|bn)(\d)\.",
        lambda m: (
            f"resnet.encoder.stages.{int(m[1]) - 1}.layers.{m[2]}"
            f".layer.{int(m[4]) - 1}.{_HF_WORD[m[3]]}."
        ),
    ),
    _Rule(
        _PLACE + r"shortcut\.(convolution|normalization)\.",
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.{_SHORTCUT.index(m[3])}.",
        r"layer(\d+)\.(\d+)\.downsample\.([01])\.",
        lambda m: (
            f"resnet.encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.shortcut.{_SHORTCUT[int(m[3])]}."
        ),
    ),
    _Rule(r"classifier\.1\.", lambda m: "fc.", r"fc\.", lambda m: "classifier.1."),
)


def _name_in(layout: str, name: str) -> str:
    """The canonical name in a layout's own words."""
    if layout == "huggingface":
        for rule in _RULES:
            if match := re.match(rule.ours, name):
                return rule.to_theirs(match) + name[match.end() :]
    return name


def _canonical(mapping: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The layout found, and its entries under canonical names; unknown ones keep theirs."""
    if not any(name.startswith("resnet.") for name in mapping):
        return "torchvision", dict(mapping)
    canonical = {}
    for name, value in mapping.items():
        for rule in _RULES:
            if match := re.match(rule.theirs, name):
                name = rule.to_ours(match) + name[match.end() :]
                break
        if name in canonical:
            raise FresnetError(f"from_state_dict expects one entry of each name; got two {name}")
        canonical[name] = value
    return "huggingface", canonical


def _unwrapped(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries themselves, without a training script's wrappers and prefixes."""
    for _ in range(WRAPPINGS):
        if not isinstance(mapping, Mapping):
            raise FresnetError(
                "from_state_dict expects a mapping of names to tensors, as model.state_dict() "
                f"gives; got {describe(mapping)}"
            )
        wrapper = next((name for name in WRAPPERS if isinstance(mapping.get(name), Mapping)), None)
        if wrapper is not None:
            mapping = mapping[wrapper]
            continue
        strange = [name for name in mapping if not isinstance(name, str)]
        if strange:
            raise FresnetError(f"from_state_dict expects names to be strings; got {strange[0]!r}")
        entries = {n: mapping[n] for n in mapping if n.rpartition(".")[2] != "n_averaged"}
        prefixes = {match[1] for name in entries if (match := STEM.fullmatch(name))}
        prefix = prefixes.pop() if len(prefixes) == 1 else ""
        if not all(name.startswith(prefix) for name in entries):
            return entries
        return {name.removeprefix(prefix): value for name, value in entries.items()}
    raise FresnetError(f"from_state_dict expects fewer than {WRAPPINGS} wrappers")


# What the names and shapes say of the architecture.


def _template(given: Mapping[str, Any], stride_in_1x1: bool) -> Params:
    """The network that the entries describe, on meta: every shape, no values."""
    stem = _stem(given)
    pattern = r"layer([1-9]\d?)\.(\d{1,3})\."
    blocks = [match for name in given if (match := re.match(pattern, name))]
    if not blocks:
        names = ", ".join(map(str, list(given)[:3])) or "none"
        raise FresnetError(
            "from_state_dict expects the names of torchvision, timm or Hugging Face "
            f"(conv1.weight, layer1.0.conv1.weight, ..., fc.bias); "
            f"got {len(given)} entries: {names}"
        )
    depths = tuple(
        1 + max((int(match[2]) for match in blocks if int(match[1]) == stage), default=0)
        for stage in range(1, 1 + max(int(match[1]) for match in blocks))
    )
    width = _size(given, ("bn1.weight", 0), ("conv1.weight", 0), default=64)
    bottleneck = any(".conv3." in name for name in given)
    grouping = {}
    if bottleneck:
        inner = _size(given, ("layer1.0.bn1.weight", 0), default=width)
        per_group = _size(given, ("layer1.0.conv2.weight", 1), default=inner)
        if inner % per_group == 0 and per_group * 64 % width == 0:
            grouping = {"groups": inner // per_group, "group_width": per_group * 64 // width}
    if not any(name.startswith("fc.") for name in given):
        raise FresnetError(
            "from_state_dict expects a head; got none: add an fc.weight [k c] and fc.bias [k]"
        )
    if sum(depths) > len(given):
        raise FresnetError(
            f"from_state_dict expects entries of every block; got {len(given)} entries, and names "
            f"of {sum(depths)} blocks"
        )
    spec = Spec(
        (BottleneckV1 if stride_in_1x1 else Bottleneck) if bottleneck else BasicBlock,
        depths,
        width,
        stem=(stem_type := _stem_type(given, stem)),
        shortcut=_shortcut_type(given, stem_type),
        **grouping,
    )
    return init(
        0,
        spec,
        num_classes=_size(given, ("fc.weight", 0), ("fc.bias", 0), default=1000),
        in_channels=_size(given, ("conv1.weight", 1), ("conv1.0.weight", 1), default=3),
        dtype=_widened(stem.dtype) if _is_float(stem) else torch.float32,
        device="meta",
    )


def _stem(given: Mapping[str, Any]) -> Any:
    """The weight that meets the images, which sets dtype and device; None if it is missing."""
    return given.get("conv1.weight", given.get("conv1.0.weight"))


def _stem_type(given: Mapping[str, Any], stem: Any) -> type:
    if "conv1.0.weight" in given:
        return DeepStem
    return Stem3x3 if _is_float(stem) and stem.shape[2:] == (3, 3) else Stem7x7


def _shortcut_type(given: Mapping[str, Any], stem_type: type) -> type:
    places = {match[1] for name in given if (match := re.search(r"\.downsample\.(\d)\.", name))}
    if stem_type is Stem3x3 and not places:
        return ZeroPad
    return PooledProjection if "2" in places else Projection


def _faults(expected: Mapping[str, Tensor], given: Mapping[str, Any], layout: str) -> Iterator[str]:
    for name, leaf in expected.items():
        if name not in given:
            yield f"{_name_in(layout, name)} is missing: expected {tuple(leaf.shape)}"
    for name, value in given.items():
        if name not in expected:
            yield f"{_name_in(layout, name)} is unexpected: got {describe(value)}"
    yield from _misfits(expected, given, given, layout)


def _misfits(
    expected: Mapping[str, Tensor], values: Mapping[str, Any], given: Mapping[str, Any], layout: str
) -> Iterator[str]:
    """Values of another shape, dtype or device than goes with the stem."""
    stem = _stem(given)
    device = stem.device if _is_float(stem) else None
    for name in (name for name in expected if name in values):
        value, leaf, theirs = values[name], expected[name], _name_in(layout, name)
        if not _is_float(value) or value.shape != leaf.shape:
            yield f"{theirs}: expected float {tuple(leaf.shape)}, got {describe(value)}"
        elif torch.promote_types(value.dtype, leaf.dtype) != leaf.dtype:
            yield f"{theirs}: expected {leaf.dtype}, to go with the stem, got {value.dtype}"
        elif device is not None and value.device != device:
            yield f"{theirs}: expected on {device}, to go with the stem, got {value.device}"


def _is_conv_bias(name: str, expected: Mapping[str, Tensor]) -> bool:
    weight = expected.get(f"{name.removesuffix('.bias')}.weight")
    return name.endswith(".bias") and weight is not None and weight.ndim == 4


def _mean_after(bias: str) -> str:
    """The running mean of the norm that follows the convolution with this bias."""
    module = bias.removesuffix(".bias")
    if module == "conv1.6":
        return "bn1.running_mean"
    if match := re.fullmatch(r"(.*\.)(\d)", module):  # in a sequence: the next place
        return f"{match[1]}{int(match[2]) + 1}.running_mean"
    return re.sub(r"conv(\d)$", r"bn\1", module) + ".running_mean"


def foreign_to(layout: str, params: Params) -> str:
    """What the layout's networks do not have; empty if there is nothing."""
    own: dict[str, tuple[type, ...]] = {
        "torchvision": (DeepStem, PooledProjection, NoShortcut, ZeroPad, Stem3x3, Bias),
        "timm": (NoShortcut, ZeroPad, Stem3x3, Bias),
        "huggingface": (DeepStem, PooledProjection, NoShortcut, ZeroPad, Stem3x3, Bias),
    }
    blocks = [block for stage in params.weights.stages for block in blocks_of(stage)]
    if layout == "huggingface" and not all(
        isinstance(block, BasicBlock)
        or block.conv3.shape[0] == 4 * block.conv1.shape[0] == 4 * block.conv2.shape[1]
        for block in blocks
    ):
        return "bottlenecks that are grouped or wide"
    found = set(_kinds(params.weights))
    return next((kind.__name__ for kind in own[layout] if kind in found), "")


def _architecture(params: Params) -> str:
    stages = [blocks_of(stage) for stage in params.weights.stages]
    depths = ", ".join(str(len(blocks)) for blocks in stages)
    classes = params.weights.head.weight.shape[0]
    width = params.weights.stem[-1][0].shape[0]
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


def _size(mapping: Mapping[str, Any], *places: tuple[str, int], default: int) -> int:
    """A size read off the first of these entries' dimensions that is there."""
    for name, dim in places:
        value = mapping.get(name)
        if _is_float(value) and value.ndim > dim and value.shape[dim] > 0:
            return value.shape[dim]
    return default


def _widened(dtype: torch.dtype) -> torch.dtype:
    """Files are stored in float16, networks do not run in it."""
    return torch.float32 if dtype == torch.float16 else dtype


def _is_float(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dtype in DTYPES and value.layout is torch.strided


def _is_counter(name: str) -> bool:
    return name.endswith(".num_batches_tracked")
