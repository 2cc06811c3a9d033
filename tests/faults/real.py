# SPDX-License-Identifier: GPL-2.0-or-later
"""The real host, with a device that something is done to right before one of its writes or flushes."""

import asyncio
import os
import signal
import subprocess
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

from luksrotd import direct
from luksrotd.errors import LuksrotdError, Outcome
from luksrotd.host.blockdev import BlockDevices
from luksrotd.host.locks import HostLocks
from luksrotd.host.worker import WorkerEngine
from luksrotd.luks2.pair import parse_pair
from luksrotd.ports import DeviceRef
from luksrotd.rotation.edits import NEW as NEW_SECRET
from luksrotd.rotation.edits import UNLOCK, Pbkdf
from luksrotd.rotation.view import view
from luksrotd.service.volume import Volumes
from tests.support.makeimage import KEY, cryptsetup_opens, make_image
from tests.support.simulation import secrets

CHEAP = Pbkdf("pbkdf2", iterations=1000)
OLD, NEW = b"the old backup key", b"the new backup key"
MIB = 1024 * 1024
HDR_SIZE = 16384
FOREVER = 3600.0


@dataclass
class Moment:
    """When, and what: ``before`` is called right before that write, ``behind`` right behind it, with its range.

    Writes are counted from 0, over all descriptors.
    """

    at: int = -1
    before: object = None
    behind: object = None
    seen: list = field(default_factory=list)


class Watched:
    """A ``HeaderDevice`` that is opened for writing."""

    def __init__(self, device, moment):
        self._device, self._moment = device, moment

    def __getattr__(self, name):
        return getattr(self._device, name)

    def write(self, offset, data):
        here = len(self._moment.seen) == self._moment.at
        self._moment.seen.append((offset, len(data)))
        if here and self._moment.before:
            self._moment.before(offset, len(data))
        try:
            self._device.write(offset, data)
        finally:
            if here and self._moment.behind:
                self._moment.behind(offset, len(data))


class Devices(BlockDevices):
    """Real devices, watched where they are written to."""

    def __init__(self, moment):
        super().__init__()
        self._moment = moment

    def open(self, ref, *, writable=False):
        device = super().open(ref, writable=writable)
        return Watched(device, self._moment) if writable else device


class Bench:
    """A volume on the real host.

    Each operation has a loop of its own, with new threads: those of an older one may be in another mount namespace than
    the test (a mount namespace is a thread's, and fixtures change it), and not see what it mounts.
    """

    def __init__(self, path, runtime, moment=None, engine=None):
        self.moment = moment or Moment()
        host = direct.build_host(
            journal=direct.NoJournal(), locks=HostLocks(runtime=str(runtime), lock_wait=FOREVER), engine=engine
        )
        self.path = path
        self.ref = DeviceRef(str(path))
        self.volumes = Volumes(replace(host, devices=Devices(self.moment)))

    def rotate(self, unlock=KEY, new=NEW):
        return self._with_new("rotate", unlock, new)

    def stage(self, unlock=KEY, new=NEW):
        return self._with_new("stage", unlock, new)

    def enroll(self, unlock=KEY, new=OLD):
        return self._with_new("enroll", unlock, new)

    def reconcile(self):
        return asyncio.run(self.volumes.reconcile(self.ref))

    def look(self):
        return asyncio.run(self.volumes.look(self.ref))

    def opens(self, secret):
        return cryptsetup_opens(self.path, secret)

    def _with_new(self, verb, unlock, new):
        with secrets(**{UNLOCK: unlock, NEW_SECRET: new}) as sources:
            return asyncio.run(getattr(self.volumes, verb)(self.ref, sources, data={"of": new.decode()}, pbkdf=CHEAP))


def enrolled_image(path, runtime):
    """A small image with a managed key in it."""
    make_image(path, keyslots_size=MIB, size=4 * MIB)
    Bench(path, runtime).enroll()
    return path


def medium(path, length=2 * HDR_SIZE):
    """What the device holds, past the page cache."""
    device = BlockDevices().open(DeviceRef(str(path)))
    try:
        return device.read_medium(0, length)
    finally:
        device.close()


def pair_on(path):
    """Both header copies as they are on the medium."""
    device = BlockDevices().open(DeviceRef(str(path)))
    try:
        return parse_pair(device.read_medium(0, 2 * HDR_SIZE).ljust(device.size, b"\0"))
    finally:
        device.close()


def truth(before, path):
    """The outcome that the medium shows, where it held the header copies ``before``."""
    try:
        if medium(path, len(before)) == before:
            return Outcome.UNCHANGED
        pair = pair_on(path)
    except LuksrotdError:
        return Outcome.UNKNOWN
    if not pair.agree:
        return Outcome.UNKNOWN
    return Outcome.WIPE_PENDING if view(pair).pending else Outcome.COMMITTED


def punch(path, offset, size):
    """Give the file system back what the file has there: it reads as zeros then."""
    command = ["fallocate", "--punch-hole", "--offset", str(offset), "--length", str(size), str(path)]
    subprocess.run(command, check=True)


def fill_up(directory):
    """Leave no room in the file system; the file that takes it all."""
    filler = directory / "filler"
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)) == 4096:
            pass
    return filler


class Killing:
    """A ``KeyslotEngine``: one worker is killed at its call number ``at``, before the request or with it unanswered."""

    def __init__(self, at=-1, *, midway=False):
        self.at, self.midway, self.calls = at, midway, []

    @asynccontextmanager
    async def session(self, shadow, secrets):
        async with WorkerEngine().session(shadow, secrets) as session:
            yield _Mortal(self, session)


class _Mortal:
    def __init__(self, engine, session):
        self._engine, self._session = engine, session

    def __getattr__(self, name):
        call = getattr(self._session, name)

        async def dying(*arguments):
            here = len(self._engine.calls) == self._engine.at
            self._engine.calls.append(name)
            if here:
                # Stopped, it cannot answer between the request and its death.
                os.kill(self._session.pid, signal.SIGSTOP if self._engine.midway else signal.SIGKILL)
            running = asyncio.ensure_future(call(*arguments))
            if here and self._engine.midway:
                await asyncio.sleep(0)  # the request is sent
                os.kill(self._session.pid, signal.SIGKILL)
            return await running

        return dying
