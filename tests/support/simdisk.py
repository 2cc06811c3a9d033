# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk in memory that remembers every write and flush, and fails where it is told to.

``SimDisk`` is the medium with the kernel's page cache before it; ``SimDevice`` is one open descriptor of it, which
behaves as ``luksrotd.host.blockdev.BlockDevice`` (``tests/contract/test_devices.py`` runs on both).

A write changes the page cache and is *dirty* until a flush puts it on the medium.  A failed flush marks everything
clean, as Linux does: the cache still shows it, the medium has as much of it as the fault says, and no later flush
will add to that.
"""

import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NoReturn

from luksrotd.errors import DeviceError, Internal, UnknownDevice
from luksrotd.ports import DeviceIdentity, DeviceRef


@dataclass(frozen=True, slots=True)
class Write:
    """A write that reached the page cache, in whole sectors."""

    offset: int
    data: bytes

    @property
    def end(self) -> int:
        """First byte behind it."""
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True)
class Flush:
    """A flush that succeeded: everything before it is on the medium."""


Operation = Write | Flush


def epochs_of(log: Iterable[Operation]) -> list[list[Write]]:
    """A log cut at its flushes, those that had nothing to cover left out; the last epoch, maybe empty, has none."""
    epochs: list[list[Write]] = [[]]
    for operation in log:
        if isinstance(operation, Write):
            epochs[-1].append(operation)
        elif epochs[-1]:
            epochs.append([])
    return epochs


@dataclass(slots=True)
class Faults:
    """What goes wrong; writes and flushes are counted per disk, from 0.  Change it at any time."""

    writes: dict[int, int] = field(default_factory=dict)
    """Number of the write → bytes of it that still arrive: 0 is an I/O error, more a short write."""
    flushes: dict[int, int | None] = field(default_factory=dict)
    """Number of the flush → how many of the dirty writes, oldest first, got to the medium all the same (None: all)."""
    lost: frozenset[int] = frozenset()
    """Numbers of the writes that the device says it has written, and has not."""
    torn: int = 0
    """Of the next dirty write after those, this many sectors got there, too."""
    error: int = errno.EIO
    """What a write or flush that fails gives."""
    gone: bool = False
    """The device was pulled: everything fails."""
    gone_at_write: int | None = None
    """The device is pulled right before the write of that number."""
    gone_at_flush: int | None = None
    """The device is pulled right before the flush of that number."""


class SimDisk:
    """The medium and its page cache."""

    def __init__(
        self,
        content: bytes | bytearray,
        *,
        path: str = "/dev/sim0",
        identity: DeviceIdentity | None = None,
        sector_size: int = 512,
    ) -> None:
        if len(content) % sector_size:
            raise ValueError(f"{len(content)} bytes are not whole sectors of {sector_size}")
        self.path = path
        self.identity = identity or DeviceIdentity(True, 259, 0)
        self.sector_size = sector_size
        self.cached = bytearray(content)
        self.durable = bytearray(content)
        self.log: list[Operation] = []
        self.faults = Faults()
        self.observer: Callable[[Operation], None] | None = None
        """Called before each write and flush takes effect; may raise, or change the disk as another tool would."""
        self.attempts = 0
        """Writes and flushes that were asked for, failed ones too."""
        self._dirty: list[Write] = []
        self.writes = 0
        """The number of the next write."""
        self.flushes = 0
        """The number of the next flush."""

    @property
    def content(self) -> bytes:
        """What a reader on the running system sees."""
        return bytes(self.cached)

    @property
    def dirty(self) -> tuple[Write, ...]:
        """Writes that no flush has covered yet: a power cut may lose any part of them."""
        return tuple(self._dirty)

    def epochs(self) -> list[list[Write]]:
        """The log cut at its flushes; the last epoch, maybe empty, is not flushed."""
        return epochs_of(self.log)

    def replace(self, offset: int, data: bytes) -> None:
        """Change cache and medium behind everybody's back, as another program would; not logged."""
        self.cached[offset : offset + len(data)] = data
        self.durable[offset : offset + len(data)] = data

    def medium(self, offset: int = 0, length: int | None = None) -> bytes:
        """What a reader past the cache sees: such a reader makes the kernel write out what is dirty first."""
        end = len(self.durable) if length is None else offset + length
        seen = self.durable[offset:end]
        for write in self._dirty:
            first, last = max(write.offset, offset), min(write.end, end)
            if first < last:
                seen[first - offset : last - offset] = write.data[first - write.offset : last - write.offset]
        return bytes(seen)

    def power_cut(self, landed: int = 0) -> None:
        """Lose all that is not durable but the oldest ``landed`` dirty writes, and the faults with it."""
        self._land(landed)
        self.cached[:] = self.durable
        self._dirty.clear()
        self.faults = Faults()

    def accept(self, write: Write) -> int:
        """Put a write into the cache; how many bytes of it arrived (none: I/O error)."""
        if self.observer:
            self.observer(write)
        number, self.writes = self.writes, self.writes + 1
        arrived = self.faults.writes.get(number, len(write.data))
        if arrived:
            part = Write(write.offset, write.data[:arrived])
            self.cached[part.offset : part.end] = part.data
            self.log.append(part)
            if number not in self.faults.lost:
                self._dirty.append(part)
        return arrived

    def sync(self) -> bool:
        """Put what is dirty on the medium; whether all of it got there."""
        if self.observer:
            self.observer(Flush())
        number, self.flushes = self.flushes, self.flushes + 1
        failed = number in self.faults.flushes
        landed = self.faults.flushes[number] if failed else None
        self._land(landed, self.faults.torn if failed else 0)
        self._dirty.clear()
        if not failed:
            self.log.append(Flush())
        return not failed

    def pull(self, *, write: bool) -> None:
        """Be pulled, if a fault says that it happens before the next write (or flush)."""
        at, number = (self.faults.gone_at_write, self.writes) if write else (self.faults.gone_at_flush, self.flushes)
        self.faults.gone = self.faults.gone or at == number

    def _land(self, landed: int | None, torn: int = 0) -> None:
        """Put the oldest dirty writes on the medium (None: all), and the first ``torn`` sectors of the next one."""
        for write in self._dirty[:landed]:
            self.durable[write.offset : write.end] = write.data
        for write in self._dirty[len(self._dirty) if landed is None else landed :][:1]:
            part = write.data[: torn * self.sector_size]
            self.durable[write.offset : write.offset + len(part)] = part


