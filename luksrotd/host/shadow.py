# SPDX-License-Identifier: GPL-2.0-or-later
"""Shadows of header devices in sparse memfds (memfd_create(2)): libcryptsetup works on them by /proc/self/fd/N."""

import errno
import fcntl
import os
from collections.abc import Iterator

from luksrotd.errors import EngineError, Internal
from luksrotd.luks2.areas import Extent


class MemfdShadows:
    """Makes shadows (``ports.ShadowStore``)."""

    def create(self, length: int) -> "MemfdShadow":
        """A shadow of ``length`` bytes of zeros that uses no memory yet; ``EngineError`` if there is none to be had."""
        if length <= 0:
            raise Internal(f"cannot create a shadow of {length} bytes")
        try:
            fd = os.memfd_create("luksrotd-shadow", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(fd, length)
                # The worker parses hostile headers: it may scribble in the shadow, but not change its length.
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise EngineError(f"cannot create a shadow of {length} bytes: {error.strerror}") from error
        return MemfdShadow(fd, length)


class MemfdShadow:
    """One shadow (``ports.Shadow``); owns the descriptor, which goes to a worker with its first request."""

    def __init__(self, fd: int, length: int) -> None:
        self._fd = fd
        self._length = length

    @property
    def fd(self) -> int:
        """The memfd."""
        return self._fd

    @property
    def length(self) -> int:
        """Bytes."""
        return self._length

    def write(self, offset: int, data: bytes) -> None:
        """Write all of ``data``; ``EngineError`` if memory runs out."""
        self._check(offset, len(data))
        view = memoryview(data)
        while view:
            try:
                count = os.pwrite(self._fd, view, offset)
            except OSError as error:
                raise EngineError(f"cannot write the shadow at {offset}: {error.strerror}") from error
            view = view[count:]
            offset += count

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes at ``offset``."""
        self._check(offset, length)
        try:
            data = os.pread(self._fd, length, offset)
        except OSError as error:
            raise EngineError(f"cannot read the shadow at {offset}: {error.strerror}") from error
        if len(data) != length:
            raise EngineError(f"cannot read the shadow at {offset}: {len(data)} of {length} bytes")
        return data

    def clear(self) -> None:
        """Make it all zeros again; its pages stay allocated."""
        for extent in self.data_extents():
            self.write(extent.offset, bytes(extent.size))

    def data_extents(self) -> tuple[Extent, ...]:
        """Ascending ranges, of whole pages but for the end, that may hold something else than zeros."""
        try:
            return tuple(self._extents())
        except OSError as error:
            raise EngineError(f"cannot map the shadow: {error.strerror}") from error

    def _extents(self) -> Iterator[Extent]:
        position = 0
        while position < self._length:
            try:
                start = os.lseek(self._fd, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                    return
                raise
            position = os.lseek(self._fd, start, os.SEEK_HOLE)
            yield Extent(start, position - start)

    def close(self) -> None:
        """Release the memory; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _check(self, offset: int, length: int) -> None:
        if self._fd < 0:
            raise Internal("cannot use a shadow: closed")
        if offset < 0 or length < 0 or offset + length > self._length:
            raise Internal(f"cannot use a shadow of {self._length} bytes at {offset}: {length} bytes do not fit")
