# SPDX-License-Identifier: GPL-2.0-or-later
"""Block devices, images and header files: the only place that reads, writes and flushes them.

One descriptor per open device does all writing and flushing, because Linux reports a write-back error once per
descriptor (fsync(2)): what another descriptor was told, this one would never hear of.
"""

import errno
import fcntl
import os
import stat
import struct
import sys
from typing import Final, NoReturn

from luksrotd.errors import DeviceError, Internal, UnknownDevice
from luksrotd.host.medium import Medium
from luksrotd.ports import DeviceIdentity, DeviceRef

FILE_SECTOR_SIZE: Final = 512
"""Bytes; what an image has for a sector."""

# linux/fs.h; the direction bits of an ioctl number (asm/ioctl.h) are elsewhere on a few architectures.
_SHIFTED_DIRECTION: Final = os.uname().machine.startswith(("alpha", "mips", "ppc", "sparc"))
_NO_DIRECTION: Final = 0x20000000 if _SHIFTED_DIRECTION else 0
_BLKROGET: Final = 0x125E | _NO_DIRECTION
_BLKSSZGET: Final = 0x1268 | _NO_DIRECTION
_BLKGETSIZE64: Final = 0x1272 | struct.calcsize("N") << 16 | (0x40000000 if _SHIFTED_DIRECTION else 0x80000000)

_NO_SUCH_PATH: Final = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM}
)


def identity_of(status: os.stat_result) -> DeviceIdentity:
    """The identity of a block device or regular file from its stat(2)."""
    if stat.S_ISBLK(status.st_mode):
        return DeviceIdentity(True, os.major(status.st_rdev), os.minor(status.st_rdev))
    return DeviceIdentity(False, os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)


class BlockDevices:
    """Opens block devices and regular files (``ports.Devices``)."""

    def open(self, ref: DeviceRef, *, writable: bool = False) -> "BlockDevice":
        """Open ``ref.metadata_path``; raises ``UnknownDevice`` if it leads nowhere or to another kind of file.

        ``DeviceError`` if it is there but cannot be opened.
        """
        path = ref.metadata_path
        try:
            return _open(path, writable=writable)
        except OSError as error:
            kind = UnknownDevice if error.errno in _NO_SUCH_PATH else DeviceError
            raise kind(f"cannot open {path}: {error.strerror}") from error
        except ValueError as error:  # a NUL byte, or what no file name can hold
            raise UnknownDevice("cannot open the device: not a path") from error


def _open(path: str, *, writable: bool) -> "BlockDevice":
    # Opening has side effects on some files (fifos block, tapes rewind), so look first: O_PATH opens nothing.
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        status = os.fstat(place)
        mode = status.st_mode
        if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode)):
            raise UnknownDevice(f"cannot open {path}: neither a block device nor a regular file")
        # O_NONBLOCK: do not wait for somebody who holds a lease on the file (fcntl(2)), nor for a medium.
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(f"/proc/self/fd/{place}", flags)
        except PermissionError as error:
            raise DeviceError(f"cannot open {path}: {error.strerror}{_advice(status)}") from error
    finally:
        os.close(place)
    try:
        if writable and stat.S_ISBLK(mode) and _ask(fd, _BLKROGET, 4):
            # The kernel lets it be opened, and refuses the first write.
            raise DeviceError(f"cannot open {path}: {os.strerror(errno.EROFS)}")
        return BlockDevice(fd, path, writable=writable)
    except BaseException:
        os.close(fd)
        raise


def _advice(status: os.stat_result) -> str:
    """What to do about a file that keeps root out: without CAP_DAC_OVERRIDE, as in our units, others' files do."""
    if os.geteuid() != 0 or status.st_uid == 0:
        return ""
    who = f"user {status.st_uid}, group {status.st_gid}, mode {stat.S_IMODE(status.st_mode):04o}"
    return f" (it belongs to {who}): let root open it (luksrotd(8), PROBLEMS)"


def _ask(fd: int, request: int, width: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, request, bytes(width)), sys.byteorder)


