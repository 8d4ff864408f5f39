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
def test_a_mistake_in_it_is_found(tmp_path: Path) -> None:
    """So that the checkers see the package's types, and not `Any` everywhere."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import fresnet\n"
        "params = fresnet.init(0)\n"
        "fresnet.forward(params)\n"
        "fresnet.save(params, 3)\n"
        "params.weights.tail\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", *PYRIGHT, str(wrong)],
        cwd=SCRIPT.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert [f"wrong.py:{line}:" in done.stdout for line in (3, 4, 5)] == [True] * 3, done.stdout
