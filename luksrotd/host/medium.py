# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading past the page cache, with O_DIRECT."""

import mmap
import os
import threading
from contextlib import suppress
from typing import Final

_ALIGNMENT: Final = 4096
"""Bytes; satisfies O_DIRECT on every file system and device with logical blocks up to that size."""
_BUFFER: Final = 256 * 1024
"""Bytes, at least: so much a key area has, of a key of 512 bit."""
# Private, because shared memory is a file.  It is safe only as long as nobody forks during a read (open(2), NOTES):
# subprocess uses vfork(2), unless it is given a preexec_fn.
_PRIVATE: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Medium:
    """What lies below the page cache of an open file.

    Its descriptor and its buffer, of whole pages, are kept until ``close``: to make them takes longer than to read.
    """

    def __init__(self, fd: int) -> None:
        self._of = fd
        self._fd = -1
        self._buffer: mmap.mmap | None = None
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        """As much of ``length`` bytes at ``offset`` as there is; raises ``OSError``, EINVAL if there is no O_DIRECT."""
        start = offset - offset % _ALIGNMENT
        wanted = offset + length - start
        aligned = wanted + -wanted % _ALIGNMENT  # what is behind the end comes back as a short read
        with self._lock, memoryview(self._room(aligned)) as view:
            done = 0
            while done < wanted:
                with view[done:aligned] as rest:
                    count = os.preadv(self._opened(), [rest], start + done)
                if not count:
                    break
                done += count
            return bytes(view[offset - start : min(wanted, done)])

    def close(self) -> None:
        """Release both; idempotent, never fails."""
        self._buffer = None
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):  # nothing was written by it
                os.close(fd)

    def _opened(self) -> int:
        if self._fd < 0:
            self._fd = os.open(f"/proc/self/fd/{self._of}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NONBLOCK)
        return self._fd

    def _room(self, size: int) -> mmap.mmap:
        if self._buffer is None or len(self._buffer) < size:
            self._buffer = mmap.mmap(-1, max(size, _BUFFER), flags=_PRIVATE)
        return self._buffer
