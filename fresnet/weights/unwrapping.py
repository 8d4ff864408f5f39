"""Which entries of a checkpoint are the network's.

Training scripts wrap a state dict into others, put prefixes before its names, and keep averages,
momentum copies, criteria and queues beside it. The rules by which they are told apart stand here
and in docs/checkpoints.md.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fresnet.errors import FresnetError, describe, listed

AVERAGES = {"ema", "average", "averaged", "avg", "swa", "teacher"}
"""Words in the name of an average of the weights, which is what its maker evaluates."""

COPIES = {"k", "key", "momentum", "target", "attacker"}
"""Words in the name of a network that training keeps beside its own: `encoder_k`, `target_net`."""

LONGEST = 1000
"""The most letters of an entry's name, so that prefixes are soon told apart."""

DEEPEST = 200
"""The most letters of the names on the way to a mapping within mappings."""

STEMS = (
    "conv1.weight",
    "conv1.0.weight",
    "stem.conv.weight",
    "stem.conv1.weight",
    "stem.0.weight",
    "stem.0.conv.weight",
    "embedder.embedder.convolution.weight",
    "0.weight",
)
"""What the first convolution is called."""

BLOCK = re.compile(
    r"((?:(?!layer\d|stages\.)\w+\.)*?)"
    r"(?:layer1\.\d+|stages\.0\.blocks\.\d+|encoder\.stages\.0\.layers\.\d+|res2\.\d+"
    r"|4\.\d+(?=\.conv1\.))\."
)
"""How names in the first stage begin, behind the prefix that a parent module, DataParallel or
`torch.compile` puts before all names."""

HEADS = (
    *("fc", "fc.1", "head.fc", "classifier.1", "classifier", "head", "linear", "last_linear"),
    "stem.fc",
)
"""What the last layer is called."""

PROJECTION = re.compile(
    r"(?:fc\.\d+|projection_head|prediction_head|projector|predictor|prototypes)\."
)
"""What self-supervised training puts behind an encoder, in place of a last layer."""


class Found(NamedTuple):
    """The one network in a checkpoint.

    entries: by names without prefix; those of its head are `fc.`.
    modules: the names of its modules, without prefix, where a state dict of PyTorch lists them.
    """

    entries: dict[str, Any]
    modules: set[str]


def network_in(mapping: Mapping[str, Any]) -> Found:
    """The one network in a checkpoint. What is left out is told in a warning.

    Raises:
      FresnetError: if it is no mapping of names, or if it holds several networks or heads.
    """
    mapping = _unwrapped(mapping)
    modules = getattr(mapping, "_metadata", None) or ()
    entries = {n: mapping[n] for n in mapping if n.rpartition(".")[2] != "n_averaged"}
    prefixes = _prefixes(entries)
    behind = _behind(entries, prefixes)
    sizes = [_sizes(entries[name] for name in behind[prefix]) for prefix in prefixes]
    prefix = prefixes[_chosen(prefixes, sizes, "entries behind")] if prefixes else ""
    head = _head(entries, _places_of_head(prefix))
    last = [name.removeprefix(prefix) for name in head]
    inside = [
        name
        for name in behind.get(prefix, entries)
        if not _is_projection(name.removeprefix(prefix), last)
    ]
    found = {name.removeprefix(prefix): entries[name] for name in inside if name not in head}
    found |= {f"fc.{name.rpartition('.')[2]}": entries[name] for name in head}
    used = {*inside, *head}
    if _is_average(prefix):  # of the others it has been told
        used.update(*(names for other, names in behind.items() if other != prefix))
        used.update(name for name in entries if _is_head(name))
    if left_out := [name for name in entries if name not in used]:
        doubt = (
            "if they are of a layer between its body and its head, the logits differ"
            if head
            else "it has no head: if one of them is, call that fc.weight and fc.bias"
        )
        _tell(f"entries beside the network are left out: {listed(left_out)}; {doubt}")
    listed_there = {name for name in modules if isinstance(name, str) and name.startswith(prefix)}
    return Found(found, {name.removeprefix(prefix) for name in listed_there})


