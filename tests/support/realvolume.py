# SPDX-License-Identifier: GPL-2.0-or-later
"""Operations on real volumes, by real libcryptsetup, and the log of what they write.

``RealSimulation``: libcryptsetup above, a disk in memory below; quick.  ``RealVolume``: nothing is simulated but the
clock, the journal and the inventories: image, loop device or detached header on the real ports, and the log is what
the device was asked for.
"""

import functools
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from luksrotd.cryptsetup.api import Context
from luksrotd.cryptsetup.memory import SafeMemory
from luksrotd.direct import build_host
from luksrotd.host.shadow import MemfdShadows
from luksrotd.host.worker import WorkerEngine
from luksrotd.ports import DeviceRef, Devices, HeaderDevice, KeyslotEngine, SecretFd, SecretSource, Shadow
from luksrotd.rotation.edits import Edit, to_wire
from luksrotd.service.volume import Volumes
from luksrotd.worker.session import Session
from tests.support.crash import Enumeration, Epoch
from tests.support.crashverbs import OTHER, VERBS
from tests.support.kernel import LoopDevice
from tests.support.makeimage import make_image
from tests.support.simdisk import Flush, Operation, SimDisk, Write
from tests.support.simhost import SimClock, SimInventories, SimJournal
from tests.support.simulation import MAIN, Simulation

KIB: Final = 1024
#: Room for eight keyslots of 512 bits.
KEYSLOTS_SIZE: Final = 2048 * KIB
CARRIERS: Final = ("image", "loop", "detached")


@dataclass(frozen=True, slots=True)
class Geometry:
    """``metadata``: KiB of one header copy; ``bits`` of the volume key; ``sector`` of the device, in bytes.

    ``carrier``: an image, a loop device, or a detached header in a file.
    """

    metadata: int = 16
    bits: int = 512
    sector: int = 512
    carrier: str = "image"

    @property
    def headers(self) -> int:
        """Bytes of both copies."""
        return 2 * self.metadata * KIB

    def __str__(self) -> str:
        return f"{self.metadata} KiB, {self.bits} bit, {self.sector}, {self.carrier}"


@dataclass(frozen=True, slots=True)
class Recorded:
    """An operation on a real volume: the bytes before it, its writes between the flushes, the bytes after it."""

    geometry: Geometry
    before: bytes
    epochs: Sequence[Epoch]
    after: bytes

    def enumeration(self, epochs: Sequence[Epoch] | None = None) -> Enumeration:
        """All crash states, of the real epochs or of a mutant's."""
        chosen = self.epochs if epochs is None else epochs
        return Enumeration(self.before, chosen, self.geometry.headers, self.geometry.sector)

    @property
    def writes(self) -> int:
        """How many."""
        return sum(len(epoch) for epoch in self.epochs)

    @property
    def bytes(self) -> int:
        """How many are written."""
        return sum(len(write.data) for epoch in self.epochs for write in epoch)


class LocalSession:
    """``ports.EngineSession``: what a worker does, in this process.  Thousands of them are started."""

    def __init__(self, shadow: Shadow, secrets: Mapping[str, bytes]) -> None:
        self._session = Session(-1)
        self._session._path = f"/proc/self/fd/{shadow.fd}"
        for name, secret in secrets.items():
            self._session._secrets[name] = safe(secret)

    def close(self) -> None:
        """Wipe every secret."""
        self._session.close()

    async def load(self) -> Mapping[str, Any]:
        """See ``ports.EngineSession``."""
        return self._ask(op="load")  # type: ignore[no-any-return]  # an object

    async def unlock(self, keyslot: int | None = None) -> int:
        """See ``ports.EngineSession``."""
        return int(self._ask(op="unlock", keyslot=keyslot, volume_key=False))

    async def take_volume_key(self) -> None:
        """See ``ports.EngineSession``."""
        self._ask(op="unlock", keyslot=None, volume_key=True)

    async def apply(self, edits: Sequence[Edit]) -> None:
        """See ``ports.EngineSession``."""
        self._ask(op="apply", edits=[to_wire(edit) for edit in edits])

    async def opens(self, keyslot: int, secret: str) -> bool:
        """See ``ports.EngineSession``."""
        return bool(self._ask(op="opens", keyslot=keyslot, secret=secret))

    def _ask(self, **request: Any) -> Any:
        return self._session.handle(request)


class LocalEngine:
    """``ports.KeyslotEngine`` in this process: the worker's own code and libcryptsetup, without the worker."""

    @asynccontextmanager
    async def session(self, shadow: Shadow, secrets: Mapping[str, SecretSource]) -> AsyncIterator[LocalSession]:
        """See ``ports.KeyslotEngine``; secrets are only read."""
        read = {}
        for name, source in secrets.items():
            assert isinstance(source, SecretFd)
            read[name] = os.pread(source.fd, source.limit, 0)
        session = LocalSession(shadow, read)
        try:
            yield session
        finally:
            session.close()


