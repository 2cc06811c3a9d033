# SPDX-License-Identifier: GPL-2.0-or-later
"""Who calls, and when they vanish.

dbus-next shows a method neither the sender nor the flags of its message.  ``Bus`` keeps the message being answered in
``current_message``, a context variable, so every task sees its own.
"""

import asyncio
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final, Protocol

from dbus_next.constants import MessageFlag, MessageType
from dbus_next.errors import DBusError
from dbus_next.message import Message

from luksrotd.bus.values import ReceivedFd
from luksrotd.ports import Caller
from luksrotd.service.threads import in_thread

log = logging.getLogger(__name__)

DAEMON: Final = "org.freedesktop.DBus"
DAEMON_PATH: Final = "/org/freedesktop/DBus"
# Every unique name that goes, rather than a rule for each caller: no round trip, no limit on rules, no race.
VANISHED_RULE: Final = (
    "type='signal',sender='org.freedesktop.DBus',path='/org/freedesktop/DBus',"
    "interface='org.freedesktop.DBus',member='NameOwnerChanged',arg2=''"
)

current_message: ContextVar[Message] = ContextVar("current_message")
"""The method call that the current task answers."""


Identify = Callable[[int, int], tuple[str, str]]
"""Name and systemd unit of a process, by its number and (or -1) a descriptor of it; blocks."""


def unidentified(_: int, __: int) -> tuple[str, str]:
    """An ``Identify`` that knows nobody."""
    return "", ""


class CallerVanished(Exception):
    """The caller left the bus: there is nobody to do anything for, or to reply to."""


class Connection(Protocol):
    """What is needed of ``Bus``."""

    async def ask(
        self,
        member: str,
        signature: str = "",
        body: list[object] | None = None,
        *,
        fds: list[ReceivedFd] | None = None,
    ) -> list[object]:
        """Call the bus daemon; descriptors in its reply are appended to ``fds``."""

    def add_message_handler(self, handler: Callable[[Message], Message | bool | None]) -> object:
        """See every incoming message."""


class Callers:
    """Identifies callers by the bus daemon, once each, and knows which of them are still there."""

    def __init__(self, bus: Connection, identify: Identify = unidentified, *, connection: int = 0) -> None:
        self._bus = bus
        self._identify = identify
        self._connection = connection
        self._known: dict[str, _Known] = {}

    async def watch(self) -> None:
        """Subscribe; to be awaited before the first call is answered."""
        self._bus.add_message_handler(self._on_message)
        await self._bus.ask("AddMatch", "s", [VANISHED_RULE])

    async def current(self) -> Caller:
        """The sender of the message that this task answers; raises ``CallerVanished``."""
        message = current_message.get()
        name = message.sender
        known = self._known.setdefault(name, _Known())  # before asking, so that a vanishing in between is seen
        # The lock lets them in by their arrival: the calls of one client stay in the order in which it sent them.
        async with known.asking:
            if known.uid is None and not known.gone.is_set():
                try:
                    await self._ask(name, known)
                except (DBusError, KeyError, ConnectionError) as error:
                    self._forget(name)
                    raise CallerVanished(name) from error
        if known.gone.is_set():
            raise CallerVanished(name)
        interactive = bool(message.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION)
        assert known.uid is not None  # noqa: S101 -- for mypy: _ask has set it
        return Caller(name, known.uid, interactive, known.client, known.unit, self._connection)

    async def _ask(self, name: str, known: "_Known") -> None:
        """Raises ``DBusError`` and ``KeyError``."""
        fds: list[ReceivedFd] = []
        try:
            reply: list[Any] = await self._bus.ask("GetConnectionCredentials", "s", [name], fds=fds)
            credentials = {key: variant.value for key, variant in reply[0].items()}
            pid = credentials.get("ProcessID", 0)
            # A process that has gone may have left its number to another one; its descriptor tells.
            pidfd = fds[credentials["ProcessFD"]].fd if fds and "ProcessFD" in credentials else -1
            if pid:
                known.client, known.unit = await in_thread(lambda: self._identify(pid, pidfd))
            known.uid = credentials["UnixUserID"]
        finally:
            for fd in fds:
                fd.close()

    async def gone(self, unique_name: str) -> None:
        """Wait until that caller vanishes; at once for one that was never identified."""
        known = self._known.get(unique_name)
        if known is not None:
            await known.gone.wait()

    def is_known(self, unique_name: str) -> bool:
        """Whether the caller was identified and is still there."""
        return unique_name in self._known

    def lost(self) -> None:
        """The connection is over, and with it every caller; to be called when it is."""
        for name in list(self._known):
            self._forget(name)

    def _on_message(self, message: Message) -> bool:
        if (
            message.message_type is MessageType.SIGNAL
            and message.sender == DAEMON
            and message.member == "NameOwnerChanged"
            and message.signature == "sss"
            and message.body[2] == ""
        ):
            self._forget(message.body[0])
        return False

    def _forget(self, name: str) -> None:
        known = self._known.pop(name, None)
        if known is not None:
            known.gone.set()


class _Known:
    def __init__(self) -> None:
        self.uid: int | None = None
        self.client = self.unit = ""
        self.asking = asyncio.Lock()
        self.gone = asyncio.Event()
