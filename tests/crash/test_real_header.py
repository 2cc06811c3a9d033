# SPDX-License-Identifier: GPL-2.0-or-later
"""Every crash state of operations on a real volume, judged by real libcryptsetup: as it is, each valid copy alone,
after libcryptsetup's own recovery, and after reconcile."""

import asyncio
from collections.abc import Iterator, Sequence
from itertools import islice

import pytest

from luksrotd.errors import FormatError
from luksrotd.host.entropy import KernelEntropy
from luksrotd.host.shadow import MemfdShadows
from luksrotd.host.worker import WorkerEngine
from luksrotd.luks2.pair import parse_pair
from luksrotd.ports import Host
from luksrotd.rotation.protocol import Phase
from luksrotd.rotation.view import view
from luksrotd.service.reconciling import Reconciled
from luksrotd.service.volume import Volumes
from tests.support.crash import Enumeration, merged, moved, swapped
from tests.support.crashjudge import misplaced_writes
from tests.support.makeimage import make_image
from tests.support.oracle import MemoryImage, Oracle, same_content, states
from tests.support.simhost import SimClock, SimJournal, SimProbe
from tests.support.simlocks import SimLocks
from tests.support.simulation import MAIN, NEW, OLD, Simulation, run

MIB = 1024 * 1024
#: Reconciles that run at once, each with a worker process.
PARALLEL = 4


class RealSimulation(Simulation):
    """A simulated disk below, a real worker with real libcryptsetup above."""

    def __init__(self, content: bytes, *, sector_size: int = 512) -> None:
        super().__init__(content, sector_size=sector_size)
        self.host = Host(
            self.devices,
            SimLocks(),
            MemfdShadows(),
            WorkerEngine(),
            SimProbe(),
            KernelEntropy(),
            SimClock(),
            SimJournal(),
        )
        self.volumes = Volumes(self.host)


@pytest.fixture(scope="module", params=[512, 4096], ids=["512-byte sectors", "4096-byte sectors"])
def sector(request):
    return request.param


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    """Small, so that thousands of copies of it are quickly made."""
    path = tmp_path_factory.mktemp("crash") / "volume.img"
    return make_image(path, key=MAIN, keyslots_size=2 * MIB, size=4 * MIB).read_bytes()


@pytest.fixture(scope="module")
def enrolment(volume, sector):
    simulation = RealSimulation(volume, sector_size=sector)
    simulation.enroll(MAIN, OLD, ref="vault/1")
    return _enumeration(volume, simulation, sector)


@pytest.fixture(scope="module")
def rotation(enrolment, sector):
    simulation = RealSimulation(enrolment.final, sector_size=sector)
    simulation.rotate(MAIN, NEW, ref="vault/2")
    return _enumeration(enrolment.final, simulation, sector)


@pytest.fixture(scope="module")
def recovery(rotation, sector):
    """A reconcile of a rotation that was cut right after its first header write: heal, wipe, clear."""
    cut = rotation.starts[2]
    simulation = RealSimulation(cut, sector_size=sector)
    assert simulation.reconcile().left == ()
    return _enumeration(cut, simulation, sector)


@pytest.fixture(scope="module", params=["enrolment", "rotation", "recovery"])
def operation(request, enrolment, rotation, recovery):
    """The operation's name and its crash states."""
    return request.param, {"enrolment": enrolment, "rotation": rotation, "recovery": recovery}[request.param]


def _enumeration(before: bytes, simulation: Simulation, sector: int) -> Enumeration:
    epochs = simulation.disk.epochs()
    assert not epochs[-1]
    return Enumeration(before, epochs[:-1], 2 * parse_pair(before).hdr_size, sector)


def _oracle(*, enrolling: bool = False) -> Oracle:
    return Oracle({"main": MAIN}, {1: OLD} if enrolling else {1: OLD, 2: NEW}, may_be_absent=enrolling)


