# SPDX-License-Identifier: GPL-2.0-or-later
"""When luksrotd-rotate@.timer starts its service, as systemd 252 to 257 do it.  Pure.

All times are whole seconds since a Monday, 0:00 local time, the same for all machines.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from tests.scale.chance import bell, draw

MINUTE: Final = 60
HOUR: Final = 60 * MINUTE
DAY: Final = 24 * HOUR
WEEK: Final = 7 * DAY

# Which draw is meant, added to the seed.
_DELAY, _ACCURACY, _ON, _OFF, _BATTERY = 1_000, 2_000, 3_000, 4_000, 5_000


@dataclass(frozen=True, slots=True)
class Timer:
    """``OnCalendar=`` every ``interval``, ``RandomizedDelaySec=``, ``FixedRandomDelay=``, ``AccuracySec=``."""

    interval: int = 6 * HOUR
    delay: int = 2 * HOUR
    fixed: bool = False
    accuracy: int = 10 * MINUTE

    def __post_init__(self) -> None:
        # Else systemd leaves out every other time, as the next is looked for after the one that was late.
        if DAY % self.interval or self.delay + self.accuracy > self.interval:
            raise ValueError("delay and accuracy must fit into the interval, and that into a day")

    def late(self, seed: int, machine: int, base: int) -> int:
        """How long after ``base``, a time of the calendar or of a boot, the service is started.

        Systemd wakes up within ``accuracy`` as it suits the machine's other timers: by chance, for us.
        """
        delay = draw(self.delay, seed + _DELAY, machine, 0 if self.fixed else base)
        return delay + draw(self.accuracy, seed + _ACCURACY, machine, base)

    @property
    def spread(self) -> int:
        """Over how many seconds, evenly, machines ask that begin to wait at the same time."""
        return max(self.delay, self.accuracy)


class Power(Protocol):
    """When a machine is on, and so can ask."""

    def asks(self, timer: Timer, seed: int, machine: int, since: int, until: int) -> Iterator[int]:
        """When the service is started and not skipped: all times from ``since`` to ``until``, and perhaps some more."""
        ...


@dataclass(frozen=True, slots=True)
class AlwaysOn:
    """A server."""

    def asks(self, timer: Timer, seed: int, machine: int, since: int, until: int) -> Iterator[int]:
        """One for each time of the calendar."""
        base = (since - timer.delay - timer.accuracy) // timer.interval * timer.interval
        while base < until:
            yield base + timer.late(seed, machine, base)
            base += timer.interval


@dataclass(frozen=True, slots=True)
class Workdays:
    """A machine that somebody uses by day, from Monday to Friday.

    ``on``: when the first come, in seconds after midnight; ``coming``: how much later the last come, as a bell curve;
    ``hours``: how long they stay, in seconds, give or take 15 minutes; ``suspends``: asleep at night, not off;
    ``battery``: in how many of 100 cases it has no AC power when the timer elapses; ``holidays``: days when none comes.
    """

    on: int = 7 * HOUR
    coming: int = 2 * HOUR
    hours: int = 9 * HOUR
    suspends: bool = False
    battery: int = 0
    holidays: range = range(0)

    def __post_init__(self) -> None:
        if not 7 * HOUR <= self.on <= DAY - self.coming - self.hours - HOUR:
            raise ValueError("they come in the morning and are gone before midnight, or the calendar misses no time")

    def asks(self, timer: Timer, seed: int, machine: int, since: int, until: int) -> Iterator[int]:
        """Day by day.

        The calendar has always missed a time when the machine comes on: it has been away for longer than the interval.
        Persistent=yes makes up for it after a boot, with a delay from then on; after sleep the delay is over, too,
        and it asks at once.
        """
        for day in range(since // DAY, until // DAY + 1):
            if day % 7 < 5 and day not in self.holidays:
                for ask in self._on_day(timer, seed, machine, day):
                    if not self.battery or draw(100, seed + _BATTERY, machine, ask) >= self.battery:
                        yield ask

    def _on_day(self, timer: Timer, seed: int, machine: int, day: int) -> Iterator[int]:
        on = day * DAY + self.on + bell(self.coming, seed + _ON, machine, day)
        off = on + self.hours - 15 * MINUTE + bell(30 * MINUTE, seed + _OFF, machine, day)
        ask = on + (draw(MINUTE, seed + _ACCURACY, machine, on) if self.suspends else timer.late(seed, machine, on))
        while ask < off:
            yield ask
            base = (ask // timer.interval + 1) * timer.interval
            ask = base + timer.late(seed, machine, base)
