# SPDX-License-Identifier: GPL-2.0-or-later
"""The text of docs/benchmarks/README.md, from what was measured.  Pure."""

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from tests.bench.figures import Finding, Result, Series, by_unit, shown

HEAD: Final = """# Benchmarks

luksrotd beside what people use today: every figure of a measurement is of one run, in which all contenders took
turns, round after round, in an order made by chance; the first round does not count. Times are of this machine and mean
nothing elsewhere; ratios, which are of the same round, do. This page is written by `make bench`, or
`make bench BENCH='--only 1 3'` for some of it; the numbers are in [results.json](results.json).
"""


def page(
    results: Sequence[Result],
    machine: Mapping[str, str],
    measured: Mapping[int, str],
    plots: Collection[int],
    remarks: Mapping[int, str],
) -> str:
    """By number: when each result was ``measured``, which have ``plots``, ``remarks`` on what limits one."""
    parts = [
        HEAD,
        _table(["", ""], [[name, value] for name, value in machine.items()]),
        "## What was to be reached",
        _goals(results),
    ]
    for result in results:
        parts.append(f"## {result.number}. {result.title}")
        parts.append(f"{result.method}\n\nMeasured on {measured[result.number]}.")
        if result.number in plots:
            parts.append(f"![{result.title}]({plot_of(result.number)})")
        parts += [_series("", group) for group in by_unit(result.series)]
        parts.append(_series("ratio, of the same round", result.ratios))
        parts.append("\n".join(f"- {finding}" for finding in result.findings))
        parts.append(remarks.get(result.number, ""))
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def plot_of(number: int) -> str:
    """The name of a plot's file."""
    return f"{number:02}.svg"


def _goals(results: Sequence[Result]) -> str:
    rows = [[str(r.number), r.title, f.what, _value(f), _limit(f), _verdict(f)] for r in results for f in r.findings]
    return _table(["", "measurement", "figure", "measured", "to be reached", ""], rows)


def _series(what: str, series: Sequence[Series]) -> str:
    if not series:
        return ""
    rows = [
        [one.name, *(shown(value, one.unit) for value in (one.minimum, one.median, one.maximum)), str(len(one.values))]
        for one in series
    ]
    return _table([what, "minimum", "median", "maximum", "rounds"], rows)


def _value(finding: Finding) -> str:
    return shown(finding.value, finding.unit)


def _limit(finding: Finding) -> str:
    return f"{'≥' if finding.at_least else '≤'} {shown(finding.limit, finding.unit)}"


def _verdict(finding: Finding) -> str:
    return "reached" if finding.reached else "**not reached**"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)
