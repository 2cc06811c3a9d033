# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon in a process of its own, on the test bed's bus, and what a client does with it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from dbus_next.message import Message
from dbus_next.signature import Variant

from luksrotd import names
from tests.support import makeimage
from tests.support.busclient import BusClient
from tests.support.kernel import LoopDevice
from tests.support.testbed import PROJECT, TestBed

PREFIX = f"luksrotd-it-{os.getpid()}-"
"""Of the names of all our images: other loop devices of the machine are not ours."""
FAST = {"pbkdf": Variant("s", "pbkdf2"), "pbkdf-force-iterations": Variant("u", 1000)}
OLD, BACKUP, NEW = b"planted-old-secret-4711", b"planted-backup-secret-99", b"planted-new-secret-0815"
WAIT_SECONDS = 30.0
LIKE_THE_UNITS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
"""Before a command: what the units leave of root's power over others' files."""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT)}
"""The daemon's workers import the source tree too."""


class DaemonProcess:
    """One run of it."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    @property
    def log(self) -> str:
        """What it wrote to standard error."""
        return self._log.read_text(errors="replace")

    async def ended(self) -> int:
        """Wait for its end; the exit status, negative for a signal."""
        async with asyncio.timeout(WAIT_SECONDS):
            return await asyncio.to_thread(self.process.wait)

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)


@asynccontextmanager
async def running(
    bed: TestBed,
    client: BusClient,
    *,
    environment: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
    **fault: Any,
) -> AsyncIterator[DaemonProcess]:
    """The daemon, ready; ended on leaving.  ``prefix``: the command that runs it."""
    await client.subscribe(f"type='signal',member='NameOwnerChanged',arg0='{names.BUS_NAME}'")
    log = bed.dir / "luksrotd.log"
    argument = json.dumps({"prefix": PREFIX, **fault})
    with log.open("wb") as output:
        argv = [*prefix, sys.executable, "-m", "tests.support.daemon_launcher", argument]
        process = bed.spawn(
            argv, cwd=PROJECT, env={**ENVIRONMENT, **(environment or {})}, stderr=output, stdin=subprocess.DEVNULL
        )
    daemon = DaemonProcess(process, log)
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            while not (await client.signal("NameOwnerChanged")).body[2]:
                pass
        client.signals.clear()
        yield daemon
    finally:
        status = bed.end(process)
        async with asyncio.timeout(WAIT_SECONDS):
            while status == 0 and await owner(client):
                pass


async def owner(client: BusClient) -> bool:
    """Whether the name has an owner."""
    reply = await client.bus.call(
        Message(
            destination="org.freedesktop.DBus",
            path="/org/freedesktop/DBus",
            interface="org.freedesktop.DBus",
            member="NameHasOwner",
            signature="s",
            body=[names.BUS_NAME],
        )
    )
    assert reply is not None
    return bool(reply.body[0])


class Disk:
    """A LUKS2 volume on a loop device, with the secret ``OLD`` in keyslot 0."""

    def __init__(self, loop: LoopDevice) -> None:
        self._loop = loop
        self.node = str(loop.path)
        with open(self.node, "rb") as node:  # noqa: PTH123 -- a few bytes; cryptsetup would mend a torn header
            self.uuid = node.read(4096)[168:208].rstrip(b"\0").decode()
        self.path = f"{names.DEVICE_PATH}/{self.uuid.replace('-', '_')}"

    def opens(self, secret: bytes, keyslot: int | None = None) -> bool:
        """Whether real cryptsetup accepts it."""
        return makeimage.cryptsetup_opens(self.node, secret, keyslot)

    def metadata(self) -> dict[str, Any]:
        """The JSON, by real cryptsetup."""
        return makeimage.luks_dump_json(self.node)

    def pairs(self) -> list[tuple[str, int]]:
        """Name of the key and number of the keyslot, of each token of ours."""
        tokens = self.metadata()["tokens"].values()
        return [
            (token["name"], int(slot))
            for token in tokens
            if token["type"] == names.TOKEN_TYPE
            for slot in token["keyslots"]
        ]

    def headers(self) -> bytes:
        """Both header copies, as they are."""
        return Path(self.node).read_bytes()[:32768]

    def detach(self) -> None:
        """Pull it."""
        self._loop.detach()


@contextmanager
def disk(
    bed: TestBed, name: str = "disk", *, clone_of: Disk | None = None, prepare: Callable[[Path], None] | None = None
) -> Iterator[Disk]:
    """Such a volume, or a copy of one, detached on leaving.  ``prepare`` may change the image beforehand."""
    image = bed.dir / f"{PREFIX}{name}.img"
    if clone_of is None:
        makeimage.make_image(image, key=OLD)
    else:
        image.write_bytes(Path(clone_of.node).read_bytes())
    if prepare:
        prepare(image)
    with LoopDevice(image) as loop:
        yield Disk(loop)
    image.unlink()


async def appeared(client: BusClient, path: str) -> dict[str, Any]:
    """Wait until the volume is on the bus, and (as a volume that a job is at has no settled state) idle."""
    async with asyncio.timeout(WAIT_SECONDS):
        while (
            path
            not in (await client.call(names.ROOT_PATH, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects"))[0]
        ):
            await client.signal("InterfacesAdded")
    return await settled(client, path)


async def settled(client: BusClient, path: str, **wanted: Any) -> dict[str, Any]:
    """Wait until the properties are as wanted and the volume is idle; all of them.  Needs ``subscribe``."""
    wanted = {"Busy": False, **wanted}
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            properties = await client.get_all(path, names.DEVICE_INTERFACE)
            if all(properties[name] == value for name, value in wanted.items()):
                return properties
            await client.signal("PropertiesChanged")


def memfd(secret: bytes) -> int:
    """A descriptor of a secret."""
    fd = os.memfd_create("test-secret", os.MFD_CLOEXEC)
    os.write(fd, secret)
    return fd


async def start(
    client: BusClient,
    path: str,
    method: str = "Rotate",
    *,
    old: bytes = OLD,
    new: bytes | None = NEW,
    name: str = "",
    cost: Mapping[str, Variant] = FAST,
    **options: Variant,
) -> str:
    """Start a job with secrets in memfds (``new`` of None: generated); its path."""
    fds = [memfd(old)] + ([memfd(new)] if new is not None else [])
    new_secret = {"fd": Variant("h", 1)} if new is not None else {"generate": Variant("b", True)}
    body = [name, {"fd": Variant("h", 0)}, new_secret, {**cost, **options}]
    try:
        (job,) = await client.call(path, names.DEVICE_INTERFACE, method, "sa{sv}a{sv}a{sv}", body, fds=fds)
    finally:
        for fd in fds:
            os.close(fd)
    return str(job)


async def ended(client: BusClient, job: str) -> dict[str, Any]:
    """Wait for the end of a job; its properties.  Needs ``subscribe``."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            properties = await client.get_all(job, names.JOB_INTERFACE)
            if properties["State"] in ("finished", "failed", "cancelled"):
                return properties
            await client.signal("Completed")


async def reached(client: BusClient, job: str, **wanted: Any) -> Mapping[str, Any]:
    """Wait until a job's properties are as wanted."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            properties = await client.get_all(job, names.JOB_INTERFACE)
            if all(properties[name] == value for name, value in wanted.items()):
                return properties
            await client.signal("PropertiesChanged")


async def take_key(client: BusClient, job: str) -> bytes:
    """The generated key, taken and confirmed."""
    reply = await client.reply(job, names.JOB_INTERFACE, "TakeKey", "a{sv}", [{}])
    assert reply.unix_fds, reply.body
    (fd,) = reply.unix_fds
    with os.fdopen(fd, "rb") as file:
        key = file.read()
    await client.call(job, names.JOB_INTERFACE, "ConfirmKey", "a{sv}", [{}])
    return key
