# SPDX-License-Identifier: GPL-2.0-or-later
"""What a volume that is in order costs a reconcile, counted; and what it waits for."""

import asyncio
from itertools import count

import pytest

from luksrotd.errors import Busy, DeviceError, UnknownDevice
from luksrotd.ports import DeviceIdentity, DeviceRef, Host
from luksrotd.rotation.leftovers import Rules
from luksrotd.service import threads
from luksrotd.service.glances import TOGETHER, Glances
from luksrotd.service.reconciling import Reconciler
from luksrotd.service.suspects import Suspects
from luksrotd.service.transaction import Transactor
from tests.service.test_threads import DyingDisk, no_thread, until
from tests.support import forge
from tests.support.simdisk import SimDevices
from tests.support.simengine import HDR_SIZE, SimEngine, make_volume
from tests.support.simhost import SimClock, SimEntropy, SimInventories, SimJournal, SimProbe
from tests.support.simlocks import SimLocks
from tests.support.simshadow import SimShadows

pytestmark = pytest.mark.asyncio

RULES = Rules()


class CountedDisk(DyingDisk):
    """Also counts its reads, and how many bytes they ask for."""

    def __init__(self, *arguments, **options):
        self.reads = []
        super().__init__(*arguments, **options)

    def medium(self, *part):
        self.reads.append(part)
        return super().medium(*part)


class CountedProbe(SimProbe):
    """Counts the devices of each look."""

    def __init__(self):
        super().__init__()
        self.looks, self.singly = [], []

    async def foreign(self, device):
        self.singly.append(device.path)
        return await super().foreign(device)

    async def all_clear(self, devices):
        self.looks.append(len(devices))
        return await super().all_clear(devices)


class Place:
    """So many volumes, each reconciled already."""

    def __init__(self, count=1):
        uuids = [f"{number:08x}-2222-4333-8444-555555555555" for number in range(count)]
        self.disks = [
            CountedDisk(make_volume([b"a"], uuid=uuid), path=f"/dev/sim{n}", identity=DeviceIdentity(True, 7, n))
            for n, uuid in enumerate(uuids)
        ]
        self.refs = [DeviceRef(disk.path) for disk in self.disks]
        self.devices, self.locks, self.probe = SimDevices(*self.disks), SimLocks(), CountedProbe()
        self.shadows, self.engine, self.inventories = SimShadows(), SimEngine(), SimInventories()
        self.host = Host(
            self.devices, self.locks, self.shadows, self.engine, self.probe, SimEntropy(), SimClock(), SimJournal(),
            self.inventories,
        )  # fmt: skip
        self.reconciler = Reconciler(self.host, Transactor(self.host))
        self.glances = Glances(self.host, Suspects(self.host), patience=0.001)

    async def settled(self):
        """Once each has its inventory, nothing has been counted yet."""
        for ref in self.refs:
            assert (await self.reconciler.reconcile(ref)).found == ()
        for disk in self.disks:
            disk.reads.clear()
        self.probe.looks.clear()
        self.probe.singly.clear()
        self.locks.log.clear()
        self.devices.opened.clear()
        return self


async def test_a_volume_in_order_costs_one_read_and_no_lock():
    place = await Place().settled()
    done = await place.reconciler.reconcile(place.refs[0])
    assert (done.found, done.left, done.differences) == ((), (), ())
    assert place.disks[0].reads == [(0, 2 * HDR_SIZE)]
    assert len(place.devices.opened) == 1
    assert place.locks.log == []
    assert place.shadows.created == []
    assert place.probe.singly == []
    assert not place.devices.leaked


async def test_many_cost_no_process_of_their_own():
    place = await Place(3 * TOGETHER).settled()
    results = await asyncio.gather(*map(place.reconciler.reconcile, place.refs))
    assert [result.found for result in results] == [()] * len(place.refs)
    assert place.probe.looks == [TOGETHER] * 3
    assert place.probe.singly == []
    assert [len(disk.reads) for disk in place.disks] == [1] * len(place.disks)
    assert len({result.uuid for result in results}) == len(place.refs)
    assert not place.devices.leaked


async def test_without_a_thread_all_are_told_so_and_nothing_is_left(monkeypatch):
    place = await Place(3 * TOGETHER).settled()
    submit, refusals = threads.ThreadPoolExecutor.submit, count()

    def refused(executor, work):
        if next(refusals) < 10 * len(place.refs):  # far more than there is a need to ask for
            no_thread()
        return submit(executor, work)

    with monkeypatch.context() as patched:
        patched.setattr(threads.ThreadPoolExecutor, "submit", refused)
        results = await asyncio.gather(*map(place.reconciler.reconcile, place.refs), return_exceptions=True)
    assert {type(result) for result in results} == {Busy}
    assert (await place.reconciler.reconcile(place.refs[0])).found == ()
    assert place.probe.looks == [1]
    assert not place.devices.leaked