class RealSimulation(Simulation):
    """A simulated disk below, real libcryptsetup above, in this process or in a real worker (``worker``)."""

    def __init__(self, content: bytes, *, sector_size: int = 512, seed: int = 7, worker: bool = False) -> None:
        super().__init__(content, sector_size=sector_size, seed=seed)
        engine: KeyslotEngine = WorkerEngine() if worker else LocalEngine()
        self.host = replace(self.host, shadows=MemfdShadows(), engine=engine)
        self.volumes = Volumes(self.host)

    def volume_key(self) -> bytes:
        """The real one, which the main passphrase opens."""
        return volume_key_of(self.disk.content)


class LoggedDevice:
    """A header device, and the log of what it was asked for."""

    def __init__(self, device: HeaderDevice, log: list[Operation]) -> None:
        self._device = device
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def write(self, offset: int, data: bytes) -> None:
        """Write."""
        self._device.write(offset, data)
        self._log.append(Write(offset, bytes(data)))

    def flush(self) -> None:
        """Flush."""
        self._device.flush()
        self._log.append(Flush())


class LoggedDevices:
    """Opens such devices."""

    def __init__(self, devices: Devices, log: list[Operation]) -> None:
        self._devices = devices
        self._log = log

    def open(self, ref: DeviceRef, *, writable: bool = False) -> Any:
        """Open and wrap."""
        return LoggedDevice(self._devices.open(ref, writable=writable), self._log)


class RealVolume(Simulation):
    """The use cases on the real ports; ``log`` has what was written."""

    def __init__(self, ref: DeviceRef) -> None:
        self.log: list[Operation] = []
        host = build_host(journal=SimJournal(), engine=LocalEngine())
        self.host = replace(
            host, devices=LoggedDevices(host.devices, self.log), clock=SimClock(), inventories=SimInventories()
        )
        self.volumes = Volumes(self.host)
        self.ref = ref

    @property
    def content(self) -> bytes:
        """What a reader on the running system sees."""
        return Path(self.ref.metadata_path).read_bytes()

    def volume_key(self) -> bytes:
        """The real one, which the main passphrase opens."""
        return volume_key_of(self.content)


@functools.cache
def base_volume(metadata: int = 16, bits: int = 512, *, detached: bool = False) -> bytes:
    """A real volume with the keyslots of ``crashverbs.ORDINARY``; only its header if that is detached."""
    with tempfile.TemporaryDirectory(prefix="luksrotd-crash-") as directory:
        path = make_image(
            Path(directory) / "volume.img",
            key=MAIN,
            extra_keys={1: OTHER},
            metadata_size=metadata * KIB,
            keyslots_size=KEYSLOTS_SIZE,
            key_size=bits,
            detached=detached,
            size=2 * metadata * KIB + KEYSLOTS_SIZE + 1024 * KIB,
        )
        return path.read_bytes()


@functools.lru_cache(maxsize=64)
def prepared(verb: str, metadata: int = 16, bits: int = 512, sector: int = 512, *, detached: bool = False) -> bytes:
    """The volume on which a verb of ``crashverbs.VERBS`` begins."""
    simulation = RealSimulation(base_volume(metadata, bits, detached=detached), sector_size=sector)
    VERBS[verb].prepare(simulation)
    return simulation.disk.content


@functools.lru_cache(maxsize=64)
def recorded(verb: str, geometry: Geometry = Geometry()) -> Recorded:
    """A verb's operation on a real volume on the real ports."""
    detached = geometry.carrier == "detached"
    before = prepared(verb, geometry.metadata, geometry.bits, geometry.sector, detached=detached)
    with carried(before, geometry) as ref:
        volume = RealVolume(ref)
        VERBS[verb].operate(volume)
        epochs = epochs_of(volume.log)
        assert not epochs[-1], "the last write was not flushed"
        return Recorded(geometry, before, epochs[:-1], volume.content)


@contextmanager
def carried(content: bytes, geometry: Geometry) -> Iterator[DeviceRef]:
    """``content`` where ``geometry`` says: in an image, on a loop device, or as a detached header."""
    with tempfile.TemporaryDirectory(prefix="luksrotd-crash-") as directory:
        path = Path(directory) / "volume.img"
        path.write_bytes(content)
        if geometry.carrier == "loop":
            with LoopDevice(path, geometry.sector) as loop:
                yield DeviceRef(str(loop.path))
        elif geometry.carrier == "detached":
            data = Path(directory) / "data.img"
            data.write_bytes(bytes(64 * KIB))
            yield DeviceRef(str(data), str(path))
        else:
            yield DeviceRef(str(path))


def epochs_of(log: Sequence[Operation]) -> list[list[Write]]:
    """The log cut at its flushes, as ``SimDisk.epochs``."""
    disk = SimDisk(b"")
    disk.log = list(log)
    return disk.epochs()


def volume_key_of(content: bytes) -> bytes:
    """The volume key of a volume that the main passphrase opens."""
    fd = os.memfd_create("volume")
    try:
        os.write(fd, content)
        with Context(f"/proc/self/fd/{fd}") as context, safe(MAIN) as passphrase:
            _, key = context.volume_key(passphrase)
            with key:
                return bytes(key.view())
    finally:
        os.close(fd)


def safe(secret: bytes) -> SafeMemory:
    """The secret where libcryptsetup wants it."""
    memory = SafeMemory(len(secret))
    memory.view()[:] = secret
    return memory
