"""Which entries of a checkpoint are the network's.

Training scripts wrap a state dict into others, put prefixes before its names, and keep averages,
momentum copies, criteria and queues beside it. The rules by which they are told apart stand here
and in docs/checkpoints.md.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from fresnet.errors import FresnetError, describe, listed

AVERAGES = {"ema", "average", "averaged", "avg", "swa", "teacher"}
"""Words in the name of an average of the weights, which is what its maker evaluates."""

COPIES = {"encoder_k", "momentum_encoder", "momentum_backbone", "key_encoder", "target_encoder"}
"""Prefixes of networks that self-supervised training keeps to compare with."""

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module")
"""Under which names are looked for where no network is found, so that an error tells of them."""

WRAPPINGS = 10

LONGEST = 1000
"""The most letters of an entry's name, so that prefixes are soon told apart."""

STEMS = (
    "conv1.weight",
    "conv1.0.weight",
    "stem.conv.weight",
    "stem.conv1.weight",
    "embedder.embedder.convolution.weight",
)
"""What the first convolution is called."""

BLOCK = re.compile(
    r"((?:(?!layer\d|stages\.)\w+\.)*?)"
    r"(?:layer1\.\d+|stages\.0\.blocks\.\d+|encoder\.stages\.0\.layers\.\d+)\."
)
"""How names in the first stage begin, behind the prefix that a parent module, DataParallel or
`torch.compile` puts before all names."""

HEADS = ("fc", "fc.1", "head.fc", "classifier.1", "classifier", "head", "linear", "last_linear")
"""What the last layer is called."""


