# SPDX-License-Identifier: GPL-2.0-or-later
"""Which job may run when: one per volume, within the memory, users in turn, everything bounded.  Pure.

Nobody starves: on a volume, who came first goes first.  Of those whose volumes are free, the user with the fewest jobs
ahead goes first, and nobody overtakes one that is next and waits for a place or for memory.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from luksrotd.config import Limits
from luksrotd.errors import Busy, TooMany

ROOT = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """A job, as far as the schedule is concerned: what it works on, whose it is (uid), the memory that it needs.

    ``owner`` of ``None``: the daemon's own.  ``number`` grows with every job.
    """

    number: int
    volumes: frozenset[str]
    owner: int | None = None
    memory_kib: int = 0


def startable(running: Sequence[Entry], queued: Sequence[Entry], limits: Limits) -> tuple[Entry, ...]:
    """The waiting jobs that may run now, in the order in which they are to start; ``queued``: by their arrival.

    One that needs more than all of the memory runs alone.
    """
    now = list(running)
    for entry in _in_turn(running, queued):
        if len(now) >= limits.jobs or not _fits(now, entry, limits.memory_kib):
            break  # it is next: were others let by, it might never find enough memory
        now.append(entry)
    return tuple(now[len(running) :])


def refusal(running: Sequence[Entry], queued: Sequence[Entry], new: Entry, limits: Limits) -> Busy | TooMany | None:
    """Why a new job is not taken; None if it is.

    The daemon's own is refused only where another one waits for the volume, and takes nobody's place in the queue.
    """
    if new.owner is None:
        doubled = any(entry.owner is None and entry.volumes & new.volumes for entry in queued)
        return Busy("cannot start a job: one of the daemon's own is waiting for the volume") if doubled else None
    own = [entry for entry in (*running, *queued) if entry.owner == new.owner]
    if new.owner != ROOT and len(own) >= limits.jobs_per_user:
        return TooMany(f"cannot start a job: {limits.jobs_per_user} of the user's are under way")
    if new in startable(running, (*queued, new), limits):
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


def _in_turn(running: Sequence[Entry], queued: Sequence[Entry]) -> list[Entry]:
    """Those whose volumes are free: the daemon's own first, then by how many of the same user's are ahead of each."""
    taken = {volume for entry in running for volume in entry.volumes}
    ahead = Counter(entry.owner for entry in running)
    found: list[tuple[int, int, Entry]] = []
    for entry in queued:
        if not entry.volumes & taken:
            turn = -1 if entry.owner is None else ahead[entry.owner]
            found.append((turn, entry.number, entry))
            ahead[entry.owner] += 1
        taken |= entry.volumes  # who waits for several volumes is not overtaken for ever by those who want one
    return [entry for _, _, entry in sorted(found, key=lambda item: item[:2])]


def _fits(running: Sequence[Entry], entry: Entry, memory_kib: int | None) -> bool:
    used = sum(other.memory_kib for other in running)
    return not running or memory_kib is None or used + entry.memory_kib <= memory_kib
