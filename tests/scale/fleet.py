# SPDX-License-Identifier: GPL-2.0-or-later
"""A fleet of machines, each with one volume whose managed key is rotated when it is older than it may become.  Pure."""

from dataclasses import dataclass, field
from typing import Final

from tests.scale.chance import draw
from tests.scale.timer import DAY, HOUR, AlwaysOn, Power, Timer

#: Later than all.
NEVER: Final = 1 << 62

_AGE, _START = 6_000, 7_000


@dataclass(frozen=True, slots=True)
class Fleet:
    """``age``: AGE of the unit.  ``spread``: by how much at most it is less, on each machine by an amount of its own.

    ``oldest``: how old the oldest key is at the beginning; ``enrolled``: from then on, how long it took to make all.
    ``broken``: on how many machines the credential no longer opens the volume.
    """

    machines: int
    seed: int = 2026
    age: int = 90 * DAY
    spread: int = 0
    oldest: int = 90 * DAY
    enrolled: int = 90 * DAY
    broken: int = 0
    timer: Timer = field(default_factory=Timer)
    power: Power = field(default_factory=AlwaysOn)

    def limit(self, machine: int) -> int:
        """The age, in seconds, from which a machine rotates; whole hours, as its configuration says it."""
        return self.age - draw(self.spread // HOUR + 1, self.seed + _AGE, machine) * HOUR

    def made(self, machine: int) -> int:
        """When its first key was made."""
        return draw(self.enrolled, self.seed + _START, machine) - self.oldest

    def next_ask(self, machine: int, since: int) -> int:
        """The first time from ``since`` on, and not before 0, at which a machine asks; ``NEVER``: not within a year."""
        since = max(since, 0)
        for ask in self.power.asks(self.timer, self.seed, machine, since, since + 365 * DAY):
            if ask >= since:
                return ask
        return NEVER
