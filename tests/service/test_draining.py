# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon stops while a set of volumes, or a transaction, is at work."""

import asyncio

import pytest

from luksrotd.errors import Cancelled
from luksrotd.service.jobs import Kind, State
from luksrotd.service.runner import Request, Runner
from luksrotd.service.setwork import Happened
from tests.support.simdisk import Write
from tests.support.simset import SIZE, SimulatedSet, enrolled, opens
from tests.support.simulation import NEW, OLD, run

FINISHED, FAILED, NOTHING = Happened.FINISHED, Happened.FAILED, Happened.NOTHING


@pytest.fixture
def staged():
    simulated = SimulatedSet([enrolled(number) for number in range(SIZE)])
    simulated.stage()
    return simulated


def stopped(staged, when):
    """Finish the set as a job, and drain when ``when``, which gets a function that begins that, calls it."""

    async def main():
        runner, draining = Runner(), []
        loop = asyncio.get_running_loop()

        def stop():
            if not draining:
                draining.append(None)
                loop.call_soon_threadsafe(lambda: draining.append(asyncio.ensure_future(runner.drain())))

        async def work(job):
            return await staged.sets.finish(staged.refs, progress=job.entered)

        when(stop)
        job = runner.submit(Request(Kind.FINISH, tuple("abc"), work))
        await asyncio.wait([ended := asyncio.ensure_future(job.wait())])
        ended.exception()
        await draining[1]
        return job

    return run(main())


def finished(staged):
    """Which of the volumes are."""
    return [opens(image, NEW) and not opens(image, OLD) for image in staged.images]


def test_a_set_stops_after_the_volume_that_is_being_committed_to(staged):
    """Here in the middle of the second one's writes: the flush before the first one can still be cancelled."""

    def when(stop):
        staged.disks[1].observer = lambda operation: stop() if isinstance(operation, Write) else None

    job = stopped(staged, when)
    assert job.state is State.FINISHED
    assert [member.happened for member in job.result.members] == [FINISHED, FINISHED, FAILED]
    assert [type(error) for error in job.result.errors] == [Cancelled]
    assert finished(staged) == [True, True, False]
    assert staged.locks._holds == []
    staged.finish()
    assert finished(staged) == [True] * SIZE


def test_a_set_stops_at_once_while_no_volume_is_being_committed_to(staged):
    def when(stop):
        calls = []

        def on_call(name):
            calls.append(name)
            if calls.count("session") == 2:
                stop()

        staged.engine.on_call = on_call

    job = stopped(staged, when)
    assert [member.happened for member in job.result.members] == [FINISHED, FAILED, NOTHING]
    assert finished(staged) == [True, False, False]


def test_a_set_that_has_done_nothing_yet_is_cancelled(staged):
    def when(stop):
        staged.engine.on_call = lambda _: stop()

    job = stopped(staged, when)
    assert job.state is State.CANCELLED
    assert finished(staged) == [False] * SIZE
