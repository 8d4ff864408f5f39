"""The code in the documents runs as printed."""

import re
import shlex
from pathlib import Path

import PIL.Image
import pytest
import reference  # noqa: F401  (makes torchvision importable beside a CPU-only torch)
from huggingface_hub import constants

import fresnet
from fresnet.__main__ import main
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


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a photo, and a cache that has the README's repository: a tiny network in it."""
    folder = tmp_path / "cache" / "models--timm--resnet50.a1_in1k"
    snapshot = folder / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abcd")
    (snapshot / "config.json").write_text("{}")
    tiny = fresnet.init(0, fresnet.Spec(fresnet.nodes.BasicBlock, (1, 1), width=4))
    fresnet.save(tiny, snapshot / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    PIL.Image.new("RGB", (40, 30)).save("photo.jpg")


@pytest.mark.usefixtures("published")
def test_the_prediction_of_the_readme_runs_from_a_cache(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    command = re.search(r"^    python -m fresnet (predict .*)$", text, re.M)
    assert command is not None
    assert main(shlex.split(command[1])) == 0
    assert "photo.jpg" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("document", PROGRAMS, ids=lambda d: d.name)
def test_python_blocks_run_in_order(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row of a table that they print, and that the document has, is the same in it."""
    namespace: dict[str, object] = {}
    for block in blocks(document):
        if "quantize" in block and not int8_kernels.is_supported():
            continue
        exec(compile(block, document.name, "exec"), namespace)
    text = document.read_text()
    for row in re.findall(r"^\| \w.*", capsys.readouterr().out, re.M):
        if f"\n{row[: row.index('|', 2)]}|" in text:
            assert f"\n{row}\n" in text


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


def test_regimes_are_where_the_design_says() -> None:
    rows = re.findall(
        r"^\| (.+) \| `(fresnet/.+\.py)` \|", (ROOT / "docs/design.md").read_text(), re.M
    )
    assert len(rows) > 8
    for names, file in rows:
        for name in re.findall(r"`(\w+)`", names):
            defined = rf"^(class|def) {name}\b|^{name} = "
            assert re.search(defined, (ROOT / file).read_text(), re.M), f"{name} in {file}"


def test_files_named_exist() -> None:
    text = "".join(document.read_text() for document in DOCUMENTS)
    names = re.findall(r"`((?:[\w.]+/)+[\w.]+\.\w+)`", text)
    assert len(names) > 15
    for name in names:
        assert (ROOT / name).exists(), name
