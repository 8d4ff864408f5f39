"""The code in the documents runs as printed."""

import re
from pathlib import Path

import pytest
import reference  # noqa: F401  (makes torchvision importable beside a CPU-only torch)

from fresnet.inference import int8

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md"]


def blocks(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", document.read_text(), re.M | re.S)


@pytest.mark.slow
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d)], ids=lambda d: d.name)
def test_python_blocks_run_in_order(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks(document):
        if "quantize" in block and not int8.is_supported():
            continue
        exec(compile(block, document.name, "exec"), namespace)


def test_the_training_step_of_the_readme_has_twelve_lines_of_code() -> None:
    first, *_ = blocks(ROOT / "README.md")
    assert len([line for line in first.splitlines() if line]) <= 12


def test_files_named_exist() -> None:
    text = "".join(document.read_text() for document in DOCUMENTS)
    names = re.findall(r"`((?:[\w.]+/)+[\w.]+\.\w+)`", text)
    assert len(names) > 15
    for name in names:
        assert (ROOT / name).exists(), name
