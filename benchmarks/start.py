"""A fresh process from its start to the first logits of a ResNet-50, beside torchvision.

    python benchmarks/start.py                   # prints two tables, in two minutes

Both import their library, read the same file of `torch.save`, and run one image of 224 px.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from math import nan
from pathlib import Path
from typing import NamedTuple

import torch
from harness import Comparison, Measured, main

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import reference

import fresnet

ROUNDS = 9

OURS = """
import sys, torch, fresnet

params = fresnet.load(sys.argv[1])
logits = fresnet.forward(params, torch.ones(1, 3, 224, 224))
torch.save(logits, sys.argv[2])
"""

# The stub beside a CPU-only PyTorch, as in tests/reference.py, takes 4 milliseconds.
THEIRS = """
import sys, torch

try:
    import torchvision
except RuntimeError:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

model = torchvision.models.resnet50()
model.load_state_dict(torch.load(sys.argv[1]))
model.eval()
with torch.no_grad():
    logits = model(torch.ones(1, 3, 224, 224))
torch.save(logits, sys.argv[2])
"""

PROGRAMS = {"torchvision": THEIRS, "fresnet": OURS}


class Usage(NamedTuple):
    """What one process took: seconds by the clock and of the processor, and its memory in MiB."""

    wall: float
    processor: float
    peak: float


def run(program: str, *arguments: Path) -> Usage:
    """Run a program in a process of its own, with the compiled modules that Python keeps."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = str(Path(fresnet.__file__).parent.parent)
    start = time.perf_counter()
    command = [sys.executable, "-c", program, *map(str, arguments)]
    _, status, used = os.wait4(os.posix_spawn(sys.executable, command, environment), 0)
    seconds = time.perf_counter() - start
    assert status == 0
    return Usage(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


@cache
def used() -> dict[str, list[Usage]]:
    """What each took, turn by turn. The first turn only makes caches warm."""
    turns: dict[str, list[Usage]] = {name: [] for name in PROGRAMS}
    with tempfile.TemporaryDirectory() as folder:
        file, logits = Path(folder) / "resnet50.pth", Path(folder) / "logits.pt"
        model = reference.module(fresnet.RESNET50, 0, num_classes=1000, dtype=torch.float32)
        torch.save(model.state_dict(), file)
        with torch.no_grad():
            expected = model.eval()(torch.ones(1, 3, 224, 224))
        for _ in range(1 + ROUNDS):
            for name, program in PROGRAMS.items():
                turns[name].append(run(program, file, logits))
                error = (torch.load(logits) - expected).norm()
                assert error <= 1e-4 * expected.norm(), f"{name} is off by {error:.1e}"
    return {name: found[1:] for name, found in turns.items()}


def measured(comparison: Comparison) -> list[Measured]:
    by_clock = comparison.title.endswith("by the clock")
    return [
        Measured(
            name,
            prepare=0.0,
            seconds=[one.wall if by_clock else one.processor for one in turns],
            peak=max(one.peak for one in turns),
            error=nan,
        )
        for name, turns in used().items()
    ]


def comparisons(full: bool) -> Iterator[Comparison]:
    for clock in ("by the clock", "by the processor"):
        yield Comparison(f"From the start to first logits, {clock}", {}, images=1)


if __name__ == "__main__":
    main(__doc__, comparisons, measured)
