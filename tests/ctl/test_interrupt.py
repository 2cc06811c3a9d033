# SPDX-License-Identifier: GPL-2.0-or-later
"""A signal is a wish: what an operation makes of it is what counts, and is told."""

import asyncio
import os
import signal

import pytest

from luksrotd.ctl.interrupt import SIGNALS, interruptible
from luksrotd.ctl.local import Local
from luksrotd.errors import Cancelled

TURNS = 1000
"""Of the event loop, after which a signal must have been seen."""


@pytest.fixture(autouse=True)
def _signals():
    """``interruptible`` ignores signals afterwards; here they are counted instead of ending the tests."""
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


async def signalled(number, *, past_the_point_of_no_return):
    os.kill(os.getpid(), number)
    try:
        for _ in range(TURNS):
            await asyncio.sleep(0)
    except asyncio.CancelledError:
        if not past_the_point_of_no_return:
            raise
        return "committed"
    return "nobody said anything"


@pytest.mark.parametrize("number", SIGNALS)
def test_an_operation_that_finishes_tells_its_result(number):
    operation = signalled(number, past_the_point_of_no_return=True)
    assert asyncio.run(interruptible(operation, lambda task: task.cancel())) == "committed"


@pytest.mark.parametrize("number", SIGNALS)
def test_an_operation_that_stops_is_cancelled(number):
    operation = signalled(number, past_the_point_of_no_return=False)
    with pytest.raises(Cancelled):
        asyncio.run(interruptible(operation, lambda task: task.cancel()))


def test_signals_are_ignored_while_the_result_is_told():
    async def work():
        return None

    asyncio.run(interruptible(work(), lambda task: task.cancel()))
    assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}


@pytest.mark.parametrize(("step", "stopped"), [("deriving", True), ("clear-secondary", True), ("done", False)])
def test_direct_mode_cancels_until_all_is_done(step, stopped):
    """After the commit only the worker is left to be ended: cancelling then would lose the result."""

    async def work():
        local = Local()
        local.watched(lambda _: None)(step)
        local.interrupt(asyncio.current_task())
        await asyncio.sleep(0)

    if stopped:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(work())
    else:
        asyncio.run(work())
