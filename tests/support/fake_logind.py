# SPDX-License-Identifier: GPL-2.0-or-later
"""A logind that has only ``Inhibit``: ``python -m tests.support.fake_logind MODE``, with the bed's bus.

MODE: ``answer``; ``ignore`` (never answers); ``refuse``; ``none`` (answers without a descriptor).
Prints, one a line: "ready", "asked", "taken WHAT|WHO|WHY|MODE", "released".
"""

import asyncio
import os
import subprocess
import sys
from typing import Any

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import BusType, MessageFlag, MessageType, RequestNameReply
from dbus_next.message import Message

from tests.support.testbed import PROJECT, TestBed

LOGIND = "org.freedesktop.login1"


class FakeLogind:
    """The process, as a test sees it."""

    def __init__(self, bed: TestBed, mode: str = "answer") -> None:
        self._bed = bed
        argv = [sys.executable, "-m", "tests.support.fake_logind", mode]
        self._process = bed.spawn(argv, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
        assert self.line() == "ready"

    def line(self) -> str:
        """The next line."""
        assert self._process.stdout is not None
        return str(self._process.stdout.readline()).rstrip("\n")

    def end(self) -> list[str]:
        """End it; the lines that were not read."""
        self._process.terminate()
        assert self._process.stdout is not None
        rest = str(self._process.stdout.read()).splitlines()
        self._bed.end(self._process)
        return rest


async def main(mode: str) -> None:
    """Run until killed."""
    bus = await MessageBus(bus_type=BusType.SYSTEM, negotiate_unix_fd=True).connect()
    loop = asyncio.get_running_loop()

    def released(fd: int) -> None:
        loop.remove_reader(fd)
        os.close(fd)
        _say("released")

    def inhibit(message: Message) -> Message | bool:
        if message.message_type is not MessageType.METHOD_CALL or message.member != "Inhibit":
            return False
        _say("asked")
        if mode == "ignore":
            return True
        if mode == "refuse":
            return Message.new_error(message, "org.freedesktop.DBus.Error.AccessDenied", "not you")
        if mode == "none":
            return Message.new_method_return(message)
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        loop.add_reader(ours, released, ours)
        _say("taken " + "|".join(message.body))
        reply: Any = Message.new_method_return(message, "h", [0], [theirs])
        bus.send(reply).add_done_callback(lambda _: os.close(theirs))
        return True

    bus.add_message_handler(inhibit)
    reply = await bus.call(
        Message(
            destination="org.freedesktop.DBus",
            path="/org/freedesktop/DBus",
            interface="org.freedesktop.DBus",
            member="RequestName",
            signature="su",
            body=[LOGIND, 4],
            flags=MessageFlag.NONE,
        )
    )
    assert reply is not None
    assert reply.body == [RequestNameReply.PRIMARY_OWNER.value], reply.body
    _say("ready")
    await loop.create_future()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
