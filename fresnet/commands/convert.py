"""`convert`: checkpoints under another library's names, or exported."""

import argparse
import os
from functools import partial
from pathlib import Path

from fresnet.errors import FresnetError
from fresnet.reading import read_json, write_json
from fresnet.weights.export import SUFFIXES, export
from fresnet.weights.files import load, save
from fresnet.weights.hub import config_of
from fresnet.weights.layouts import foreign_to
from fresnet.weights.notes import notes, texts_of
from fresnet.weights.state_dicts import to_state_dict
from fresnet.weights.storage import write_file, write_pickle, write_safetensors
from fresnet.weights.untold import untold


def convert(args: argparse.Namespace) -> str:
    if args.target.suffix not in (".safetensors", ".pth", ".pt", ".bin", *SUFFIXES):
        expected = "a .safetensors, .pth, .pt, .bin, .onnx or .pt2"
        raise FresnetError(f"OUT expects {expected}; got {args.target}")
    exported = args.target.suffix in SUFFIXES
    if exported and args.layout != "torchvision":
        raise FresnetError(
            f"{args.target} expects no --layout: it holds a program; got {args.layout}"
        )
    params = load(args.source, architecture=args.arch)
    if exported:
        export(params, args.target)
        return f"wrote {args.target}"
    known = notes(args.source)
    foreign = foreign_to(args.layout, params)
    if foreign and (args.target.suffix, args.layout) != (".safetensors", "torchvision"):
        raise FresnetError(
            f"{args.layout} has no {foreign}; fresnet keeps it in a .safetensors without --layout"
        )
    config = args.target.with_name("config.json") if args.layout == "huggingface" else None
    if config is not None:
        _check_replaceable(config)
    if args.target.suffix != ".safetensors":
        write_pickle("convert", to_state_dict(params, args.layout), args.target)
    elif args.layout != "torchvision":
        texts = texts_of("convert", params, *known)
        write_safetensors("convert", to_state_dict(params, args.layout), args.target, texts)
    else:
        save(params, args.target, **known._asdict())
        return f"wrote {args.target}" + (
            f"; torchvision has no {foreign}, so it is for fresnet alone" if foreign else ""
        )
    lost = untold(params)
    if args.target.suffix != ".safetensors":
        lost += [name for name, value in known._asdict().items() if value is not None]
    wrote = f"wrote {args.target}"
    if config is not None:
        write_file("convert", config, partial(write_json, value=config_of(params, known.labels)))
        lost = [name for name in lost if name not in ("BottleneckV1", "labels")]
        wrote += f" and {config}"
    return wrote + (f"; it does not tell {', '.join(lost)}" if lost else "")


def _check_replaceable(config: Path) -> None:
    """Refuse to replace what is no configuration of a ResNet."""
    if os.path.lexists(config):
        there = read_json(config)
        if not isinstance(there, dict) or there.get("model_type") != "resnet":
            raise FresnetError(
                f"{config} is not of a ResNet of Hugging Face, and would be replaced: convert to "
                "another folder"
            )
