"""The site has every public name, and each function has an example."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import fresnet

ROOT = Path(__file__).parent.parent
PAGES = {page: page.read_text() for page in ROOT.glob("docs/api/*.rst")}
MODULES = [fresnet, *(one for one in vars(fresnet).values() if isinstance(one, ModuleType))]
MODULES = [
    one for one in MODULES if one is fresnet or one.__name__.split(".")[-1] in fresnet.__all__
]


def public() -> Iterator[tuple[str, object]]:
    """Every public name but those of modules, with what it names."""
    for module in MODULES:
        for name in module.__all__:
            if not isinstance(found := getattr(module, name), ModuleType):
                yield f"{module.__name__}.{name}", found


FUNCTIONS = {name: one for name, one in public() if inspect.isfunction(one)}
SEVERAL_PROCESSES = ("fresnet.moments.merge_across",)  # An example would have to start them.


def on_pages() -> list[str]:
    """The names that the pages of the API document. A directive may have several, a line each."""
    found = []
    for page in PAGES.values():
        for names in re.findall(r"^\.\. (?:auto|py:)\w+:: (.*(?:\n +fresnet\..*)*)", page, re.M):
            found += names.split()
    return found


def test_every_public_name_is_on_one_page_of_the_api() -> None:
    names = on_pages()
    assert len({*names}) == len(names)
    known = dict(public())
    assert {*names} <= {*known}
    there = {id(known[name]) for name in names}  # one thing may have two public names
    assert not [name for name, one in known.items() if name not in names and id(one) not in there]


def test_every_function_and_class_says_what_it_is() -> None:
    for name, one in public():
        if inspect.isfunction(one) or inspect.isclass(one):
            assert (one.__doc__ or "").strip(), name
            assert not (one.__doc__ or "").startswith(f"{one.__name__}("), f"{name}: Python's own"


def test_every_page_is_reached() -> None:
    listed = re.findall(r"^   (\w+)$", (ROOT / "docs/api/index.rst").read_text(), re.M)
    assert sorted([*listed, "index"]) == sorted(page.stem for page in PAGES)
    index = (ROOT / "docs/index.md").read_text()
    for document in ROOT.glob("docs/*.md"):
        assert document.stem == "index" or re.search(rf"^{document.stem}$", index, re.M), document


def test_what_is_said_of_versions_is_what_is_asked_for() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    found = [
        re.search(rf'\b{what}>=([\d.]+)"', project) for what in ('requires-python = "', "torch")
    ]
    python, pytorch = (one[1] for one in found if one)
    line = f"Python {python} or newer, PyTorch {pytorch} or newer, MIT licence."
    assert line in (ROOT / "README.md").read_text()
    assert f"\nversion: {fresnet.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.fixture(scope="module")
def code() -> str:
    """All code in documents and tutorials."""
    documents = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    blocks = [re.findall(r"^```python\n(.*?)^```$", d.read_text(), re.M | re.S) for d in documents]
    tutorials = [path.read_text() for path in ROOT.glob("docs/tutorials/*.py")]
    return "\n".join([*(block for several in blocks for block in several), *tutorials])


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in SEVERAL_PROCESSES])
def test_every_function_has_an_example(name: str, code: str) -> None:
    """A doctest, or a line of a document that runs."""
    last = ".".join(name.split(".")[-2:])
    assert ">>>" in (FUNCTIONS[name].__doc__ or "") or re.search(rf"\b{last}\b", code)
