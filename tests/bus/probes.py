# SPDX-License-Identifier: GPL-2.0-or-later
"""Attacks on a service: each tells whether the service stood it.  ``test_hardening`` runs them."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dbus_next.constants import MessageType
from dbus_next.message import Message

from luksrotd import names
from luksrotd.bus.transport import BATCH
from tests.bus.toy import INTERFACE, PATH, SECRET, Service
from tests.support.busclient import PROPERTIES, BusClient, CallFailed

FLOOD = 40_000
BURST = 500
PROJECT = Path(__file__).resolve().parents[2]


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def spin(times: int = 50) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


async def error_name(call) -> str:
    with pytest.raises(CallFailed) as caught:
        await call
    return caught.value.name


async def survives_burst(service: Service, client: BusClient, bed) -> bool:
    """Signals while the bus is not reading: long ones, so that the socket's buffer fills up amid a batch."""
    await client.subscribe()
    os.kill(bed.bus_pid, signal.SIGSTOP)
    try:
        for number in range(BURST):
            service.bus.send(Message.new_signal(PATH, INTERFACE, "Noise", "us", [number, "x" * 20_000]))
        await spin(200)
        if not service.bus.connected:
            return False
    finally:
        os.kill(bed.bus_pid, signal.SIGCONT)
    for number in range(BURST):
        assert (await client.signal("Noise")).body[0] == number
    return True


async def closes_unwanted_fds(service: Service, client: BusClient, bed) -> bool:
    """Descriptors sent with messages that no handler takes."""
    reading, writing = os.pipe()
    before = open_fds()
    for _ in range(10):
        await client.reply(PATH, INTERFACE, "NoSuchMethod", "h", [0], fds=[reading])
        await client.reply(PATH, INTERFACE, "Echo", "h", [0], fds=[reading])
        await client.reply(PATH, PROPERTIES, "Get", "ssh", [INTERFACE, "Label", 0], fds=[reading])
        stray = Message.new_signal("/x", "x.y", "Z", "h", [0], unix_fds=[reading])
        stray.destination = names.BUS_NAME
        await client.bus.send(stray)
    await client.reply(PATH, INTERFACE, "Echo", "s", ["after all of them"])
    leaked = open_fds() - before
    os.close(reading)
    os.close(writing)
    return leaked == 0


async def received_fds_are_cloexec(service: Service, client: BusClient, bed) -> bool:
    reading, writing = os.pipe()
    os.write(writing, b"x")
    await client.call(PATH, INTERFACE, "ReadFd", "h", [0], fds=[reading])
    os.close(reading)
    os.close(writing)
    return service.toy.inheritable == [False]


async def shares_the_loop_in_a_flood(service: Service, client: BusClient, bed) -> bool:
    """Messages handled between two turns of another task, while one client floods: counted, not timed."""
    # blocking on purpose: the service does not read while the flood piles up
    flooder = [sys.executable, "-m", "tests.support.flooder", str(FLOOD), PATH, INTERFACE, "Echo", "x"]
    subprocess.run(flooder, cwd=PROJECT, check=True)  # noqa: ASYNC221 -- waiting is the point
    handled = 0
    seen: list[int] = []

    def count(message: Message) -> bool:
        nonlocal handled
        handled += 1
        return False

    # both connections hand every message to this method
    original = service.bus._on_message
    service.bus._on_message = lambda message, **more: (count(message), original(message, **more))
    while handled < FLOOD:
        seen.append(handled)
        await asyncio.sleep(0)
    return max(after - before for before, after in zip(seen, [*seen[1:], handled], strict=True)) <= BATCH


async def keeps_exceptions_to_itself(service: Service, client: BusClient, bed) -> bool:
    with pytest.raises(CallFailed) as caught:
        await client.call(PATH, INTERFACE, "Leak")
    return SECRET not in caught.value.text and "File" not in caught.value.text


async def cancelled_method_replies(service: Service, client: BusClient, bed) -> bool:
    hanging = asyncio.ensure_future(client.reply(PATH, INTERFACE, "Hang"))
    await service.toy.entered.wait()
    service.toy.tasks[0].cancel()
    await spin()
    await client.reply(PATH, INTERFACE, "Echo", "s", ["replies come in order"])
    await spin()
    return not hanging.cancel()  # nothing left to cancel: the reply is there


async def call_after_disconnect_fails(service: Service, client: BusClient, bed) -> bool:
    service.bus.disconnect()
    await asyncio.wait([asyncio.ensure_future(service.bus.wait_for_disconnect())])
    calling = asyncio.ensure_future(service.bus.call(client.message("/", None, "Late")))
    await spin()
    if not calling.done():
        calling.cancel()
        return False
    with pytest.raises(ConnectionError):
        await calling
    return True


