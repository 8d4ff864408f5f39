"""`convert`: checkpoints under another library's names, or exported."""

import argparse

from fresnet.errors import FresnetError
from fresnet.weights.export import SUFFIXES, export
from fresnet.weights.files import load, save
from fresnet.weights.layouts import foreign_to
from fresnet.weights.notes import notes, texts_of
from fresnet.weights.state_dicts import to_state_dict
from fresnet.weights.storage import write_pickle, write_safetensors
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
    if args.target.suffix != ".safetensors":
        write_pickle("convert", to_state_dict(params, args.layout), args.target)
    elif args.layout != "torchvision":
        write_safetensors(
            "convert",
            to_state_dict(params, args.layout),
            args.target,
            texts_of("convert", params, *known),
        )
    else:
        save(params, args.target, **known._asdict())
        foreign = foreign_to("torchvision", params)
        return f"wrote {args.target}" + (
            f"; torchvision has no {foreign}, so it is for fresnet alone" if foreign else ""
        )
    lost = untold(params)
    if args.target.suffix != ".safetensors":
        lost += [name for name, value in known._asdict().items() if value is not None]
    return f"wrote {args.target}" + (f"; it does not tell {', '.join(lost)}" if lost else "")