class BlockDevice:
    """An open block device or regular file (``ports.HeaderDevice``); owns the descriptor."""

    def __init__(self, fd: int, path: str, *, writable: bool) -> None:
        status = os.fstat(fd)
        self._fd = fd
        self._medium = Medium(fd)
        self._path = path
        self._writable = writable
        self._identity = identity_of(status)
        self._failure = ""
        if self._identity.block:
            self._sector_size = _ask(fd, _BLKSSZGET, 4)
            self._size = _ask(fd, _BLKGETSIZE64, 8)
        else:
            self._sector_size = FILE_SECTOR_SIZE
            self._size = status.st_size

    @property
    def path(self) -> str:
        """The path that it was opened by."""
        return self._path

    @property
    def identity(self) -> DeviceIdentity:
        """What the path led to."""
        return self._identity

    @property
    def size(self) -> int:
        """Bytes, when it was opened."""
        return self._size

    @property
    def sector_size(self) -> int:
        """Bytes; writes are aligned to it."""
        return self._sector_size

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes at ``offset``, through the page cache; ``DeviceError`` if there are fewer."""
        self._check_range("read", offset, length)
        parts: list[bytes] = []
        position, end = offset, offset + length
        # A bad sector ends one call early and fails the next, so only a second call tells why.
        while position < end:
            try:
                part = os.pread(self._fd, end - position, position)
            except OSError as error:
                self._fail("read", position, error)
            if not part:
                self._fail("read", position, "unexpected end")
            parts.append(part)
            position += len(part)
        return b"".join(parts)

    def read_medium(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes at ``offset`` from the medium, past the page cache.

        The cached pages are dropped (posix_fadvise(2)): after a failed flush they show what never arrived, to every
        other reader.  The kernel may decline that; where O_DIRECT is not to be had, it is all that can be done.  Data
        that was written but not flushed is written out by either way.
        """
        self._check_range("read", offset, length)
        if not length:
            return b""
        try:
            seen = self._medium.read(offset, length)
        except OSError as error:
            if error.errno != errno.EINVAL:
                self._fail("read", offset, error)
        else:
            if len(seen) < length:
                self._fail("read", offset + len(seen), "unexpected end")
            self._drop_cached(offset, length)
            return seen
        if self._writable and not self._failure:
            self.flush()  # dirty pages are not dropped
        self._drop_cached(offset, length)
        return self.read(offset, length)

    def _drop_cached(self, offset: int, length: int) -> None:
        try:
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            self._fail("read", offset, error)

    def write(self, offset: int, data: bytes) -> None:
        """Write all of ``data``; offset and length are whole sectors (else ``Internal``: the caller is wrong).

        Never makes a file longer.  After a write that failed or was short every later write and flush raises
        ``DeviceError``: what the device holds is unknown then.
        """
        if offset % self._sector_size or len(data) % self._sector_size:
            raise Internal(f"cannot write {self._path} at {offset}: not in sectors of {self._sector_size} bytes")
        self._check_usable("write")
        self._check_range("write", offset, len(data))
        try:
            count = os.pwrite(self._fd, data, offset)
        except OSError as error:
            self._failure = error.strerror or "write error"
            self._fail("write", offset, error)
        if count != len(data):
            self._failure = "short write"
            self._fail("write", offset, f"short write, {count} of {len(data)} bytes")

    def flush(self) -> None:
        """fdatasync(2); after it failed every later write and flush raises ``DeviceError``.

        The kernel marks pages clean that it failed to write, so a second fdatasync would succeed and mean nothing.
        """
        self._check_usable("flush")
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._failure = error.strerror or "flush error"
            raise DeviceError(f"cannot flush {self._path}: {error.strerror}") from error

    def close(self) -> None:
        """Release the descriptors; idempotent, never fails."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._medium.close()
            try:
                os.close(fd)
            except OSError:  # what counted was flushed, and the descriptor is gone in any case (close(2))
                self._failure = self._failure or "close error"

    def _check_usable(self, verb: str) -> None:
        if self._fd < 0:
            raise DeviceError(f"cannot {verb} {self._path}: closed")
        if not self._writable:
            raise DeviceError(f"cannot {verb} {self._path}: opened for reading only")
        if self._failure:
            raise DeviceError(f"cannot {verb} {self._path}: failed before: {self._failure}")

    def _check_range(self, verb: str, offset: int, length: int) -> None:
        if self._fd < 0:
            raise DeviceError(f"cannot {verb} {self._path}: closed")
        if offset < 0 or length < 0 or offset + length > self._size:
            raise DeviceError(f"cannot {verb} {self._path} at {offset}: {length} bytes do not fit in {self._size}")

    def _fail(self, verb: str, offset: int, why: OSError | str) -> NoReturn:
        if isinstance(why, OSError):
            raise DeviceError(f"cannot {verb} {self._path} at {offset}: {why.strerror}") from why
        raise DeviceError(f"cannot {verb} {self._path} at {offset}: {why}")
