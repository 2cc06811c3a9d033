# SPDX-License-Identifier: GPL-2.0-or-later
"""A client that is to be killed: it says on standard output how far it has come.

``python -m tests.support.doomed VOLUME``: a transaction with all kinds of secrets, up to a key that it never confirms.
"""

import asyncio
import os
import sys
from typing import Any, Final

from dbus_next.signature import Variant

from luksrotd import names
from tests.support.busclient import BusClient
from tests.support.daemon_process import FAST, OLD, memfd

POINTS: Final = ("begun", "unlocking", "unlocked", "added", "committing", "taken")


async def go_on(volume: str) -> None:
    """To the last point, and stay there."""
    async with BusClient() as client:
        (path,) = await client.call(volume, names.DEVICE_INTERFACE, "BeginTransaction", "a{sv}", [{}])
        _say("begun")
        secret = memfd(OLD)
        unlock = (path, names.TRANSACTION_INTERFACE, "Unlock", "a{sv}a{sv}", [{"fd": Variant("h", 0)}, {}])
        await client.bus.send(client.message(*unlock, fds=[secret]))
        _say("unlocking")
        while not await client.get(path, names.TRANSACTION_INTERFACE, "Unlocked"):  # noqa: ASYNC110 -- it is about to be killed
            await asyncio.sleep(0.01)
        _say("unlocked")
        generate: list[Any] = [{"generate": Variant("b", True)}, FAST]
        await client.call(path, names.TRANSACTION_INTERFACE, "AddKeyslot", "a{sv}a{sv}", generate)
        _say("added")
        (job,) = await client.call(path, names.TRANSACTION_INTERFACE, "Commit", "a{sv}", [{}])
        _say("committing")
        await client.call(job, names.JOB_INTERFACE, "TakeKey", "a{sv}", [{}])
        _say("taken")
        os.close(secret)
        await asyncio.Event().wait()


def _say(point: str) -> None:
    sys.stdout.write(point + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(go_on(sys.argv[1]))
