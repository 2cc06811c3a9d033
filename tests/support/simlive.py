# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulated ``LiveEngine``: the simulated libcryptsetup on the disk itself, with its habits there.

A flush after each area and each header copy, whose failure it ignores; the metadata lock, which it takes itself: to
hold it meanwhile is a deadlock, so here an ``AssertionError``.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from luksrotd.errors import DeviceError, EngineError
from luksrotd.luks2.areas import Extent
from luksrotd.ports import HeaderDevice, SecretSource
from tests.support.simdisk import SimDevice, SimDevices, SimDisk
from tests.support.simengine import SimEngine, SimSession
from tests.support.simlocks import Level, SimLocks


class SimLive:
    """Sessions on the disks of ``devices``; ``engine`` has the calls and the failures that are planted."""

    def __init__(self, engine: SimEngine, devices: SimDevices, locks: SimLocks) -> None:
        self.engine = engine
        self._devices = devices
        self._locks = locks

    @asynccontextmanager
    async def session(self, device: HeaderDevice, secrets: Mapping[str, SecretSource]) -> AsyncIterator[SimSession]:
        """See ``ports.LiveEngine``."""
        disk = self._devices.disks.get(device.path)
        if disk is None or disk.identity != device.identity:
            raise DeviceError(f"cannot use {device.path}: it is another device than before")
        medium = _Medium(device, disk, self._locks)
        async with self.engine.session(medium, secrets) as session:
            yield session


class _Medium:
    """What a session takes for its shadow."""

    fd = -1

    def __init__(self, asked: HeaderDevice, disk: SimDisk, locks: SimLocks) -> None:
        self._asked = asked
        self._disk = disk
        self._device = SimDevice(disk)
        self._locks = locks

    @property
    def length(self) -> int:
        """Bytes of the device."""
        return self._device.size

    def read(self, offset: int, length: int) -> bytes:
        """Read the device."""
        self._check_lock()
        try:
            return self._device.read(offset, length)
        except DeviceError as error:
            raise EngineError(f"cannot load the header: {error.message}") from error

    def write(self, offset: int, data: bytes) -> None:
        """Write to the device, and flush."""
        self._check_lock()
        try:
            self._device.write(offset, data)
        except DeviceError as error:
            raise EngineError(f"cannot write the header: {error.message}") from error
        try:
            self._device.flush()
        except DeviceError:
            self._device = SimDevice(self._disk)  # it goes on as if nothing had been

    def data_extents(self) -> Sequence[Extent]:
        """All of it."""
        return [Extent(0, self.length)]

    def clear(self) -> None:
        """Nobody clears a device."""
        raise AssertionError

    def close(self) -> None:
        """Nothing to do."""

    def _check_lock(self) -> None:
        assert Level.METADATA not in self._locks.held(self._asked), "libcryptsetup would wait for its own lock for ever"
