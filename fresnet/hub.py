"""Weights in repositories of Hugging Face."""

import json
import os
import re
from pathlib import Path
from typing import Any

from fresnet.errors import FresnetError, reason

ARCHITECTURE = r"(wide_)?res(net|next)\d+[cd]?(_\d+x\d+d|_2)?"
"""timm's names of what networks here compute. Others share their entries, not their numbers."""


def is_repository(path: str | os.PathLike[str]) -> bool:
    """Whether this can only be "owner/name": there is no such file, and no folder for one."""
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
      FresnetError: if they cannot be had, or if the configuration beside them asks for what a
        network here does not do.
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
        weights = fetch("model.safetensors", "pytorch_model.bin")
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise FresnetError(
            "there is no such file, and no such repository with a config.json and weights to be "
            f"had: {reason(error)}"
        ) from error
    _check_config(config)
    return weights, bool(config.get("downsample_in_bottleneck"))


def _check_config(config: Any) -> None:
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
