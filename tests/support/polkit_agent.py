# SPDX-License-Identifier: GPL-2.0-or-later
"""A polkit authentication agent without a human: ``python -m tests.support.polkit_agent MODE PID UID LOCALE``.

It registers for one process (polkit's subject ``unix-process``) and answers by itself, which root may.  Modes: ``yes``
authenticates, ``cancel`` dismisses, ``ignore`` never answers.  Prints one JSON object per event.
"""

import asyncio
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import BusType, MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

POLKIT = "org.freedesktop.PolicyKit1"
AUTHORITY_PATH = "/org/freedesktop/PolicyKit1/Authority"
AUTHORITY = "org.freedesktop.PolicyKit1.Authority"
AGENT_PATH = "/testbed/agent"
MODES = ("yes", "cancel", "ignore")
WAIT_SECONDS = 20.0


class Agent:
    """The agent's process as its starter sees it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []
        self._unread = b""

    @staticmethod
    def argv(mode: str, pid: int, uid: int, locale: str = "C") -> list[str]:
        """The command line."""
        if mode not in MODES:
            raise ValueError(f"no such mode: {mode}")
        return [sys.executable, "-m", "tests.support.polkit_agent", mode, str(pid), str(uid), locale]

    def wait_for(self, event: str) -> dict[str, Any]:
        """Block until the agent reports ``registered``, ``begin`` or ``cancel``; the report, with its details."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while True:
            while b"\n" not in self._unread:
                if not select.select([descriptor], [], [], WAIT_SECONDS)[0]:
                    raise TimeoutError(f"the agent never reported {event}: {self.events}")
                data = os.read(descriptor, 4096)
                if not data:
                    raise RuntimeError(f"the agent ended before {event}: {self.events}")
                self._unread += data
            line, _, self._unread = self._unread.partition(b"\n")
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == event:
                return self.events[-1]


def _report(event: str, **details: Any) -> None:
    sys.stdout.write(json.dumps({"event": event} | details) + "\n")
    sys.stdout.flush()


class _Agent:
    def __init__(self, bus: MessageBus, mode: str, uid: int) -> None:
        self._bus = bus
        self._mode = mode
        self._uid = uid
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, message: Message) -> bool:
        if message.message_type is not MessageType.METHOD_CALL:
            return False
        if message.member == "BeginAuthentication":
            task = asyncio.ensure_future(self._begin(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif message.member == "CancelAuthentication":
            _report("cancel")
            self._bus.send(Message.new_method_return(message))
        return True

    async def _begin(self, message: Message) -> None:
        action, text, _icon, details, cookie, identities = message.body
        _report("begin", action=action, message=text, details=details)
        if self._mode == "ignore":
            return
        if self._mode == "cancel":
            self._bus.send(Message.new_error(message, f"{POLKIT}.Error.Cancelled", "dismissed"))
            return
        # An agent is known by the user who registered it to polkit 122, by the user it is for to polkit 126.
        for uid in (os.getuid(), self._uid):
            body = [uid, cookie, identities[0]]
            reply = await self._bus.call(_call("AuthenticationAgentResponse2", "us(sa{sv})", body))
            assert reply is not None
            _report("answered", reply=reply.message_type.name, error=reply.error_name)
            if reply.message_type is MessageType.METHOD_RETURN:
                break
        self._bus.send(Message.new_method_return(message))


def _call(member: str, signature: str, body: list[Any]) -> Message:
    return Message(
        destination=POLKIT, path=AUTHORITY_PATH, interface=AUTHORITY, member=member, signature=signature, body=body
    )


def _start_time(pid: int) -> int:
    """proc_pid_stat(5): field 22, counted after the command's closing parenthesis."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


async def _run(mode: str, pid: int, uid: int, locale: str) -> None:
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    bus.add_message_handler(_Agent(bus, mode, uid))
    process = {"pid": Variant("u", pid), "start-time": Variant("t", _start_time(pid)), "uid": Variant("i", uid)}
    subject = ["unix-process", process]
    reply = await bus.call(_call("RegisterAuthenticationAgent", "(sa{sv})ss", [subject, locale, AGENT_PATH]))
    assert reply is not None
    assert reply.message_type is MessageType.METHOD_RETURN, reply.body
    _report("registered")
    await bus.wait_for_disconnect()  # type: ignore[no-untyped-call] # of dbus-next


if __name__ == "__main__":
    asyncio.run(_run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
