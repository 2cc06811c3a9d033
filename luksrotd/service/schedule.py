# SPDX-License-Identifier: GPL-2.0-or-later
"""Which job may run when: one per volume, first come first served, everything bounded.  Pure."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Numbers of jobs: that run at once, that wait for one volume, that wait at all.

    A key derivation takes a processor and up to a gigabyte of memory for seconds, so few run at once.
    """

    parallel: int = 2
    waiting_per_volume: int = 4
    waiting: int = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """A job, as far as the schedule is concerned: what it works on, whose it is (uid), the memory that it needs."""

    number: int
    volumes: frozenset[str]
    owner: int | None = None
    memory_kib: int = 0


@dataclass(frozen=True, slots=True)
class Start:
    """Run it now."""


@dataclass(frozen=True, slots=True)
class Queue:
    """Let it wait, for want of a place or (``behind``) for another job of its volume."""

    behind: int | None


@dataclass(frozen=True, slots=True)
class Refuse:
    """Too much is waiting already."""

    reason: str


Decision = Start | Queue | Refuse


def admit(running: Sequence[Entry], queued: Sequence[Entry], new: Entry, limits: Limits) -> Decision:
    """What becomes of a new job; ``queued`` is in the order of arrival."""
    ahead = [entry.number for entry in (*running, *queued) if entry.volumes & new.volumes]
    if not ahead and len(running) < limits.parallel:
        return Start()
    if sum(bool(entry.volumes & new.volumes) for entry in queued) >= limits.waiting_per_volume:
        return Refuse(f"{limits.waiting_per_volume} jobs are waiting for the volume")
    if len(queued) >= limits.waiting:
        return Refuse(f"{limits.waiting} jobs are waiting")
    return Queue(ahead[-1] if ahead else None)


def startable(running: Sequence[Entry], queued: Sequence[Entry], limits: Limits) -> tuple[Entry, ...]:
    """The waiting jobs that may run now, in the order of arrival."""
    busy = {volume for entry in running for volume in entry.volumes}
    places = limits.parallel - len(running)
    chosen: list[Entry] = []
    for entry in queued:
        if len(chosen) >= places:
            break
        if not entry.volumes & busy:
            chosen.append(entry)
        busy |= entry.volumes  # who waits for several volumes is not overtaken for ever by those who want one
    return tuple(chosen)
