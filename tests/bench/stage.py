# SPDX-License-Identifier: GPL-2.0-or-later
"""Where it is measured: a private bus with polkitd and udevd, the daemon, and volumes on the disk of this machine.

The volumes are image files in ``FOLDER`` behind loop devices.  Not in memory: what a flush costs is a part of it.
"""

import os
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from tests.support.busclient import BusClient
from tests.support.daemon_process import OLD, PREFIX, Disk, appeared, reached, running, start, take_key
from tests.support.kernel import LoopDevice
from tests.support.makeimage import make_image
from tests.support.testbed import PROJECT, TestBed

BENCH: Final = PROJECT / "build" / "bench"
FOLDER: Final = BENCH / "volumes"


@dataclass
class Stage:
    """The place of a measurement; the volumes that ``volume`` makes are gone with it."""

    bed: TestBed
    client: BusClient
    daemon: Any = None
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    def volume(self, name: str, **image: Any) -> Disk:
        """A volume, with the passphrase ``OLD`` in keyslot 0 (further options as of ``make_image``)."""
        path = FOLDER / f"{PREFIX}{name}.img"
        make_image(path, key=OLD, **image)
        self.stack.callback(path.unlink)
        return Disk(self.stack.enter_context(LoopDevice(path)))

    async def known(self, disk: Disk) -> Disk:
        """Wait until the daemon has it on the bus, and is idle."""
        await appeared(self.client, disk.path)
        return disk

    async def job(self, disk: Disk, method: str, *, taken: bool = False, **arguments: Any) -> None:
        """A job from the call to its end, which must be good; ``taken``: its key is generated, and we take it."""
        path = await start(self.client, disk.path, method, **arguments)
        if taken:
            await reached(self.client, path, Stage="delivering")
            await take_key(self.client, path)
        while True:
            signal = await self.client.signal("Completed")
            if signal.path == path:
                break
        self.client.signals.clear()
        if not signal.body[0]:
            raise RuntimeError(f"{method} on {disk.node} has not finished: {signal.body}")


class Runner(Protocol):
    """Runs a command that must succeed; what it said."""

    def __call__(
        self, command: Sequence[str], *, stdin: bytes = b"", environment: Mapping[str, str] | None = None
    ) -> bytes: ...


@asynccontextmanager
async def stage(*, daemon: bool = True, **plan: Any) -> AsyncIterator[Stage]:
    """All of it, and its end; ``plan`` as of ``daemon_launcher``."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        bed = stack.enter_context(TestBed())
        client = await stack.enter_async_context(BusClient())
        await client.subscribe()
        volumes = await stack.enter_async_context(AsyncExitStack())
        made = Stage(bed, client, stack=volumes)
        if daemon:
            made.daemon = await stack.enter_async_context(running(bed, client, spare=True, **plan))
        yield made


def run(command: Sequence[str], *, stdin: bytes = b"", environment: Mapping[str, str] | None = None) -> bytes:
    """Run a command that must succeed; what it said."""
    done = subprocess.run(
        command, input=stdin, capture_output=True, check=False, env={**os.environ, **(environment or {})}
    )
    if done.returncode:
        raise RuntimeError(f"{command} ended with status {done.returncode}: {done.stderr.decode(errors='replace')}")
    return done.stdout
