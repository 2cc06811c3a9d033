# SPDX-License-Identifier: GPL-2.0-or-later
"""The service manager's end of the notification socket, and a daemon that outlives what it talks to."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.daemon_process import ENVIRONMENT, PREFIX, WAIT_SECONDS, DaemonProcess
from tests.support.testbed import PROJECT, TestBed


class Manager:
    """Listens at ``path`` for what a service tells, all the time: who tells waits while nobody listens.

    All that ``hears`` has seen is in ``told``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told: list[str] = []
        self._loop = asyncio.get_running_loop()
        self._messages: asyncio.Queue[str] = asyncio.Queue()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket, self._read)

    async def hears(self, *wanted: str) -> str:
        """Wait for the next message with all of that in it."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                message = await self._messages.get()
                self.told.append(message)
                if all(text in message for text in wanted):
                    return message

    def _read(self) -> None:
        self._messages.put_nowait(self._socket.recv(8192).decode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self.path.unlink()


class Managed(DaemonProcess):
    """The daemon, and what it tells its manager."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path, manager: Manager) -> None:
        super().__init__(process, log)
        self.manager = manager

    def reload(self) -> None:
        """SIGHUP."""
        self.process.send_signal(signal.SIGHUP)

    def open_files(self) -> int:
        """How many descriptors it has."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))  # noqa: PTH208 -- a count


@asynccontextmanager
async def managed(
    bed: TestBed, *, environment: Mapping[str, str] | None = None, ready: bool = True, **plan: Any
) -> AsyncIterator[Managed]:
    """The daemon without any client of the bus; ended on leaving.  ``plan`` as of ``daemon_launcher``."""
    log, argument = bed.dir / "luksrotd.log", json.dumps({"prefix": PREFIX, **plan})
    with Manager(bed.dir / "notify") as manager, log.open("wb") as output:
        process = bed.spawn(
            [sys.executable, "-m", "tests.support.daemon_launcher", argument],
            cwd=PROJECT,
            env={**ENVIRONMENT, "NOTIFY_SOCKET": str(manager.path), **(environment or {})},
            stderr=output,
            stdin=subprocess.DEVNULL,
        )
        daemon = Managed(process, log, manager)
        try:
            if ready:
                await manager.hears("READY=1")
            yield daemon
        finally:
            bed.end(process)
