"""Weights in repositories of Hugging Face, and in folders of the same layout."""

import json
import os
import re
from pathlib import Path

from fresnet.errors import FresnetError, reason

WEIGHTS = ("model.safetensors", "pytorch_model.bin")

ARCHITECTURE = r"((wide_|se)?res(net|next)\d+[cdst]?(_\d+x\d+d|_2)?|resnetv2_(50|101|152))"
"""timm's names of the networks that fresnet computes. Others share entries, but not results."""


def is_repository(path: str | os.PathLike[str]) -> bool:
    """Whether this can only be "owner/name" at Hugging Face, since no path here is "owner"."""
    owner, *rest = str(path).split("/")
    return (
        isinstance(path, str)
        and len(rest) == 1
        and all(re.fullmatch(r"\w[\w.-]*", part) for part in (owner, *rest))
        and not rest[0].endswith((".safetensors", ".pth", ".pt", ".bin", ".ckpt"))
        and not Path(owner).exists()
    )


def download(repository: str) -> tuple[Path, bool]:
    """The weights of a repository, and whether its bottlenecks stride in their first convolution.

    Raises:
      FresnetError: if the weights cannot be had, or if the configuration beside them asks for
        something that no network here does.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
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
        config = json.loads(fetch("config.json").read_bytes())
        weights = fetch(*WEIGHTS)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise FresnetError(
            "there is no such file, and no such repository with a config.json and weights to be "
            f"had: {reason(error)}"
        ) from error
    return weights, _strides_in_1x1(config)


def local(path: Path) -> tuple[Path, bool]:
    """The same for a file, or for a folder that `save_pretrained` wrote.

    A configuration beside a file is read if the file has a name that Hugging Face gives.

    Raises:
      FresnetError: if the configuration asks for something that no network here does.
    """
    try:
        if path.is_dir():
            path = next((path / name for name in WEIGHTS if (path / name).exists()), path)
        config = path.parent / "config.json"
        if path.name in WEIGHTS and config.exists():
            return path, _strides_in_1x1(json.loads(config.read_bytes()))
    except (OSError, ValueError) as error:
        raise FresnetError(reason(error)) from error
    return path, False


def _strides_in_1x1(config: object) -> bool:
    """Whether bottlenecks stride in their first convolution.

    Raises:
      FresnetError: if no network here computes what this configuration says.
    """
    if not isinstance(config, dict):
        raise FresnetError("its config.json is no object")
    architecture = config.get("architecture")
    if architecture is not None and not re.fullmatch(ARCHITECTURE, str(architecture)):
        raise FresnetError(f"its architecture is {architecture}, not a plain ResNet")
    if config.get("model_args"):
        raise FresnetError(f"its architecture has arguments of its own: {config['model_args']}")
    if config.get("hidden_act", "relu") != "relu":
        raise FresnetError(f"its activation is {config['hidden_act']}; networks here have relu")
    if config.get("downsample_in_first_stage"):
        raise FresnetError("its first stage strides, which no network here does")
    return bool(config.get("downsample_in_bottleneck"))
