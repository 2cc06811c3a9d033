# SPDX-License-Identifier: GPL-2.0-or-later
"""logind's inhibitor lock as the ``Inhibitor`` (org.freedesktop.login1(5)): sleep and shutdown wait for a commit.

A delay, for logind to end when it thinks fit: a commit takes milliseconds on a healthy disk, and survives the rest.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, Protocol

from dbus_next.constants import MessageFlag
from dbus_next.errors import DBusError
from dbus_next.message import Message

from luksrotd.bus.values import ReceivedFd, body_of

log = logging.getLogger(__name__)

LOGIND: Final = "org.freedesktop.login1"
LOGIND_PATH: Final = "/org/freedesktop/login1"
MANAGER: Final = "org.freedesktop.login1.Manager"
WHAT: Final = "sleep:shutdown"
WHO: Final = "luksrotd"
MODE: Final = "delay"
ANSWER_SECONDS: Final = 1.0
"""How long logind may take; whoever opens the volume waits for the commit, with its locks."""
PAUSE_SECONDS: Final = 60.0
"""How long a logind that did not answer is left alone; a scrub commits a thousand times."""


class Connection(Protocol):
    """What is needed of ``Bus``."""

    async def call(self, msg: Message, *, seconds: float | None, fds: list[ReceivedFd] | None) -> Message | None:
        """Call and wait for the reply, whose descriptors are put into ``fds``."""


class LogindInhibitor:
    """See ``ports.Inhibitor``; ``bus`` gives the present connection to the bus, or None."""

    def __init__(self, bus: Callable[[], Connection | None], *, seconds: float = ANSWER_SECONDS) -> None:
        self._bus = bus
        self._seconds = seconds
        self._silent_until = 0.0

    @asynccontextmanager
    async def held(self, why: str) -> AsyncIterator[None]:
        """Delay sleep and shutdown, if logind gives a lock in time; the lock is a descriptor, closed in the end."""
        fds: list[ReceivedFd] = []
        try:
            await self._take(why, fds)
            yield
        finally:
            for fd in fds:
                fd.close()

    async def _take(self, why: str, fds: list[ReceivedFd]) -> None:
        bus = self._bus()
        now = asyncio.get_running_loop().time
        if bus is None or now() < self._silent_until:
            return
        message = Message(
            destination=LOGIND,
            path=LOGIND_PATH,
            interface=MANAGER,
            member="Inhibit",
            signature="ssss",
            body=[WHAT, WHO, why, MODE],
            flags=MessageFlag.NO_AUTOSTART,
        )
        try:
            body_of(await bus.call(message, seconds=self._seconds, fds=fds))
        except TimeoutError:
            self._silent_until = now() + PAUSE_SECONDS
            log.warning("sleep and shutdown are not delayed: logind does not answer")
        except (DBusError, ConnectionError) as error:
            log.debug("sleep and shutdown are not delayed: %s", error)  # many machines have no logind
