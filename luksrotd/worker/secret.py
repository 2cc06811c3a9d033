# SPDX-License-Identifier: GPL-2.0-or-later
"""Secrets from descriptors and new ones, in safe memory from the first byte on."""

import os
import select
import stat
import time
from typing import Final

from luksrotd.cryptsetup.linux import fill_randomly
from luksrotd.cryptsetup.memory import SafeMemory
from luksrotd.errors import EngineError, SecretRejected
from luksrotd.secret import FORMATTED_LENGTH, RANDOM_BYTES, write_recovery_key

FIRST_READ: Final = 4096


def read_secret(fd: int, limit: int, deadline: float) -> SafeMemory:
    """All bytes behind ``fd``, verbatim (no newline is cut off), as ``cryptsetup --key-file`` takes them.

    A file, memfd or block device is read from its start, and the offset that other holders of the descriptor share
    stays; a pipe, socket or character device is read to its end.  ``deadline`` is a time of ``time.monotonic``.
    Raises ``SecretRejected`` for anything else, for an empty or unreadable one, for more than ``limit`` bytes, and
    where the end does not come in time.
    """
    memory = SafeMemory(min(FIRST_READ, limit + 1))
    try:
        size = _read_all(fd, limit, deadline, memory)
        if size == 0:
            raise SecretRejected("it is empty")
        if size > limit:
            raise SecretRejected(f"it is longer than {limit} bytes")
        memory.resize(size)
    except OSError as error:
        memory.close()
        raise SecretRejected(f"it cannot be read: {error.strerror}") from error
    except SecretRejected:
        memory.close()
        raise
    return memory


def generate_into(fd: int) -> SafeMemory:
    """A new secret of 256 bit, also written to the start of ``fd``, whose offset stays.

    Raises ``EngineError`` when it cannot be written.
    """
    memory = SafeMemory(FORMATTED_LENGTH)
    with SafeMemory(RANDOM_BYTES) as random:
        fill_randomly(random)
        write_recovery_key(random.view().cast("B"), memory.view().cast("B"))
    try:
        done = 0
        while done < memory.size:
            done += os.pwrite(fd, memory.view(done), done)
    except OSError as error:
        memory.close()
        raise EngineError(f"cannot hand back the generated secret: {error.strerror}") from error
    return memory


def _read_all(fd: int, limit: int, deadline: float, memory: SafeMemory) -> int:
    """Fill ``memory`` (it grows) up to one byte more than ``limit``; how many bytes there were."""
    seekable = _is_seekable(fd)
    done = 0
    while done <= limit:
        if done == memory.size:
            memory.resize(min(2 * memory.size, limit + 1))
        if seekable:
            count = os.preadv(fd, [memory.view(done)], done)
        else:
            _wait(fd, deadline)
            try:
                count = os.readv(fd, [memory.view(done)])
            except BlockingIOError:
                continue
        if count == 0:
            break
        done += count
    return done


def _is_seekable(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return True
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode):
        return False
    raise SecretRejected("it is not a file, pipe or socket")


def _wait(fd: int, deadline: float) -> None:
    """Until ``fd`` has data or an end.  If another holder takes the data first, the read blocks until the daemon gives
    up on this worker: setting O_NONBLOCK would set it for all holders.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(left * 1000):
        raise SecretRejected("its end did not come in time")
