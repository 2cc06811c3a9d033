# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of docs/scale.md, as SVG: the same bytes for the same numbers (docs/adr/0028-plots-by-matplotlib.md)."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from tests.support.drawing import COLOURS, pyplot, save

DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")

Numbers = Mapping[str, Any]


def draw(numbers: Numbers, folder: Path) -> list[Path]:
    """Write all figures; their files."""
    folder.mkdir(exist_ok=True)
    written = []
    for name, figure in FIGURES.items():
        path = folder / f"{name}.svg"
        save(figure(numbers), path)
        written.append(path)
    return written


def _steady(numbers: Numbers) -> Any:
    figure, plots = pyplot.subplots(3, 1, figsize=(8, 6.5), sharex=True)
    for name, plot in zip(("servers", "desktops", "laptops"), plots, strict=True):
        for label, key, colour in (
            ("the same AGE on all", name, COLOURS[1]),
            ("an AGE of its own", f"{name}, AGE of its own", COLOURS[0]),
        ):
            plot.step(range(168), numbers["steady"][key]["per_hour_of_week"], where="post", color=colour, label=label)
        plot.set_ylim(bottom=0)
        plot.set_title(name, loc="left", fontsize=10)
    plots[-1].set_xticks(range(0, 168, 24), DAYS)
    plots[1].set_ylabel("requests per hour, mean of a year")
    plots[1].legend(frameon=False)
    return figure


def _rollout(numbers: Numbers) -> Any:
    figure, plot = pyplot.subplots(figsize=(8, 4))
    lines = (
        "all keys are overdue",
        "all enrolled within a week",
        "enrolled within an hour, AGE of its own",
        "enrolled within 90 days",
    )
    for name, colour in zip(lines, COLOURS, strict=False):
        plot.step(
            range(375),
            [count or math.nan for count in numbers["rollout"][name]["per_day"]],
            where="post",
            color=colour,
            label=name,
        )
        plot.plot(
            range(375),
            [count or math.nan for count in numbers["rollout"][name]["per_day"]],
            ".",
            color=colour,
            markersize=3,
        )
    plot.set(yscale="log", xlabel="days since the roll-out", ylabel="requests per day")
    plot.set_ylim(top=1e6)
    plot.legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
    return figure


def _outages(numbers: Numbers) -> Any:
    figure, plots = pyplot.subplots(3, 1, figsize=(8, 6.5))
    for (length, seconds), plot in zip((("1 hour", 3600), ("1 day", 86400), ("1 week", 604800)), plots, strict=True):
        counts = numbers["outages"][f"servers, {length}"]["per_quarter_hour"]
        hours = [slot / 4 - 24 for slot in range(len(counts))]
        plot.axvspan(0, seconds / 3600, color=COLOURS[1], alpha=0.15, label="the store is away")
        plot.step(hours, [count / 15 for count in counts], where="post", color=COLOURS[0], linewidth=1)
        plot.set_title(length, loc="left", fontsize=10)
        plot.set_xlim(hours[0], hours[-1])
        plot.set_ylim(bottom=0)
    plots[0].legend(frameon=False)
    plots[1].set_ylabel("requests per minute")
    plots[2].set_xlabel("hours since the beginning of the outage")
    return figure


def _timers(numbers: Numbers) -> Any:
    figure, plot = pyplot.subplots(figsize=(8, 3))
    waves = {name: one for name, one in numbers["retries"].items() if "wave" in one}
    rows = range(len(waves))
    plot.barh(
        rows, [one["wave"]["second"]["max"] for one in waves.values()], color=COLOURS[0], label="simulated", height=0.6
    )
    plot.plot(
        [one["wave_bound"] for one in waves.values()],
        rows,
        "|",
        color=COLOURS[1],
        markersize=22,
        markeredgewidth=2,
        label="formula",
    )
    plot.set_yticks(rows, list(waves))
    plot.set(xscale="log", xlabel="requests in the worst second, all machines due at once")
    plot.invert_yaxis()
    plot.legend(frameon=False)
    return figure


def _losses(numbers: Numbers) -> Any:
    figure, plot = pyplot.subplots(figsize=(8, 4.5))
    for (name, row), colour in zip(numbers["losses"].items(), COLOURS, strict=True):
        days = [int(hours) / 24 for hours in row]
        plot.plot(days, [one["bound"] for one in row.values()], "-", color=colour, alpha=0.5)
        plot.plot(days, [one["lost"] for one in row.values()], "o", color=colour, markersize=5, label=name)
    plot.set(xlabel="age of the backup that the store goes back to, in days", ylabel="machines whose key nobody has")
    plot.legend(frameon=False, title="dots: simulated; lines: formula")
    return figure


FIGURES: Final[Mapping[str, Callable[[Numbers], Any]]] = {
    "steady": _steady,
    "rollout": _rollout,
    "outages": _outages,
    "timers": _timers,
    "losses": _losses,
}
