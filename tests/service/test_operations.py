# SPDX-License-Identifier: GPL-2.0-or-later
"""Jobs on a simulated volume: what they do, and what is left wherever they are cancelled."""

import asyncio
import os

import pytest

from luksrotd.errors import Cancelled, DeviceError, InvalidRequest, NotAuthorized, TooMany, UnknownDevice
from luksrotd.ports import Caller, DeviceRef
from luksrotd.rotation.edits import NEW, UNLOCK
from luksrotd.service import handover
from luksrotd.service.jobs import State
from luksrotd.service.progress import Stage
from tests.service.world import BACKUP, FAST, NEXT, NODE, OLD, OTHER_UUID, OWNER, UUID, World
from tests.support.simdisk import Flush, Write
from tests.support.simengine import make_volume
from tests.support.simlocks import Level

pytestmark = pytest.mark.asyncio


async def test_enrol_rotate_verify_data_and_reconcile():
    world = World()
    async with world.running():
        await world.enrolled()
        assert await world.operations.data(UUID, "backup") == {"escrow": 1}
        result = await world.start().wait()
        assert (result.generation, result.name) == (2, "backup")
        assert await world.operations.verify(UUID, OWNER, "backup", world.secrets(**{UNLOCK: NEXT}))
        assert not await world.operations.verify(UUID, OWNER, "backup", world.secrets(**{UNLOCK: BACKUP}))
        done = await world.operations.reconcile(UUID, OWNER)
        assert done.found == done.left == ()
    assert world.opened_by(OLD)
    assert world.opened_by(NEXT)
    assert not world.opened_by(BACKUP)


async def test_a_secret_is_tried_with_the_device_let_go_of():
    """It may be unplugged meanwhile; and a tool that wants it for itself need not wait for a key derivation."""
    world = World()
    async with world.running():
        await world.enrolled()
        held = []
        world.engine.on_call = lambda _: held.append([one.path for one in world.devices.opened if not one.closed])
        assert await world.operations.verify(UUID, OWNER, "backup", world.secrets(**{UNLOCK: BACKUP}))
        assert held
        assert not any(held)


async def test_a_job_outlives_the_registry():
    """When udev is lost, the daemon stops; a commit is finished, and reported as it is."""
    world = World()
    async with world.running():
        loop = asyncio.get_running_loop()

        async def lose_udev():
            world.watcher.close()
            while not world.following.done():  # noqa: ASYNC110 -- a task of the test itself
                await asyncio.sleep(0)

        def observe(operation):
            world.disk.observer = None
            asyncio.run_coroutine_threadsafe(lose_udev(), loop).result()

        world.disk.observer = observe
        job = world.start("enroll")
        assert (await job.wait()).generation == 1
    assert world.opened_by(NEXT)


async def test_the_registry_knows_by_the_time_that_a_job_has_ended():
    world = World()
    async with world.running():
        await world.enrolled()
        assert [key.token.generation for key in world.registry.get(UUID).view.keys] == [1]


async def test_two_rotations_at_once_both_end_right():
    world = World()
    async with world.running():
        await world.enrolled()
        jobs = [world.start(new=b"first"), world.start(new=b"second")]
        assert [job.state for job in jobs] == [State.RUNNING, State.QUEUED]
        results = [await job.wait() for job in jobs]
    assert [result.generation for result in results] == [2, 3]
    assert not world.opened_by(b"first")
    assert world.opened_by(b"second")


async def test_a_node_that_holds_another_volume_by_now_is_not_touched():
    """The caller was authorized for the volume, not for whatever the node shows when the job runs."""
    world = World()
    async with world.running():
        world.disk.replace(0, make_volume([OLD], uuid=OTHER_UUID))
        for kind in ("enroll", "rotate"):
            with pytest.raises(UnknownDevice, match="holds the volume"):
                await world.start(kind).wait()
        with pytest.raises(UnknownDevice):
            await world.operations.verify(UUID, OWNER, "backup", world.secrets(**{UNLOCK: OLD}))
        with pytest.raises(UnknownDevice):
            await world.operations.data(UUID, "backup")
    assert not world.disk.log


# -- generated keys ----------------------------------------------------------------------------------------------


async def offered(job):
    """Wait until the job offers its key."""
    reached = asyncio.Event()
    job.subscribe(lambda: reached.set() if job.ended or job.step is Stage.DELIVERING else None)
    await reached.wait()


