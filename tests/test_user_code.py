"""Code that is typed against the package checks, under both checkers that people use."""

import subprocess
import sys
from pathlib import Path

import pytest
import user_code

SCRIPT = Path(user_code.__file__)
PYRIGHT = ("pyright", "--pythonpath", sys.executable)


def test_it_runs(tmp_path: Path) -> None:
    assert user_code.main(tmp_path).shape == (4, 3)


@pytest.mark.slow
@pytest.mark.parametrize("checker", [("mypy", "--strict"), PYRIGHT], ids=lambda c: c[0])
def test_it_checks(checker: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *checker, str(SCRIPT)],
        cwd=SCRIPT.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("checker", [("mypy", "--strict"), PYRIGHT], ids=lambda c: c[0])
def test_a_mistake_in_it_is_found(checker: tuple[str, ...], tmp_path: Path) -> None:
    """So that the checkers see the package's types, and not `Any` everywhere."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text("\n".join([*RIGHT, *WRONG]))
    done = subprocess.run(
        [sys.executable, "-m", *checker, str(wrong)],
        cwd=SCRIPT.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    found = [f"wrong.py:{line}:" in done.stdout for line in range(1, len(RIGHT + WRONG) + 1)]
    assert found == [False] * len(RIGHT) + [True] * len(WRONG), done.stdout


RIGHT = [
    "import fresnet",
    "from fresnet.nodes import Bottleneck",
    "params = fresnet.init(0)",
    "weights = params.weights",
    "block = weights.stages[0][1]",
    "scale = block.layer2.norm.scale.sum() + block.shortcut.layer.conv.sum()",
    "stem = weights.stem._replace(layer=weights.stem.layer)",
    "widths = [len(block.layer1.conv) for stage in weights.stages for block in stage]",
    "assert isinstance(block, Bottleneck)",
    "from fresnet import optim",
    "optimizer = optim.by_path({'head': optim.frozen, '*': optim.sgd(0.1)})",
    "part, rest = fresnet.tree.partition(weights, fresnet.tree.matching('head'))",
    "whole = fresnet.tree.combine(part, rest).head.bias.sum()",
]
WRONG = [
    "fresnet.forward(params)",
    "fresnet.save(params, 3)",
    "weights.tail",
    "weights.stem.layr",
    "weights.stem.layer.weight",
    "weights.stages[0][1].layer2.norm.scal",
    "weights.stages[0][1].norm2",
    "weights.stages[0][1].shortcut.conv",
    "weights.stages[0][1].attention.excitation",
    "block.before",
    "weights.last.norm",
    "optim.by_path({'*': 0.1})",
    "fresnet.tree.combine(part, rest).hed",
]
"""After `isinstance`, a bottleneck has no norm before its first layer."""
