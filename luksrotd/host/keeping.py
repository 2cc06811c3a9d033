# SPDX-License-Identifier: GPL-2.0-or-later
"""``SecretKeeper`` by splice(2): what is in a pipe goes to a memfd without coming by this process's memory."""

import asyncio
import os
import stat
from contextlib import ExitStack
from typing import Final

from luksrotd.errors import SecretRejected
from luksrotd.host.sealed import SecretMemfd
from luksrotd.ports import SecretFd
from luksrotd.records import dataclass

CHUNK: Final = 65536


@dataclass(frozen=True, slots=True)
class PipeKeeper:
    """``seconds``: how long the end of a pipe may take to come, and a file system to say what a file is."""

    seconds: float = 10.0

    async def keep(self, source: SecretFd, resources: ExitStack) -> SecretFd:
        """See ``ports.SecretKeeper``."""
        try:
            # In a thread: the file may lie on a file system of the caller's own, which answers when it likes.
            async with asyncio.timeout(self.seconds):
                mode = (await asyncio.to_thread(os.fstat, source.fd)).st_mode
            if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
                return source
            if not stat.S_ISFIFO(mode):
                raise SecretRejected("cannot keep a secret: its descriptor is of no file, memfd, block device or pipe")
            with ExitStack() as mine:
                memfd = mine.enter_context(SecretMemfd())
                async with asyncio.timeout(self.seconds):
                    await _pour(source, memfd.fd)
                memfd.lock()
                resources.push(mine.pop_all())
                return SecretFd(memfd.fd, source.limit)
        except TimeoutError as error:
            raise SecretRejected(f"cannot keep a secret: it has not ended within {self.seconds:g} s") from error
        except OSError as error:
            raise SecretRejected(f"cannot keep a secret: {error.strerror}") from error


async def _pour(source: SecretFd, memfd: int) -> None:
    """Move all that comes out of a pipe; at most one byte more than the limit."""
    done = 0
    while True:
        try:
            count = os.splice(source.fd, memfd, min(CHUNK, source.limit + 1 - done), flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            await _readable(source.fd)
            continue
        done += count
        if done > source.limit:
            raise SecretRejected(f"cannot keep a secret: it is longer than {source.limit} bytes")
        if not count:
            break
    if not done:
        raise SecretRejected("cannot keep a secret: it is empty")


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(fd)
