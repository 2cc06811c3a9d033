# SPDX-License-Identifier: GPL-2.0-or-later
"""Sees every message on the private bus (D-Bus Specification, ``org.freedesktop.DBus.Monitoring``)."""

import asyncio

from dbus_next.message import Message

from luksrotd.bus.caller import DAEMON, DAEMON_PATH
from luksrotd.bus.connection import Bus


class Monitor:
    """``async with Monitor() as seen: … await seen.wait_for("Member")``.

    Descriptors in what it saw stay open, for whoever looks at them to close.  By luksrotd's own connection: dbus-next's
    has been seen to stop reading, on a busy machine.
    """

    def __init__(self):
        self.messages = []

    async def __aenter__(self):
        self._arrived = asyncio.Event()
        self._bus = await Bus().connect()
        self._bus._on_message = self._see
        await self._bus.send(
            Message(
                destination=DAEMON,
                path=DAEMON_PATH,
                interface="org.freedesktop.DBus.Monitoring",
                member="BecomeMonitor",
                signature="asu",
                body=[[], 0],
            )
        )
        await self.until(lambda message: message.reply_serial and message.sender == DAEMON)
        self.messages.clear()
        return self

    async def __aexit__(self, *exception):
        await self._bus.close()

    def _see(self, message, *, is_oversized):
        self.messages.append(message)
        self._arrived.set()

    async def wait_for(self, member):
        await self.until(lambda message: message.member == member)

    async def until(self, is_it):
        """Wait until there is a message that ``is_it``; that message."""
        async with asyncio.timeout(60):
            while True:
                for message in self.messages:
                    if is_it(message):
                        return message
                self._arrived.clear()
                await self._arrived.wait()

    def named(self, name):
        """The messages with that member, or that error."""
        return [one for one in self.messages if name in (one.member, (one.error_name or "").rpartition(".")[2])]

    def sender_of(self, member):
        return next(message.sender for message in self.messages if message.member == member)

    def cancellation(self, member):
        return next(message.body[-1] for message in self.messages if message.member == member)
