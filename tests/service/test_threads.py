# SPDX-License-Identifier: GPL-2.0-or-later
"""Blocking calls: a disk that has died holds up nobody else, and a call that is given up leaves nothing."""

import asyncio
import threading

import pytest

from luksrotd.errors import Busy
from luksrotd.luks2.pair import parse_pair
from luksrotd.ports import DeviceIdentity
from luksrotd.service import actor, threads
from luksrotd.service.threads import THREADS_ABOUT_ONE, in_thread
from luksrotd.service.turns import Turns
from tests.service.world import BACKUP, NEXT, NODE, OLD, OWNER, UUID, World
from tests.support.simdisk import SimDisk
from tests.support.simengine import make_volume

pytestmark = pytest.mark.asyncio
AWAY = 60
CALLS = 40


class DyingDisk(SimDisk):
    """Answers nothing while it is dead; ``entered``: how many calls wait for it."""

    def __init__(self, *arguments, **options):
        self.alive = threading.Event()
        self.alive.set()
        self.entered = 0
        super().__init__(*arguments, **options)

    def medium(self, *part):
        self.entered += 1
        assert self.alive.wait(AWAY)
        return super().medium(*part)


def dying_disks(count):
    disks = []
    for number in range(count):
        uuid = UUID.replace(UUID[:8], f"{number:08x}")
        identity = DeviceIdentity(True, 7, 100 + number)
        disks.append(DyingDisk(make_volume([OLD], uuid=uuid), path=f"/dev/dying{number}", identity=identity))
    return disks


async def turns(count=20):
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition):
    """Of a thread there is no event."""
    async with asyncio.timeout(AWAY):
        while not condition():  # noqa: ASYNC110 -- of other threads
            await asyncio.sleep(0.001)


def no_thread(*_):
    raise RuntimeError("can't start new thread")


class Blocked:
    """Calls that do not come back before they are let."""

    def __init__(self):
        self.go = threading.Event()
        self.entered = 0
        self._lock = threading.Lock()

    def __call__(self):
        with self._lock:
            self.entered += 1
        assert self.go.wait(AWAY)
        return self.entered


async def test_calls_about_one_thing_have_few_threads_and_leave_the_others_to_the_rest():
    dead = Blocked()
    calls = [asyncio.create_task(in_thread(dead, about="/dev/dead")) for _ in range(CALLS)]
    try:
        await until(lambda: dead.entered == THREADS_ABOUT_ONE)
        assert await asyncio.gather(*(in_thread(lambda: 7, about="/dev/alive") for _ in range(CALLS))) == [7] * CALLS
        assert await asyncio.gather(*(in_thread(lambda: 8) for _ in range(CALLS))) == [8] * CALLS
        assert dead.entered == THREADS_ABOUT_ONE
    finally:
        dead.go.set()
    assert len(await asyncio.gather(*calls)) == CALLS
    assert not threads._places


async def test_a_call_that_gets_no_thread_is_not_made_later_either(monkeypatch):
    made = []
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(Busy, match="cannot go on: no thread is to be had: can't start new thread"):
            await in_thread(lambda: made.append("late"))
    await in_thread(lambda: made.append("now"))
    assert made == ["now"]


async def test_a_call_that_an_idle_thread_takes_is_made(monkeypatch):
    """The executor starts a thread before it knows that another one has become free."""
    submit = threads.ThreadPoolExecutor.submit

    def taken(executor, work):
        submit(executor, work).result()
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads.ThreadPoolExecutor, "submit", taken)
    assert await in_thread(lambda: 7) == 7


async def test_many_dead_things_leave_threads_to_the_rest():
    """asyncio has as many as there are processors, and four."""
    dead = Blocked()
    calls = [asyncio.create_task(in_thread(dead, about=f"/dev/dead{n}")) for n in range(CALLS)]
    try:
        await until(lambda: dead.entered == CALLS)
        assert await in_thread(lambda: 7, about="/dev/alive") == 7
    finally:
        dead.go.set()
        await asyncio.gather(*calls)


async def test_a_call_that_has_no_thread_yet_is_given_up_at_once():
    dead, made = Blocked(), []
    first = [asyncio.create_task(in_thread(dead, about="/dev/dead")) for _ in range(THREADS_ABOUT_ONE)]
    await until(lambda: dead.entered == THREADS_ABOUT_ONE)
    late = asyncio.create_task(in_thread(lambda: made.append(1), about="/dev/dead"))
    await turns()
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    dead.go.set()
    await asyncio.gather(*first)
    assert not made
    assert not threads._places


async def test_a_call_that_has_begun_is_waited_for_and_undone():
    dead, undone = Blocked(), []
    call = asyncio.create_task(in_thread(dead, about="/dev/dead", undo=undone.append))
    await until(lambda: dead.entered)
    for _ in range(2):
        call.cancel()
        await turns()
    assert not call.done()
    dead.go.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert undone == [1]


async def test_who_acts_is_known_in_the_thread_too():
    with actor.acting(OWNER, 5):
        found = await in_thread(actor.current)
    assert (found.caller, found.job) == (OWNER, 5)


# -- what callers see --------------------------------------------------------------------------------------------


async def test_who_asks_about_a_dead_disk_does_not_keep_others_from_a_commit():
    dead, alive = dying_disks(1)[0], SimDisk(make_volume([OLD]), path=NODE)
    world = World(disks=[alive, dead])
    gone = parse_pair(dead.content).winner.header.uuid
    async with world.running():
        await world.enrolled()
        dead.alive.clear()
        begun = dead.entered
        asked = [asyncio.create_task(world.operations.data(gone, "backup")) for _ in range(CALLS)]
        try:
            await until(lambda: dead.entered == begun + THREADS_ABOUT_ONE)
            async with asyncio.timeout(AWAY):
                await world.start(old=BACKUP, new=NEXT).wait()
            assert dead.entered == begun + THREADS_ABOUT_ONE
        finally:
            dead.alive.set()
            await asyncio.gather(*asked, return_exceptions=True)
    assert world.opened_by(NEXT)


async def test_disks_that_are_dead_from_the_beginning_do_not_hide_the_others():
    dead, alive = dying_disks(9), SimDisk(make_volume([OLD]), path=NODE)
    world = World(disks=[*dead, alive])
    world.registry._turns = Turns(4, 0.01)
    for disk in dead:
        disk.alive.clear()
    running = asyncio.create_task(world.registry.run())
    try:
        await until(lambda: UUID in world.registry.volumes)
        assert set(world.registry.volumes) == {UUID}
    finally:
        for disk in dead:
            disk.alive.set()
    await world.registry.scanned()
    assert len(world.registry.volumes) == 10
    world.watcher.close()
    await running


async def test_turns_go_round():
    entered, go = [], asyncio.Event()

    async def work(taking, number):
        async with taking.one():
            entered.append(number)
            await go.wait()

    patient = Turns(2, AWAY)
    tasks = [asyncio.create_task(work(patient, number)) for number in range(5)]
    await turns()
    assert entered == [0, 1]
    tasks[3].cancel()
    go.set()
    await asyncio.wait(tasks)
    assert entered == [0, 1, 2, 4]
    assert patient._free._value == 2
    hasty = Turns(1, 0.001)
    go.clear()
    tasks = [asyncio.create_task(work(hasty, number)) for number in range(5, 8)]
    await until(lambda: entered[4:] == [5, 6, 7])
    await until(lambda: hasty._free._value == 1)
    go.set()
    await asyncio.wait(tasks)
    assert hasty._free._value == 1
