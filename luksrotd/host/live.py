# SPDX-License-Identifier: GPL-2.0-or-later
"""``LiveEngine`` by worker processes that have the device itself."""

import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import field

from luksrotd.errors import DeviceError
from luksrotd.host.blockdev import identity_of
from luksrotd.host.worker import Deadlines, WorkerEngine, WorkerSession
from luksrotd.ports import HeaderDevice, SecretSource
from luksrotd.records import dataclass


@dataclass(frozen=True, slots=True)
class LiveWorkerEngine:
    """Starts ``luksrotd.worker.live``.

    The worker gets a descriptor, not a path: so it works on the device that was locked, probed and read, whatever the
    path leads to by then.  libcryptsetup opens it anew by /proc/self/fd, and takes its locks by the device number, or
    on the file.
    """

    deadlines: Deadlines = field(default_factory=Deadlines)

    @contextlib.asynccontextmanager
    async def session(self, device: HeaderDevice, secrets: Mapping[str, SecretSource]) -> AsyncIterator[WorkerSession]:
        """See ``ports.LiveEngine``."""
        with _opened(device) as fd:
            engine = WorkerEngine(self.deadlines, module="luksrotd.worker.live")
            async with engine.session_on(fd, secrets) as session:
                yield session


@contextlib.contextmanager
def _opened(device: HeaderDevice) -> Iterator[int]:
    try:
        fd = os.open(device.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise DeviceError(f"cannot open {device.path}: {error.strerror}") from error
    try:
        if identity_of(os.fstat(fd)) != device.identity:
            raise DeviceError(f"cannot use {device.path}: it is another device than before")
        yield fd
    finally:
        os.close(fd)