async def socket_is_closed_after_disconnect(service: Service, client: BusClient, bed) -> bool:
    service.bus.disconnect()
    await asyncio.wait([asyncio.ensure_future(service.bus.wait_for_disconnect())])
    return service.bus._sock.fileno() == -1


async def interfaces_are_added_at_the_root(service: Service, client: BusClient, bed) -> bool:
    await client.subscribe()
    service.bus.unexport(PATH, service.toy)
    service.bus.export(PATH, service.toy)
    removed, added = await client.signal("InterfacesRemoved"), await client.signal("InterfacesAdded")
    assert (added.body[0], list(added.body[1])) == (PATH, [INTERFACE])
    assert removed.body == [PATH, [INTERFACE]]
    return added.path == removed.path == names.ROOT_PATH


async def only_the_root_manages_objects(service: Service, client: BusClient, bed) -> bool:
    reply = await client.reply(PATH, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
    return reply.message_type is MessageType.ERROR


async def bad_fd_index_is_invalid(service: Service, client: BusClient, bed) -> bool:
    reply = await client.reply(PATH, INTERFACE, "ReadFd", "h", [7])
    return reply.error_name == "org.freedesktop.DBus.Error.InvalidArgs"


async def unknown_object_is_unknown(service: Service, client: BusClient, bed) -> bool:
    failed = await error_name(client.call(f"{PATH}/none", INTERFACE, "Echo", "s", ["x"]))
    return failed == "org.freedesktop.DBus.Error.UnknownObject"


async def wrong_signature_is_invalid(service: Service, client: BusClient, bed) -> bool:
    failed = await error_name(client.call(PATH, INTERFACE, "Echo", "u", [1]))
    return failed == "org.freedesktop.DBus.Error.InvalidArgs"


async def call_without_interface_is_found(service: Service, client: BusClient, bed) -> bool:
    reply = await client.reply(PATH, None, "Echo", "s", ["x"])
    return reply.body == ["x"]


async def property_without_interface_is_found(service: Service, client: BusClient, bed) -> bool:
    reply = await client.reply(PATH, PROPERTIES, "Get", "ss", ["", "Label"])
    return reply.message_type is MessageType.METHOD_RETURN and reply.body[0].value == "toy"


async def machine_id_is_told_twice(service: Service, client: BusClient, bed) -> bool:
    asked = [asyncio.ensure_future(client.call(PATH, "org.freedesktop.DBus.Peer", "GetMachineId")) for _ in range(2)]
    for _ in range(3):
        await client.call(PATH, "org.freedesktop.DBus.Peer", "Ping")
        await spin()
    answers = [task.result() if task.done() else task.cancel() for task in asked]
    return all(isinstance(answer, list) and len(answer[0]) == 32 for answer in answers)


async def long_messages_are_refused(service: Service, client: BusClient, bed) -> bool:
    reply = await client.reply(PATH, INTERFACE, "Echo", "s", ["x" * 1_000_000])
    assert (await client.call(PATH, INTERFACE, "Echo", "s", ["still there"])) == ["still there"]
    return reply.error_name == "org.freedesktop.DBus.Error.LimitsExceeded"


async def can_be_imported_by_python_3_15(service: Service, client: BusClient, bed) -> bool:
    """Which no longer has ``typing.no_type_check_decorator``."""
    module = type(service.bus).__module__
    program = f"import typing; vars(typing).pop('no_type_check_decorator', None); import {module}"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, check=False, capture_output=True)  # noqa: ASYNC221 -- waiting is the point
    return done.returncode == 0


#: What is known to be wrong with dbus-next 0.2.3, and what shows it.
WEAKNESSES = {
    "a full socket buffer ends the connection": [survives_burst],
    "descriptors of messages that nobody handles stay open": [closes_unwanted_fds],
    "descriptors are inherited": [received_fds_are_cloexec],
    "a flood of 40,000 messages stops the event loop": [shares_the_loop_in_a_flood, long_messages_are_refused],
    "replies are lost": [cancelled_method_replies, call_after_disconnect_fails, machine_id_is_told_twice],
    "the socket outlives the connection": [socket_is_closed_after_disconnect],
    "exceptions are told to callers": [keeps_exceptions_to_itself],
    "ObjectManager signals come from a wrong path": [interfaces_are_added_at_the_root, only_the_root_manages_objects],
    "a bad index of a descriptor reaches the method": [bad_fd_index_is_invalid],
    "errors have wrong names": [unknown_object_is_unknown, wrong_signature_is_invalid],
    "no interface is no method": [call_without_interface_is_found, property_without_interface_is_found],
    "Python 3.15 cannot import it": [can_be_imported_by_python_3_15],
}
PROBES = [probe for probes in WEAKNESSES.values() for probe in probes]
