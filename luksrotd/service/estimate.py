# SPDX-License-Identifier: GPL-2.0-or-later
"""Moves the progress of jobs while keys are derived: by time, for a derivation says nothing until it is done."""

import asyncio
from collections.abc import Callable, Hashable
from typing import Final, Protocol

from luksrotd.service.jobs import Job
from luksrotd.service.progress import TIMED, Stage, estimated_part

TICK_SECONDS: Final = 0.25
"""How often the progress of a job that derives keys moves."""
#: Where nothing has been measured yet.  libcryptsetup's default cost is two seconds for each derivation.
FIRST_GUESS: Final = {Stage.DERIVING: 4.0, Stage.VERIFYING: 2.0}
#: Who expects nothing to take any time divides by zero.
LEAST_SECONDS: Final = 0.05
#: How many durations are remembered.
REMEMBERED: Final = 256


class Timer(Protocol):
    """A call that is to come."""

    def cancel(self) -> None:
        """It shall not."""


class Timers(Protocol):
    """What is needed of an event loop."""

    def time(self) -> float:
        """Seconds, monotonic."""

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Timer:
        """Call after ``delay`` seconds."""


class Durations:
    """How long things took the last time, in seconds; the oldest are forgotten."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._seconds: dict[Hashable, float] = {}
        self._remembered = remembered

    def learn(self, keys: tuple[Hashable, ...], seconds: float) -> None:
        """It took so long, under each of the names that it goes by."""
        for key in keys:
            self._seconds.pop(key, None)
            self._seconds[key] = seconds
        while len(self._seconds) > self._remembered:
            del self._seconds[next(iter(self._seconds))]

    def expect(self, keys: tuple[Hashable, ...], guess: float) -> float:
        """How long it will take: as it did under the first name that is known, else ``guess``."""
        return max(next((self._seconds[key] for key in keys if key in self._seconds), guess), LEAST_SECONDS)


class Estimator:
    """Follows jobs; a timer runs for each that derives keys, and none else.

    ``timers``: None for the running event loop.
    """

    def __init__(self, timers: Timers | None = None) -> None:
        self._timers = timers
        self._durations = Durations()

    def follow(self, job: Job, cost: Hashable) -> None:
        """Move its progress from now to its end; jobs of the same kind and ``cost`` are taken to last as long."""
        _Followed(job, cost, self._durations, self._timers or asyncio.get_running_loop())


class _Followed:
    def __init__(self, job: Job, cost: Hashable, durations: Durations, timers: Timers) -> None:
        self._job = job
        self._cost = cost
        self._durations = durations
        self._timers = timers
        self._entry = 0
        self._stage: Stage | None = None
        self._since = 0.0
        self._timer: Timer | None = None
        job.subscribe(self._look)

    def _look(self) -> None:
        """The job has changed; perhaps it is in another stage now."""
        if self._job.ended:
            self._stop()
        elif self._job.entries != self._entry:
            self._entry = self._job.entries
            if self._stage is not None:
                self._durations.learn(self._names(self._stage), self._timers.time() - self._since)
            self._stop()
            if self._job.step in TIMED:
                self._stage, self._since = Stage(self._job.step), self._timers.time()
                self._timer = self._timers.call_later(TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        if self._stage is None:
            return
        expected = self._durations.expect(self._names(self._stage), FIRST_GUESS[self._stage])
        self._timer = self._timers.call_later(TICK_SECONDS, self._tick)
        self._job.estimate(estimated_part(self._timers.time() - self._since, expected))

    def _stop(self) -> None:
        self._stage = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _names(self, stage: Stage) -> tuple[Hashable, ...]:
        """On the same volumes it takes what it took; on others of the same cost, about as long."""
        kind = self._job.kind
        return (stage, kind, self._job.volumes), (stage, kind, self._cost)
