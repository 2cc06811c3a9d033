# SPDX-License-Identifier: GPL-2.0-or-later
"""One connection after the other, on the real bus; the machine behind it is simulated."""

import asyncio
import gc
import itertools
import os
import socket
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio
from dbus_next.signature import Variant

from luksrotd import names
from luksrotd.bus.caller import unidentified
from luksrotd.bus.connection import Bus
from luksrotd.bus.device import Device
from luksrotd.bus.job import Job
from luksrotd.bus.link import Links, Outfit, _pauses
from luksrotd.bus.publisher import Publisher
from luksrotd.bus.served import Served
from luksrotd.errors import NotAuthorized
from luksrotd.ports import Caller
from luksrotd.service.drafts import Drafts
from luksrotd.service.handover import Handover
from luksrotd.service.history import Chronicle
from luksrotd.service.owned import Means
from tests.service.world import OLD, Key, World
from tests.support.busclient import BusClient, CallFailed
from tests.support.daemon_process import memfd
from tests.support.simengine import UUID
from tests.support.simhost import SimHistory
from tests.support.simkeeper import SimKeeper

pytestmark = pytest.mark.asyncio
DEVICE = f"{names.DEVICE_PATH}/{UUID.replace('-', '_')}"
OBJECTS = (names.ROOT_PATH, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")


class Allowing:
    """An authority that lets everybody do everything."""

    async def check(self, caller, action, details):
        """Yes."""


def no_credential(name):
    raise AssertionError(name)


class Service:
    """The links, and what they serve."""

    def __init__(self, world):
        self.world = world
        self.links = Links(Outfit(unidentified, lambda _: Allowing(), Key, no_credential))
        drafts = Drafts(world.host, Means(world.registry, world.runner, SimKeeper()), self.links.gone)
        parts = world.operations, world.sets, drafts, world.registry, world.runner, Chronicle(SimHistory(world.journal))
        self.served = Served(*parts)

    async def cut(self):
        """The bus ends the connection; the next one follows."""
        self.links.bus._sock.shutdown(socket.SHUT_RDWR)
        await self.links.lost()
        assert self.links.bus is None
        await self.links.reopen(self.served)


@pytest_asyncio.fixture
async def service(bed):
    world = World()
    service = Service(world)
    async with world.running():
        await service.links.open(service.served)
        await service.links.own_name()
        yield service
        await service.links.close()


@asynccontextmanager
async def busy(service, client):
    """A transaction is open, and a job waits for its key to be taken."""
    await client.call(DEVICE, names.DEVICE_INTERFACE, "BeginTransaction", "a{sv}", [{}])
    fd = memfd(OLD)
    body = ["", {"fd": Variant("h", 0)}, {"generate": Variant("b", True)}, {}]
    (job,) = await client.call(DEVICE, names.DEVICE_INTERFACE, "Enroll", "sa{sv}a{sv}a{sv}", body, fds=[fd])
    os.close(fd)
    assert len(service.served.drafts.transactions) == 1
    yield job


def left_over():
    """Descriptors, tasks, timers, and objects of the bus that something keeps alive."""
    gc.collect()
    kinds = (Bus, Publisher, Device, Job)
    timers = [timer for timer in asyncio.get_running_loop()._scheduled if not timer.cancelled()]
    living = {kind.__name__: sum(isinstance(item, kind) for item in gc.get_objects()) for kind in kinds}
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208 -- a count
        "tasks": len(asyncio.all_tasks()),
        "timers": len(timers),
        **living,
    }


async def test_however_often_the_connection_ends_nothing_is_left_of_it(service):
    before = {}
    for number in range(6):
        async with BusClient() as client, busy(service, client):
            await service.cut()
            while service.links._closing or service.served.drafts.transactions:  # noqa: ASYNC110 -- their own ends
                await asyncio.sleep(0)
            while service.world.runner.busy(UUID):  # noqa: ASYNC110 -- the end of the job
                await asyncio.sleep(0)
            assert DEVICE in (await client.call(*OBJECTS))[0]
        if number == 1:
            before = left_over()
    # The jobs that have ended since are kept for a while, each with a timer and an object; one timer is our own.
    before |= {"timers": before["timers"] + 4 + 1, "Job": before["Job"] + 4}
    async with asyncio.timeout(30):
        while any(now > before[kind] for kind, now in left_over().items()):  # noqa: ASYNC110 -- what is under way ends
            await asyncio.sleep(0.01)


async def test_who_called_before_is_nobody_now(service):
    async with BusClient() as client:
        await client.call(*OBJECTS)
        async with busy(service, client) as job:
            (transaction,) = service.served.drafts.transactions.values()
            owner = transaction.terms.owner
            assert (owner.name, owner.connection) == (client.name, 1)
            await service.cut()
            await asyncio.wait_for(service.links.gone(owner), 30)
            # The same client, under the same name, as another one would be on a bus that was started again.
            for method in ("TakeKey", "ConfirmKey"):
                with pytest.raises(CallFailed) as caught:
                    await client.call(job, names.JOB_INTERFACE, method, "a{sv}", [{}])
                assert caught.value.name == names.ERROR_PREFIX + "NotAuthorized"
            with pytest.raises(NotAuthorized):
                transaction.of(Caller(client.name, 0, connection=2))


async def test_a_key_belongs_to_a_connection_not_to_a_name():
    handover = Handover(Key(), Caller(":1.7", 0, connection=1))
    for caller in (Caller(":1.7", 0, connection=2), Caller(":1.8", 0, connection=1)):
        with pytest.raises(NotAuthorized):
            await handover.take(caller)
        with pytest.raises(NotAuthorized):
            handover.confirm(caller)
    handover.close()


async def test_a_call_that_is_being_answered_is_not_waited_for(service):
    """One that hangs, as on a disk that is dying, must not keep the others from the next connection."""
    async with BusClient() as client, busy(service, client) as job:
        waiting = asyncio.create_task(client.call(job, names.JOB_INTERFACE, "TakeKey", "a{sv}", [{}]))
        while not service.links.bus._tasks:  # noqa: ASYNC110 -- the call on its way
            await asyncio.sleep(0)
        await service.cut()
        assert DEVICE in (await client.call(*OBJECTS))[0]
        waiting.cancel()


async def test_a_name_that_is_taken_is_waited_for(service, caplog):
    async with BusClient() as other:
        service.links.bus._sock.shutdown(socket.SHUT_RDWR)
        await service.links.lost()
        while await request_name(other) != 1:  # noqa: ASYNC110 -- the bus may not have seen yet that it is free
            await asyncio.sleep(0.001)
        reopening = asyncio.create_task(service.links.reopen(service.served))
        while "is taken" not in caplog.text:  # noqa: ASYNC110 -- what it says
            await asyncio.sleep(0.001)
    async with asyncio.timeout(30):
        await reopening
    assert caplog.text.count("is taken") == 1


async def request_name(client):
    body = [names.BUS_NAME, 4]
    destination, client.destination = client.destination, "org.freedesktop.DBus"
    (result,) = await client.call("/org/freedesktop/DBus", "org.freedesktop.DBus", "RequestName", "su", body)
    client.destination = destination
    return result


async def test_it_tries_again_without_haste_but_soon_enough():
    first = list(itertools.islice(_pauses(), 9))
    assert first == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
