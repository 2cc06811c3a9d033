# SPDX-License-Identifier: GPL-2.0-or-later
"""The plots of docs/benchmarks: bars with the least and the most, lines for what grows."""

from pathlib import Path
from typing import Any

from tests.bench.figures import Result, Series, by_unit, shown
from tests.support.drawing import COLOURS, pyplot, save


def draw(result: Result, path: Path) -> bool:
    """Write the plot of a result; whether there is one."""
    if result.growth:
        save(_lines(result), path)
    elif result.series:
        save(_bars(result), path)
    return bool(result.growth or result.series)


def _bars(result: Result) -> Any:
    """Of the first unit alone, which is what is compared; figures of another one are in the text."""
    series = by_unit(result.series)[0]
    figure, axis = pyplot.subplots(figsize=(8, 0.9 + 0.4 * len(series)))
    _group(axis, series)
    return figure


def _group(axis: Any, group: list[Series]) -> None:
    for place, one in enumerate(group):
        whiskers = [[one.median - one.minimum], [one.maximum - one.median]]
        colour = COLOURS[0 if place == 0 or one.name.startswith("luksrot") else 1]
        axis.barh(place, one.median, color=colour, height=0.6, xerr=whiskers, capsize=4, alpha=0.85)
        axis.annotate(
            shown(one.median, one.unit), (one.maximum, place), (6, 0), textcoords="offset points", va="center"
        )
    axis.set_yticks(range(len(group)), [one.name for one in group])
    axis.invert_yaxis()
    axis.set_xlim(0, max(one.maximum for one in group) * 1.15)
    axis.set_xlabel({"s": "seconds", "B": "bytes"}.get(group[0].unit, group[0].unit))


def _lines(result: Result) -> Any:
    figure, axis = pyplot.subplots(figsize=(8, 4))
    for (name, points), colour in zip(result.growth.items(), COLOURS, strict=False):
        axis.plot([x for x, _ in points], [y for _, y in points], marker="o", color=colour, label=name)
    axis.set_xlabel(result.axes[0])
    axis.set_ylabel(result.axes[1])
    axis.set_ylim(bottom=0)
    axis.legend()
    return figure
