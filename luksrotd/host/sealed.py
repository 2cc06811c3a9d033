# SPDX-License-Identifier: GPL-2.0-or-later
"""Secrets in memfds: out of swap and core dumps, sealed before they are handed to somebody else.

Swap is kept away by a locked mapping (mlock(2)) that lives as long as the object: best effort, as RLIMIT_MEMLOCK may
forbid it (libcryptsetup does the same).  The mapping is made from a second, read-only descriptor, because a mapping
that could become writable would make F_SEAL_WRITE fail with EBUSY, and before Linux 6.7 a sealed memfd cannot be
mapped through a writable descriptor at all.
"""

import ctypes
import fcntl
import mmap
import os
from contextlib import suppress
from typing import Final, Self

from luksrotd.errors import SecretRejected

_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = _libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_MADV_DONTDUMP: Final = 16


class SecretMemfd:
    """A memfd that holds, or is going to hold, one secret.  Use it in a ``with``, or ``close`` it.

    Raises ``SecretRejected`` where memory for a secret cannot be had.
    """

    def __init__(self) -> None:
        try:
            self._fd = os.memfd_create("luksrotd-secret", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise SecretRejected(f"cannot make room for a secret: {error.strerror}") from error
        self._mapping: tuple[int, int] | None = None

    @classmethod
    def from_bytes(cls, secret: bytearray) -> Self:
        """A sealed memfd that holds ``secret``, which is zeroed in any case."""
        memfd = None
        try:
            memfd = cls()
            os.ftruncate(memfd.fd, len(secret))
            memfd.lock()  # before there is anything in it
            with memoryview(secret) as rest:
                done = 0
                while done < len(secret):
                    with rest[done:] as part:
                        done += os.pwrite(memfd.fd, part, done)
            memfd.seal()
        except BaseException as error:
            if memfd is not None:
                memfd.close()
            if isinstance(error, OSError):
                raise SecretRejected(f"cannot keep a secret: {error.strerror}") from error
            raise
        else:
            return memfd
        finally:
            secret[:] = bytes(len(secret))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def fd(self) -> int:
        """The memfd, readable and (until it is sealed) writable; for the worker to generate into."""
        return self._fd

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return os.fstat(self._fd).st_size

    @property
    def locked(self) -> bool:
        """Whether what was in it at the last ``lock`` is kept out of swap."""
        return self._mapping is not None

    def lock(self) -> bool:
        """Keep what is in it now out of swap and core dumps; whether that was possible."""
        self._unlock()
        length = self.size
        if not length:
            return False
        try:
            fd = self.reader()
        except SecretRejected:
            return False
        try:
            address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        finally:
            os.close(fd)
        if address == _MAP_FAILED:
            return False
        _libc.madvise(address, length, _MADV_DONTDUMP)
        if _libc.mlock(address, length):
            _libc.munmap(address, length)
            return False
        self._mapping = (address, length)
        return True

    def seal(self) -> None:
        """Lock it and make it immutable, for those too who have a descriptor already (F_SEAL_WRITE, fcntl(2))."""
        if self._mapping is None or self._mapping[1] != self.size:
            self.lock()
        try:
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:  # EBUSY: somebody has it mapped writable
            raise SecretRejected(f"cannot seal a secret: {error.strerror}") from error

    @property
    def sealed(self) -> bool:
        """Whether it is immutable."""
        return fcntl.fcntl(self._fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS

    def reader(self) -> int:
        """A new read-only descriptor, positioned at the start, to hand to others; the caller closes it."""
        try:
            return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SecretRejected(f"cannot hand on a secret: {error.strerror}") from error

    def wipe(self) -> bool:
        """Zero and empty it, under the eyes of all who have a descriptor; False when it is sealed, so cannot be."""
        if self.sealed:
            return False
        with suppress(OSError):
            os.pwrite(self._fd, bytes(self.size), 0)
        os.ftruncate(self._fd, 0)
        self._unlock()
        return True

    def close(self) -> None:
        """Wipe it if it is not sealed, and let go of it; idempotent.  A sealed secret lives with its last holder."""
        if self._fd < 0:
            return
        with suppress(OSError):
            self.wipe()
        self._unlock()
        os.close(self._fd)
        self._fd = -1

    def _unlock(self) -> None:
        if self._mapping is not None:
            _libc.munmap(*self._mapping)
            self._mapping = None
