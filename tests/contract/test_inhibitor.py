# SPDX-License-Identifier: GPL-2.0-or-later
"""``ports.Inhibitor``, simulated and real; and what the real one does with a logind that is not as it should be."""

import asyncio
import logging
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio

from luksrotd.bus.connection import Bus
from luksrotd.bus.inhibitor import LogindInhibitor
from luksrotd.ports import NoInhibitor
from tests.contract.conftest import open_descriptors
from tests.support.fake_logind import FakeLogind
from tests.support.simhost import SimInhibitor

pytestmark = pytest.mark.asyncio


class Sim:
    """The simulated one, and what a test asks of it."""

    def __init__(self):
        self.inhibitor = SimInhibitor()

    async def heard(self, *wanted):
        assert self.inhibitor.events == list(wanted)
        self.inhibitor.events.clear()


class Real:
    """The real one, on the bus of the bed with a fake logind."""

    def __init__(self, bus, logind):
        self.inhibitor = LogindInhibitor(lambda: bus)
        self._logind = logind

    async def heard(self, *wanted):
        for text in wanted:
            line = await asyncio.to_thread(self._logind.line)
            if line == "asked":
                line = await asyncio.to_thread(self._logind.line)
            why = text.removeprefix("taken: ")
            assert line == (f"taken sleep:shutdown|luksrotd|{why}|delay" if why != text else text)


@asynccontextmanager
async def connected():
    bus = await Bus().connect()
    try:
        yield bus
    finally:
        await bus.close()


@pytest_asyncio.fixture(params=["sim", "logind"])
async def machine(request):
    if request.param == "sim":
        yield Sim()
        return
    logind = await asyncio.to_thread(FakeLogind, request.getfixturevalue("bed"))
    async with connected() as bus:
        yield Real(bus, logind)
    assert await asyncio.to_thread(logind.end) == []


async def test_it_is_held_from_entering_to_leaving(machine):
    before = open_descriptors()
    async with machine.inhibitor.held("because"):
        await machine.heard("taken: because")
    await machine.heard("released")
    assert open_descriptors() == before


async def test_it_is_let_go_when_that_fails(machine):
    with pytest.raises(KeyError):
        async with machine.inhibitor.held("because"):
            raise KeyError
    await machine.heard("taken: because", "released")


async def test_it_is_let_go_when_that_is_cancelled(machine):
    async def hold():
        async with machine.inhibitor.held("because"):
            await asyncio.get_running_loop().create_future()

    task = asyncio.create_task(hold())
    if isinstance(machine, Sim):
        await asyncio.sleep(0)
    await machine.heard("taken: because")
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    await machine.heard("released")


async def test_it_can_be_held_twice_at_once(machine):
    async with machine.inhibitor.held("one"):
        await machine.heard("taken: one")
        async with machine.inhibitor.held("two"):
            await machine.heard("taken: two")
        await machine.heard("released")
    await machine.heard("released")


# -- the real one alone --------------------------------------------------------------------------------------------


async def test_none_at_all_holds_nothing_up():
    async with NoInhibitor().held("because"):
        pass
    async with LogindInhibitor(lambda: None).held("because"):
        pass


async def test_without_logind_it_goes_on(bed, caplog):
    caplog.set_level(logging.DEBUG)
    async with connected() as bus:
        async with LogindInhibitor(lambda: bus).held("because"):
            pass
        assert "not delayed" in caplog.text
    async with LogindInhibitor(lambda: bus).held("because"):
        pass
    assert "not connected" in caplog.text


@pytest.mark.parametrize("mode", ["refuse", "none"])
async def test_with_a_logind_that_gives_none_it_goes_on(bed, mode):
    logind = await asyncio.to_thread(FakeLogind, bed, mode)
    before = open_descriptors()
    async with connected() as bus, LogindInhibitor(lambda: bus).held("because"):
        pass
    assert open_descriptors() == before
    assert await asyncio.to_thread(logind.end) == ["asked"]


async def test_a_logind_that_hangs_is_asked_once_and_not_waited_for(bed, caplog):
    logind = await asyncio.to_thread(FakeLogind, bed, "ignore")
    async with connected() as bus:
        inhibitor = LogindInhibitor(lambda: bus, seconds=0.05)
        for _ in range(3):
            async with inhibitor.held("because"):
                pass
    assert caplog.text.count("logind does not answer") == 1
    assert await asyncio.to_thread(logind.end) == ["asked"]


async def test_cancelled_while_logind_is_asked_it_holds_nothing(bed):
    logind = await asyncio.to_thread(FakeLogind, bed, "ignore")
    before = open_descriptors()

    async def hold(bus):
        async with LogindInhibitor(lambda: bus, seconds=3600).held("because"):
            raise AssertionError("held")

    async with connected() as bus:
        task = asyncio.create_task(hold(bus))
        assert await asyncio.to_thread(logind.line) == "asked"
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
    assert open_descriptors() == before
    assert await asyncio.to_thread(logind.end) == []
