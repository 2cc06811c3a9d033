# SPDX-License-Identifier: GPL-2.0-or-later
"""One verb, one fault: what was told of it, what was left behind, and what reconcile makes of the rest.

The verb has been recorded without a fault before, so that its writes and flushes are known by number.  The fault is
planted at one of them; the same verb on the same volume makes the same writes up to there.
"""

import copy
import errno
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from luksrotd.errors import LuksrotdError, Outcome
from luksrotd.luks2.pair import Pair, parse_pair
from luksrotd.rotation.view import view
from tests.support.crash import Enumeration
from tests.support.crashjudge import SEED, Judge, Scenario, record
from tests.support.crashverbs import ORDINARY, Verb, enroll
from tests.support.crashverbs import VERBS as CRASH_VERBS
from tests.support.simdisk import Faults, Operation, SimDisk, Write, epochs_of
from tests.support.simengine import make_volume
from tests.support.simulation import Simulation, run

SECTOR = 512
VERBS: Final[Mapping[str, Verb]] = {
    **CRASH_VERBS,
    "scrub": Verb(lambda simulation: run(simulation.volumes.scrub(simulation.ref)), enroll),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, and at which of the writes and flushes (all counted together, from 0).

    ``landed``: of a device that is pulled, how many dirty writes get to the medium all the same.
    """

    name: str
    at: int
    plant: Callable[[Faults], object]
    landed: int = 0


@dataclass(slots=True)
class Row:
    """One verb of the matrix; ``disturbed`` counts the faults that it was put to."""

    scenario: Scenario
    log: Sequence[Operation]
    judge: Judge
    mended: Pair
    operate: Callable[[Simulation], object]
    disturbed: int = 0
    outcomes: dict[Outcome, int] = field(default_factory=dict)


@functools.cache
def row(name: str) -> Row:
    """The row of that verb, recorded."""
    verb = VERBS[name]
    prepared = Simulation(make_volume(ORDINARY))
    verb.prepare(prepared)
    scenario = record(prepared.disk.content, verb.operate, releases=verb.releases)
    undisturbed, mended = Simulation(scenario.before), Simulation(scenario.before)
    verb.operate(undisturbed)
    mended.reconcile()
    return Row(scenario, undisturbed.disk.log, Judge(scenario), mended.pair, verb.operate)


def write_faults(log: Sequence[Operation]) -> Iterator[Fault]:
    """Each write in turn: an I/O error, no space, only one sector, all but one sector."""
    ways = {"EIO": (errno.EIO, 0), "ENOSPC": (errno.ENOSPC, 0), "one sector": (0, SECTOR), "but one": (0, -SECTOR)}
    for number, at, size in _writes(log):
        for what, (error, arrives) in ways.items():
            arrived = arrives % size if arrives else 0
            yield Fault(f"write {number}: {what}", at, functools.partial(_fail_write, number, error, arrived))


def flush_faults(log: Sequence[Operation]) -> Iterator[Fault]:
    """Each flush in turn; any prefix of what it should have made durable has arrived, whole writes or sectors."""
    for number, at, writes in _flushes(log):
        sizes = [len(write.data) // SECTOR for write in writes]
        for landed in range(len(sizes) + 1):
            torn = {0} if landed == len(sizes) else {0, 1, sizes[landed] // 2, sizes[landed] - 1} - {sizes[landed]}
            for sectors in sorted(torn):
                plant = functools.partial(_fail_flush, number, landed, sectors)
                yield Fault(f"flush {number}: {landed} writes and {sectors} sectors landed", at, plant)


def losses(log: Sequence[Operation]) -> Iterator[Fault]:
    """Each write in turn is lost, and nobody says so; it is seen when the flush that should have covered it is done."""
    for number, at, _ in _writes(log):
        flushed = next(place for place, operation in enumerate(log) if place > at and not isinstance(operation, Write))
        yield Fault(f"write {number} is lost", flushed, functools.partial(_lose_write, number))


def pulls(log: Sequence[Operation]) -> Iterator[Fault]:
    """The device goes before each write and each flush; of what is dirty, all or nothing has arrived."""
    for number, at, _ in _writes(log):
        yield Fault(f"gone before write {number}", at, functools.partial(_pull_at_write, number))
    for number, at, writes in _flushes(log):
        plant = functools.partial(_pull_at_flush, number)
        for landed in range(len(writes) + 1):
            yield Fault(f"gone before flush {number}: {landed} writes landed", at, plant, landed)


def disturb(name: str, fault: Fault) -> list[str]:
    """Everything that is wrong after the verb has met the fault."""
    this = row(name)
    this.disturbed += 1
    simulation = Simulation(this.scenario.before)
    fault.plant(simulation.disk.faults)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    try:
        this.operate(simulation)
        return ["no error"]
    except LuksrotdError as error:
        told = error.outcome
    this.outcomes[told] = this.outcomes.get(told, 0) + 1
    wrong = [*_told(this, simulation, told), *leaks(simulation)]
    if len(list(Path("/proc/self/fd").iterdir())) != descriptors:
        wrong.append("a descriptor is leaked")
    if simulation.disk.attempts != fault.at + 1:
        wrong.append(f"{simulation.disk.attempts - fault.at - 1} writes and flushes after the one that failed")
    if not simulation.disk.faults.gone:
        wrong += [f"cache kept: {what}" for what in _reconciled(this, simulation.disk)]
    simulation.disk.power_cut(fault.landed)
    return wrong + [f"cache lost: {what}" for what in this.judge.violations(simulation.disk.content)]


def truth(this: Row, simulation: Simulation) -> Outcome:
    """What the device shows, to readers of the page cache and of the medium, after the verb has failed."""
    headers = len(this.mended.raw)
    seen = simulation.disk.medium()[:headers]
    if simulation.disk.faults.gone or seen != simulation.disk.content[:headers]:
        return Outcome.UNKNOWN
    before, after = parse_pair(this.scenario.before), parse_pair(this.scenario.after)
    pair = parse_pair(simulation.disk.content)
    if seen == before.raw and not view(pair).pending:
        return Outcome.UNCHANGED
    if not pair.agree:
        return Outcome.UNCHANGED if seen == before.raw else Outcome.UNKNOWN
    if view(pair).pending:
        return Outcome.WIPE_PENDING
    if pair.winner.metadata.raw == after.winner.metadata.raw:
        return Outcome.COMMITTED
    mended = pair.winner.metadata.raw == this.mended.winner.metadata.raw
    return Outcome.UNCHANGED if mended else Outcome.UNKNOWN


def _told(this: Row, simulation: Simulation, told: Outcome) -> list[str]:
    true = truth(this, simulation)
    return [] if told is true else [f"{told} was told, but {true} is true"]


def leaks(simulation: Simulation) -> list[str]:
    """What has not been given back."""
    leaks = {
        "device": simulation.devices.leaked,
        "shadow": simulation.shadows.leaked,
        "lock": any(simulation.locks.held(device) for device in simulation.devices.opened),
        "worker": simulation.engine.live,
    }
    return [f"a {what} is leaked" for what, leaked in leaks.items() if leaked]


def _reconciled(this: Row, disk: SimDisk) -> list[str]:
    """The fault has gone, the machine has not been restarted: reconcile here and now.

    Crashes in it that share an epoch with a header that was never flushed are judged one by one; later ones are like
    those in any reconcile.
    """
    if disk.cached == disk.durable:
        return []  # as after a restart
    disk = copy.deepcopy(disk)
    disk.faults = Faults()
    base, dirty, logged = bytes(disk.durable), disk.dirty, len(disk.log)
    simulation = Simulation(this.scenario.before, seed=SEED)
    simulation.use(disk)
    try:
        wrong = [f"reconcile leaves {finding.code}" for finding in simulation.reconcile().left]
    except LuksrotdError as error:
        return [f"reconcile fails: {error.message}"]
    headers = len(this.mended.raw)
    if disk.medium()[:headers] != disk.content[:headers]:
        wrong.append("the page cache still shows another header than the medium holds")
    crashes = Enumeration(base, epochs_of([*dirty, *disk.log[logged:]]), headers)
    shared = [0] if any(write.offset < headers for write in dirty) else []
    first = (crash.image(crashes.starts[0]) for crash in crashes.crashes(shared))
    return wrong + [what for image in (*first, *crashes.starts) for what in this.judge.violations(image, 0)]


def _writes(log: Sequence[Operation]) -> Iterator[tuple[int, int, int]]:
    """Of each write: its number, its place among writes and flushes, its size in bytes."""
    number = 0
    for at, operation in enumerate(log):
        if isinstance(operation, Write):
            yield number, at, len(operation.data)
            number += 1


def _flushes(log: Sequence[Operation]) -> Iterator[tuple[int, int, list[Write]]]:
    """Of each flush: its number, its place among writes and flushes, and the writes that it covers."""
    number, dirty = 0, []
    for at, operation in enumerate(log):
        if isinstance(operation, Write):
            dirty.append(operation)
        else:
            yield number, at, dirty
            number, dirty = number + 1, []


def _fail_write(number: int, error: int, arrived: int, faults: Faults) -> None:
    faults.error = error
    faults.writes[number] = arrived


def _lose_write(number: int, faults: Faults) -> None:
    faults.lost = frozenset({number})


def _fail_flush(number: int, landed: int, sectors: int, faults: Faults) -> None:
    faults.flushes[number] = landed
    faults.torn = sectors


def _pull_at_write(number: int, faults: Faults) -> None:
    faults.gone_at_write = number


def _pull_at_flush(number: int, faults: Faults) -> None:
    faults.gone_at_flush = number
