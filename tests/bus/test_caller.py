# SPDX-License-Identifier: GPL-2.0-or-later
"""Who calls, as the record has it: the name and unit of the process, where it can be told."""

import asyncio
import os
from pathlib import Path

import pytest
from dbus_next.errors import DBusError
from dbus_next.message import Message
from dbus_next.signature import Variant

from luksrotd.bus.caller import Callers, CallerVanished, current_message
from luksrotd.bus.values import ReceivedFd
from luksrotd.host.process import client_and_unit, unit_of
from tests.bus.toy import INTERFACE, PATH, serve
from tests.support.busclient import BusClient, Remote

pytestmark = pytest.mark.asyncio


def proc(pid, name):
    return Path(f"/proc/{pid}/{name}").read_text().strip()


async def test_a_caller_has_the_name_and_the_unit_of_its_process(bed):
    async with serve() as service, BusClient() as client:
        remote = Remote(bed, bed.user("games").pw_uid)
        await client.call(PATH, INTERFACE, "Echo", "s", ["root's"])
        await remote.call(PATH, INTERFACE, "Echo", "s", ["another's"])
        remote_name = proc(remote.pid, "comm")
        remote.close()
    (mine, _), (others, _) = service.toy.calls
    assert (mine.name, mine.uid) == (client.name, 0)
    assert mine.client == proc("self", "comm")
    assert mine.unit == unit_of(proc("self", "cgroup"))
    assert (others.uid, others.client) == (bed.user("games").pw_uid, remote_name)


async def test_a_caller_is_identified_once(bed):
    asked = []

    def identify(pid, pidfd):
        asked.append(pid)
        return "a name", "a.service"

    async with serve() as service, BusClient() as client:
        service.callers._identify = identify
        for _ in range(3):
            await client.call(PATH, INTERFACE, "Echo", "s", ["x"])
    assert asked == [os.getpid()]
    assert {(caller.client, caller.unit) for caller, _ in service.toy.calls} == {("a name", "a.service")}


async def test_the_first_calls_of_a_client_stay_in_their_order(bed):
    texts = [str(number) for number in range(20)]
    asked = []

    def identify(pid, pidfd):
        asked.append(pid)
        return "a name", "a.service"

    async with serve() as service, BusClient() as client:
        service.callers._identify = identify
        await asyncio.gather(*(client.call(PATH, INTERFACE, "Echo", "s", [text]) for text in texts))
    assert [arguments for _, arguments in service.toy.calls] == [[text] for text in texts]
    assert asked == [os.getpid()]


class SlowDaemon:
    """Answers when it is told to: with an error."""

    def __init__(self):
        self.asked = 0
        self.asking, self.answering = asyncio.Event(), asyncio.Event()

    async def ask(self, *_, **__):
        self.asked += 1
        self.asking.set()
        await self.answering.wait()
        raise DBusError("org.freedesktop.DBus.Error.NameHasNoOwner", "no such name")

    def add_message_handler(self, handler):
        """Nothing vanishes."""


async def test_all_calls_of_a_client_that_left_before_it_was_identified_end():
    daemon = SlowDaemon()
    callers = Callers(daemon)
    current_message.set(a_call())
    calls = [asyncio.ensure_future(callers.current()) for _ in range(3)]
    await daemon.asking.wait()
    daemon.answering.set()
    await asyncio.wait(calls)
    assert [type(call.exception()) for call in calls] == [CallerVanished] * 3
    assert daemon.asked == 1
    assert not callers.is_known(":1.5")


class Daemon13:
    """Answers as Debian 13's bus does: with a descriptor of the process."""

    def __init__(self, pid, of, **members):
        self.credentials = {"UnixUserID": Variant("u", 7), "ProcessID": Variant("u", pid), **members}
        self.of = of
        self.sent = []

    async def ask(self, member, signature="", body=None, *, fds=None):
        assert (member, body) == ("GetConnectionCredentials", [":1.5"])
        if self.of:
            self.sent.append(os.pidfd_open(self.of))
            fds.append(ReceivedFd(self.sent[-1]))
            self.credentials["ProcessFD"] = Variant("h", 0)
        return [self.credentials]

    def add_message_handler(self, handler):
        """Nothing vanishes."""


def a_call():
    message = Message(path="/x", interface="a.b", member="C", destination="d.e")
    message.sender = ":1.5"
    return message


async def identified(daemon):
    current_message.set(a_call())
    return await asyncio.create_task(Callers(daemon, client_and_unit).current())


async def test_a_descriptor_of_the_process_is_believed_over_its_number():
    me = proc("self", "comm")
    same, other, none = Daemon13(os.getpid(), os.getpid()), Daemon13(1, os.getpid()), Daemon13(os.getpid(), 0)
    assert [(await identified(daemon)).client for daemon in (same, other, none)] == [me, "", me]
    for daemon in (same, other):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(daemon.sent[0])


async def test_a_caller_whose_process_cannot_be_told_is_still_a_caller():
    daemon = Daemon13(0, 0)
    del daemon.credentials["ProcessID"]
    caller = await identified(daemon)
    assert (caller.uid, caller.client, caller.unit) == (7, "", "")


async def test_a_caller_without_a_user_has_vanished_and_its_descriptor_is_closed():
    daemon = Daemon13(os.getpid(), os.getpid())
    del daemon.credentials["UnixUserID"]
    with pytest.raises(CallerVanished):
        await identified(daemon)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(daemon.sent[0])
