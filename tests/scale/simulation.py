# SPDX-License-Identifier: GPL-2.0-or-later
"""A fleet and its escrow store, second by second: a heap of what each machine does next.  Pure.

Only asks at which something is to be done are looked at: a key is due, or a staged one is to be finished.
"""

from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from typing import Final

from tests.scale.fleet import Fleet
from tests.scale.timer import MINUTE

#: From the ask until the new key is in the header, and its time with it.
ROTATION: Final = 5
#: --escrow-timeout.
PATIENCE: Final = 10 * MINUTE


@dataclass(frozen=True, slots=True)
class Loss:
    """What the store took from ``begin`` on, and before ``end``, is not there any more.

    ``restored``: it was there until ``end``, when the store went back to a backup as of ``begin``.  Else it was never
    kept, and who reads it back finds that at once.  ``known``: when people know, and look before they
    finish anything.
    """

    begin: int
    end: int
    restored: bool = True
    known: int | None = None

    def of(self, stored: int) -> bool:
        """Whether what was stored then is in the end not there."""
        return self.begin <= stored < self.end

    def seen(self, stored: int, now: int) -> bool:
        """Whether somebody who looks now finds that it is not there."""
        return self.of(stored) and (not self.restored or now >= self.end)


@dataclass(slots=True)
class Store:
    """``outages``: from when until when it answers nobody; ``capacity``: requests per second; None: as many as come."""

    outages: tuple[tuple[int, int], ...] = ()
    capacity: float | None = None
    loss: Loss | None = None
    _free: float = 0.0

    def takes(self, now: int) -> bool:
        """Whether it acknowledges what comes now before the machine's patience is at its end; in order."""
        if any(begin <= now < end for begin, end in self.outages):
            return False
        if self.capacity is None:
            return True
        begun = max(self._free, now)
        if begun - now > PATIENCE:
            return False
        self._free = begun + 1 / self.capacity
        return True


@dataclass(frozen=True, slots=True)
class Policy:
    """``grace``: None to rotate at once; else how long a key is staged at least, before the next ask finishes it.

    ``read_back``: only if the store still has it; else it is aborted, and the next one staged.
    ``restarts``, ``restart``: how often, and after how many seconds, a failed attempt is repeated before that.
    """

    grace: int | None = None
    read_back: bool = False
    restarts: int = 0
    restart: int = 10 * MINUTE


@dataclass(slots=True)
class Trace:
    """What has happened.  ``requests``: times of all requests to the store, ``failed``: of those that failed.

    For each rotation that is done (finished, if in two steps): ``rotated``, its time, ``machines``, whose, ``ages``,
    how old the key before was.  For each machine: ``made``, when its key in force was made, ``stored``, when the store
    took that; ``waited``: when it rotated after a failure, ``staged``: when its staged key was stored, if it has
    one.  ``replaced``: how many staged keys were aborted because the store had lost them.
    """

    requests: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    rotated: list[int] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)
    machines: list[int] = field(default_factory=list)
    waited: dict[int, int] = field(default_factory=dict)
    made: list[int] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    replaced: int = 0
    staged: dict[int, int] = field(default_factory=dict)

    def lost(self, loss: Loss) -> int:
        """Machines whose key in force nobody has."""
        return sum(loss.of(stored) for stored in self.stored)


def run(fleet: Fleet, end: int, store: Store | None = None, policy: Policy | None = None) -> Trace:
    """From 0 until ``end``."""
    simulation = _Simulation(fleet, store or Store(), policy or Policy())
    trace = simulation.trace
    heap = [
        (fleet.next_ask(machine, trace.made[machine] + fleet.limit(machine)), machine)
        for machine in range(fleet.machines)
    ]
    heapify(heap)
    while heap and heap[0][0] < end:
        now, machine = heap[0]
        following = simulation.step(now, machine)
        if following < end:
            heapreplace(heap, (following, machine))
        else:
            heappop(heap)
    return trace


class _Simulation:
    def __init__(self, fleet: Fleet, store: Store, policy: Policy) -> None:
        self.fleet, self.store, self.policy, self.trace = fleet, store, policy, Trace()
        self.trace.made.extend(fleet.made(machine) for machine in range(fleet.machines))
        self.trace.stored.extend(self.trace.made)
        self._tries: dict[int, int] = {}

    def step(self, now: int, machine: int) -> int:
        """What a machine does at an ask; when it will have something to do again."""
        if machine in self.trace.staged:
            return self._finish(now, machine)
        if not self._gives(now):
            return self._again(now, machine)
        tried = self._tries.pop(machine, None) is not None
        if machine < self.fleet.broken:  # the store has a key that opens nothing
            return self.fleet.next_ask(machine, now + 1)
        if self.policy.grace is not None:
            self.trace.staged[machine] = now
            return self.fleet.next_ask(machine, now + ROTATION + self.policy.grace)
        return self._done(now, machine, now, tried)

    def _gives(self, now: int) -> bool:
        self.trace.requests.append(now)
        if self.store.takes(now):
            return True
        self.trace.failed.append(now)
        return False

    def _again(self, now: int, machine: int) -> int:
        tries = self._tries[machine] = self._tries.get(machine, 0) + 1
        if tries % (self.policy.restarts + 1):
            return now + self.policy.restart
        return self.fleet.next_ask(machine, now + 1)

    def _finish(self, now: int, machine: int) -> int:
        stored, loss = self.trace.staged[machine], self.store.loss
        if self.policy.read_back and not self._gives(now):
            return self._again(now, machine)
        tried = self._tries.pop(machine, None) is not None
        looked = self.policy.read_back or (loss is not None and loss.known is not None and now >= loss.known)
        del self.trace.staged[machine]
        if looked and loss is not None and loss.seen(stored, now):
            self.trace.replaced += 1
            return self.step(now, machine)
        return self._done(now, machine, stored, tried)

    def _done(self, now: int, machine: int, stored: int, tried: bool) -> int:
        """``stored``: when the store took the key that is in force now, which is its age, too."""
        trace = self.trace
        trace.rotated.append(now)
        trace.machines.append(machine)
        trace.ages.append(now - trace.made[machine])
        if tried:
            trace.waited[machine] = now
        trace.made[machine] = trace.stored[machine] = stored
        return self.fleet.next_ask(machine, stored + ROTATION + self.fleet.limit(machine))
