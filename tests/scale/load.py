# SPDX-License-Identifier: GPL-2.0-or-later
"""How many requests come per second and per minute, and how many may be expected.  Pure."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """Requests in the seconds (minutes, …) of a time, those without any among them."""

    mean: float
    p99: int
    max: int
    at: int


def load(times: Iterable[int], begin: int, end: int, bucket: int = 1) -> Load:
    """Of ``times`` from ``begin`` to ``end``; ``bucket`` in seconds; ``at``: when the first worst one begins."""
    counts = Counter(time // bucket for time in times if begin <= time < end)
    buckets = max((end - begin) // bucket, 1)
    worst = max(counts.values(), default=0)
    at = min((when for when, count in counts.items() if count == worst), default=begin // bucket)
    return Load(counts.total() / buckets, _p99(counts, buckets), worst, at * bucket)


def _p99(counts: Counter[int], buckets: int) -> int:
    """The least number of requests that 99 of 100 buckets do not exceed."""
    above = buckets // 100
    for size, number in sorted(Counter(counts.values()).items(), reverse=True):
        above -= number
        if above < 0:
            return size
    return 0


def expected_rate(machines: int, age: int, interval: int, spread: int, pause: int = 0) -> float:
    """Requests per second, when all that fell due in ``interval`` and ``pause`` ask within ``spread`` seconds."""
    return min(machines, machines * (interval + pause) / age) / spread


def worst_second(rate: float, seconds: int = 1, chance: float = 1e-3) -> int:
    """What no one of ``seconds`` exceeds, but by ``chance``, if requests come by chance at ``rate``, at most 500."""
    if rate > 500:
        raise ValueError("the chance of none is too small for a float")
    count, term = 0, math.exp(-rate)
    while _more(rate, count, term) * seconds > chance:
        count += 1
        term *= rate / count
    return count


def _more(rate: float, count: int, term: float) -> float:
    """The chance of more than ``count``, whose own is ``term``: summed up, for 1 less the others has few digits."""
    total = 0.0
    while True:
        count += 1
        term *= rate / count
        total += term
        if term <= total * 1e-12 and count > rate:
            return total
