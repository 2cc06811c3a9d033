# SPDX-License-Identifier: GPL-2.0-or-later
"""udisksd of this Debian, unpacked and never installed: it would be a service of the machine from then on."""

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from tests.bench import wire
from tests.bench.real import MARK, Daemon
from tests.bench.stage import BENCH, run
from tests.support.busclient import BusClient
from tests.support.daemon_process import WAIT_SECONDS
from tests.support.testbed import TestBed

NAME: Final = "org.freedesktop.UDisks2"
ROOT: Final = "/org/freedesktop/UDisks2"
FOLDER: Final = BENCH / "udisks"
#: udisksd, and of what it is linked with or loads, as apt would install it, what a Debian of tests does not have.
PACKAGES: Final = (
    "udisks2",
    "libatasmart4",
    "libblockdev2",
    "libblockdev-crypto2",
    "libblockdev-fs2",
    "libblockdev-loop2",
    "libblockdev-part2",
    "libblockdev-part-err2",
    "libblockdev-swap2",
    "libblockdev-utils2",
    "libgudev-1.0-0",
    "libparted2",
    "libparted-fs-resize0",
    "libudisks2-0",
    "libvolume-key1",
)
_DONE: Final = "done"
#: Becomes udisksd, with a /var/lib of its own.
_SCRIPT: Final = 'mount -t tmpfs udisks /var/lib && exec "$0" "$@"'


def fetch() -> None:
    """Have it in ``FOLDER``."""
    if (FOLDER / _DONE).exists():
        return
    run(("rm", "-rf", str(FOLDER)))
    FOLDER.mkdir(parents=True)
    _download(PACKAGES)
    for package in FOLDER.glob("*.deb"):
        run(("dpkg-deb", "--extract", str(package), str(FOLDER)))
    (FOLDER / _DONE).touch()


def _download(packages: Sequence[str]) -> None:
    script = 'cd "$0"; apt-get -qq download "$@" || { apt-get -qq update </dev/null; apt-get -qq download "$@"; }'
    run(("sh", "-c", script, str(FOLDER), *packages))


@asynccontextmanager
async def daemon(bed: TestBed) -> AsyncIterator[Daemon]:
    """It runs from when it has its name, which for its unit is to be ready, until the context is left."""
    async with BusClient(NAME) as client:
        await client.subscribe(f"type='signal',member='NameOwnerChanged',arg0='{NAME}'")
        begun = time.perf_counter()
        process = _spawn(bed)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await client.signal("NameOwnerChanged")
            seconds = time.perf_counter() - begun
            yield Daemon(process.pid, seconds, await _volumes(client))
        finally:
            bed.end(process)


async def _volumes(client: BusClient) -> int:
    """How many of ours it has on the bus."""
    (objects,) = await client.call(ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
    blocks = [interfaces[f"{NAME}.Block"] for interfaces in objects.values() if f"{NAME}.Block" in interfaces]
    return sum(block["IdUUID"].value.startswith(MARK) for block in blocks)


def admit(bed: TestBed) -> None:
    """Have the bus let it have its name."""
    shipped = FOLDER / f"usr/share/dbus-1/system.d/{NAME}.conf"
    (bed.dir / "bus-policy" / shipped.name).write_bytes(shipped.read_bytes())
    with wire.Wire() as client:
        client.call(wire.call(wire.BUS, "/org/freedesktop/DBus", wire.BUS, "ReloadConfig"))


def _spawn(bed: TestBed) -> "subprocess.Popen[Any]":
    libraries = [str(path) for path in FOLDER.glob(f"**/lib/{os.uname().machine}-linux-gnu")]
    with (bed.dir / "udisksd.log").open("wb") as output:
        return bed.spawn(
            ["unshare", "--mount", "sh", "-c", _SCRIPT, FOLDER / "usr/libexec/udisks2/udisksd"],
            env={**os.environ, "LD_LIBRARY_PATH": ":".join(libraries)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
