# SPDX-License-Identifier: GPL-2.0-or-later
"""A worker as a process: how it is waited for, and its end."""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from luksrotd.host.launch import Launched, launch


class Child:
    """A process of ours that is waited for without a thread."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status once it has been waited for; negative for a signal."""
        return self._process.returncode

    async def wait(self) -> int:
        """Its exit status, when it has ended; for any number of tasks."""
        if self._process.returncode is None:
            try:
                ended = os.pidfd_open(self._process.pid)
            except OSError:  # no descriptor is to be had
                return await asyncio.to_thread(self._process.wait)
            try:
                await _readable(ended)
            finally:
                os.close(ended)
        return self._process.wait()


class WorkerProcess:
    """A worker that waits for requests; whoever has it ends it.

    ``channel``: our end of its control socket; ``stderr``: a descriptor of what it complains about.
    """

    def __init__(self, launched: Launched) -> None:
        self.process = Child(launched.process)
        self.channel = launched.channel
        self.stderr = launched.stderr
        self._launched = launched

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._launched.alive

    async def end(self) -> None:
        """Kill its process group, reap it, and close what is ours, however often this task is cancelled meanwhile.

        Once, and not again.  Raises the last ``CancelledError`` after that.
        """
        try:
            self._launched.kill()
            cancelled = await to_the_end(asyncio.ensure_future(self.process.wait()))
        finally:
            self._launched.close()
        if cancelled is not None:
            raise cancelled


async def start_worker(
    python: str = sys.executable, module: str = "luksrotd.worker", groups: Sequence[int] = ()
) -> WorkerProcess:
    """Start ``module`` in the interpreter ``python``, with these supplementary groups; raises ``EngineError``."""
    return WorkerProcess(launch(python, module, groups))


async def to_the_end(future: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait until ``future`` is done, whatever its outcome; the last cancellation of this task that came meanwhile."""
    cancelled = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(fd, _settle, ready)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


def _settle(future: asyncio.Future[None]) -> None:
    with contextlib.suppress(asyncio.InvalidStateError):  # cancelled, or told twice
        future.set_result(None)
