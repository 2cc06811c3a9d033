# SPDX-License-Identifier: GPL-2.0-or-later
"""Timers of an event loop whose time the test moves."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class FakeTimer:
    """A call that is to come."""

    timers: "FakeTimers"
    due: float
    number: int
    callback: Callable[[], None]

    def cancel(self) -> None:
        """It shall not."""
        if self in self.timers.pending:
            self.timers.pending.remove(self)


@dataclass(slots=True)
class FakeTimers:
    """``service.estimate.Timers``; ``pending`` is what waits, ``fired`` how many calls there were."""

    now: float = 0.0
    pending: list[FakeTimer] = field(default_factory=list)
    fired: int = 0
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def time(self) -> float:
        """Seconds."""
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None], /) -> FakeTimer:
        """Call when the test has moved the time so far."""
        timer = FakeTimer(self, self.now + delay, next(self.numbers), callback)
        self.pending.append(timer)
        return timer

    def pass_time(self, seconds: float) -> None:
        """Let the time go by, and call what is due, in its order."""
        end = self.now + seconds
        while due := [timer for timer in self.pending if timer.due <= end]:
            timer = min(due, key=lambda one: (one.due, one.number))
            self.now = timer.due
            timer.cancel()
            self.fired += 1
            timer.callback()
        self.now = end