def _judge(enumeration: Enumeration, oracle: Oracle) -> tuple[int, list[str]]:
    """Each state by libcryptsetup, and what its own recovery makes of it: exactly one of the states between phases."""
    count, wrong = 0, []
    between = [parse_pair(start) for start in enumeration.starts]
    for crash, image in states(enumeration):
        count += 1
        wrong += [f"epoch {crash.epoch}: {what}" for what in oracle.judge(image)]
        if not same_content(image, between):
            wrong.append(f"epoch {crash.epoch}: neither before nor after")
    return count, wrong


def test_libcryptsetup_finds_no_violation_in_any_state(operation, report):
    name, enumeration = operation
    oracle = _oracle(enrolling=name == "enrolment")
    count, wrong = _judge(enumeration, oracle)
    assert wrong == []
    assert misplaced_writes(enumeration) == []
    report(
        f"real {name}, {enumeration.sector}-byte sectors: {count} crash states judged by libcryptsetup "
        f"(each copy alone: {oracle.opened} headers loaded), 0 violations"
    )


def test_reconcile_brings_every_state_to_one_end(operation, report):
    """The states whose header differs, that is: what reconcile does depends on nothing else."""
    name, enumeration = operation
    oracle = _oracle(enrolling=name == "enrolment")
    reconciled: set[bytes] = set()

    def distinct() -> Iterator[RealSimulation]:
        for _, image in states(enumeration):
            if image.headers not in reconciled:
                reconciled.add(image.headers)
                yield RealSimulation(image.read(0, image.size), sector_size=enumeration.sector)

    async def reconcile_all(simulations: Sequence[RealSimulation]) -> Sequence[Reconciled]:
        return await asyncio.gather(*(each.volumes.reconcile(each.ref) for each in simulations))

    todo = distinct()
    while batch := list(islice(todo, PARALLEL)):
        assert all(result.left == () for result in run(reconcile_all(batch)))
        for simulation in batch:
            assert _is_done(simulation, enumeration, oracle) == []
    report(f"real {name}, {enumeration.sector}-byte sectors: {len(reconciled)} headers reconciled, all clean")


def _is_done(simulation: Simulation, enumeration: Enumeration, oracle: Oracle) -> list[str]:
    content = simulation.disk.content
    image = MemoryImage(content, enumeration.headers)
    try:
        wrong = oracle.judge(image)
    finally:
        image.close()
    pair = simulation.pair
    if not pair.agree or view(pair).pending:
        wrong.append("not at an end")
    first = parse_pair(enumeration.base)
    retired = [area for area in first.referenced if area not in pair.referenced]
    for area in retired:
        if content[area.offset : area.end] == enumeration.base[area.offset : area.end]:
            wrong.append("the retired area is intact")
    logged = len(simulation.disk.log)
    simulation.reconcile()
    if len(simulation.disk.log) != logged:
        wrong.append("a second reconcile writes")
    return wrong


def test_a_rotation_makes_six_writes_and_six_flushes(rotation):
    writes = [write for epoch in rotation.epochs for write in epoch]
    assert len(rotation.epochs) == len(Phase) == 6
    assert len(writes) <= 6
    assert sum(len(write.data) for write in writes) <= 582_000


MUTANTS = {
    "flush after NEW_AREA dropped": lambda epochs: merged(epochs, 0),
    "flush after HEADER_PRIMARY dropped": lambda epochs: merged(epochs, 1),
    "flush after HEADER_SECONDARY dropped": lambda epochs: merged(epochs, 2),
    "flush after CLEAR_PRIMARY dropped": lambda epochs: merged(epochs, 4),
    "HEADER_PRIMARY before NEW_AREA": lambda epochs: swapped(epochs, 0),
    "WIPE_OLD before HEADER_SECONDARY": lambda epochs: swapped(epochs, 2),
    "WIPE_OLD first": lambda epochs: moved(epochs, 3, 0),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_libcryptsetup_catches_protocol_mutants(name, rotation):
    mutant = Enumeration(rotation.base, MUTANTS[name](rotation.epochs), rotation.headers, rotation.sector)
    oracle = _oracle()
    for _, image in states(mutant):
        try:
            if oracle.judge(image):
                return
        except FormatError:
            return  # both copies lost
    pytest.fail("the mutant survives")