async def test_nothing_is_committed_before_the_key_was_confirmed():
    world = World()
    async with world.running():
        await world.enrolled()
        before = world.disk.content
        job = world.start(new=None)
        await offered(job)
        for _ in range(20):
            await asyncio.sleep(0)
        assert world.disk.content == before
        with pytest.raises(NotAuthorized):
            await job.handover.take(Caller(":1.8", 1000))
        with pytest.raises(InvalidRequest, match="not been taken"):
            job.handover.confirm(OWNER)
        fd = await job.handover.take(OWNER)
        with pytest.raises(NotAuthorized):
            job.handover.confirm(Caller(":1.8", 1000))
        for _ in range(20):
            await asyncio.sleep(0)
        assert world.disk.content == before
        job.handover.confirm(OWNER)
        await job.wait()
        with os.fdopen(fd, "rb") as file:
            assert world.opened_by(file.read())
    assert not world.opened_by(BACKUP)


async def test_who_asks_early_gets_the_key_when_it_is_there():
    world = World()
    async with world.running():
        job = world.start("enroll", new=None)
        fd = await job.handover.take(OWNER)
        assert job.step is Stage.DELIVERING
        os.close(fd)
        job.handover.confirm(OWNER)
        await job.wait()


@pytest.mark.parametrize("taken", [False, True])
async def test_a_caller_that_vanishes_before_it_has_the_key_takes_the_job_with_it(taken):
    world = World()
    async with world.running():
        await world.enrolled()
        before = world.disk.content
        job = world.start(new=None)
        await offered(job)
        if taken:  # but not stored yet
            os.close(await job.handover.take(OWNER))
        world.gone.set()
        with pytest.raises(Cancelled):
            await job.wait()
    assert world.disk.content == before


async def test_a_caller_that_has_confirmed_may_go():
    world = World()
    async with world.running():
        await world.enrolled()
        job = world.start(new=None)
        await offered(job)
        held = world.devices.open(DeviceRef(NODE))
        waiting = asyncio.Event()
        job.subscribe(lambda: waiting.set() if job.step is Stage.WAITING_FOR_LOCK else None)
        with world.locks.held_elsewhere(Level.METADATA, held, exclusive=False):
            os.close(await job.handover.take(OWNER))
            job.handover.confirm(OWNER)
            await waiting.wait()
            world.gone.set()
            for _ in range(10):
                await asyncio.sleep(0)
        held.close()
        await job.wait()
    assert not world.opened_by(BACKUP)


async def test_a_key_that_nobody_takes_is_given_up(monkeypatch):
    world = World()
    monkeypatch.setattr(handover.Handover.__init__, "__kwdefaults__", {"seconds": 0.01})
    async with world.running():
        job = world.start("enroll", new=None)
        with pytest.raises(Cancelled, match="not confirmed"):
            await job.wait()
        with pytest.raises(Cancelled):
            await job.handover.take(OWNER)
    assert world.view.seqid == 3


async def test_who_waits_for_a_key_that_never_comes_is_told():
    world = World()
    async with world.running():
        job = world.start("enroll", old=b"wrong", new=None)
        with pytest.raises(Cancelled, match="the job has ended"):
            await job.handover.take(OWNER)


# -- cancelling --------------------------------------------------------------------------------------------------


def check_after_cancel(world, job, before):
    """All or nothing, and the job says which."""
    assert job.ended
    if job.state is State.FINISHED:
        assert world.opened_by(NEXT)
        assert not world.opened_by(BACKUP)
    else:
        assert job.state is State.CANCELLED
        headers = 2 * world.view.pair.hdr_size
        assert world.disk.content[:headers] == before[:headers]
        assert world.opened_by(BACKUP)
        assert not world.opened_by(NEXT)
    assert world.opened_by(OLD)
    assert not world.view.pending


async def cancelled_at(arrange):
    """A rotation that ``arrange(world, cancel)`` has cancelled somewhere; its state."""
    world = World()
    async with world.running():
        await world.enrolled()
        before = world.disk.content
        jobs = []

        def cancel():
            if jobs[0].cancellable:
                world.runner.cancel(jobs[0])

        arranged = arrange(world, cancel)
        jobs.append(world.start())
        await arranged() if arranged else None
        await asyncio.wait([asyncio.ensure_future(jobs[0].wait())])
        check_after_cancel(world, jobs[0], before)
    return jobs[0].state


async def test_cancelled_after_any_number_of_turns_of_the_loop():
    states = []
    for turns in range(60):

        def arrange(world, cancel, turns=turns):
            async def wait_and_cancel():
                for _ in range(turns):
                    await asyncio.sleep(0)
                cancel()

            return wait_and_cancel

        states.append(await cancelled_at(arrange))
    assert State.CANCELLED in states


