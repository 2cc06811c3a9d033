# SPDX-License-Identifier: GPL-2.0-or-later
"""Which job may run when: one per volume, within the memory, users in turn, everything bounded.  Pure.

Nobody starves.  On a volume, who came first goes first.  Of those whose volumes are free, one of the user with the
fewest running jobs is next, and of these by time: that of the job's arrival or, if that was later, of the start of its
owner's last one.  So who comes from now on is behind.  Nobody overtakes the next one while it waits for a place or
for memory.
"""

from collections.abc import Mapping, Sequence

from luksrotd.config import Limits
from luksrotd.errors import Busy, TooMany
from luksrotd.records import dataclass

ROOT = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """A job, as far as the schedule is concerned: what it works on, whose it is (uid), the memory that it needs.

    ``owner`` of ``None``: the daemon's own.  ``number`` grows with every job.  ``idle``: it runs, but waits for a
    person, so it has its volumes and nothing else.
    """

    number: int
    volumes: frozenset[str]
    owner: int | None = None
    memory_kib: int = 0
    idle: bool = False


#: When the last job of each owner started: the number of the newest job then, and a count of starts since that came.
Turns = Mapping[int | None, tuple[int, int]]


def startable(
    running: Sequence[Entry], queued: Sequence[Entry], limits: Limits, turns: Turns | None = None
) -> tuple[Entry, ...]:
    """The waiting jobs that may run now, in the order in which they are to start; ``queued``: by their arrival.

    One that needs more than all of the memory runs alone.  One user leaves a place to the others.
    """
    at_work, free = [entry for entry in running if not entry.idle], _free(running, queued)
    now = list(at_work)
    while candidates := [entry for entry in free if _may_have_another(entry.owner, now, limits)]:
        entry = _next(candidates, now, turns or {})
        if len(now) >= limits.jobs or not _fits(now, entry, limits.memory_kib):
            break  # it is next: were others let by, it might never find enough memory
        free.remove(entry)
        now.append(entry)
    return tuple(now[len(at_work) :])


def turns_after(turns: Turns, started: Entry, queued: Sequence[Entry]) -> Turns:
    """The turns once ``started``, one of ``queued``, has; without those that do not matter any more."""
    kept = {owner: last for owner, last in turns.items() if last[0] >= queued[0].number}
    newest = (queued[-1].number, 0)
    number, count = max((newest, *kept.values()))
    return {**kept, started.owner: (number, count + 1)}


def refusal(
    running: Sequence[Entry], queued: Sequence[Entry], new: Entry, limits: Limits, turns: Turns | None = None
) -> Busy | TooMany | None:
    """Why a new job is not taken; None if it is.

    The daemon's own is refused only where another one waits for the volume, and takes nobody's place in the queue.
    """
    if new.owner is None:
        doubled = any(entry.owner is None and entry.volumes & new.volumes for entry in queued)
        return Busy("cannot start a job: one of the daemon's own is waiting for the volume") if doubled else None
    own = [entry for entry in (*running, *queued) if entry.owner == new.owner]
    if new.owner != ROOT and len(own) >= limits.jobs_per_user:
        return TooMany(f"cannot start a job: {limits.jobs_per_user} of the user's are under way")
    if new in startable(running, (*queued, new), limits, turns):
        return None
    of_users = [entry for entry in queued if entry.owner is not None]
    here = [entry for entry in of_users if entry.volumes & new.volumes]
    share = _share(limits.waiting_per_volume)
    if len(here) >= limits.waiting_per_volume:
        return Busy(f"cannot start a job: {limits.waiting_per_volume} jobs are waiting for the volume")
    if new.owner != ROOT and sum(entry.owner == new.owner for entry in here) >= share:
        return TooMany(f"cannot start a job: {share} of the user's are waiting for the volume")
    if len(of_users) >= limits.waiting:
        return Busy(f"cannot start a job: {limits.waiting} jobs are waiting")
    return None


def _share(places: int) -> int:
    """How many of the places in a queue one user may take, so that another one finds one."""
    return max(1, places // 2)


def _free(running: Sequence[Entry], queued: Sequence[Entry]) -> list[Entry]:
    """Those whose volumes nobody has or waits for that came before."""
    taken = {volume for entry in running for volume in entry.volumes}
    free = []
    for entry in queued:
        if not entry.volumes & taken:
            free.append(entry)
        taken |= entry.volumes  # who waits for several volumes is not overtaken for ever by those who want one
    return free


def _next(free: Sequence[Entry], running: Sequence[Entry], turns: Turns) -> Entry:
    def turn(entry: Entry) -> tuple[int, tuple[int, int], int]:
        arrival = (entry.number, 0)
        if entry.owner is None:
            return (-1, arrival, entry.number)
        of_owner = sum(other.owner == entry.owner for other in running)
        return (of_owner, max(arrival, turns.get(entry.owner, arrival)), entry.number)

    return min(free, key=turn)


def _may_have_another(owner: int | None, running: Sequence[Entry], limits: Limits) -> bool:
    return owner in (None, ROOT) or sum(other.owner == owner for other in running) < max(1, limits.jobs - 1)


def _fits(running: Sequence[Entry], entry: Entry, memory_kib: int | None) -> bool:
    used = sum(other.memory_kib for other in running)
    return not running or memory_kib is None or used + entry.memory_kib <= memory_kib
