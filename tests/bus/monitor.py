# SPDX-License-Identifier: GPL-2.0-or-later
"""Sees every message on the private bus (D-Bus Specification, ``org.freedesktop.DBus.Monitoring``)."""

import asyncio

from tests.support.busclient import DAEMON, BusClient


class Monitor:
    """``async with Monitor() as seen: … await seen.wait_for("Member")``."""

    def __init__(self):
        self._client = BusClient(DAEMON)
        self.messages = []

    async def __aenter__(self):
        self._arrived = asyncio.Event()
        await self._client.__aenter__()
        path, interface = "/org/freedesktop/DBus", "org.freedesktop.DBus.Monitoring"
        await self._client.call(path, interface, "BecomeMonitor", "asu", [[], 0])
        self._client.bus._on_message = self._see
        return self

    async def __aexit__(self, *exception):
        await self._client.__aexit__(*exception)

    def _see(self, message):
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
