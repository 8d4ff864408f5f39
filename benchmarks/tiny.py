"""What calls cost: images of 32 px, on which hardly anything is computed.

    python benchmarks/tiny.py                    # prints tables

Both sides run layer by layer, as Python calls them: `fresnet.forward` beside torchvision's module,
and a training step of each.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from harness import Comparison, Run, main
from torch import Tensor
from training_step import ours, torchvision
from transforms import images

import fresnet

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import reference


def module(spec: fresnet.Spec, x: Tensor) -> Run:
    network = reference.module(spec, 0, dtype=torch.float32).eval()
    return torch.no_grad()(lambda: network(x))


def forward(spec: fresnet.Spec, x: Tensor) -> Run:
    params = reference.params(reference.module(spec, 0, dtype=torch.float32))
    return torch.no_grad()(lambda: fresnet.forward(params, x))


def comparisons(full: bool) -> Iterator[Comparison]:
    for name in ("ResNet-18", "ResNet-50"):
        spec, (x, _) = fresnet.SPECS[name.replace("-", "").lower()], images(1, 32)
        layers = {"torchvision": partial(module, spec, x), "fresnet": partial(forward, spec, x)}
        yield Comparison(f"Layer by layer, {name}, 1 image of 32 px", layers, 1, rounds=101)
    x, y = images(4, 32)
    steps = {"torchvision": partial(torchvision, x, y), "fresnet": partial(ours, x, y)}
    yield Comparison("Training step, 4 images of 32 px", steps, 4, agree=0.05, rounds=31)


if __name__ == "__main__":
    main(__doc__, comparisons)
