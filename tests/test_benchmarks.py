"""Benchmarks compare before they time, and the document has what was recorded."""

from collections.abc import Mapping
from math import nan

import pytest
import torch
from harness import Comparison, Measured, errors_of, quartiles, ratios, table
from report import PAGES_KEPT, judge, report, targets
from run import DOCUMENT, GPU_RESULTS, RESULTS, read
from torch import Tensor

ONES = torch.ones(4)


@pytest.mark.parametrize(
    "other",
    [
        {"a": ONES, "b": 1.2 * ONES},
        {"a": ONES, "b": nan * ONES},
        {"a": nan * ONES, "b": ONES},
        {"a": ONES},
        {"a": ONES, "c": ONES},
    ],
)
def test_who_computes_something_else_is_not_timed(other: Mapping[str, Tensor]) -> None:
    first = {"a": ONES, "b": ONES}
    comparison = Comparison("a job", {}, 1, agree=0.1)
    with pytest.raises(AssertionError):
        errors_of(comparison, {"first": lambda: first, "other": lambda: other})


def test_errors_are_relative_to_the_first_and_the_largest_counts() -> None:
    first, other = {"a": ONES, "b": 1000 * ONES}, {"a": ONES, "b": 1050 * ONES}
    comparison = Comparison("a job", {}, 1, agree=0.1)
    errors = errors_of(comparison, {"first": lambda: first, "other": lambda: other})
    assert errors["first"] == 0
    assert errors["other"] == pytest.approx(0.05, rel=1e-4)


ROWS = [
    Measured("theirs", 0.1, [2.0, 4.0, 6.0], 50.0, 0.0),
    Measured("ours", 0.2, [1.0, 2.0, 2.0], 40.0, 1e-6),
]


def test_a_ratio_is_of_one_round_and_above_1_for_the_faster() -> None:
    assert ratios(ROWS, "ours", "theirs") == [2.0, 2.0, 3.0]
    assert quartiles([2.0, 2.0, 3.0]) == (2.0, 2.0, 3.0)
    assert quartiles([5.0]) == (5.0, 5.0, 5.0)
    entry = {"title": "A job", "images": 8, "least": 0.5, "rows": [row._asdict() for row in ROWS]}
    assert table(entry).splitlines()[-1] == (
        "| ours | 4.0 | 2.000 (2.000 to 3.000) | 40 | 0.2 s | 25% | 1e-06 |"
    )


def test_a_target_is_judged_against_the_fastest_rival() -> None:
    (target,) = (t for t in targets() if len(t.others) > 2 and "8 images" in t.title)
    slow, fast, *rest = (Measured(name, 0.1, [3.0] * 3, 1.0, 0.0) for name in target.others)
    float32 = slow._replace(name="fresnet in float32", seconds=[8.0] * 3)
    rows = [float32, slow, fast._replace(seconds=[1.0] * 3), *rest]
    rows += [ROWS[1]._replace(name=target.name, seconds=[2.0] * 3)]
    entry = {"rows": [row._asdict() for row in rows]}
    judged = judge({(target.title, PAGES_KEPT): entry})
    assert judged.startswith("Of 2 targets 1 are not met.")
    missed, met = (part.splitlines()[-1] for part in judged.split("\n\n### Targets that are met"))
    assert missed.endswith(f"| as fast as {fast.name} | 1.00 | 0.500 (0.500 to 0.500) |")
    assert met.endswith("| as fast as fresnet in float32 | 2.00 | 4.000 (4.000 to 4.000) |")


def test_the_document_has_the_report_of_what_was_recorded() -> None:
    text = DOCUMENT.read_text()
    measured = text.partition("<!-- measured -->\n")[2].partition("<!-- end -->")[0]
    assert measured == report({**read(RESULTS), **read(GPU_RESULTS)}) + "\n"
