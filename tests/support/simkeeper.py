# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulated ``SecretKeeper``: it reads, as the daemon never does; what is not there yet never comes."""

import asyncio
import os
import stat
from contextlib import ExitStack

from luksrotd.errors import SecretRejected
from luksrotd.ports import SecretFd


class SimKeeper:
    """``ports.SecretKeeper``; waits for ``go`` first."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.go.set()

    async def keep(self, source: SecretFd, resources: ExitStack) -> SecretFd:
        """What is in a pipe, in a memfd."""
        await self.go.wait()
        try:
            mode = os.fstat(source.fd).st_mode
            if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
                return source
            if not stat.S_ISFIFO(mode):
                raise SecretRejected("cannot keep a secret: no file or pipe")
            os.set_blocking(source.fd, False)
            secret = b""
            while len(secret) <= source.limit and (chunk := os.read(source.fd, source.limit + 1 - len(secret))):
                secret += chunk
        except OSError as error:
            raise SecretRejected(f"cannot keep a secret: {error.strerror}") from error
        if not 0 < len(secret) <= source.limit:
            raise SecretRejected("cannot keep a secret: empty or too long")
        memfd = os.memfd_create("test-kept", os.MFD_CLOEXEC)
        resources.callback(os.close, memfd)
        os.pwrite(memfd, secret, 0)
        return SecretFd(memfd, source.limit)
