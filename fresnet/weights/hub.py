"""Weights in repositories of Hugging Face, and in folders of the same layout."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from fresnet.errors import FresnetError, describe, reason
from fresnet.network.check import first_conv
from fresnet.network.family import RESNET50, SPECS
from fresnet.network.nodes import BasicBlock, BottleneckV1, NoHead, Params, blocks_of, last_layer
from fresnet.network.specs import Spec
from fresnet.reading import read_json
from fresnet.weights.formats import FORMATS, refusal

INDEX = ".safetensors.index.json"
"""How the file is called that lists which of several files holds an entry."""

WEIGHTS = ("model.safetensors", f"model{INDEX}", "pytorch_model.bin")

CONFIG = "config.json"

PRUNED = ("ecaresnet50d_pruned", "ecaresnet101d_pruned")
"""timm's names that no spec can have, because the widths differ in every block."""


def is_repository(path: str | os.PathLike[str]) -> bool:
    """Whether this can only be "owner/name" at Hugging Face, since no path here is "owner"."""
    owner, *rest = str(path).split("/")
    return (
        isinstance(path, str)
        and len(rest) == 1
        and all(re.fullmatch(r"\w[\w.-]*", part) for part in (owner, *rest))
        and not rest[0].endswith((".safetensors", ".pth", ".pt", ".bin", ".ckpt", *FORMATS))
        and not os.path.exists(owner)
    )


def download(repository: str) -> tuple[Path, Spec | None]:
    """The weights of a repository, and its architecture if names would not tell it.

    Raises:
      FresnetError: if the weights cannot be had, or if the configuration beside them asks for
        something that no network here does.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise FresnetError(
            "there is no such file, and a repository takes huggingface_hub: "
            "pip install 'fresnet[io]'"
        ) from error

    def fetch(*names: str) -> Path:
        *others, last = names
        for name in others:
            try:
                return Path(hf_hub_download(repository, name))
            except EntryNotFoundError:
                continue
        return Path(hf_hub_download(repository, last))

    try:
        config = read_json(fetch(CONFIG))
        weights = fetch(*WEIGHTS)
        if weights.name.endswith(INDEX):
            for shard in shards(weights):
                fetch(shard)
    except Exception as error:  # a connection may fail in any way
        raise FresnetError(
            "there is no such file, and no such repository with a config.json and weights to be "
            f"had: {reason(error)}"
        ) from error
    return weights, _architecture(config)


def local(path: Path) -> tuple[Path, Spec | None]:
    """The same for a file, or for a folder that `save_pretrained` wrote.

    A configuration beside a file is read if the file has a name that Hugging Face gives.

    Raises:
      FresnetError: if the configuration asks for something that no network here does.
    """
    try:
        if path.is_dir():
            found = [path / name for name in WEIGHTS if (path / name).exists()]
            if not found:
                others = sorted(map(str, path.glob("*.safetensors")))
                hint = f"; did you mean {others[-1]}?" if others else ""
                raise refusal(path, f"the folder has none of {', '.join(WEIGHTS)}{hint}")
            path = found[0]
        config = path.parent / CONFIG
        if path.name in WEIGHTS and os.path.lexists(config):
            return path, _architecture(read_json(config))
    except (OSError, ValueError) as error:
        raise FresnetError(reason(error)) from error
    return path, None


def configuration(path: str | os.PathLike[str]) -> Any:
    """What the configuration of a repository says, or that beside a file; None if there is none.

    Raises:
      FresnetError: if it cannot be read.
    """
    if is_repository(path):
        from huggingface_hub import hf_hub_download

        return read_json(Path(hf_hub_download(str(path), CONFIG)))
    file, _ = local(Path(path))
    config = file.parent / CONFIG
    return read_json(config) if file.name in WEIGHTS and os.path.lexists(config) else None


def config_of(params: Params, labels: Sequence[str] | None) -> dict[str, Any]:
    """The configuration by which Hugging Face's library makes this network of its own."""
    weights = params.weights
    stages = [blocks_of(stage) for stage in weights.stages]
    first = stages[0][0]
    bare = isinstance(weights.head, NoHead)
    classes = [] if bare else labels or [f"LABEL_{i}" for i in range(len(weights.head.bias))]
    return {
        "model_type": "resnet",
        "architectures": ["ResNetModel" if bare else "ResNetForImageClassification"],
        "num_channels": first_conv(weights).shape[1],
        "embedding_size": weights.stem.layer.conv.shape[0],
        "hidden_sizes": [_width(blocks[0]) for blocks in stages],
        "depths": [len(blocks) for blocks in stages],
        "layer_type": "basic" if isinstance(first, BasicBlock) else "bottleneck",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": isinstance(first, BottleneckV1),
        "id2label": {str(i): label for i, label in enumerate(classes)},
        "label2id": {label: i for i, label in enumerate(classes)},
    }


def _width(block: Any) -> int:
    """How many channels a block puts out."""
    return int(getattr(block, last_layer(block)).conv.shape[0])


def shards(index: Path) -> list[str]:
    """The names of the files that an index lists, which stand beside it.

    Raises:
      FresnetError: if it lists none.
    """
    found = read_json(index)
    files = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise FresnetError(f"{index.name} lists no files")
    return sorted({Path(name).name for name in files.values()})


def _architecture(config: Any) -> Spec | None:
    """The architecture that a configuration tells, if it is not the one that names tell.

    Raises:
      FresnetError: if no network here computes what this configuration says.
    """
    if not isinstance(config, dict):
        raise FresnetError("its config.json is no object")
    architecture = str(config.get("architecture", ""))
    if architecture not in ("", *SPECS, *PRUNED):
        shown = shorten(architecture, 80)
        raise FresnetError(f"its architecture is {shown}, not a ResNet that fresnet has")
    if config.get("model_args"):
        shown = shorten(str(config["model_args"]), 80)
        raise FresnetError(f"its architecture has arguments of its own: {shown}")
    if config.get("hidden_act", "relu") != "relu":
        shown = shorten(str(config["hidden_act"]), 80)
        raise FresnetError(f"its activation is {shown}; networks here have relu")
    if config.get("downsample_in_first_stage"):
        raise FresnetError("its first stage strides, which no network here does")
    if not config.get("downsample_in_bottleneck") or config.get("layer_type") == "basic":
        return SPECS.get(architecture)
    depths = config.get("depths", RESNET50.depths)
    if not isinstance(depths, list | tuple):
        raise FresnetError(f"its depths are {describe(depths)}, and not numbers of blocks")
    return Spec(BottleneckV1, tuple(depths))
