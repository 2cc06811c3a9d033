# SPDX-License-Identifier: GPL-2.0-or-later
"""A client of the bus for tests, on dbus-next as it is, so that it shares no mistake with ``luksrotd.bus``.

Run as a program (``Remote``) it is a client of another user in a process of its own, driven by JSON lines.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import BusType, MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from luksrotd import names
from tests.support.testbed import TestBed, unprivileged_argv

PROJECT = Path(__file__).resolve().parents[2]
PROPERTIES = "org.freedesktop.DBus.Properties"
DAEMON = "org.freedesktop.DBus"


class CallFailed(Exception):
    """The reply was an error."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(name, text)
        self.name = name
        self.text = text


class BusClient:
    """``async with BusClient() as client: await client.call(path, interface, member, "s", ["x"])``."""

    def __init__(self, destination: str = names.BUS_NAME) -> None:
        self.destination = destination
        self.signals: list[Message] = []
        self._arrived = asyncio.Event()

    async def __aenter__(self) -> Self:
        self.bus = await MessageBus(bus_type=BusType.SYSTEM, negotiate_unix_fd=True).connect()
        self.bus.add_message_handler(self._on_message)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bus.disconnect()  # type: ignore[no-untyped-call] # of dbus-next
        with suppress(EOFError, OSError):  # the bus was ended before
            await self.bus.wait_for_disconnect()  # type: ignore[no-untyped-call] # of dbus-next
        self.bus._stream.close()
        self.bus._sock.close()

    @property
    def name(self) -> str:
        """The unique name."""
        return str(self.bus.unique_name)

    async def reply(
        self,
        path: str,
        interface: str | None,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        fds: Sequence[int] = (),
        flags: MessageFlag = MessageFlag.NONE,
    ) -> Message:
        """Call, and return whatever message comes back.  ``h`` in the body is an index into ``fds``."""
        reply = await self.bus.call(self.message(path, interface, member, signature, body, fds=fds, flags=flags))
        assert reply is not None
        return reply

    async def call(self, *arguments: Any, interactive: bool = False, fds: Sequence[int] = ()) -> list[Any]:
        """Call as ``reply`` does; the body of the return.  Raises ``CallFailed``."""
        flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION if interactive else MessageFlag.NONE
        reply = await self.reply(*arguments, fds=fds, flags=flags)
        if reply.message_type is MessageType.ERROR:
            raise CallFailed(reply.error_name, reply.body[0] if reply.body else "")
        body: list[Any] = reply.body
        return body

    def message(
        self,
        path: str,
        interface: str | None,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        fds: Sequence[int] = (),
        flags: MessageFlag = MessageFlag.NONE,
    ) -> Message:
        """A method call to the service, to be sent by ``bus.send``."""
        return Message(
            destination=self.destination,
            path=path,
            interface=interface,  # type: ignore[arg-type] # dbus-next forgot the None
            member=member,
            signature=signature,
            body=list(body),
            unix_fds=list(fds),
            flags=flags,
        )

    async def get(self, path: str, interface: str, name: str) -> Any:
        """The value of a property."""
        return (await self.call(path, PROPERTIES, "Get", "ss", [interface, name]))[0].value

    async def get_all(self, path: str, interface: str) -> dict[str, Any]:
        """The values of all properties."""
        body = await self.call(path, PROPERTIES, "GetAll", "s", [interface])
        return {name: variant.value for name, variant in body[0].items()}

    async def subscribe(self, rule: str = "") -> None:
        """Collect the signals of the service (or of a match rule) in ``signals``."""
        message = Message(
            destination=DAEMON,
            path="/org/freedesktop/DBus",
            interface=DAEMON,
            member="AddMatch",
            signature="s",
            body=[rule or f"type='signal',sender='{self.destination}'"],
        )
        reply = await self.bus.call(message)
        assert reply is not None
        assert reply.message_type is MessageType.METHOD_RETURN, reply.body

    async def signal(self, member: str) -> Message:
        """Wait for the next signal of that name and take it out of ``signals``."""
        while True:
            for message in self.signals:
                if message.member == member:
                    self.signals.remove(message)
                    return message
            self._arrived.clear()
            await self._arrived.wait()

    def _on_message(self, message: Message) -> bool:
        if message.message_type is MessageType.SIGNAL and message.member not in ("NameAcquired", "NameLost"):
            self.signals.append(message)
            self._arrived.set()
        return False


class Remote:
    """A client in a process of another user; values that JSON knows, and ``Variant``, only."""

    def __init__(self, bed: TestBed, uid: int) -> None:
        self._bed = bed
        self.uid = uid
        self.process = as_user(bed, uid, __spec__.name)
        self.pid = self.process.pid

    async def call(self, *arguments: Any, interactive: bool = False) -> list[Any]:
        """As ``BusClient.call``."""
        return await self._ask({"arguments": arguments, "interactive": interactive})

    def send(self, *arguments: Any, interactive: bool = False) -> None:
        """Call without waiting for the reply."""
        self._write({"arguments": arguments, "interactive": interactive, "send": True})

    async def reconnect(self) -> str:
        """Leave the bus, whatever has been called, and come back; the new unique name."""
        return str((await self._ask({"reconnect": True}))[0])

    def close(self) -> None:
        """End the process, and with it the connection."""
        self._bed.end(self.process)

    async def _ask(self, request: dict[str, Any]) -> list[Any]:
        answer = json.loads(await asyncio.to_thread(self._exchange, request))
        if "error" in answer:
            raise CallFailed(*answer["error"])
        body: list[Any] = answer["body"]
        return body

    def _write(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request, default=_variant_to_json) + "\n")
        self.process.stdin.flush()

    def _exchange(self, request: dict[str, Any]) -> str:
        self._write(request)
        assert self.process.stdout is not None
        return str(self.process.stdout.readline())


def _variant_to_json(value: Any) -> dict[str, Any]:
    assert isinstance(value, Variant), value
    return {"@signature": value.signature, "value": value.value}


def _variant_from_json(found: dict[str, Any]) -> Any:
    return Variant(found["@signature"], found["value"]) if "@signature" in found else found


def as_user(bed: TestBed, uid: int, module: str, *arguments: str) -> subprocess.Popen[str]:
    """Run ``module.main(arguments)`` in a process of an unprivileged user, with pipes as standard input and output."""
    argv = unprivileged_argv(uid, module, *arguments)
    return bed.spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PROJECT)


def main(arguments: Sequence[str]) -> None:
    """Serve ``Remote``: for each line on standard input one call, and one line of answer."""
    asyncio.run(_serve())


async def _serve() -> None:
    stays = True
    comes_back = False
    while stays:
        async with BusClient() as client:
            if comes_back:
                _answer({"body": [client.name]})
            stays = comes_back = await _serve_connection(client)


async def _serve_connection(client: BusClient) -> bool:
    """Until it is to be left; whether there shall be another one."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        request = json.loads(line, object_hook=_variant_from_json)
        if "reconnect" in request:
            return True
        if "send" in request:
            flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION if request["interactive"] else MessageFlag.NONE
            await client.bus.send(client.message(*request["arguments"], flags=flags))
            continue
        try:
            _answer({"body": await client.call(*request["arguments"], interactive=request["interactive"])})
        except CallFailed as error:
            _answer({"error": [error.name, error.text]})
    return False


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer, default=_variant_to_json) + "\n")
    sys.stdout.flush()
