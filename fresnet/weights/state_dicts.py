"""Parameters from and to the state dicts of other libraries.

A state dict is read in steps. It is unwrapped; its names are brought to the canonical ones; its
nodes are recognised (`recognition`); and its entries are assembled (`assembly`).
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError, describe
from fresnet.network.check import check_params, first_conv
from fresnet.network.nodes import BottleneckV1, DilatedStage, FrozenNorm, Params
from fresnet.weights.assembly import assemble
from fresnet.weights.names import (
    LAYOUTS,
    canonical,
    foreign_to,
    kinds,
    layout_of,
    name_in,
    names,
)
from fresnet.weights.recognition import recognised

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model")
"""Under which training scripts keep a state dict in a checkpoint."""

WRAPPINGS = 10

STEM = re.compile(
    r"((?:(?!layer\d|stages\.)\w+\.)*?)"
    r"(?:conv1\.(?:0\.)?|stem\.conv\.|resnet\.embedder\.embedder\.convolution\.)weight"
)
"""The first convolution's name, behind the prefix that a parent module, DataParallel or
`torch.compile` puts before all names."""


def from_state_dict(mapping: Mapping[str, Any], *, stride_in_1x1: bool = False) -> Params:
    """The network in a state dict of torchvision, of timm or of Hugging Face.

    For Hugging Face that is `ResNetForImageClassification`. fresnet detects which library the names
    come from, also behind a prefix of all names (such as `module.`) and inside a checkpoint's
    `state_dict`, `model_state_dict`, `model_state` or `model`. It recognises stem, blocks and
    shortcuts by the names of their entries, and takes all sizes from the entries' shapes. Tensors
    are copied, convolutions into channels last. Weights take the dtype of the first convolution,
    statistics the same but never narrower than float32, and float16 becomes float32; an entry that
    this dtype cannot hold exactly is refused. A convolution's bias is absorbed into the running
    mean after it. The counters `num_batches_tracked` are dropped: no BatchNorm with a fixed
    momentum reads them.

    Names and shapes do not tell everything. fresnet takes for granted strides of 2 in each stage
    but the first, pooling after a 7x7 stem and none after a 3x3 one, zero padding (option A) where
    a network with a 3x3 stem has no projections, projections without pooling and convolutions
    without standardised weights in ResNet V2, ReLU, and an eps of 1e-5. A network that was trained
    otherwise, such as timm's resnetaa and resnetblur, or one with dilation, loads but is another
    one; `dilate`, and other nodes in the tree, make of it what they can express.

    Args:
      mapping: names to tensors, as `model.state_dict()` gives them.
      stride_in_1x1: whether bottlenecks stride in their first convolution, as the paper's and
        Hugging Face's with `downsample_in_bottleneck` do.
    Returns:
      `Params(weights, stats)`.
    Raises:
      FresnetError: naming the entries that are missing, unexpected, misshapen or of another dtype
        or device than the rest, or the first layer that does not fit the one before it.
    """
    layout, given = canonical(_unwrapped(mapping))
    given = {name: _widened(value) for name, value in given.items()}
    return assemble("from_state_dict", recognised(given, stride_in_1x1), given, layout)


def to_state_dict(params: Params, layout: str = "torchvision") -> dict[str, Tensor]:
    """The network under another library's names, as its modules load it.

    Tensors are contiguous copies. Each norm gets a counter `num_batches_tracked` of 0. Names cannot
    say which norms are frozen, which stages dilate, and whether bottlenecks stride in their first
    convolution.

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
      FresnetError: if params is not a network, or has nodes or norms that the layout's library does
        not have. Sizes are not held against what that library can build.
    """
    check_params("to_state_dict", params)
    if layout not in LAYOUTS:
        raise FresnetError(f"to_state_dict expects layout to be one of {LAYOUTS}; got {layout!r}")
    foreign = foreign_to(layout, params)
    if foreign:
        raise FresnetError(
            f"to_state_dict expects a network that {layout} has; got {foreign}; save keeps all"
        )
    layout = layout_of(params, layout)
    state = named_leaves(params)
    if layout == "timm":
        state["fc.weight"] = state["fc.weight"][..., None, None]  # timm's V2 has a convolution
    return {name_in(layout, name): value for name, value in state.items()}


def named_leaves(params: Params) -> dict[str, Tensor]:
    """Contiguous copies of a network's leaves by canonical name, with a counter for each norm.

    Entries of a module stand together, as in a module's state dict.

    Raises:
      FresnetError: if two leaves have one name, as where a norm stands in a bias's place.
    """
    listed = names(params)
    if twice := [name for name in listed if listed.count(name) > 1]:
        raise FresnetError(f"an entry expects a name of its own; got two {twice[0]}")
    leaves = dict(zip(listed, tree.leaves(params), strict=True))
    modules: dict[str, list[str]] = {}
    for name in leaves:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    device = first_conv(params.weights).device
    state: dict[str, Tensor] = {}
    for module, entries in modules.items():
        for name in entries:
            state[name] = leaves[name].detach().clone(memory_format=torch.contiguous_format)
        if f"{module}.running_var" in state:
            state[f"{module}.num_batches_tracked"] = torch.tensor(0, device=device)
    return state


def untold(params: Params) -> list[str]:
    """The node types of a network that names do not tell: lost from a state dict."""
    found = kinds(params.weights)
    return [kind.__name__ for kind in (BottleneckV1, DilatedStage, FrozenNorm) if kind in found]


def _widened(value: Any) -> Any:
    """Files are stored in float16, networks do not run in it."""
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value


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
