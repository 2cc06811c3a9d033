# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting that something may interrupt."""

import asyncio

import pytest

from luksrotd.errors import Cancelled
from luksrotd.service.interruption import Interruption

pytestmark = pytest.mark.asyncio


async def waits(interruption, log):
    async with interruption.heeded():
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)
            log.append("cleaned up")


async def test_all_who_wait_are_called_off_with_their_clean_up_and_the_first_reason():
    interruption, log = Interruption(), []
    waiting = [asyncio.ensure_future(waits(interruption, log)) for _ in range(2)]
    await asyncio.sleep(0)
    interruption.happen("the sky fell")
    interruption.happen("something else")
    for task in waiting:
        with pytest.raises(Cancelled, match="cannot go on: the sky fell"):
            await task
    assert log == ["cleaned up"] * 2


async def test_who_comes_later_does_not_even_begin():
    interruption, log = Interruption(), []
    interruption.happen("the sky fell")
    with pytest.raises(Cancelled):
        await waits(interruption, log)
    assert log == []


async def test_nobody_is_called_off_who_has_left_but_for_who_leaves_right_then():
    interruption = Interruption()
    async with interruption.heeded():
        await asyncio.sleep(0)
    with pytest.raises(Cancelled):
        async with interruption.heeded():
            interruption.happen("the sky fell")
    await asyncio.sleep(0)
    assert not asyncio.current_task().cancelling()


async def test_other_errors_and_cancels_stay_what_they_are():
    interruption = Interruption()
    for error in (TimeoutError, ZeroDivisionError):
        with pytest.raises(error):
            async with interruption.heeded():
                raise error
    task = asyncio.ensure_future(waits(interruption, []))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