class SimDevice:
    """One descriptor of a disk (``ports.HeaderDevice``)."""

    def __init__(self, disk: SimDisk, *, writable: bool = True) -> None:
        self.disk = disk
        self.closed = False
        self._writable = writable
        self._failure = ""

    @property
    def path(self) -> str:
        """The disk's path."""
        return self.disk.path

    @property
    def identity(self) -> DeviceIdentity:
        """The disk's identity."""
        return self.disk.identity

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.disk.cached)

    @property
    def sector_size(self) -> int:
        """Bytes."""
        return self.disk.sector_size

    @property
    def log(self) -> list[Operation]:
        """The disk's log."""
        return self.disk.log

    def read(self, offset: int, length: int) -> bytes:
        """Read from the page cache."""
        self._check_range("read", offset, length)
        return bytes(self.disk.cached[offset : offset + length])

    def read_medium(self, offset: int, length: int) -> bytes:
        """Read past the page cache, which forgets what it had there."""
        self._check_range("read", offset, length)
        seen = self.disk.medium(offset, length)
        self.disk.cached[offset : offset + length] = seen
        return seen

    def write(self, offset: int, data: bytes) -> None:
        """Write whole sectors into the page cache."""
        if offset % self.sector_size or len(data) % self.sector_size:
            raise Internal(f"cannot write {self.path} at {offset}: not in sectors of {self.sector_size} bytes")
        self.disk.attempts += 1
        self.disk.pull(write=True)
        self._check_usable("write")
        self._check_range("write", offset, len(data))
        arrived = self.disk.accept(Write(offset, bytes(data)))
        if arrived != len(data):
            self._failure = "short write" if arrived else os.strerror(self.disk.faults.error)
            self._fail("write", offset, self._failure)

    def flush(self) -> None:
        """Make every earlier write durable."""
        self.disk.attempts += 1
        self.disk.pull(write=False)
        self._check_usable("flush")
        if not self.disk.sync():
            self._failure = os.strerror(self.disk.faults.error)
            raise DeviceError(f"cannot flush {self.path}: {self._failure}")

    def close(self) -> None:
        """Close; idempotent."""
        self.closed = True

    def _check_usable(self, verb: str) -> None:
        if self.closed:
            raise DeviceError(f"cannot {verb} {self.path}: closed")
        if not self._writable:
            raise DeviceError(f"cannot {verb} {self.path}: opened for reading only")
        if self._failure:
            raise DeviceError(f"cannot {verb} {self.path}: failed before: {self._failure}")
        if self.disk.faults.gone:
            self._failure = os.strerror(errno.ENXIO)
            raise DeviceError(f"cannot {verb} {self.path}: {self._failure}")

    def _check_range(self, verb: str, offset: int, length: int) -> None:
        if self.closed:
            raise DeviceError(f"cannot {verb} {self.path}: closed")
        if offset < 0 or length < 0 or offset + length > self.size:
            raise DeviceError(f"cannot {verb} {self.path} at {offset}: {length} bytes do not fit in {self.size}")
        if self.disk.faults.gone:
            self._fail(verb, offset, os.strerror(errno.ENXIO))

    def _fail(self, verb: str, offset: int, why: str) -> NoReturn:
        raise DeviceError(f"cannot {verb} {self.path} at {offset}: {why}")


class SimDevices:
    """Disks by path (``ports.Devices``); remembers the devices that it opened."""

    def __init__(self, *disks: SimDisk) -> None:
        self.disks = {disk.path: disk for disk in disks}
        self.opened: list[SimDevice] = []

    def open(self, ref: DeviceRef, *, writable: bool = False) -> SimDevice:
        """Open the disk of that path."""
        disk = self.disks.get(ref.metadata_path)
        if disk is None or disk.faults.gone:
            reason = os.strerror(errno.ENXIO if disk else errno.ENOENT)
            raise UnknownDevice(f"cannot open {ref.metadata_path}: {reason}")
        device = SimDevice(disk, writable=writable)
        self.opened.append(device)
        return device

    @property
    def leaked(self) -> tuple[SimDevice, ...]:
        """Devices that were opened and never closed."""
        return tuple(device for device in self.opened if not device.closed)
