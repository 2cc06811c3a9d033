# SPDX-License-Identifier: GPL-2.0-or-later
"""Who calls, as the record has it: the name and unit of the process, where it can be told."""

import asyncio
import os
from pathlib import Path

import pytest
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


async def identified(daemon):
    message = Message(path="/x", interface="a.b", member="C", destination="d.e")
    message.sender = ":1.5"
    current_message.set(message)
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
