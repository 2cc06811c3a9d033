# SPDX-License-Identifier: GPL-2.0-or-later
import asyncio
import json

import pytest

from tests.bench.figures import Finding, Result, Series, by_unit, fastest, shown
from tests.bench.page import page
from tests.bench.rounds import Trial, interleaved

OURS = Series("ours", "s", (1.0, 3.0, 2.0))
THEIRS = Series("theirs", "s", (2.0, 4.0, 8.0))


def test_a_series_tells_its_order() -> None:
    assert (OURS.minimum, OURS.median, OURS.maximum) == (1.0, 2.0, 3.0)
    many = Series("many", "s", tuple(float(number) for number in range(100, 0, -1)))
    assert [many.percentile(percent) for percent in (0, 1, 50, 99, 100)] == [1.0, 1.0, 50.0, 99.0, 100.0]


def test_ratios_are_of_the_same_round() -> None:
    assert OURS.over(THEIRS).values == (0.5, 0.75, 0.25)
    with pytest.raises(ValueError, match="shorter"):
        OURS.over(Series("theirs", "s", (1.0,)))


def test_the_fastest_is_that_of_the_least_median() -> None:
    assert fastest([THEIRS, OURS, Series("once", "s", (0.1, 9.0, 9.0))]) is OURS


def test_only_what_has_one_unit_stands_side_by_side() -> None:
    written, flushes, bound = Series("a", "B", (1,)), Series("a, flushes", "flushes", (2,)), Series("bound", "B", (1,))
    assert by_unit([written, flushes, bound]) == [[written, bound], [flushes]]
    assert by_unit([]) == []


@pytest.mark.parametrize(
    ("value", "at_least", "reached"), [(1.0, False, True), (1.1, False, False), (1.0, True, True), (0.9, True, False)]
)
def test_what_is_reached(value: float, at_least: bool, reached: bool) -> None:
    assert Finding("what", value, 1.0, at_least=at_least).reached is reached


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.25, "s", "250 ms"),
        (1.5, "s", "1.50 s"),
        (0.0000205, "s", "20.5 µs"),
        (0.0, "s", "0 µs"),
        (0.7, "", "0.70"),
        (1234.0, "B", "1,234 B"),
        (3 << 20, "B", "3 MiB"),
        (1234.5, "", "1,234"),
    ],
)
def test_how_a_figure_is_shown(value: float, unit: str, text: str) -> None:
    assert shown(value, unit) == text


def test_all_contenders_run_in_every_round_and_the_first_does_not_count() -> None:
    calls: list[str] = []

    def contender(name: str) -> Trial:
        async def trial() -> float:
            calls.append(name)
            return float(len(calls))

        return trial

    series = asyncio.run(interleaved({name: contender(name) for name in "abc"}, 5))
    rounds = [calls[start : start + 3] for start in range(0, 18, 3)]
    assert [sorted(one) for one in rounds] == [["a", "b", "c"]] * 6
    assert len({tuple(one) for one in rounds}) > 1
    assert [len(one.values) for one in series] == [5, 5, 5]
    assert min(min(one.values) for one in series) == 4.0


def test_a_result_survives_a_file() -> None:
    finding = Finding("what", 1.0, 2.0, "s", at_least=True)
    result = Result(1, "title", "method", (OURS,), (), (finding,), {"line": [(1.0, 2.0)]}, ("x", "y"))
    assert Result.from_json(json.loads(json.dumps(result.to_json()))) == Result(
        1, "title", "method", [OURS], [], [finding], {"line": [(1.0, 2.0)]}, ("x", "y")
    )


def test_the_page_hides_nothing() -> None:
    findings = [Finding("ours / theirs", 0.5, 0.7), Finding("median", 0.3, 0.25, "s")]
    result = Result(3, "A title", "How.", [OURS, THEIRS], [OURS.over(THEIRS)], findings)
    text = page([result], {"kernel": "6.1"}, {3: "today"}, {3}, {3: "The reason."})
    assert "| 3 | A title | ours / theirs | 0.50 | ≤ 0.70 | reached |" in text
    assert "| 3 | A title | median | 300 ms | ≤ 250 ms | **not reached** |" in text
    assert "| ours | 1 s | 2 s | 3 s | 3 |" in text
    assert "| ours / theirs | 0.25 | 0.50 | 0.75 | 3 |" in text
    assert "![A title](03.svg)" in text
    assert "Measured on today." in text
    assert "The reason." in text
    assert "![" not in page([result], {}, {3: "today"}, set(), {})
