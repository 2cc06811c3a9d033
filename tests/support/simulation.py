# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole simulated host with one volume: the use cases run on it as they run on the real one."""

import asyncio
import atexit
import functools
import os
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from luksrotd.luks2.pair import Pair, read_pair
from luksrotd.ports import DeviceRef, Host, SecretFd, SecretSource
from luksrotd.rotation.draft import Draft
from luksrotd.rotation.edits import VOLUME_KEY, Pbkdf
from luksrotd.service.draft import begin
from luksrotd.service.reconciling import Reconciled
from luksrotd.service.stepwise import StepwiseVolumes
from luksrotd.service.transaction import Committed
from luksrotd.service.volume import KeyChange, Volumes
from tests.support.simdisk import SimDevices, SimDisk
from tests.support.simengine import VOLUME_KEY_CONTENT, SimEngine
from tests.support.simhost import SimClock, SimEntropy, SimInhibitor, SimInventories, SimJournal, SimProbe
from tests.support.simlive import SimLive
from tests.support.simlocks import SimLocks
from tests.support.simshadow import SimShadows

CHEAP = Pbkdf("pbkdf2", iterations=1000)
MAIN, OLD, NEW = b"main passphrase", b"old backup key", b"new backup key"

T = TypeVar("T")


class Simulation:
    """One disk, one engine, and the use cases on them; ``disk.log`` has what was written."""

    def __init__(self, content: bytes, *, sector_size: int = 512, seed: int = 7) -> None:
        self.disk = SimDisk(content, path="/dev/sim0", sector_size=sector_size)
        self.engine = SimEngine(seed)
        self.locks = SimLocks()
        self.journal = SimJournal()
        self.probe = SimProbe()
        self.shadows = SimShadows()
        self.devices = SimDevices(self.disk)
        self.clock = SimClock()
        self.inventories = SimInventories()
        self.inhibitor = SimInhibitor()
        self.host = Host(
            self.devices,
            self.locks,
            self.shadows,
            self.engine,
            self.probe,
            SimEntropy(seed),
            self.clock,
            self.journal,
            self.inventories,
            self.inhibitor,
        )
        self.volumes = Volumes(self.host)
        self.live = SimLive(self.engine, self.devices, self.locks)
        self.stepwise = StepwiseVolumes(self.host, self.live)
        self.ref = DeviceRef("/dev/sim0")

    @property
    def pair(self) -> Pair:
        """The header copies as a reader on the running system sees them."""
        cached = self.disk.cached
        return read_pair(lambda offset, length: bytes(cached[offset : offset + length]), len(cached))

    def volume_key(self) -> bytes:
        """The volume key, for operations that begin with it."""
        return VOLUME_KEY_CONTENT

    def use(self, disk: SimDisk) -> None:
        """Go on with another disk, as after its failure."""
        self.disk = self.devices.disks[disk.path] = disk

    def enroll(self, unlock: bytes, new: bytes, *, name: str = "backup", **data: Any) -> KeyChange:
        """Enrol a key."""
        with secrets(unlock=unlock, new=new) as sources:
            return run(self.volumes.enroll(self.ref, sources, data=data, pbkdf=CHEAP, name=name))

    def rotate(self, unlock: bytes, new: bytes, **data: Any) -> KeyChange:
        """Rotate the key named "backup"."""
        with secrets(unlock=unlock, new=new) as sources:
            return run(self.volumes.rotate(self.ref, sources, data=data, pbkdf=CHEAP))

    def stage(self, unlock: bytes, new: bytes, **data: Any) -> KeyChange:
        """Put a new generation beside the key named "backup"."""
        with secrets(unlock=unlock, new=new) as sources:
            return run(self.volumes.stage(self.ref, sources, data=data, pbkdf=CHEAP))

    def finish(self) -> KeyChange:
        """The staged generation becomes the only one."""
        return run(self.volumes.finish(self.ref))

    def abort(self) -> KeyChange:
        """The staged generation goes."""
        return run(self.volumes.abort(self.ref))

    def remove(self, unlock: bytes) -> KeyChange:
        """Remove the key named "backup"."""
        with secrets(unlock=unlock) as sources:
            return run(self.volumes.remove(self.ref, sources))

    def set_data(self, **data: Any) -> KeyChange:
        """Other associated data."""
        return run(self.volumes.set_data(self.ref, data))

    def adopt(self, keyslot: int, **data: Any) -> KeyChange:
        """Manage a keyslot that is there."""
        return run(self.volumes.adopt(self.ref, keyslot, data=data))

    def release(self) -> KeyChange:
        """Manage the key named "backup" no more."""
        return run(self.volumes.release(self.ref))

    def recreate(self, data: Mapping[str, Any] | None = None, **named: bytes) -> KeyChange:
        """Make token, or token and keyslot, anew; ``named`` are the secrets."""
        with secrets(**named) as sources:
            return run(self.volumes.recreate(self.ref, sources, data=data, pbkdf=CHEAP))

    def transaction(self, compose: Callable[[Draft], object], **named: bytes) -> Committed:
        """A generic transaction: ``compose`` queues the edits, ``named`` are the secrets that they need."""

        async def work(sources: Mapping[str, SecretSource]) -> Committed:
            transaction = await begin(self.host, self.ref)
            compose(transaction.draft)
            return await transaction.commit(sources)

        with secrets(**named) as sources:
            return run(work(sources))

    def reconcile(self, *, dry_run: bool = False, retire_expired: bool = False) -> Reconciled:
        """Reconcile the volume."""
        return run(self.volumes.reconcile(self.ref, dry_run=dry_run, retire_expired=retire_expired))


@functools.cache
def _runner() -> asyncio.Runner:
    """One loop, with its threads, for all: a crash enumeration reconciles thousands of volumes."""
    runner = asyncio.Runner()
    atexit.register(runner.close)
    return runner


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a use case to its end."""
    return _runner().run(work)


@contextmanager
def secrets(**named: bytes) -> Iterator[dict[str, SecretFd]]:
    """Secrets in memfds, by name; ``volume_key`` is that of ``rotation.edits.VOLUME_KEY``."""
    fds: dict[str, int] = {}
    try:
        for name, secret in named.items():
            name = VOLUME_KEY if name == "volume_key" else name
            fds[name] = os.memfd_create(name)
            os.write(fds[name], secret)
            os.lseek(fds[name], 0, os.SEEK_SET)
        yield {name: SecretFd(fd) for name, fd in fds.items()}
    finally:
        for fd in fds.values():
            os.close(fd)
