"""Everything that `docs/performance.md` says, measured and written.

    make bench                # a few sizes with pages kept, printed: python benchmarks/run.py
    make bench-full           # an hour: all sizes, both settings of the allocator
    python benchmarks/run.py --full --only clipping.py    # one benchmark, or titles with a word

Each benchmark runs in a process of its own for each setting. With the default allocator only
inference runs in all sizes. A full run leaves every time that it measured in
`docs/performance.json`, beside its date and its versions. With --only it measures some tables anew
and keeps the others. From that file it writes the measured part of `docs/performance.md` and its
picture, and --report does the same without measuring. The figures for a GPU are those that
`make bench-gpu` left in `docs/performance_gpu.json`. The rest of the document is written by hand
and quotes the tables.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from itertools import product
from pathlib import Path

from harness import KEPT
from picture import draw
from report import Results, judge, report

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "performance.md"
RESULTS = DOCUMENT.with_suffix(".json")
GPU_RESULTS = DOCUMENT.with_name("performance_gpu.json")
PICTURE = DOCUMENT.with_suffix(".png")

BENCHMARKS = (
    "start.py",
    "inference.py",
    "training_step.py",
    "tiny.py",
    "transforms.py",
    "clipping.py",
    "jax_flax.py",
    "reading.py",
)


def read(path: Path) -> Results:
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return {(entry["title"], entry["setting"]): entry for entry in entries}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="all sizes and settings, and written")
    parser.add_argument("--report", action="store_true", help="write anew from the last full run")
    parser.add_argument("--only", default="", help="clipping.py or its like, or a part of a title")
    args = parser.parse_args()
    names = [args.only] if args.only in BENCHMARKS else BENCHMARKS
    words = "" if args.only in BENCHMARKS else args.only
    with tempfile.TemporaryDirectory() as folder:
        path = RESULTS if args.report else Path(folder) / "results.json"
        settings: list[Mapping[str, str]] = [KEPT, {}] if args.full else [KEPT]
        path.touch()
        for setting, name in product([] if args.report else settings, names):
            command = [sys.executable, str(HERE / name), "--record", str(path), "--only", words]
            if args.full and (setting or name == "inference.py"):
                command.append("--full")
            subprocess.run(command, env={**os.environ, **setting}, check=True)
        if not read(path):
            parser.error(f"no table that was measured is of {args.only}")
        results = {**(read(RESULTS) if args.full and args.only else {}), **read(path)}
        if args.full:
            RESULTS.write_text("".join(json.dumps(entry) + "\n" for entry in results.values()))
    if args.full or args.report:
        results = {**results, **read(GPU_RESULTS)}
        written = re.sub(
            r"(?<=<!-- measured -->\n).*?(?=<!-- end -->)",
            lambda _: report(results) + "\n",
            DOCUMENT.read_text(),
            flags=re.S,
        )
        DOCUMENT.write_text(written)
        draw(results, PICTURE)
    print(judge(results))


if __name__ == "__main__":
    main()
