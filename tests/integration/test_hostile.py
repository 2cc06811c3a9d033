# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages that no client of good will sends: each gets an error, if it wants a reply, and costs the daemon nothing.

Descriptors that are no secrets are in ``test_hostile_secrets``.
"""

import asyncio
import os
import socket
import subprocess
import sys
from contextlib import suppress

import pytest
import pytest_asyncio
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from luksrotd import names
from luksrotd.errors import MESSAGE_MAX
from tests.integration.test_jobs import workers_of
from tests.support import doomed
from tests.support.busclient import PROPERTIES, BusClient
from tests.support.census import census_of
from tests.support.daemon_process import appeared, running
from tests.support.manager import managed
from tests.support.testbed import PROJECT

pytestmark = pytest.mark.asyncio
ROOT, MANAGER, DEVICE = names.ROOT_PATH, names.MANAGER_INTERFACE, names.DEVICE_INTERFACE
DBUS = "org.freedesktop.DBus.Error."
INVALID, LIMITS = DBUS + "InvalidArgs", DBUS + "LimitsExceeded"
UNKNOWN_DEVICE = names.ERROR_PREFIX + "UnknownDevice"
FLOOD = 40_000
HANG_SECONDS = 60
OBJECTS_MORE, MEMORY_MORE_KIB = 300, 4096


def nested(depth):
    """Variants in variants; the bus allows 64 of them."""
    value = Variant("s", "x")
    for _ in range(depth):
        value = Variant("v", value)
    return value


def options(count):
    return {f"option-{number}": Variant("u", number) for number in range(count)}


def nowhere(count):
    return [f"{names.DEVICE_PATH}/none{number}" for number in range(count)]


def stage(paths):
    return (ROOT, MANAGER, "Stage", "aosa{sv}a{sv}a{sv}", [paths, "", {}, {}, {}])


def cases(path):
    """What is called, and the error that it gets."""
    get_devices = (ROOT, MANAGER, "GetDevices")
    get_device = (ROOT, MANAGER, "GetDevice", "sa{sv}")
    rotate = (path, DEVICE, "Rotate", "sa{sv}a{sv}a{sv}")
    return {
        "no arguments": (*get_devices, "", []),
        "wrong type": (*get_devices, "s", ["x"]),
        "one too many": (*get_devices, "a{sv}s", [{}, "x"]),
        "array of bytes": (*get_devices, "ay", [bytes(100_000)]),
        "nested arrays": (*get_devices, "a" * 32 + "y", [[]]),
        "nested structs": (*get_devices, "(" * 32 + "y" + ")" * 32, [_struct(32)]),
        "nested variants": (*get_devices, "a{sv}", [{"x": nested(30)}]),
        "many options": (*get_devices, "a{sv}", [options(3000)]),
        "long option": (*get_devices, "a{sv}", [{"x" * 100_000: Variant("s", "")}]),
        "option of a wrong type": (*rotate, ["", {"fd": Variant("s", "0")}, {}, {}]),
        "two secrets in one": (*rotate, ["", {"fd": Variant("h", 0), "keyfile": Variant("s", "/x")}, {}, {}]),
        "no such descriptor": (*rotate, ["", {"fd": Variant("h", 2**32 - 1)}, {"fd": Variant("h", 99)}, {}]),
        "name of a key": (path, DEVICE, "Rotate", "sa{sv}a{sv}a{sv}", ["\n", {}, {}, {}]),
        "a set of nothing": stage([]),
        "volumes twice": stage([path] * 1500),
        "unknown verb": (path, DEVICE, "Plan", "ssa{sv}", ["x" * 100_000, "", {}]),
        "a time in the far future": (path, DEVICE, "BeginTransaction", "a{sv}", [{"timeout": Variant("t", 2**64 - 1)}]),
        "wrong type of a property": (path, PROPERTIES, "Get", "s", [DEVICE]),
    } | {
        f"too long: {what}": call
        for what, call in {
            "string": (*get_device, ["x" * 1_000_000, {}]),
            "string of megabytes": (*get_device, ["x" * 20_000_000, {}]),
            "options": (*get_devices, "a{sv}", [options(10_000)]),
            "paths": stage(nowhere(5000)),
            "property": (path, PROPERTIES, "Get", "ss", [DEVICE, "x" * 200_000]),
        }.items()
    }


def _struct(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def unknown(path):
    """Calls that lead nowhere, each with the error that says where it ended."""
    return [
        (("/", MANAGER, "GetDevices", "a{sv}", [{}]), "UnknownInterface"),
        ((f"{names.JOB_PATH}/4294967296", names.JOB_INTERFACE, "Cancel", "a{sv}", [{}]), "UnknownObject"),
        ((f"{path}/x", DEVICE, "Plan", "ssa{sv}", ["enroll", "", {}]), "UnknownObject"),
        ((path, MANAGER, "GetDevices", "a{sv}", [{}]), "UnknownInterface"),
        ((path, "a" + ".b" * 100, "X"), "UnknownInterface"),
        ((path, DEVICE, "X" * 255), "UnknownMethod"),
        ((path, None, "NoSuchMethod"), "UnknownMethod"),
        ((path, PROPERTIES, "Get", "ss", [DEVICE, "x" * 60_000]), "UnknownProperty"),
        ((path, PROPERTIES, "Get", "ss", ["", ""]), "UnknownProperty"),
        ((path, PROPERTIES, "GetAll", "s", ["x" * 60_000]), "UnknownInterface"),
        ((path, PROPERTIES, "Set", "ssv", [DEVICE, "UUID", Variant("s", "x")]), "PropertyReadOnly"),
        ((path, PROPERTIES, "Set", "ssv", [DEVICE, "None", nested(20)]), "UnknownProperty"),
    ]


@pytest.fixture
def told(tmp_path):
    return tmp_path / "census"


@pytest_asyncio.fixture
async def daemon(bed, client, volume, told):
    async with running(bed, client, census=str(told)) as daemon:
        await appeared(client, volume.path)
        yield daemon


async def check_alive(client):
    assert len((await client.call(ROOT, MANAGER, "GetDevices", "a{sv}", [{}]))[0]) == 1


async def error_of(client, call, fds=()):
    reply = await client.reply(*call, fds=fds)
    assert reply.message_type is MessageType.ERROR, call[2:4]
    assert len(reply.body[0]) <= MESSAGE_MAX, "it says nothing back at length"
    assert reply.body[0].isprintable()
    return reply.error_name


async def each_gets_its_error(client, path):
    for name, call in cases(path).items():
        wanted = LIMITS if name.startswith("too long") else INVALID
        assert await error_of(client, call) == wanted, name
    for call, wanted in unknown(path):
        assert await error_of(client, call) == DBUS + wanted, call
    assert await error_of(client, stage(nowhere(1500))) == UNKNOWN_DEVICE


async def descriptors_for_nothing(client, path):
    """As many as the bus lets through, with calls, signals and replies that are for nobody."""
    fds = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(16)]
    try:
        # Not the long ones: dbus-next, in the client, sends the descriptors once more with each part of a message.
        short = [call for name, call in cases(path).items() if not name.startswith("too long")]
        for call in short + [call for call, _ in unknown(path)]:
            await error_of(client, call, fds)
        body = [list(range(16))]
        assert await error_of(client, (ROOT, MANAGER, "GetDevices", "ah", body), fds) == INVALID
        for make in (_signal, _return, _error):
            message = make(client, "ah", body)
            message.unix_fds = fds
            await client.bus.send(message)
    finally:
        for fd in fds:
            os.close(fd)


def _signal(client, signature, body):
    message = Message.new_signal("/x", "x.y", "Z", signature, body)
    message.destination = client.destination
    return message


def _return(client, signature, body):
    return Message(
        message_type=MessageType.METHOD_RETURN,
        destination=client.destination,
        reply_serial=5,
        signature=signature,
        body=body,
    )


def _error(client, signature, body):
    return Message(
        message_type=MessageType.ERROR,
        destination=client.destination,
        error_name="x.y",
        reply_serial=6,
        signature=signature,
        body=body,
    )


async def unasked(client, path):
    """Replies to no call, signals to it alone, calls that want no reply."""
    for number in range(50):
        for make in (_return, _error, _signal):
            message = make(client, "s", ["x" * 1000])
            message.reply_serial = number + 1
            await client.bus.send(message)
    for call in cases(path).values():
        await client.bus.send(client.message(*call, flags=MessageFlag.NO_REPLY_EXPECTED))


async def unparsable(client, path):
    """Whatever is no D-Bus the bus keeps to itself, and ends the connection."""
    for damage in (_nul_in_a_string, _not_utf_8, _wrong_length, _too_deep):
        async with BusClient() as other:
            data = damage(other, path)
            with suppress(OSError):
                await asyncio.get_running_loop().sock_sendall(other.bus._sock, data)
            with suppress(EOFError, OSError):
                await other.bus.wait_for_disconnect()
        await check_alive(client)


def _marshalled(client, path, text="x" * 16):
    message = client.message(path, DEVICE, "GetData", "sa{sv}", [text, {}])
    message.serial = 77
    return bytearray(message._marshall())


def _nul_in_a_string(client, path):
    return _marshalled(client, path).replace(b"x" * 16, b"x" * 8 + b"\0" + b"x" * 7)


def _not_utf_8(client, path):
    return _marshalled(client, path).replace(b"x" * 16, b"x" * 8 + b"\xff\xfe" + b"x" * 6)


def _wrong_length(client, path):
    data = _marshalled(client, path)
    data[4:8] = (2**31).to_bytes(4, sys.byteorder)
    return data + bytes(1000)


def _too_deep(client, path):
    message = client.message(path, DEVICE, "GetData", "v", [nested(80)])
    message.serial = 78
    return message._marshall()


async def deaf(client, path):
    """Calls a lot, and reads nothing that comes back."""
    async with BusClient() as other:
        loop = asyncio.get_running_loop()
        loop.remove_reader(other.bus._fd)
        other.bus._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(200):
            await other.bus.send(other.message(ROOT, "org.freedesktop.DBus.Introspectable", "Introspect"))
        await check_alive(client)
        loop.add_reader(other.bus._fd, other.bus._message_reader)  # to see its own end


ATTACKS = [each_gets_its_error, descriptors_for_nothing, unasked, unparsable, deaf]


async def test_they_cost_the_daemon_nothing(daemon, client, volume, told):
    async def all_of_them():
        for attack in ATTACKS:
            async with asyncio.timeout(HANG_SECONDS), BusClient() as attacker:
                await attack(attacker, volume.path)
                await check_alive(attacker)

    async def settled():
        now = await census_of(daemon.pid, told)
        for _ in range(100):
            if now.handles == before.handles:
                return now
            await asyncio.sleep(0.1)
            now = await census_of(daemon.pid, told)
        raise AssertionError(f"left: {now}; at the beginning: {before}")

    await check_alive(client)
    before = await census_of(daemon.pid, told)
    headers = volume.headers()
    await all_of_them()
    first = await settled()
    for _ in range(2):
        await all_of_them()
    last = await settled()
    assert last.objects - first.objects < OBJECTS_MORE, (first.objects, last.objects)
    assert last.memory_kib - first.memory_kib < MEMORY_MORE_KIB, (first.memory_kib, last.memory_kib)
    assert volume.headers() == headers
    assert "Traceback" not in daemon.log


async def test_nobody_can_say_that_somebody_else_has_left(daemon, client, volume):
    """The bus says so, by a signal; anybody can send one of that name to the daemon alone."""
    async with BusClient() as owner, BusClient() as attacker:
        (transaction,) = await owner.call(volume.path, DEVICE, "BeginTransaction", "a{sv}", [{}])
        for path, interface in (("/org/freedesktop/DBus", "org.freedesktop.DBus"), ("/x", "org.freedesktop.DBus")):
            message = Message.new_signal(path, interface, "NameOwnerChanged", "sss", [owner.name, owner.name, ""])
            message.destination = client.destination
            await attacker.bus.send(message)
        await check_alive(attacker)
        assert await owner.get(transaction, names.TRANSACTION_INTERFACE, "State") == "open"
    removed = await client.signal("InterfacesRemoved")
    assert removed.body[0] == transaction, "now it has left"


async def test_a_flood_leaves_others_their_turns(bed, volume):
    """40,000 calls from one client: the watchdog is fed, another client is answered, all the while."""
    environment = {"WATCHDOG_USEC": "2000"}
    async with managed(bed, environment=environment) as daemon, BusClient() as client:
        await client.subscribe()
        await appeared(client, volume.path)
        fed = asyncio.create_task(daemon.manager.hears("never told"))
        arguments = (str(FLOOD), ROOT, MANAGER, "GetDevices", "x")
        flooder = bed.spawn([sys.executable, "-m", "tests.support.flooder", *arguments], cwd=PROJECT)
        try:
            before, answers = len(daemon.manager.told), 0
            while flooder.poll() is None:
                await check_alive(client)
                answers += 1
            assert flooder.returncode == 0
            await check_alive(client)  # behind all that was routed before
            pings = daemon.manager.told[before:].count("WATCHDOG=1")
        finally:
            fed.cancel()
            bed.end(flooder)
        assert pings > FLOOD / 32 / 20, (pings, answers)
        assert answers > 3


async def test_a_client_that_is_killed_leaves_nothing(bed, daemon, client, volume, told):
    await check_alive(client)
    before, headers = await census_of(daemon.pid, told), volume.headers()
    for point in doomed.POINTS:
        argv = [sys.executable, "-m", "tests.support.doomed", volume.path]
        process = bed.spawn(argv, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
        try:
            while (line := await asyncio.to_thread(process.stdout.readline)) != f"{point}\n":
                assert line, f"it ends before it is {point}"
            process.kill()
        finally:
            bed.end(process)
        async with asyncio.timeout(HANG_SECONDS):
            while (now := await census_of(daemon.pid, told)).handles != before.handles or await busy(client, volume):  # noqa: ASYNC110 -- another process
                await asyncio.sleep(0.01)
        assert now.handles == before.handles
        managed_objects = (ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
        (objects,) = await client.call(*managed_objects)
        assert not [path for path in objects if path.startswith(names.TRANSACTION_PATH)], point
        assert volume.headers() == headers, point
        assert not workers_of(daemon.pid), point


async def busy(client, volume):
    return await client.get(volume.path, DEVICE, "Busy")
