# SPDX-License-Identifier: GPL-2.0-or-later
"""Two hundred volumes, fifty clients, thousands of calls, most of them wrong: in the end nothing is left of them.

``LUKSROTD_LOAD`` multiplies the calls (``make load``).
"""

import asyncio
import os
import random

import pytest
import pytest_asyncio
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.signature import Variant

from luksrotd import names
from tests.support import makeimage
from tests.support.busclient import PROPERTIES, BusClient, CallFailed
from tests.support.census import census_of
from tests.support.daemon_process import OLD, appeared, ended, memfd, running, start, take_key

pytestmark = pytest.mark.asyncio
MANAGER, DEVICE = names.MANAGER_INTERFACE, names.DEVICE_INTERFACE
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
VOLUMES, CLIENTS = 200, 50
FACTOR = int(os.environ.get("LUKSROTD_LOAD", "1"))
CALLS = 24 * FACTOR
AT_ONCE = 8
LOAD_SECONDS = 300 * FACTOR
OBJECTS_MORE, MEMORY_MORE_KIB = 500, 6144
"""What may be more after the third round than after the second: far less than one object for a call.  Threads come,
and each has its own stack and heap, so that memory grows by some MiB, less with each round."""


@pytest.fixture
def images(tmp_path):
    """A configuration that names two hundred volumes in files."""
    paths = [makeimage.make_image(tmp_path / f"{number}.img", key=OLD) for number in range(VOLUMES)]
    (tmp_path / "luksrotd.conf").write_text("".join(f"[Volume]\nPath={path}\n" for path in paths))
    return tmp_path


@pytest.fixture
def told(tmp_path):
    return tmp_path / "census"


@pytest_asyncio.fixture
async def loaded(bed, client, volume, images, told):
    """The daemon with all of them."""
    async with running(bed, client, config=str(images), census=str(told)) as daemon:
        await appeared(client, volume.path)
        async with asyncio.timeout(LOAD_SECONDS):
            while len(await devices(client)) < VOLUMES + 1:
                await client.signal("InterfacesAdded")
        client.signals.clear()
        client.bus.remove_message_handler(client._on_message)  # its signals would pile up
        yield daemon


async def devices(client):
    (paths,) = await client.call(names.ROOT_PATH, MANAGER, "GetDevices", "a{sv}", [{}])
    return paths


# -- calls -------------------------------------------------------------------------------------------------------

ROOT = names.ROOT_PATH
NONE = f"{names.DEVICE_PATH}/none"
DIRECTORY = {"fd": Variant("h", 0)}
COMMON = [
    (ROOT, MANAGER, "GetDevices", "a{sv}", [{}]),
    (ROOT, "org.freedesktop.DBus.Introspectable", "Introspect"),
    (ROOT, "org.freedesktop.DBus.Peer", "Ping"),
    (ROOT, PROPERTIES, "GetAll", "s", [MANAGER]),
    (ROOT, MANAGER, "GetDevice", "sa{sv}", ["/dev/none", {}]),
    (ROOT, MANAGER, "GetDevice", "sa{sv}", ["/" + 5000 * "x", {}]),
    (ROOT, MANAGER, "GetDevices", "a{sv}", [{"unknown": Variant("s", 100 * "x")}]),
    (ROOT, MANAGER, "GetDevices", "s", ["wrong"]),
    (ROOT, MANAGER, "NoSuchMethod"),
    (ROOT, "no.such.Interface", "GetDevices"),
    (ROOT, MANAGER, "GetHistory", "a{sv}", [{"limit": Variant("s", "many")}]),
    (ROOT, MANAGER, "Stage", "aosa{sv}a{sv}a{sv}", [[NONE], "", {}, {}, {}]),
    (NONE, DEVICE, "GetData", "sa{sv}", ["", {}]),
    ("/", PROPERTIES, "Set", "ssv", ["", "x", Variant("s", "y")]),
]


