"""The code in the documents runs as printed."""

import re
from pathlib import Path

import pytest
import reference  # noqa: F401  (makes torchvision importable beside a CPU-only torch)

from fresnet.inference import int8_kernels

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md"]
HOWTO = ROOT / "docs/howto.md"


def blocks_in(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


def blocks(document: Path) -> list[str]:
    return blocks_in(document.read_text())


PROGRAMS = [document for document in DOCUMENTS if blocks(document) and document != HOWTO]
FIRST, *TASKS = HOWTO.read_text().split("\n## ")[1:]


@pytest.mark.slow
@pytest.mark.parametrize("document", PROGRAMS, ids=lambda d: d.name)
def test_python_blocks_run_in_order(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks(document):
        if "quantize" in block and not int8_kernels.is_supported():
            continue
        exec(compile(block, document.name, "exec"), namespace)


@pytest.fixture(scope="module")
def beginning() -> dict[str, object]:
    """What the first section of the how-to's defines."""
    namespace: dict[str, object] = {}
    for block in blocks_in(FIRST):
        exec(compile(block, HOWTO.name, "exec"), namespace)
    return namespace


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.splitlines()[0])
def test_a_task_stands_on_the_first_section_alone(task: str, beginning: dict[str, object]) -> None:
    (block,) = blocks_in(task)
    exec(compile(block, HOWTO.name, "exec"), {**beginning})


def test_there_are_twelve_tasks_of_fifteen_lines_at_most_each_with_its_source() -> None:
    assert len(TASKS) == 12
    for task in TASKS:
        (block,) = blocks_in(task)
        assert len(block.splitlines()) <= 15, task
        assert "assert " in block, task
        assert "arXiv:" in task, task


def test_the_training_step_of_the_readme_has_twelve_lines_of_code() -> None:
    first, *_ = blocks(ROOT / "README.md")
    assert len([line for line in first.splitlines() if line]) <= 12


def test_files_named_exist() -> None:
    text = "".join(document.read_text() for document in DOCUMENTS)
    names = re.findall(r"`((?:[\w.]+/)+[\w.]+\.\w+)`", text)
    assert len(names) > 15
    for name in names:
        assert (ROOT / name).exists(), name