def network_entries(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the one network in a checkpoint, without prefix; those of its head are `fc.`.

    What is left out is told in a warning.

    Raises:
      FresnetError: if it is no mapping of names, or if it holds several networks or heads.
    """
    entries = _unwrapped(mapping)
    entries = {n: entries[n] for n in entries if n.rpartition(".")[2] != "n_averaged"}
    prefixes = _prefixes(entries)
    behind = _behind(entries, prefixes)
    sizes = {prefix: _sizes(entries[name] for name in names) for prefix, names in behind.items()}
    prefix = _chosen(sizes, "entries behind") if prefixes else ""
    inside = behind.get(prefix, list(entries))
    head = _head(entries, _places_of_head(prefix))
    found = {name.removeprefix(prefix): entries[name] for name in inside if name not in head}
    found |= {f"fc.{name.rpartition('.')[2]}": entries[name] for name in head}
    used = {*inside, *head}
    if _is_average(prefix):  # of the others it has been told
        used.update(*behind.values())
        used.update(name for name in entries if _is_head(name))
    if left_out := [name for name in entries if name not in used]:
        doubt = (
            "if they are of a layer between its body and its head, the logits differ"
            if head
            else "it has no head: if one of them is, call that fc.weight and fc.bias"
        )
        _tell(f"entries beside the network are left out: {listed(left_out)}; {doubt}")
    return found


def _unwrapped(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries themselves, without a training script's wrappers."""
    for _ in range(WRAPPINGS):
        if not isinstance(mapping, Mapping):
            raise FresnetError(
                "from_state_dict expects a mapping of names to tensors, as model.state_dict() "
                f"gives; got {describe(mapping)}"
            )
        if any(_is_of_network(*entry) for entry in mapping.items()):
            break
        raw = mapping.get("ema_state_dict")
        if isinstance(raw, Mapping) and "steps" in raw and "state_dict" in mapping:
            # MMEngine swaps the two before it saves.
            _tell("the average that MMEngine keeps under 'state_dict' is taken")
            mapping = mapping["state_dict"]
            continue
        seen: set[int] = set()
        tensors = {name: dict(tensors_in(value, seen)) for name, value in mapping.items()}
        holders = [
            name
            for name, within in tensors.items()
            if any(_is_of_network(*entry) for entry in within.items())
        ] or [name for name in WRAPPERS if tensors.get(name)][:1]
        if not holders:
            break
        sizes = {str(name): _sizes(tensors[name].values()) for name in holders}
        chosen = _chosen(sizes, "state dicts under")
        mapping = next(mapping[name] for name in holders if str(name) == chosen)
    else:
        raise FresnetError(f"from_state_dict expects fewer than {WRAPPINGS} wrappers")
    if strange := [name for name in mapping if not isinstance(name, str)]:
        raise FresnetError(
            f"from_state_dict expects names to be strings; got {describe(strange[0])}"
        )
    if any(len(name) > LONGEST for name in mapping):
        raise FresnetError(f"from_state_dict expects names of at most {LONGEST} letters")
    return mapping


def tensors_in(value: object, seen: set[int]) -> Iterator[tuple[object, Tensor]]:
    """The tensors in a mapping, and in mappings in it, with their own names.

    What stands in `seen` by its identity is passed over, and what is found is put there: a file of
    a few kilobytes can name one mapping a thousand times, within itself too.
    """
    waiting = [value]
    while waiting:
        mapping = waiting.pop()
        if isinstance(mapping, Mapping) and id(mapping) not in seen:
            seen.add(id(mapping))
            yield from ((n, below) for n, below in mapping.items() if isinstance(below, Tensor))
            waiting += mapping.values()


def _is_of_network(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and bool(BLOCK.match(name))


def _prefixes(entries: Mapping[str, Any]) -> list[str]:
    """Behind which prefixes there is a network: a first stage, and a stem if any has one."""
    found = sorted({match[1] for name in entries if (match := BLOCK.match(name))})
    whole = [prefix for prefix in found if any(prefix + stem in entries for stem in STEMS)]
    return whole or found


def _behind(entries: Mapping[str, Any], prefixes: Sequence[str]) -> dict[str, list[str]]:
    """For each prefix the names behind it that are not behind a longer one."""
    behind: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    lengths = sorted({len(prefix) for prefix in prefixes}, reverse=True)
    for name in entries:
        longest = next((name[:length] for length in lengths if name[:length] in behind), None)
        if longest is not None:
            behind[longest].append(name)
    return behind


def _sizes(values: Any) -> list[Any]:
    """The sizes of all tensors, but for counters."""
    return sorted(tuple(v.shape) for v in values if isinstance(v, Tensor) and v.ndim)


def _chosen(sizes: Mapping[str, list[Any]], what: str) -> str:
    """The one that is no momentum copy; or, if an average of it stands there too, the average.

    Args:
      sizes: for each name, the sizes of its tensors. An average has those of the weights.
    Raises:
      FresnetError: if there are several.
    """
    averages = [name for name in sizes if _is_average(name)]
    others = [n for n in sizes if n not in averages and COPIES.isdisjoint(n.split("."))]
    match averages, others:
        case [average], [weights] if sizes[average] == sizes[weights]:
            _tell(
                f"an average of the weights, {average!r}, stands beside the weights {weights!r}: "
                "it is taken; for the others, pass them alone to from_state_dict"
            )
            return average
    kept = [*averages, *others] or list(sizes)
    if len(kept) > 1:
        raise FresnetError(
            f"from_state_dict expects one network; got {what} {listed(list(map(repr, kept)))}: "
            "pass those of one"
        )
    return kept[0]


def _is_average(name: str) -> bool:
    """Whether a wrapper or a prefix is called as an average is."""
    return not AVERAGES.isdisjoint(re.split(r"[._]", name))


def _places_of_head(prefix: str) -> list[str]:
    """The prefixes behind which the head may stand: the network's own, and those around it.

    An average has a head of its own.

    >>> _places_of_head("module.encoder."), _places_of_head("ema.encoder.")
    (['', 'module.', 'module.encoder.'], ['ema.', 'ema.encoder.'])
    """
    parts = prefix.split(".")[:-1]
    places = ["".join(f"{part}." for part in parts[:i]) for i in range(len(parts) + 1)]
    return [place for place in places if _is_average(place) or not _is_average(prefix)]


def _head(entries: Mapping[str, Any], places: Sequence[str]) -> list[str]:
    """The names of the one last layer in these places; none if there is no such layer.

    Raises:
      FresnetError: if there are several.
    """
    heads = [
        f"{place}{head}"
        for place in places
        for head in HEADS
        if _is_matrix(entries.get(f"{place}{head}.weight"))
    ]
    if len(heads) > 1:
        raise FresnetError(
            f"from_state_dict expects one head; got {' and '.join(heads)}: leave out the others"
        )
    names = [f"{head}.{leaf}" for head in heads for leaf in ("weight", "bias")]
    return [name for name in names if name in entries]


def _is_head(name: str) -> bool:
    return name.rpartition(".")[0].endswith(HEADS)


def _is_matrix(value: object) -> bool:
    """Whether this is a matrix, or a 1x1 convolution, which timm's V2 has in a head."""
    return isinstance(value, Tensor) and (value.ndim == 2 or value.shape[2:] == (1, 1))


def _tell(what: str) -> None:
    warnings.warn(what, stacklevel=2)
