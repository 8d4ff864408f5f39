"""The folders show how fresnet is built: imports, the places of files, the cost of an import."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fresnet
from fresnet.network import nodes
from fresnet.network.nodes import fields

ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
FILES = [path.relative_to(ROOT) for path in ROOT.glob("fresnet/**/*.py")]


def room(module: str) -> str:
    """The room of a module: the file or folder directly below fresnet/ that holds it."""
    return module.split(".")[1] if "." in module else "fresnet"


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from."""
    rooms = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            rooms |= {name[1] for name in names if name[0] == "fresnet" and name[1:]}
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path} imports relatively, which this test does not follow")
        elif isinstance(node, ast.ImportFrom) and node.module == "fresnet":
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fresnet."):
            rooms.add(room(str(node.module)))
    return rooms


def test_imports_point_one_way() -> None:
    """A room imports from itself and from lines above its own, as CONTRIBUTING.md lists them."""
    found = re.search(r"^```imports\n(.*?)^```", CONTRIBUTING, re.M | re.S)
    assert found is not None
    levels = {
        name: level for level, line in enumerate(found[1].splitlines()) for name in line.split()
    }
    for path in FILES:
        own = path.with_suffix("").parts[1]
        if own in ("__init__", "__main__"):  # the public face, and what is below all of it
            continue
        for other in imported(path) - {own}:
            assert levels[other] < levels[own], f"{path} imports {other}"


def test_the_map_names_every_file_once() -> None:
    table = re.findall(r"^\| `([^`]+\.py)`", CONTRIBUTING, re.M)
    there = [str(p) for p in FILES] + [
        str(p.relative_to(ROOT)) for p in ROOT.glob("benchmarks/*.py")
    ]
    assert sorted(
        name for name in table if not name.startswith(("docs/", "tests/", "examples/"))
    ) == sorted(there)


IMPORTED = """
import sys, torch
before = set(sys.modules)
import fresnet
{then}
print(*sorted(set(sys.modules) - before))
"""
USED = """
spec = fresnet.Spec(fresnet.RESNET18.block, (1,), width=128)
x = torch.ones(6, 3, 72, 76)
for name in ("net.safetensors", "net.pth"):
    fresnet.forward(fresnet.load(name, architecture=spec), x)
fresnet.summary(fresnet.init(0, spec, device="meta"))
fresnet.compile_inference(fresnet.init(0, spec), x)(x)
"""


@pytest.mark.parametrize(("then", "most"), [("", 60), (USED, 80)])
def test_little_is_imported_beyond_torch(then: str, most: int, tmp_path: Path) -> None:
    """Neither PyTorch's compilers nor libraries for drawing, images or processes.

    Nor does what runs a network in float32 or describes it, which takes less time than they do.
    """
    params = fresnet.init(0, fresnet.Spec(fresnet.RESNET18.block, (1,), width=128))
    fresnet.save(params, tmp_path / "net.safetensors")
    torch.save(fresnet.to_state_dict(params), tmp_path / "net.pth")
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED.format(then=then)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    modules = done.stdout.split()
    heavy = ("torch._dynamo", "torch._inductor", "torch.distributed", "PIL", "matplotlib", "sympy")
    assert not [name for name in modules if name.startswith(heavy)]
    assert len([name for name in modules if not name.startswith("fresnet")]) < most


def test_public_modules_say_what_is_public_in_them() -> None:
    modules = [one for one in vars(fresnet).values() if isinstance(one, ModuleType)]
    public = [one for one in modules if one.__name__.split(".")[-1] in fresnet.__all__]
    assert len(public) == 6
    for module in (fresnet, *public):
        assert len({*module.__all__}) == len(module.__all__)
        for name in module.__all__:
            assert hasattr(module, name), f"{module.__name__}.{name}"


def test_type_checkers_know_the_fields_of_all_nodes_and_no_others() -> None:
    for known, kinds in (
        (fields.StemFields, nodes.STEMS),
        (fields.StageFields, nodes.STAGES),
        (fields.BlockFields, nodes.BLOCKS),
        (fields.ShortcutFields, nodes.SHORTCUTS),
        (fields.AttentionFields, nodes.ATTENTIONS),
        (fields.LastFields, nodes.LASTS),
    ):
        there = {field for kind in kinds for field in kind._fields}
        assert {*known.__annotations__} == there, known.__name__
    assert {field for kind in nodes.NORMS for field in kind._fields} == {*nodes.Norm._fields}


def test_texts_are_written_and_read_in_a_stated_encoding() -> None:
    """Else it is the locale's, in which names of classes may not be written."""
    for path in FILES:
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            owner = getattr(getattr(node.func, "value", None), "id", "")
            modes = [str(mode.value) for mode in node.args if isinstance(mode, ast.Constant)]
            is_text = name in ("read_text", "write_text") or (
                name == "open"
                and owner not in ("Image", "os", "tarfile")
                and "b" not in "".join(modes)
            )
            stated = any(keyword.arg == "encoding" for keyword in node.keywords)
            assert stated or not is_text, f"{path}:{node.lineno} states no encoding"
