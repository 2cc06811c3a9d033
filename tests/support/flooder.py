# SPDX-License-Identifier: GPL-2.0-or-later
"""A client that calls as fast as the bus takes it, and wants no reply.

``python -m tests.support.flooder COUNT PATH INTERFACE MEMBER TEXT``; it ends when the bus has routed all of them.
"""

import asyncio
import sys

from dbus_next.constants import MessageFlag

from tests.support.busclient import DAEMON, BusClient

AT_ONCE = 500


async def flood(count: int, path: str, interface: str, member: str, text: str) -> None:
    """Call ``member`` with the text, so often."""
    async with BusClient() as client:
        message = client.message(path, interface, member, "s", [text], flags=MessageFlag.NO_REPLY_EXPECTED)
        message.serial = client.bus.next_serial()
        data = bytes(message._marshall()) * AT_ONCE  # type: ignore[no-untyped-call] # of dbus-next
        for _ in range(count // AT_ONCE):
            await asyncio.get_running_loop().sock_sendall(client.bus._sock, data)
        await client.bus.introspect(DAEMON, "/org/freedesktop/DBus")  # answered after all of them were routed


if __name__ == "__main__":
    asyncio.run(flood(int(sys.argv[1]), *sys.argv[2:]))
