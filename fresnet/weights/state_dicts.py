"""Parameters from and to the state dicts of other libraries.

A state dict is read in steps. The network's entries are found (`unwrapping`); their names become
the canonical ones (`names`); nodes are recognised (`recognition`); entries are assembled
(`assembly`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fresnet import tree
from fresnet.errors import FresnetError, shown, suggestion
from fresnet.network.check import check_params, first_conv
from fresnet.network.family import SPECS
from fresnet.network.nodes import (
    DilatedStage,
    FrozenNorm,
    NoHead,
    Norm,
    Params,
    Unit,
    beside,
    kinds,
    norm_shape,
    replaced,
)
from fresnet.network.specs import Spec
from fresnet.weights.assembly import assemble
from fresnet.weights.families import explained
from fresnet.weights.layouts import LAYOUTS, canonical, foreign_to, layout_of, name_in
from fresnet.weights.names import check_distinct, name_tree, names
from fresnet.weights.recognition import recognised
from fresnet.weights.untold import check_modules, like, tell_what_is_assumed
from fresnet.weights.unwrapping import network_in

SAME_NAMES: set[type] = {Norm, FrozenNorm, DilatedStage}
"""What a network has by itself or by `freeze` and `dilate`, and no architecture says."""


def from_state_dict(
    mapping: Mapping[str, Any], *, architecture: str | Spec | None = None
) -> Params:
    """The network in a state dict of torchvision, of timm or of Hugging Face.

    For Hugging Face that is `ResNetForImageClassification` or `ResNetModel`. The names of
    detectron2, OpenMMLab, fastai and repositories for CIFAR are read too. fresnet detects whose the
    names are, and finds the network's entries in a checkpoint: behind a prefix (such as `module.`),
    inside `state_dict`, `model` and the like, beside a criterion, a queue or a copy. What it leaves
    out it tells in a warning. An average of the weights, such as `state_dict_ema`, is taken before
    the weights. `docs/checkpoints.md` has the rules. Where no entries are a head's, the network has
    none, and its `forward` returns features.

    It recognises stem, blocks and shortcuts by the names of their entries, and takes all sizes from
    the entries' shapes. Tensors are copied, convolutions into channels last. Weights take the
    narrowest dtype that holds all of them exactly, where float16 counts as float32; statistics take
    the same, but at least float32. A convolution's bias is absorbed into the
    running mean after it. The counters `num_batches_tracked` are dropped: no BatchNorm with a fixed
    momentum reads them.

    Names and shapes do not tell everything; `architecture` does, and without it fresnet takes for
    granted:

    - that bottlenecks stride in their 3x3 convolution ("resnet50"), not in the first 1x1
      ("resnet50_v1"). Where the mapping lists no modules, as safetensors do not, a warning says so;
    - that a network with a 3x3 stem and no projections pads new channels at the end ("resnet20"),
      and not on both sides ("resnet20_centred"), nor has no shortcuts ("plain20"). A warning says
      so;
    - that maps are made smaller by the strides of convolutions ("resnet50d"), and not by pooling
      against aliasing ("resnetaa50d", "resnetblur50d"). Where the mapping lists no modules or
      timm's, a warning says so, and a blur among timm's is refused;
    - that norms without running statistics are norms in groups ("resnet50_gn"), and in ResNet V2
      with a 7x7 stem BiT's, with standardised weights ("resnetv2_50x1_bit"). A warning says so;
    - that projections in ResNet V2 pool after a deep stem ("resnetv2_50d") and else stride;
    - strides of 2 in each stage but the first, pooling after a 7x7 stem and none after a 3x3 one,
      ReLU, and an eps of 1e-5, for which see `with_eps`. A network that was trained otherwise, such
      as one with dilation, loads but is another one; `dilate`, and other nodes in the tree, make of
      it what they can express.

    Args:
      mapping: names to tensors, as `model.state_dict()` gives them.
      architecture: tells what names do not: a name in `SPECS`, which the sizes of the entries must
        fit too, but for classes and channels of images; or a `Spec`, of which types and depths are
        read and sizes are not.
    Returns:
      `Params(weights, stats)`.
    Raises:
      FresnetError: naming the entries that are missing, unexpected, misshapen or on another device
        than the rest, or the first layer that does not fit the one before it; or the family of
        networks that the entries look like; or if there are several networks, or nodes that are not
        the architecture's.
    """
    spec = spec_of("from_state_dict", architecture)
    network = network_in(mapping)
    layout, given = canonical(network.entries)
    given = {name: _widened(value) for name, value in given.items()}
    with explained(given, layout):
        nodes = recognised(given, spec)
        params = assemble("from_state_dict", nodes, _in_groups(nodes, given), layout)
    check_modules(params, network.modules)
    if spec is None:
        tell_what_is_assumed(params, layout, network.modules)
    check_architecture("from_state_dict", params, architecture, spec)
    return params


def to_state_dict(params: Params, layout: str = "torchvision") -> dict[str, Tensor]:
    """The network under another library's names, as its modules load it.

    A network without a head is written for modules that have none: torchvision's with
    `fc = torch.nn.Identity()`, timm's with `num_classes=0`, Hugging Face's `ResNetModel`.

    Tensors are contiguous copies. Each norm gets a counter `num_batches_tracked` of 0. Names cannot
    say which norms are frozen, which stages dilate or pool, which weights are standardised, and
    whether bottlenecks stride in their first convolution.

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
        not have, or norms of another number of groups than 32. Sizes are not held against what that
        library can build.
    """
    check_params("to_state_dict", params)
    if layout not in LAYOUTS:
        raise FresnetError(
            f"to_state_dict expects layout to be one of {LAYOUTS}; got {shown(layout)}"
        )
    foreign = foreign_to(layout, params)
    if foreign:
        raise FresnetError(
            f"to_state_dict expects a network that {layout} has; got {foreign}; save keeps all"
        )
    layout = layout_of(params, layout)
    state = named_leaves(_flat(params))
    for name, value in state.items():
        if name == "fc.weight" and layout in ("timm", "timm, deep"):
            state[name] = value[..., None, None]  # timm's V2 has a convolution
        if name.endswith(".se.conv.weight"):
            state[name] = value[:, :, 0]  # timm's goes along one dimension
    state = {name_in(layout, name): value for name, value in state.items()}
    if isinstance(params.weights.head, NoHead):  # Hugging Face's encoder is a module of its own
        return {name.removeprefix("resnet."): value for name, value in state.items()}
    return state


def named_leaves(params: Params) -> dict[str, Tensor]:
    """Contiguous copies of a network's leaves by canonical name, with a counter for each norm.

    Entries of a module stand together, as in a module's state dict.

    Raises:
      FresnetError: if two leaves have one name, as where a norm stands in a bias's place.
    """
    listed = names(params)
    check_distinct(listed)
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


def spec_of(caller: str, architecture: str | Spec | None) -> Spec | None:
    """The architecture that is meant.

    Raises:
      FresnetError: if it is neither a name in `SPECS` nor a `Spec`.
    """
    if architecture is None or isinstance(architecture, Spec):
        return architecture
    if not isinstance(architecture, str) or architecture not in SPECS:
        known = suggestion(architecture if isinstance(architecture, str) else "", SPECS)
        raise FresnetError(
            f"{caller} expects architecture to be a Spec or a name in SPECS; "
            f"got {shown(architecture)}: {known}"
        )
    return SPECS[architecture]


def check_architecture(
    caller: str, params: Params, architecture: str | Spec | None, spec: Spec | None
) -> None:
    """Refuse a network that is not what its architecture says: a name says sizes too, but classes.

    Raises:
      FresnetError: naming what differs.
    """
    if architecture is None or spec is None:
        return
    drawn = like(spec, params)
    both = kinds(params.weights), kinds(drawn.weights)
    expected, got = (sorted(kind.__name__ for kind in of - SAME_NAMES) for of in both[::-1])
    if expected != got:
        raise FresnetError(
            f"{caller} expects nodes {expected}, as architecture says; the network has {got}"
        )
    sizes, found = (
        {name: tuple(leaf.shape) for name, leaf in zip(names(one), tree.leaves(one), strict=True)}
        for one in (drawn, params)
    )
    for name in {**sizes, **found} if isinstance(architecture, str) else ():
        if sizes.get(name) != found.get(name):
            raise FresnetError(
                f"{caller} expects {name} to be {sizes.get(name, 'nothing')}, as architecture "
                f"says; got {found.get(name, 'nothing')}"
            )


def _in_groups(nodes: Params, given: Mapping[str, Any]) -> dict[str, Any]:
    """The entries, those of norms in groups `[g c/g]` instead of `[c]`."""
    shaped = dict(given)

    def look(unit: Unit) -> None:
        for name in map(str, unit.norm):
            value = given.get(name)
            if isinstance(value, Tensor) and value.ndim == 1:
                shaped[name] = value.reshape(norm_shape(type(unit.norm), len(value)))

    beside(look, name_tree(nodes).weights)
    return shaped


def _flat(params: Params) -> Params:
    """The network with leaves of norms `[c]`, which in groups are `[g c/g]`."""

    def flat(unit: Unit) -> Unit:
        return unit._replace(norm=tree.map(torch.flatten, unit.norm))

    return params._replace(weights=replaced(flat, params.weights))


def _widened(value: Any) -> Any:
    """Files are stored in float16, networks do not run in it."""
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value