def about(path):
    """Calls about one volume; most of them are wrong."""
    return [
        (path, PROPERTIES, "GetAll", "s", [DEVICE]),
        (path, PROPERTIES, "Get", "ss", [DEVICE, "NoSuchProperty"]),
        (path, PROPERTIES, "Set", "ssv", [DEVICE, "Label", Variant("s", "mine")]),
        (path, DEVICE, "GetData", "sa{sv}", ["", {}]),
        (path, DEVICE, "GetData", "sa{sv}", [1000 * "x", {}]),
        (path, DEVICE, "Plan", "ssa{sv}", ["enroll", "", {}]),
        (path, DEVICE, "Plan", "ssa{sv}", ["levitate", "", {}]),
        (path, DEVICE, "Finish", "sa{sv}", ["", {}]),
        (path, DEVICE, "Finish", "sa{sv}", ["none", {"if-generation": Variant("t", 2**64 - 1)}]),
        (path, DEVICE, "BeginTransaction", "a{sv}", [{}]),
        (path, DEVICE, "BeginTransaction", "a{sv}", [{"timeout": Variant("t", 2**64 - 1)}]),
        (path, DEVICE, "Enroll", "sa{sv}a{sv}a{sv}", ["", {}, {}, {}]),
        (path, DEVICE, "Rotate", "sa{sv}a{sv}a{sv}", ["", DIRECTORY, DIRECTORY, {}]),
        (path, DEVICE, "VerifyKey", "sa{sv}a{sv}", ["none", {"keyfile": Variant("s", "/nowhere")}, {}]),
    ]


async def one_client(seed, paths, directory):
    """What one client calls, some of it at once; it leaves amid the last calls.  How many errors it got."""
    choice = random.Random(seed)
    failed = 0
    async with BusClient() as client:
        for _ in range(CALLS // AT_ONCE):
            calls = [choice.choice(COMMON + 3 * about(choice.choice(paths))) for _ in range(AT_ONCE)]
            replies = await asyncio.gather(*(client.reply(*call, fds=_fds(call, directory)) for call in calls))
            failed += sum(reply.message_type is MessageType.ERROR for reply in replies)
        for call in about(choice.choice(paths)):
            flags = choice.choice([MessageFlag.NONE, MessageFlag.NO_REPLY_EXPECTED])
            await client.bus.send(client.message(*call, flags=flags, fds=_fds(call, directory)))
    return failed


def _fds(call, directory):
    return [directory] if DIRECTORY in list(call[-1]) else []


async def patiently(call):
    """The result of a call that starts a job; on a slow machine the queue may be full of the clients' own."""
    while True:
        try:
            return await call()
        except CallFailed as error:
            if error.name != "org.luksrotd1.Error.Busy":
                raise
            await asyncio.sleep(0.01)


async def round_of(number, client, volume):
    """All clients, and meanwhile some jobs on a real volume, of all ends."""
    paths = [path for path in await devices(client) if path != volume.path]
    directory = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        clients = [asyncio.create_task(one_client(seed, paths, directory)) for seed in range(CLIENTS)]
        async with BusClient() as owner:
            await owner.subscribe()
            await patiently(lambda: start(owner, volume.path, "Enroll", name="vanishes", new=None))
        async with BusClient() as owner:
            await owner.subscribe()
            name = f"round-{number}"
            job = await patiently(lambda: start(owner, volume.path, "Enroll", name=name, old=b"wrong"))
            await ended(owner, job)
            job = await patiently(lambda: start(owner, volume.path, "Enroll", name="key", new=None))
            await take_key(owner, job)
            assert (await ended(owner, job))["State"] == "finished"
            fd = memfd(OLD)
            body = ["key", {"fd": Variant("h", 0)}, {}]
            remove = (volume.path, DEVICE, "Remove", "sa{sv}a{sv}", body)
            reply = await patiently(lambda: owner.call(*remove, fds=[fd]))
            os.close(fd)
            done = await ended(owner, reply[0])
            assert done["State"] == "finished", done["ErrorMessage"]
        return sum(await asyncio.gather(*clients))
    finally:
        os.close(directory)


async def test_memory_and_descriptors_are_flat(loaded, client, volume, told):
    async with asyncio.timeout(LOAD_SECONDS):
        before = await census_of(loaded.pid, told)
        after = []
        for number in range(3):
            failed = await round_of(number, client, volume)
            assert failed > CLIENTS * CALLS // 3, "many of them are wrong"
            after.append(await settled_census(loaded, told, before))
    assert after[2].objects - after[1].objects < OBJECTS_MORE, after
    assert after[2].memory_kib - after[1].memory_kib < MEMORY_MORE_KIB, after
    assert len(await devices(client)) == VOLUMES + 1
    assert "Traceback" not in loaded.log


async def settled_census(daemon, told, before):
    """When nothing is going on any more, descriptors and tasks are those of the beginning."""
    now = await census_of(daemon.pid, told)
    for _ in range(200):
        if now.handles == before.handles:
            return now
        await asyncio.sleep(0.1)
        now = await census_of(daemon.pid, told)
    raise AssertionError(f"left: {now}; at the beginning: {before}")
