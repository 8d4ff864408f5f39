"""`summary` and `models`: networks in tables."""

import argparse
import os

from fresnet.errors import FresnetError, suggestion
from fresnet.network.family import SPECS
from fresnet.network.init import init
from fresnet.network.nodes import Params
from fresnet.network.summary import summary
from fresnet.weights import published
from fresnet.weights.files import load
from fresnet.weights.notes import notes


def look_at(args: argparse.Namespace) -> str:
    params, size = _network(args), args.image_size
    if size is None:
        preset = None if args.network in SPECS else notes(args.network).preset
        size = preset.crop if preset else 224
    table = summary(params, size)
    return table.markdown() if args.markdown else str(table)


def family(args: argparse.Namespace) -> str:
    found = published.rows(args.pattern)
    return published.markdown(found) if args.markdown else published.table(found)


def _network(args: argparse.Namespace) -> Params:
    """A member of the family without values, or the network in a checkpoint."""
    name = args.network
    if name in SPECS:
        return init(0, SPECS[name], num_classes=args.classes, device="meta")
    if os.path.exists(name) or "/" in name or "." in name:
        return load(name, architecture=args.arch)
    raise FresnetError(f"unknown network {name!r}; {suggestion(name, SPECS)}")
