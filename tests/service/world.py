# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulated machine with one volume, and the service on it."""

import asyncio
import os
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from luksrotd.luks2.pair import parse_pair
from luksrotd.ports import Caller, GenerateInto, Host, SecretFd
from luksrotd.rotation.edits import NEW, UNLOCK, Pbkdf
from luksrotd.rotation.view import view
from luksrotd.service.handover import Handover, Secrets
from luksrotd.service.jobs import Kind
from luksrotd.service.operations import Operations
from luksrotd.service.registry import Registry
from luksrotd.service.runner import Runner
from luksrotd.service.setjobs import SetJobs
from luksrotd.service.sets import VolumeSets
from luksrotd.service.verbs import Wanted
from luksrotd.service.volume import Volumes
from tests.support.simdisk import SimDevices, SimDisk
from tests.support.simengine import UUID, SimEngine, make_volume, opened_by
from tests.support.simhost import SimClock, SimEntropy, SimInventories, SimJournal, SimProbe, SimWatcher
from tests.support.simlocks import SimLocks
from tests.support.simshadow import SimShadows

OLD, BACKUP, NEXT = b"old", b"backup", b"next"
NODE = "/dev/sim0"
OWNER = Caller(":1.7", 1000)
FAST = Pbkdf("pbkdf2", iterations=1000)
OTHER_UUID = "11111111-2222-4333-8444-555555555555"


def is_open(fd):
    return Path(f"/proc/self/fd/{fd}").is_symlink()


class Key:
    """A memfd that knows whether it was closed."""

    def __init__(self):
        self.fd = os.memfd_create("test-key", os.MFD_CLOEXEC)
        self.is_sealed = self.is_closed = False

    def seal(self):
        self.is_sealed = True

    def reader(self):
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self):
        if not self.is_closed:
            os.close(self.fd)
        self.is_closed = True


class World:
    """Everything, simulated but for memfds that hold secrets."""

    def __init__(self, runner=None, disks=()):
        self.disks = disks or [SimDisk(make_volume([OLD]), path=NODE)]
        self.disk = self.disks[0]
        self.devices = SimDevices(*self.disks)
        self.locks = SimLocks(wait=True)
        self.shadows = SimShadows()
        self.engine = SimEngine()
        self.probe = SimProbe()
        self.journal = SimJournal()
        self.clock = SimClock()
        self.watcher = SimWatcher()
        self.inventories = SimInventories()
        host = Host(
            self.devices,
            self.locks,
            self.shadows,
            self.engine,
            self.probe,
            SimEntropy(),
            self.clock,
            self.journal,
            self.inventories,
        )
        self.host = host
        self.volumes = Volumes(host)
        self.runner = runner or Runner()
        self.registry = Registry(self.volumes, self.watcher, pause_seconds=0)
        self.operations = Operations(self.volumes, self.registry, self.runner)
        self.sets = SetJobs(VolumeSets(host), self.registry, self.runner)
        self.closed = []
        self.gone = asyncio.Event()
        for disk in self.disks:
            self.watcher.put(disk.path, parse_pair(disk.content).winner.header.uuid)

    @asynccontextmanager
    async def running(self):
        """The registry follows the watcher; in the end everything is drained, and nothing may be left."""
        self.following = asyncio.create_task(self.registry.run())
        try:
            await self.registry.scanned()
            yield self
            await self.runner.drain()
        finally:
            self.watcher.close()
            await self.following
        assert not self.devices.leaked
        assert not self.shadows.leaked
        assert self.engine.live == 0
        assert not self.locks._holds
        assert not any(is_open(fd) for fd in self.closed)

    def secrets(self, **secrets):
        """Secrets in memfds; ``new`` of None is generated.  Their descriptors must be closed in the end."""
        resources, sources, handover, abandoned = ExitStack(), {}, None, None
        for name, secret in secrets.items():
            if secret is None:
                handover = Handover(Key(), OWNER)
                self.closed.append(handover.fd)
                resources.callback(handover.close)
                sources[name] = GenerateInto(handover.fd)
                abandoned = lambda handover=handover: handover.abandoned(self.gone.wait)  # noqa: E731 -- as in bus
                continue
            fd = os.memfd_create("test-secret", os.MFD_CLOEXEC)
            os.pwrite(fd, secret, 0)
            self.closed.append(fd)
            resources.callback(os.close, fd)
            sources[name] = SecretFd(fd)
        return Secrets(sources, resources, handover, abandoned)

    def start(self, kind="rotate", *, old=OLD, new=NEXT, **options):
        """A job."""
        secrets = self.secrets(**{UNLOCK: old, NEW: new})
        return self.operations.start(Kind(kind), UUID, OWNER, Wanted(**{"pbkdf": FAST, **options}), secrets)

    async def enrolled(self):
        """Give the volume its managed key."""
        await self.start("enroll", new=BACKUP, data={"escrow": 1}).wait()

    def opened_by(self, secret):
        """Keyslots that the secret opens."""
        return opened_by(self.disk.content, secret)

    @property
    def view(self):
        """The volume as it is on the simulated disk."""
        return view(parse_pair(self.disk.content))