async def test_one_that_is_not_in_order_is_worked_on_in_its_turn_and_the_others_do_not_wait():
    place = await Place(3).settled()
    place.disks[1].replace(4096, bytes(512))
    entered = []

    class Turn:
        async def __aenter__(self):
            entered.append(1)

        async def __aexit__(self, *_):
            entered.append(-1)

    results = await asyncio.gather(*(place.reconciler.reconcile(ref, turn=Turn) for ref in place.refs))
    assert [[str(found.code) for found in result.found] for result in results] == [[], ["header-copy-bad"], []]
    assert entered == [1, -1]
    assert place.probe.singly == ["/dev/sim1"]
    assert forge.pair_of(place.disks[1].content).agree


def foreign(place):
    place.probe.planted["/dev/sim0"] = ("ext4",)


def unprobed(place):
    place.probe.broken = True


def torn(place):
    place.disks[0].replace(HDR_SIZE + 4096, bytes(512))


def lost(place):
    place.disks[0].replace(0, bytes(512))
    place.disks[0].replace(HDR_SIZE, b"SKUL\xba\xbe\x00\x02" + bytes(504))


def newer(place):
    place.disks[0].replace(0, forge.newer(place.disks[0].content, ["primary"])[: 2 * HDR_SIZE])


def forgotten(place):
    place.inventories.kept.clear()


def unreadable(place):
    place.inventories.broken = True


@pytest.mark.parametrize("doubt", [foreign, unprobed, torn, lost, newer, forgotten, unreadable])
async def test_in_doubt_it_is_not_in_order(doubt):
    place = await Place().settled()
    assert await place.glances.clean(place.refs[0], RULES)
    doubt(place)
    assert await place.glances.clean(place.refs[0], RULES) is None
    assert not place.devices.leaked


async def test_what_cannot_be_read_is_told():
    place = await Place(2).settled()
    with pytest.raises(UnknownDevice):
        await place.glances.clean(DeviceRef("/dev/nothing"), RULES)
    place.disks[0].faults.gone = True
    assert await place.glances.clean(place.refs[1], RULES)
    with pytest.raises((UnknownDevice, DeviceError)):
        await place.glances.clean(place.refs[0], RULES)
    assert not place.devices.leaked


async def test_a_device_that_does_not_answer_holds_up_nobody_but_who_asks_about_it():
    place = await Place(5).settled()
    dead = place.disks[2]
    dead.entered = 0
    dead.alive.clear()
    asked = [asyncio.create_task(place.glances.clean(ref, RULES)) for ref in place.refs]
    await asyncio.wait(asked[:2] + asked[3:])
    assert not asked[2].done()
    # Who asks about it again takes no thread: it is left to the thorough way, which has its own limit.
    assert await place.glances.clean(place.refs[2], RULES) is None
    assert dead.entered == 1
    dead.alive.set()
    assert await asked[2]
    assert all([await task for task in asked])
    assert not place.devices.leaked


async def test_a_cancel_waits_for_the_thread_and_leaves_nothing_open():
    place = await Place(2).settled()
    place.disks[0].entered = 0
    place.disks[0].alive.clear()
    first, second = (asyncio.create_task(place.glances.clean(ref, RULES)) for ref in place.refs)
    await until(lambda: place.disks[0].entered)
    first.cancel()
    assert await second
    assert not first.done()
    place.disks[0].alive.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert not place.devices.leaked
    assert await place.glances.clean(place.refs[0], RULES)


async def test_one_that_nobody_waits_for_any_more_is_not_looked_at():
    place = await Place(2).settled()
    glances = Glances(place.host, Suspects(place.host), patience=60)
    place.disks[0].entered = 0
    place.disks[0].alive.clear()
    first, second = (asyncio.create_task(glances.clean(ref, RULES)) for ref in place.refs)
    await until(lambda: place.disks[0].entered)
    second.cancel()
    await asyncio.sleep(0)
    place.disks[0].alive.set()
    assert await first
    with pytest.raises(asyncio.CancelledError):
        await second
    assert place.disks[1].reads == []
    assert not place.devices.leaked


async def test_the_end_of_the_loop_leaves_nobody_waiting():
    place = await Place(2).settled()
    waiting = asyncio.Event()

    async def never(devices):
        waiting.set()
        await asyncio.Event().wait()

    place.probe.all_clear = never
    asked = [asyncio.create_task(place.glances.clean(ref, RULES)) for ref in place.refs]
    await waiting.wait()
    for task in [*asked, *place.glances._tasks]:
        task.cancel()
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert not place.devices.leaked
