"""PyPI's PyTorch for Linux without CUDA's libraries, for tests on a CPU.

    python -m pip install --no-deps torch==2.6.0
    python tests/without_cuda.py

PyPI has no build for CPUs alone. The others are linked to libraries of 5 GB, and are not imported
without them, though a CPU calls none of their functions. This writes libraries of the same names,
in which each function returns the error that there is no GPU. It takes a C compiler and binutils.
"""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

CUDA = r"lib(?:cu|nccl|nv)\S+"
NO_DEVICE = 100
"""cudaErrorNoDevice"""


def write_libraries(folder: Path) -> list[str]:
    """Write what the libraries in this folder are linked to; their names."""
    needed: set[str] = set()
    versions: set[tuple[str, str]] = set()
    undefined: set[tuple[str, str]] = set()
    for path in folder.glob("*.so"):
        headers = _read("objdump", "--private-headers", str(path))
        needed |= set(re.findall(rf"NEEDED +({CUDA})", headers))
        for library, lines in re.findall(r"required from (\S+):\n((?: +0x.*\n)+)", headers):
            versions |= {(library, one) for one in re.findall(r"\S+$", lines, re.M)}
        undefined |= set(re.findall(r"^ +U (\w+)@?(\S*)$", _read("nm", "-D", str(path)), re.M))
    for library in needed:
        sections = {
            version: [name for name, other in undefined if other == version]
            for owner, version in versions
            if owner == library
        }
        # Names without a version may be of any library, so each has them all.
        names = {name for name, version in undefined if not version and name[:2] in CALLS}
        names = set().union(*sections.values()) or names
        _write(folder / library, names, sections)
    return sorted(needed)


CALLS = ("cu", "nc", "nv")
"""How the names of functions begin."""


def _write(path: Path, names: set[str], sections: dict[str, list[str]]) -> None:
    script = path.with_suffix(".map")
    script.write_text(
        "".join(f"{version} {{ {'; '.join(own)}; }};\n" for version, own in sections.items())
    )
    command = ["cc", "-shared", "-w", "-fno-builtin", f"-Wl,-soname,{path.name}", "-o", str(path)]
    command += [f"-Wl,--version-script={script}"] if sections else []
    source = "".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in sorted(names))
    subprocess.run([*command, "-x", "c", "-"], input=source, text=True, check=True)
    script.unlink()


def _read(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    found = find_spec("torch")
    assert found is not None
    assert found.origin is not None
    print(*write_libraries(Path(found.origin).parent / "lib"), sep="\n")
