# SPDX-License-Identifier: GPL-2.0-or-later
"""A worker that was started ahead: who gets it, and that none is left."""

import asyncio
import errno
import os
import signal

import pytest

from luksrotd.errors import EngineError
from luksrotd.host.launch import launch
from luksrotd.host.spare import OnlyOne, Spare
from luksrotd.host.worker import WorkerEngine
from luksrotd.host.workerprocess import start_worker
from tests.engine.processes import interpreter, resources, worker

pytestmark = pytest.mark.asyncio


class Starts:
    """Starts workers, and remembers them."""

    def __init__(self, **options):
        self.workers = []
        self.started = asyncio.Event()
        self._options = options

    async def __call__(self):
        self.workers.append(await start_worker(**self._options))
        self.started.set()
        return self.workers[-1]

    @property
    def pids(self):
        return [worker.process.pid for worker in self.workers]


async def test_each_session_has_the_spare_of_the_one_before(shadow):
    before = resources()
    starts = Starts()
    async with Spare(starts) as spare:
        async with worker(shadow, WorkerEngine(spare=spare)) as session:
            first = session.pid
            assert await session.unlock() == 0
        for number in range(3):
            async with worker(shadow, WorkerEngine(spare=spare)) as session:
                assert session.pid == starts.pids[number]
                assert await session.unlock() == 0
        assert first not in starts.pids
        assert len(starts.pids) <= 4
    assert resources() == before


async def test_two_sessions_at_once_share_no_worker(shadow):
    async with Spare() as spare:
        engine = WorkerEngine(spare=spare)
        async with worker(shadow, engine) as one, worker(shadow, engine) as two, worker(shadow, engine) as three:
            assert len({one.pid, two.pid, three.pid}) == 3
            for session in (one, two, three):
                assert await session.unlock() == 0


async def test_it_has_given_up_root_before_it_waits():
    process = await start_worker()
    process.channel.setblocking(True)
    process.channel.sendall(b"[]\n")
    assert b"not an object" in await asyncio.to_thread(process.channel.recv, 4096)
    with open(f"/proc/{process.process.pid}/status", encoding="ascii") as file:  # noqa: ASYNC230, PTH123 - the kernel's
        assert "Uid:\t0" not in file.read()
    await process.end()


async def test_a_spare_that_has_died_is_not_used(shadow):
    before = resources()
    starts = Starts()
    async with Spare(starts) as spare:
        async with worker(shadow, WorkerEngine(spare=spare)):
            pass
        await starts.started.wait()
        (dead,) = starts.workers
        os.kill(dead.process.pid, signal.SIGKILL)
        await dead.process.wait()
        async with worker(shadow, WorkerEngine(spare=spare)) as session:
            assert session.pid != dead.process.pid
            assert await session.unlock() == 0
    assert resources() == before


async def test_a_spare_that_cannot_be_started_hinders_nobody(shadow):
    async def fail():
        raise EngineError("cannot start a worker: no more processes")

    async with Spare(fail) as spare:
        for _ in range(2):
            async with worker(shadow, WorkerEngine(spare=spare)) as session:
                assert await session.unlock() == 0


async def test_it_is_ended_after_its_time(shadow):
    before = resources()
    starts = Starts()
    async with Spare(starts, seconds=0) as spare:
        async with worker(shadow, WorkerEngine(spare=spare)):
            pass
        await starts.started.wait()
        async with asyncio.timeout(60):
            await starts.workers[0].process.wait()
    assert resources() == before


async def test_closed_while_it_is_started_it_is_ended(shadow):
    before = resources()
    async with Spare() as spare:
        async with worker(shadow, WorkerEngine(spare=spare)):
            pass
        spare.replace()
    spare.replace()  # not any more
    assert resources() == before


async def test_a_worker_that_may_use_a_device_is_started_for_it(shadow, tmp_path, monkeypatch):
    monkeypatch.setattr("luksrotd.host.worker.groups_for", lambda *_: (65534,))
    starts = Starts()
    async with Spare(starts) as spare:
        spare.replace()
        async with worker(shadow, WorkerEngine(spare=spare)) as session:
            with open(f"/proc/{session.pid}/status", encoding="ascii") as file:  # noqa: ASYNC230, PTH123 - the kernel's
                assert "Groups:\t65534" in file.read()
        assert session.pid not in starts.pids


async def test_cancelled_while_it_waits_for_the_spare_it_leaves_nothing(shadow, tmp_path):
    before = resources()
    slow = interpreter(tmp_path, "import time\ntime.sleep(1000)")
    async with Spare(Starts(python=slow)) as spare:
        spare.replace()
        entering = asyncio.ensure_future(worker(shadow, WorkerEngine(spare=spare)).__aenter__())
        for _ in range(20):
            await asyncio.sleep(0)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
    assert resources() == before


async def test_the_only_one_goes_to_the_first_session(shadow):
    before = resources()
    launched = [launch()]
    pid = launched[0].process.pid
    engine = WorkerEngine(spare=OnlyOne(lambda: launched.pop() if launched else None))
    async with worker(shadow, engine) as session, worker(shadow, engine) as other:
        assert session.pid == pid != other.pid
        assert await session.unlock() == await other.unlock() == 0
    assert resources() == before


async def test_the_only_one_has_died(shadow):
    before = resources()
    dead = launch()
    os.kill(dead.process.pid, signal.SIGKILL)
    await asyncio.to_thread(os.waitid, os.P_PID, dead.process.pid, os.WEXITED | os.WNOWAIT)
    async with worker(shadow, WorkerEngine(spare=OnlyOne(lambda: dead))) as session:
        assert session.pid != dead.process.pid
        assert await session.unlock() == 0
    assert resources() == before


async def test_it_is_waited_for_without_a_descriptor_too(shadow, monkeypatch):
    def refuse(pid):
        raise OSError(errno.EMFILE, "too many open files")

    before = resources()
    async with worker(shadow):
        monkeypatch.setattr(os, "pidfd_open", refuse)
    assert resources() == before