def _unwrapped(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries themselves, without a training script's wrappers."""
    if isinstance(mapping, Mapping) and _is_swapped(mapping):
        _tell("the average under 'state_dict' is taken, where MMEngine and Lightning save it")
        mapping = mapping["state_dict"]
    if not isinstance(mapping, Mapping):
        raise FresnetError(
            "from_state_dict expects a mapping of names to tensors, as model.state_dict() "
            f"gives; got {describe(mapping)}"
        )
    within = list(mappings_in(mapping))
    holders = [(path, one) for path, one in within if any(_is_of_network(*e) for e in one.items())]
    if holders:
        paths, networks = zip(*holders, strict=True)
        sizes = [_sizes(one.values()) for one in networks]
        chosen = _chosen(paths, sizes, "state dicts under")
        mapping = networks[chosen]
        rest = [repr(path) for i, path in enumerate(paths) if i != chosen]
        if rest and not _is_average(paths[chosen]):
            _tell(f"state dicts of copies are left out: {listed(rest)}")
    else:  # an error tells of the names
        mapping = max((one for _, one in within), key=lambda one: len(_sizes(one.values())))
    if strange := [name for name in mapping if not isinstance(name, str)]:
        raise FresnetError(
            f"from_state_dict expects names to be strings; got {describe(strange[0])}"
        )
    if any(len(name) > LONGEST for name in mapping):
        raise FresnetError(f"from_state_dict expects names of at most {LONGEST} letters")
    return mapping


def _is_swapped(mapping: Mapping[str, Any]) -> bool:
    """Whether the average took the place of the weights when they were saved."""
    raw = mapping.get("ema_state_dict")
    theirs = "averaging_state" in mapping or (isinstance(raw, Mapping) and "steps" in raw)
    return theirs and "state_dict" in mapping


def mappings_in(mapping: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """This mapping and the mappings in it, each with the names on the way there.

    Each is met once: a file of a few kilobytes can name one a thousand times, within itself too.
    """
    waiting, seen = [("", mapping)], set[int]()
    for path, one in waiting:
        if id(one) not in seen:
            seen.add(id(one))
            yield path, one
            waiting += [
                (further, below)
                for name, below in one.items()
                if isinstance(below, Mapping)
                and len(further := f"{path}.{name}".removeprefix(".")) <= DEEPEST
            ]


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


def _chosen(names: Sequence[str], sizes: Sequence[list[Any]], what: str) -> int:
    """Which one is no copy; or, if an average of it stands there too, the average.

    Args:
      sizes: for each name, the sizes of its tensors. An average has those of the weights.
    Raises:
      FresnetError: if there are several.
    """
    averages = [i for i, name in enumerate(names) if _is_average(name)]
    others = [i for i, name in enumerate(names) if not _words(name) & (AVERAGES | COPIES)]
    match averages, others:
        case [average], [weights] if sizes[average] == sizes[weights]:
            _tell(
                f"an average of the weights, {names[average]!r}, stands beside the weights "
                f"{names[weights]!r}: it is taken; for the others, pass them alone to "
                "from_state_dict"
            )
            return average
    kept = [*averages, *others] or range(len(names))
    if len(kept) > 1:
        shown = listed([repr(names[i]) if names[i] else "no name" for i in kept])
        raise FresnetError(
            f"from_state_dict expects one network; got {what} {shown}: pass those of one"
        )
    return kept[0]


def _words(name: str) -> set[str]:
    return set(re.split(r"[._]", name))


def _is_average(name: str) -> bool:
    """Whether a wrapper or a prefix is called as an average is."""
    return bool(_words(name) & AVERAGES)


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


def _is_projection(name: str, head: Sequence[str]) -> bool:
    """Whether this stands behind an encoder, and not in its head.

    >>> _is_projection("fc.0.weight", []), _is_projection("fc.0.weight", ["fc.1.weight"])
    (True, False)
    """
    in_head = name.startswith("fc.") and "fc.1.weight" in head
    return bool(PROJECTION.match(name)) and not in_head


def _is_head(name: str) -> bool:
    return name.rpartition(".")[0].endswith(HEADS)


def _is_matrix(value: object) -> bool:
    """Whether this is a matrix, or a 1x1 convolution, which timm's V2 has in a head."""
    return isinstance(value, Tensor) and (value.ndim == 2 or value.shape[2:] == (1, 1))


def _tell(what: str) -> None:
    warnings.warn(what, stacklevel=2)
