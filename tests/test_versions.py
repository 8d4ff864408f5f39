"""The table of versions says what runs of `tests/versions.py` recorded."""

import json
from pathlib import Path

import versions
from packaging.version import Version

from fresnet.errors import OLDEST

PROJECT = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
RECORD = json.loads(versions.RECORD.read_text(encoding="utf-8"))


def test_the_table_is_that_of_the_record() -> None:
    assert versions.table(RECORD) in versions.DOCUMENT.read_text(encoding="utf-8")


def test_the_oldest_pytorch_is_the_same_everywhere() -> None:
    assert f'"torch>={OLDEST}"' in PROJECT
    assert min(map(Version, RECORD)).release[:2] == Version(OLDEST).release


def test_everything_eager_works_on_every_version() -> None:
    for version, entry in RECORD.items():
        for area in ("eager", "transforms", "training"):
            assert entry[area]["passed"] > 10, (version, area)
            assert entry[area]["failed"] == 0, (version, area)


def test_a_mark_says_yes_only_where_every_test_passed() -> None:
    def mark(passed: int, failed: int) -> str:
        counts = {"passed": passed, "failed": failed, "skipped": 0}
        row = versions.table({"2.6.0": {"python": "3.10", "date": "", "eager": counts}})
        return row.splitlines()[-1].split(" | ")[2]

    assert [mark(3, 0), mark(2, 1), mark(0, 2), mark(0, 0)] == [
        "yes (3)",
        "2 of 3",
        "no",
        "skipped",
    ]
