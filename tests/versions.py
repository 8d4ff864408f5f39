"""What works on which PyTorch: a few tests of each area, run here, recorded and tabulated.

    python tests/versions.py            # runs them (four minutes) and writes docs/versions.json
    python tests/versions.py --table    # writes the table in docs/versions.md from what is recorded
    python tests/versions.py eager      # runs an area, and fails if a test does

`tests/test_versions.py` holds the table to the record.
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).parent.parent
RECORD, DOCUMENT = ROOT / "docs" / "versions.json", ROOT / "docs" / "versions.md"

SETTINGS = {"CI": "true", "FRESNET_DEVELOPMENT_LOOP": "1", "OMP_NUM_THREADS": "1"}
"""Few examples, and the same ones at every run."""

QUICK = ("-m", "not slow and not long")
COMPILED = "grad", "vmap of grad"
CELL = "forward_train-aot_eager-float64"
EXPORTED = "few channels", "grouped resnet-d"
PROGRAM, ONNX = (
    "a_program_runs_as_forward_on_images_beyond_its_stride",
    "onnx_runs_as_forward_on_batches",
)

AREAS: Mapping[str, Sequence[str]] = {
    "eager": ("tests/test_forward.py", "tests/test_tree.py", "tests/test_group_norm.py", *QUICK),
    "transforms": ("tests/test_matrix.py", *QUICK),
    "training": ("tests/test_order.py", "tests/test_clipping.py", "tests/test_parts.py", *QUICK),
    "torch.compile": (
        "tests/test_module.py::test_it_compiles_in_one_graph",
        "tests/test_training.py::test_a_compiled_step_is_the_step",
        *(f"tests/test_matrix.py::test_cell[{name}-{CELL}]" for name in COMPILED),
    ),
    "compiled inference": ("tests/test_inference.py", *QUICK),
    "int8": ("tests/test_quantization.py", *QUICK),
    ".pt2": (
        "tests/test_export.py::test_one_size_of_image",
        *(f"tests/test_export.py::test_{PROGRAM}[{name}]" for name in EXPORTED),
    ),
    ".onnx": tuple(f"tests/test_export.py::test_{ONNX}_of_every_size[{name}]" for name in EXPORTED),
}
"""The tests of each area, as pytest takes them."""


class Counts(dict[str, int]):
    """How many tests passed, failed and were skipped."""


def run(selection: Sequence[str]) -> Counts:
    """Run these tests in the present environment."""
    with TemporaryDirectory() as folder:
        report = f"{folder}/report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=line", f"--junitxml={report}"]
        subprocess.run([*command, *selection], cwd=ROOT, env=os.environ | SETTINGS)
        suite = next(ElementTree.parse(report).iter("testsuite"))
        total, *bad, skipped = (
            int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
        )
    return Counts(passed=total - sum(bad) - skipped, failed=sum(bad), skipped=skipped)


def table(record: Mapping[str, Mapping[str, object]]) -> str:
    """The record in Markdown, the newest PyTorch first."""
    rows = [["PyTorch", "Python", *AREAS, "run on"]]
    rows.append(["---"] * len(rows[0]))
    for version in sorted(record, key=lambda v: [*map(int, v.split("."))], reverse=True):
        entry: Mapping[str, object] = record[version]
        marks = [_mark(entry.get(area)) for area in AREAS]
        rows.append([version, str(entry["python"]), *marks, str(entry["date"])])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _mark(counts: object) -> str:
    if not isinstance(counts, dict):
        return ""
    passed, failed = counts["passed"], counts["failed"]
    if not passed:
        return "no" if failed else "skipped"
    return f"{passed} of {passed + failed}" if failed else f"yes ({passed})"


def main(arguments: Sequence[str]) -> int:
    chosen = [area for area in arguments if area in AREAS]
    if chosen:
        return max(run(AREAS[area])["failed"] for area in chosen)
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    if "--table" not in arguments:
        version = torch.__version__.partition("+")[0]
        told = {"python": platform.python_version(), "date": date.today().isoformat()}
        record[version] = told | {area: run(selection) for area, selection in AREAS.items()}
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    found, text = table(record), DOCUMENT.read_text(encoding="utf-8")
    text = re.sub(r"\| PyTorch \|.*?\n(?=\n|\Z)", lambda _: found, text, count=1, flags=re.S)
    DOCUMENT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
