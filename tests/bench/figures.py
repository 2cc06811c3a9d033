# SPDX-License-Identifier: GPL-2.0-or-later
"""What a measurement gives: series of figures, their ratios, and whether they are what was to be reached.  Pure."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Self

#: Of a figure that is shown: more digits than these are noise.
DIGITS: Final = 3
SECONDS: Final = ((1, "s"), (1000, "ms"), (1_000_000, "µs"))


@dataclass(frozen=True, slots=True)
class Series:
    """What one contender took, a value a round, in ``unit``; rounds of the same number belong together."""

    name: str
    unit: str
    values: tuple[float, ...]

    @property
    def minimum(self) -> float:
        """The least."""
        return min(self.values)

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    @property
    def maximum(self) -> float:
        """The most."""
        return max(self.values)

    def percentile(self, percent: float) -> float:
        """The least value that so many percent of the values do not exceed (nearest rank)."""
        ordered = sorted(self.values)
        rank = -(-len(ordered) * percent // 100)
        return ordered[max(int(rank), 1) - 1]

    def over(self, other: "Series") -> "Series":
        """Our value as a part of the other's of the same round; only what was measured side by side may be compared."""
        pairs = zip(self.values, other.values, strict=True)
        return Series(f"{self.name} / {other.name}", "", tuple(ours / theirs for ours, theirs in pairs))


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure that is to be reached: ``value`` is to be at most ``limit``, or ``at_least`` that."""

    what: str
    value: float
    limit: float
    unit: str = ""
    at_least: bool = False

    @property
    def reached(self) -> bool:
        """Whether it is so."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        verdict, sign = "reached" if self.reached else "not reached", "≥" if self.at_least else "≤"
        return f"{verdict}: {self.what}: {shown(self.value, self.unit)} {sign} {shown(self.limit, self.unit)}"


@dataclass(frozen=True, slots=True)
class Result:
    """A measurement: ``method`` is a paragraph on what was done; ``growth`` has lines of a plot, by name, as points."""

    number: int
    title: str
    method: str
    series: Sequence[Series] = ()
    ratios: Sequence[Series] = ()
    findings: Sequence[Finding] = ()
    growth: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    axes: tuple[str, str] = ("", "")

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """Back from it."""
        return cls(
            found["number"],
            found["title"],
            found["method"],
            [_series(one) for one in found["series"]],
            [_series(one) for one in found["ratios"]],
            [Finding(**one) for one in found["findings"]],
            {name: [(x, y) for x, y in points] for name, points in found["growth"].items()},
            tuple(found["axes"]),
        )


def by_unit(series: Iterable[Series]) -> list[list[Series]]:
    """What may stand side by side, in one table or plot: each unit by itself, as they come."""
    groups: dict[str, list[Series]] = {}
    for one in series:
        groups.setdefault(one.unit, []).append(one)
    return list(groups.values())


def fastest(series: Iterable[Series]) -> Series:
    """The one with the least median."""
    return min(series, key=lambda one: one.median)


def shown(value: float, unit: str = "") -> str:
    """A figure for a person: seconds below one as milliseconds or microseconds, bytes as KiB or MiB, three digits."""
    if unit == "s":
        factor, name = next((pair for pair in SECONDS if value * pair[0] >= 1), SECONDS[-1])
        return f"{_rounded(value * factor)} {name}"
    if unit == "B" and value >= 1 << 20:
        return f"{_rounded(value / (1 << 20))} MiB"
    return f"{_rounded(value)} {unit}".rstrip()


def _rounded(value: float) -> str:
    if value == int(value):
        return f"{int(value):,}"
    whole = len(str(int(abs(value))))
    return f"{value:,.{max(DIGITS - whole, 0)}f}"


def _series(found: Mapping[str, Any]) -> Series:
    return Series(found["name"], found["unit"], tuple(found["values"]))