async def test_cancelled_at_each_call_of_the_worker():
    names = []

    def count(world, cancel):
        world.engine.on_call = names.append

    await cancelled_at(count)
    assert len(names) >= 8
    for number in range(len(names)):

        def arrange(world, cancel, number=number):
            calls = iter(range(1000))
            world.engine.on_call = lambda name: cancel() if next(calls) == number else None

        # A simulated call never waits, so the next real wait is where it takes effect.
        assert await cancelled_at(arrange) is State.CANCELLED


async def test_cancelled_at_each_write_and_flush():
    """The exact line: up to the first flush it is given up, from the first header write on it is finished."""
    operations = []

    def count(world, cancel):
        world.disk.observer = operations.append

    assert await cancelled_at(count) is State.FINISHED
    states = []
    for number in range(len(operations)):

        def arrange(world, cancel, number=number):
            seen, loop = iter(range(1000)), asyncio.get_running_loop()

            async def on_loop():
                cancel()

            def observe(operation):
                if next(seen) == number:
                    asyncio.run_coroutine_threadsafe(on_loop(), loop).result()

            world.disk.observer = observe

        states.append(await cancelled_at(arrange))
    first_flush = next(index for index, operation in enumerate(operations) if isinstance(operation, Flush))
    expected = [State.CANCELLED if number <= first_flush else State.FINISHED for number in range(len(operations))]
    assert states == expected


async def crash(world):
    """Stop a rotation to ``torn`` after its two headers: wipe intent, old area intact."""
    flushes = []

    def observe(operation):
        if len(flushes) == 3:
            raise DeviceError("cannot go on: crashed")
        if isinstance(operation, Flush):
            flushes.append(operation)

    world.disk.observer = observe
    secrets = world.secrets(**{UNLOCK: OLD, NEW: b"torn"})
    with pytest.raises(DeviceError):
        await world.volumes.rotate(DeviceRef(NODE), secrets.sources, data=None, pbkdf=FAST)
    secrets.close()
    world.disk.observer = None


async def test_cancelled_while_a_crash_is_being_finished_nothing_new_is_begun():
    """Before a rotation, what a crash left is finished: that commit cannot be stopped, but the rotation can."""
    world = World()
    async with world.running():
        await world.enrolled()
        await crash(world)
        assert world.view.pending
        loop, seen, jobs = asyncio.get_running_loop(), [], []

        async def on_loop():
            world.runner.cancel(jobs[0])

        def observe(operation):
            if isinstance(operation, Write) and not seen:
                seen.append(operation)
                asyncio.run_coroutine_threadsafe(on_loop(), loop).result()

        world.disk.observer = observe
        jobs.append(world.start())
        with pytest.raises(Cancelled):
            await jobs[0].wait()
        assert seen
        assert not world.view.pending, "finished"
        assert world.opened_by(b"torn"), "the pair that the crash left"
        assert not world.opened_by(NEXT)


@pytest.mark.parametrize("late", ["inventory", "look"])
async def test_a_daemon_that_stops_right_after_a_repair_still_tells_of_it(late):
    world = World()
    async with world.running():
        await world.enrolled()
        await crash(world)
        loop, draining = asyncio.get_running_loop(), []

        def stop(*_):
            if not world.view.pending and not draining:
                draining.append(None)
                loop.call_soon_threadsafe(lambda: draining.append(asyncio.ensure_future(world.runner.drain())))

        where = world.inventories if late == "inventory" else world.registry
        name = "save" if late == "inventory" else "settle"
        original = getattr(where, name)
        setattr(where, name, lambda *given: (stop(), original(*given))[1])
        done = await world.operations.reconcile(UUID, OWNER)
        await draining[1]
        assert [finding.code for finding in done.repaired] == ["wipe-pending"]
        assert world.journal.text().count("volume reconciled") == 1


async def test_nothing_of_a_copy_is_kept_or_written():
    """Not even if there is something to repair by the time that it is known that there was not."""
    world = World()
    async with world.running():
        await world.enrolled()
        world.watcher.put("/dev/sim1", UUID)
        while not world.registry.get(UUID).ambiguous:  # noqa: ASYNC110 -- a task of the test itself
            await asyncio.sleep(0)
        world.inventories.kept.clear()
        await world.operations.reconcile(UUID, OWNER)
        assert world.inventories.kept == {}


async def test_a_full_queue_leaves_no_secret_open():
    world = World()
    async with world.running():
        await world.enrolled()
        with pytest.raises(TooMany):
            list(map(world.start, ["rotate"] * 20))
