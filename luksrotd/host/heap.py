# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of a process that is there all the time, and does something now and then (glibc's malloc(3)).

The buffers of a job, some megabytes, are made in several threads, and freed.  glibc keeps a heap for each thread, and
in each what is between small pieces still in use: tens of megabytes, of a daemon that needs thirty.
"""

import asyncio
import ctypes
from collections.abc import Callable
from typing import Any, Final

#: Seconds; long enough that jobs which follow each other do not have it done again and again.
QUIET_SECONDS: Final = 10.0

#: malloc.h
_M_ARENA_MAX: Final = -8

_libc: Final = ctypes.CDLL(None)


def share_heap() -> None:
    """One heap for all threads, for they take turns at Python anyway; to be called before there are any."""
    if hasattr(_libc, "mallopt"):  # in glibc
        _libc.mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Let the kernel have the pages that are free; takes milliseconds."""
    if hasattr(_libc, "malloc_trim"):  # in glibc
        _libc.malloc_trim(0)


class Quiet:
    """Observes the runner: when no job has ended for a while, what jobs have left is given back."""

    def __init__(self, then: Callable[[], None] = give_back, seconds: float = QUIET_SECONDS) -> None:
        self._then = then
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def job_added(self, job: Any) -> None:
        """Nothing: it will end."""

    def job_ended(self, job: Any) -> None:
        """Wait anew."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._then)

    def job_forgotten(self, job: Any) -> None:
        """Nothing: it was small."""
