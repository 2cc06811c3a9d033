# SPDX-License-Identifier: GPL-2.0-or-later
"""Timers (``service.estimate.Timers``): those of the event loop, and those whose time a test moves."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
import pytest_asyncio

from luksrotd.service.estimate import Timers
from tests.support.faketimers import FakeTimers

pytestmark = pytest.mark.asyncio
UNIT = 0.01


@dataclass
class Subject:
    timers: Timers
    passing: Callable[[asyncio.Event], Awaitable[object]]


@pytest_asyncio.fixture(params=["real", "simulated"])
async def subject(request):
    if request.param == "real":
        return Subject(asyncio.get_running_loop(), asyncio.Event.wait)
    fake = FakeTimers()

    async def passing(over):
        while not over.is_set():
            fake.pass_time(UNIT)

    return Subject(fake, passing)


async def test_calls_come_in_the_order_of_their_times_not_before_them_and_once(subject):
    called, over, start = [], asyncio.Event(), subject.timers.time()

    def call(name):
        called.append((name, subject.timers.time() - start))

    subject.timers.call_later(2 * UNIT, lambda: call("late"))
    subject.timers.call_later(UNIT, lambda: call("early"))
    subject.timers.call_later(3 * UNIT, over.set)
    await subject.passing(over)
    assert [name for name, _ in called] == ["early", "late"]
    resolution = 1e-6  # a loop calls what is due within the resolution of its clock
    assert called[0][1] >= UNIT - resolution
    assert called[1][1] >= 2 * UNIT - resolution


async def test_what_is_cancelled_does_not_come(subject):
    called, over = [], asyncio.Event()
    timer = subject.timers.call_later(UNIT, lambda: called.append("cancelled"))
    subject.timers.call_later(2 * UNIT, over.set)
    timer.cancel()
    timer.cancel()
    await subject.passing(over)
    timer.cancel()
    assert called == []


async def test_a_call_may_ask_for_the_next_one(subject):
    called, over = [], asyncio.Event()

    def tick():
        called.append(None)
        if len(called) < 3:
            subject.timers.call_later(UNIT, tick)
        else:
            over.set()

    subject.timers.call_later(UNIT, tick)
    await subject.passing(over)
    assert len(called) == 3
