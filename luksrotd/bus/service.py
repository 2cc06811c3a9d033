# SPDX-License-Identifier: GPL-2.0-or-later
"""Being a service on the system bus: connect, own the name, notice the end.  Raises only ``ConnectionError``."""

import asyncio
from typing import Any, Final

from dbus_next.errors import AuthError, DBusError

from luksrotd import names
from luksrotd.bus.caller import Callers
from luksrotd.bus.connection import Bus

DO_NOT_QUEUE: Final = 4
PRIMARY_OWNER: Final = 1


async def connect() -> Bus:
    """A connection to the system bus, whose ObjectManager is at ``names.ROOT_PATH``."""
    try:
        return await Bus(object_manager=names.ROOT_PATH).connect()
    except (OSError, EOFError, AuthError) as error:
        raise ConnectionError(f"no system bus: {error}") from error


async def watch(callers: Callers) -> None:
    """Learn of the callers that vanish."""
    try:
        await callers.watch()
    except (DBusError, TimeoutError) as error:
        raise ConnectionError(f"the bus does not tell who vanishes: {error}") from error


async def own_name(bus: Bus) -> None:
    """Become ``names.BUS_NAME``."""
    try:
        reply: list[Any] = await bus.ask("RequestName", "su", [names.BUS_NAME, DO_NOT_QUEUE])
    except (DBusError, TimeoutError) as error:
        raise ConnectionError(f"the bus refuses the name {names.BUS_NAME}: {error}") from error
    if reply != [PRIMARY_OWNER]:
        raise ConnectionError(f"the bus name {names.BUS_NAME} is taken")


async def lost(bus: Bus) -> None:
    """Return when the connection has ended."""
    # In a task of its own: cancelling dbus-next's coroutine cancels the future that Bus.close needs.
    ended = asyncio.ensure_future(bus.wait_for_disconnect())  # type: ignore[no-untyped-call] # of dbus-next
    ended.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody has to look
    await asyncio.wait({ended})
