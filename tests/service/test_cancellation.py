# SPDX-License-Identifier: GPL-2.0-or-later
"""Cancelling before, at and after the point of no return."""

import asyncio

import pytest

from luksrotd.errors import Cancelled, DeviceError, Outcome
from luksrotd.service.cancellation import PointOfNoReturn, cancellable, heed_cancellation, to_the_end


async def started(work):
    """A task that runs ``work``, and has reached its first await."""
    reached = asyncio.Event()
    task = asyncio.create_task(cancellable(lambda point: work(point, reached)))
    await reached.wait()
    return task


@pytest.mark.asyncio
async def test_before_the_point_the_work_is_cancelled():
    async def work(point, reached):
        reached.set()
        await asyncio.get_running_loop().create_future()

    task = await started(work)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.asyncio
async def test_after_the_point_the_work_goes_on_to_its_result_through_its_clean_up():
    release = asyncio.Event()

    async def work(point, reached):
        point.pass_it()
        try:
            reached.set()
            await release.wait()
            return "committed"
        finally:
            await asyncio.sleep(0)

    task = await started(work)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    release.set()
    assert await task == "committed"


@pytest.mark.asyncio
async def test_after_the_point_an_error_keeps_its_outcome():
    release = asyncio.Event()

    async def work(point, reached):
        point.pass_it()
        reached.set()
        await release.wait()
        raise DeviceError("cannot flush", outcome=Outcome.UNKNOWN)

    task = await started(work)
    task.cancel()
    await asyncio.sleep(0)
    release.set()
    with pytest.raises(DeviceError) as caught:
        await task
    assert caught.value.outcome is Outcome.UNKNOWN


@pytest.mark.asyncio
async def test_whoever_is_first_wins():
    early, late = PointOfNoReturn(), PointOfNoReturn()
    assert early.cancel()
    with pytest.raises(Cancelled):
        early.pass_it()
    with pytest.raises(Cancelled):
        early.check()
    late.check()
    late.pass_it()
    assert not late.cancel()


@pytest.mark.asyncio
async def test_a_cancel_that_was_swallowed_is_heeded_later():
    async def outer(point, reached):
        async def inner(own_point):
            own_point.pass_it()
            reached.set()
            await release.wait()

        await cancellable(inner)
        heed_cancellation()
        return "went on"

    release = asyncio.Event()
    task = await started(outer)
    task.cancel()
    await asyncio.sleep(0)
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.asyncio
async def test_what_must_come_to_its_end_does_and_the_cancel_is_kept_for_later():
    release, reached = asyncio.Event(), asyncio.Event()

    async def work():
        reached.set()
        await release.wait()
        return "undone"

    async def outer():
        assert await to_the_end(work()) == "undone"
        heed_cancellation()

    task = asyncio.create_task(outer())
    await reached.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
