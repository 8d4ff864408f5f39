"""How well networks know when they are right, alone and together, on Fashion-MNIST.

    python examples/fashion.py --seed 0 --out runs/fashion/seed0
    python examples/fashion.py --seed 1 --out runs/fashion/seed1
    python examples/fashion_ensemble.py runs/fashion/seed?/resnet20.safetensors

All networks run at once, by one vmapped forward pass. The ensemble's probabilities are the mean of
its members'. The example prints errors, losses and calibration errors on the test images, leaves
them in ensemble.csv, and draws accuracy against confidence.

Source: Lakshminarayanan, Pritzel & Blundell 2017, arXiv:1612.01474 (deep ensembles); Guo, Pleiss,
Sun & Weinberger 2017, arXiv:1706.04599 (calibration error).
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from clothes import FOLDER, load, normalised
from ensemble import draw, reliability
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import nll_loss

import fresnet
from fresnet import FresnetError, Params, tree

CHUNK = 1000  # images at once
BINS = 15  # as Guo et al. have it


class Score(NamedTuple):
    """Of probabilities: the share of images they get wrong, their loss, their calibration error."""

    error: float
    loss: float
    calibration_error: float


def probabilities_of(networks: list[Params], images: Tensor) -> Tensor:
    """What each network gives to each class of each image, `[networks images classes]`."""
    together = vmap(fresnet.forward, (0, None))
    stacked = tree.stack(networks)
    parts = [together(stacked, normalised(part)) for part in images.split(CHUNK)]
    return torch.cat(parts, 1).softmax(2)


def score(probabilities: Tensor, labels: Tensor) -> Score:
    """The scores of probabilities `[n classes]`."""
    *_, gap = reliability(probabilities, labels, BINS)
    wrong = (probabilities.argmax(1) != labels).float().mean()
    return Score(wrong.item(), nll_loss(probabilities.log(), labels).item(), gap.item())


def write(scores: list[Score], path: Path) -> None:
    """Write the scores of the members and, last, of the ensemble."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Score._fields)
        writer.writerows([f"{value:.5f}" for value in row] for row in scores)


def read(path: Path) -> list[Score]:
    _, *lines = csv.reader(path.read_text().splitlines())
    return [Score(*map(float, line)) for line in lines]


def table(scores: list[Score]) -> str:
    """The least, mean and greatest score of a member, and the ensemble's, in Markdown."""
    *members, ensemble = scores
    lines = [
        "| | test error | loss | calibration error |",
        "| --- | ---: | ---: | ---: |",
    ]
    rows = {
        "best member": map(min, *members),
        "mean member": (sum(column) / len(members) for column in zip(*members, strict=True)),
        "worst member": map(max, *members),
        f"ensemble of {len(members)}": ensemble,
    }
    for name, (error, loss, gap) in rows.items():
        lines.append(f"| {name} | {error:.2%} | {loss:.4f} | {gap:.2%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=str(__doc__).splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("networks", type=Path, nargs="+", help="files of networks of one kind")
    parser.add_argument("--data", type=Path, default=FOLDER, help="the folder of the idx files")
    parser.add_argument("--out", type=Path, default=Path("runs/fashion"), help="output folder")
    args = parser.parse_args()
    if len(args.networks) < 2:
        parser.error("an ensemble has at least two networks; got one")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        networks = [fresnet.load(path) for path in args.networks]
        _, (images, labels) = load(args.data)
        with torch.no_grad():
            each = probabilities_of(networks, images)
    except FresnetError as error:
        sys.exit(str(error))
    together = each.mean(0)
    write([score(one, labels) for one in (*each, together)], args.out / "ensemble.csv")
    print(table(read(args.out / "ensemble.csv")))
    curves = {"first member": reliability(each[0], labels, BINS)}
    curves |= {"ensemble": reliability(together, labels, BINS)}
    draw(curves, args.out / "calibration.png", images=f"{len(labels):,} test images")


if __name__ == "__main__":
    fresnet.keep_pages()
    main()
