# SPDX-License-Identifier: GPL-2.0-or-later
"""A worker as a process: how it is started, what belongs to it, and its end."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from luksrotd.errors import EngineError


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A worker that waits for requests; whoever has it ends it.

    ``channel``: our end of its control socket; ``stderr``: a descriptor of what it complains about.
    """

    process: Process
    channel: socket.socket
    stderr: int

    @property
    def alive(self) -> bool:
        """Whether it is not known to have ended."""
        return self.process.returncode is None

    async def end(self) -> None:
        """Kill its process group, reap it, and close what is ours, however often this task is cancelled meanwhile.

        Once, and not again.  Raises the last ``CancelledError`` after that.
        """
        try:
            # The group, not only its leader: a worker that was taken over may have forked.
            if self.alive:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
            cancelled = await to_the_end(asyncio.ensure_future(self.process.wait()))
        finally:
            self.channel.close()
            os.close(self.stderr)
        if cancelled is not None:
            raise cancelled


async def start_worker(
    python: str = sys.executable, module: str = "luksrotd.worker", groups: Sequence[int] = ()
) -> WorkerProcess:
    """Start ``module`` in the interpreter ``python``, with these supplementary groups.

    Not to be cancelled: asyncio forgets a process when it is cancelled while it starts it.  Raises ``EngineError``.
    """
    with contextlib.ExitStack() as failed, _plumbing(failed) as (ours, theirs, stderr):
        # PYTHONPATH: for a source tree.  Nothing else of the environment concerns a worker.
        environment = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        arguments = ("-P", "-s", "-B", "-m", module, str(theirs.fileno()), str(os.getpid()), *map(str, groups))
        try:
            process = await asyncio.create_subprocess_exec(
                python,
                *arguments,
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=stderr,
                pass_fds=(theirs.fileno(),),
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise EngineError(f"cannot start a worker: {error.strerror}") from error
        failed.pop_all()
        return WorkerProcess(process, ours, stderr)


async def to_the_end(future: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait until ``future`` is done, whatever its outcome; the last cancellation of this task that came meanwhile."""
    cancelled = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


@contextlib.contextmanager
def _plumbing(failed: contextlib.ExitStack) -> Iterator[tuple[socket.socket, socket.socket, int]]:
    """Our end of the control socket, the worker's, and a file for its stderr; ``failed`` closes what is ours.

    A file, not a pipe: it needs no reader, cannot block the worker, and is bounded by the worker's RLIMIT_FSIZE.
    """
    with contextlib.ExitStack() as always:
        try:
            ours, theirs = socket.socketpair()
            failed.enter_context(ours)
            always.enter_context(theirs)
            stderr = os.memfd_create("luksrotd-worker-stderr", os.MFD_CLOEXEC)
            failed.callback(os.close, stderr)
        except OSError as error:
            raise EngineError(f"cannot start a worker: {error.strerror}") from error
        ours.setblocking(False)
        yield ours, theirs, stderr
