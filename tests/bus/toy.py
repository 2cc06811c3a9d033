# SPDX-License-Identifier: GPL-2.0-or-later
"""A small service made of the pieces of ``luksrotd.bus``, and its twin on dbus-next as it is."""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import BusType, PropertyAccess
from dbus_next.service import ServiceInterface, dbus_property, method

from luksrotd import names
from luksrotd.bus.authority import POLKIT_SECONDS, PolkitAuthority
from luksrotd.bus.caller import Callers
from luksrotd.bus.connection import Bus
from luksrotd.bus.exposed import UNPRIVILEGED, exposed
from luksrotd.bus.guard import Guard
from luksrotd.bus.interface import Emits, Interface, emitted, readable
from luksrotd.bus.quota import CALLS_PER_USER, Quota
from luksrotd.bus.values import ReceivedFd
from luksrotd.errors import Outcome, WrongCredential
from luksrotd.host.process import client_and_unit
from luksrotd.ports import Authority, Caller

PATH = f"{names.DEVICE_PATH}/toy"
INTERFACE = names.DEVICE_INTERFACE
SECRET = "hunter2"
WHY = "a toy"


class Toy(Interface):
    def __init__(self, guard: Guard) -> None:
        super().__init__(INTERFACE, guard)
        self.entered = asyncio.Event()
        self.calls: list[tuple[Caller, list[Any]]] = []
        self.taken: list[int] = []
        self.inheritable: list[bool] = []
        self.tasks: list[asyncio.Task[Any] | None] = []
        self.revision = 7
        self.system = False
        self.data = b""

    async def details(self, method: str, arguments: Sequence[Any]) -> Mapping[str, str]:
        return {"device": "/dev/toy", "uuid": "1234", "key": "back\nup"}

    def is_of_system(self) -> bool:
        return self.system

    @exposed("s", "s", action=UNPRIVILEGED, reason=WHY, outputs=["same"])
    async def echo(self, caller: Caller, text: str) -> str:
        self.calls.append((caller, [text]))
        return text

    @exposed("", "sub", action=UNPRIVILEGED, reason=WHY, outputs=["name", "uid", "interactive"])
    async def who_am_i(self, caller: Caller) -> tuple[str, int, bool]:
        return caller.name, caller.uid, caller.interactive

    @exposed(
        "sa{sv}",
        "s",
        action=names.ACTION_ROTATE,
        options={"label": "s", "unlock": {"fd": "h", "token": "i"}},
        outputs=["job"],
    )
    async def rotate(self, caller: Caller, key: str, options: dict[str, Any]) -> str:
        self.calls.append((caller, [key, options]))
        return f"rotated {key}"

    @exposed("", "", action=UNPRIVILEGED, reason=WHY)
    async def leak(self, caller: Caller) -> None:
        raise RuntimeError(SECRET)

    @exposed("", "", action=UNPRIVILEGED, reason=WHY)
    async def refuse(self, caller: Caller) -> None:
        raise WrongCredential("cannot open toy", outcome=Outcome.WIPE_PENDING)

    @exposed("", "", action=UNPRIVILEGED, reason=WHY)
    async def hang(self, caller: Caller) -> None:
        self.tasks.append(asyncio.current_task())
        self.entered.set()
        await asyncio.Event().wait()

    @exposed("h", "s", action=UNPRIVILEGED, reason=WHY, outputs=["text"])
    async def read_fd(self, caller: Caller, source: ReceivedFd) -> str:
        self.inheritable.append(os.get_inheritable(source.fd))
        return os.read(source.fd, 100).decode()

    @exposed("(hh)", "", action=UNPRIVILEGED, reason=WHY)
    async def take_fds(self, caller: Caller, sources: tuple[ReceivedFd, ReceivedFd]) -> None:
        self.taken += [source.take() for source in sources]

    @exposed("", "ha{sv}", action=UNPRIVILEGED, reason=WHY, outputs=["source", "more"])
    async def open_fd(self, caller: Caller) -> tuple[int, dict[str, Any]]:
        reading, writing = os.pipe()
        os.write(writing, b"generated")
        os.close(writing)
        return reading, {}

    @exposed("", "u", action=UNPRIVILEGED, reason=WHY, outputs=["number"])
    async def misfit(self, caller: Caller) -> str:
        return "not a number"

    @readable("t")
    def generation(self) -> int:
        return self.revision

    @readable("s", emits=Emits.INVALIDATES)
    def label(self) -> str:
        return "toy"

    @readable("s", name="UUID", emits=Emits.CONST)
    def uuid(self) -> str:
        return "1234"

    @emitted("us", "number", "text")
    def noise(self, number: int, text: str) -> None:
        """Something was heard."""


class PlainToy(ServiceInterface):
    """The same on dbus-next as it is; the annotations are D-Bus signatures."""

    def __init__(self) -> None:
        super().__init__(INTERFACE)
        self.entered = asyncio.Event()
        self.tasks: list[asyncio.Task[Any] | None] = []
        self.inheritable: list[bool] = []
        self.calls = 0

    @method(name="Echo")
    def echo(self, text: "s") -> "s":  # noqa: F821 - dbus-next's way
        self.calls += 1
        return text

    @method(name="Leak")
    def leak(self):
        raise RuntimeError(SECRET)

    @method(name="Hang")
    async def hang(self):
        self.tasks.append(asyncio.current_task())
        self.entered.set()
        await asyncio.Event().wait()

    @method(name="ReadFd")
    def read_fd(self, source: "h") -> "s":  # noqa: F821 - dbus-next's way
        if source is None:
            return "a bad index reached the method"
        self.inheritable.append(os.get_inheritable(source))
        return os.read(source, 100).decode()

    @dbus_property(access=PropertyAccess.READ, name="Label")
    def label(self) -> "s":  # noqa: F821 - dbus-next's way
        return "toy"


class Service:
    """One of the two, on the private bus."""

    def __init__(self, bus: Any, toy: Any, callers: Callers | None = None) -> None:
        self.bus = bus
        self.toy = toy
        self.callers = callers


@asynccontextmanager
async def serve(
    authority: Authority | None = None, calls: int = CALLS_PER_USER, *, polkit_seconds: float = POLKIT_SECONDS
) -> AsyncIterator[Service]:
    bus = await Bus(object_manager=names.ROOT_PATH).connect()
    try:
        callers = Callers(bus, client_and_unit)
        await callers.watch()
        polkit = authority or PolkitAuthority(bus, polkit_seconds=polkit_seconds)
        toy = Toy(Guard(callers, polkit, Quota(calls)))
        bus.export(PATH, toy)
        await bus.request_name(names.BUS_NAME)
        yield Service(bus, toy, callers)
    finally:
        await bus.close()


@asynccontextmanager
async def serve_plain() -> AsyncIterator[Service]:
    bus = await MessageBus(bus_type=BusType.SYSTEM, negotiate_unix_fd=True).connect()
    try:
        toy = PlainToy()
        bus.export(PATH, toy)
        await bus.request_name(names.BUS_NAME)
        yield Service(bus, toy)
    finally:
        bus.disconnect()
        await asyncio.wait([asyncio.ensure_future(bus.wait_for_disconnect())])
        bus._stream.close()
        bus._sock.close()
