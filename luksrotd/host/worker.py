# SPDX-License-Identifier: GPL-2.0-or-later
"""``KeyslotEngine`` by worker processes: one per session, killed to cancel.

This end never reads a descriptor that holds a secret; it passes them on.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from luksrotd.errors import EngineCrashed, EngineError, EngineTimeout, LuksrotdError, SecretRejected
from luksrotd.host.sources import TPM_DEVICE, declared, fds_of, groups_for
from luksrotd.ports import SecretSource, Shadow
from luksrotd.rotation import wire
from luksrotd.rotation.edits import Edit, to_wire

#: How long a worker that closed its socket may take to exit, so that its own exit status can be told, in seconds.
EXIT_GRACE: Final = 5.0
#: What is kept of what a worker wrote to stderr, in bytes from its end.
STDERR_TAIL: Final = 2048
CHUNK: Final = 65536


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long each operation of a worker may take, in seconds; key derivation may take long on a slow machine.

    ``secret`` is the time in which the end of every secret must have come; ``start`` counts on top of it.
    """

    secret: float = 10.0
    start: float = 120.0
    load: float = 120.0
    unlock: float = 120.0
    apply: float = 120.0
    opens: float = 120.0


@dataclass(frozen=True, slots=True)
class WorkerEngine:
    """Starts workers.  ``python`` is the interpreter that they run in, ``module`` their program, ``tpm`` the device."""

    deadlines: Deadlines = field(default_factory=Deadlines)
    python: str = sys.executable
    module: str = "luksrotd.worker"
    tpm: str = TPM_DEVICE

    @contextlib.asynccontextmanager
    async def session(self, shadow: Shadow, secrets: Mapping[str, SecretSource]) -> AsyncIterator["WorkerSession"]:
        """A session on ``shadow``; see ``ports.KeyslotEngine``."""
        async with self.session_on(shadow.fd, secrets) as session:
            yield session

    @contextlib.asynccontextmanager
    async def session_on(self, target: int, secrets: Mapping[str, SecretSource]) -> AsyncIterator["WorkerSession"]:
        """A session on what is open as ``target``.

        The descriptors stay the caller's and must stay open until this has been entered.  Leaving kills the worker and
        everything in its process group, and returns when it has been reaped, also when cancelled meanwhile.
        """
        with contextlib.ExitStack() as ours_only, contextlib.ExitStack() as until_spawned:
            fds = [fd for source in secrets.values() for fd in fds_of(source)]
            copies = until_spawned.enter_context(_duplicates([target, *fds]))
            ours, theirs, stderr = ours_only.enter_context(_plumbing())
            # asyncio forgets the process when it is cancelled while it kills the one that it was cancelled at starting.
            groups = groups_for(secrets.values(), self.tpm)
            spawning = asyncio.ensure_future(self._spawn(theirs, copies, stderr, groups))
            cancelled = await _to_the_end(spawning)
            process = spawning.result()
            try:
                if cancelled is not None:
                    raise cancelled
                until_spawned.close()
                theirs.close()
                worker = WorkerSession(process, ours, stderr, self.deadlines)
                await worker.start(copies[0], declared(secrets, copies[1:]))
                yield worker
            finally:
                await _finish(process)

    async def _spawn(self, control: socket.socket, fds: Sequence[int], stderr: int, groups: Sequence[int]) -> Process:
        # PYTHONPATH: for a source tree.  Nothing else of the environment concerns a worker.
        environment = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        arguments = ("-P", "-s", "-B", "-m", self.module, str(control.fileno()), str(os.getpid()), *map(str, groups))
        try:
            return await asyncio.create_subprocess_exec(
                self.python,
                *arguments,
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=stderr,
                pass_fds=(control.fileno(), *fds),
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise EngineError(f"cannot start a worker: {error.strerror}") from error


class WorkerSession:
    """``ports.EngineSession`` on a running worker."""

    def __init__(self, process: Process, channel: socket.socket, stderr: int, deadlines: Deadlines) -> None:
        self._process = process
        self._channel = channel
        self._stderr = stderr
        self._deadlines = deadlines
        self._received = bytearray()
        self._usable = True

    @property
    def pid(self) -> int:
        """Process id of the worker, for the log."""
        return self._process.pid

    async def start(self, shadow: int, secrets: Mapping[str, Any]) -> None:
        """Declare the descriptors, by their numbers in the worker.  Only for ``WorkerEngine.session``."""
        seconds = self._deadlines.secret
        request = {"op": "start", "shadow": shadow, "secrets": secrets, "secret_seconds": seconds}
        await self._call(request, seconds + self._deadlines.start)

    async def load(self) -> Mapping[str, Any]:
        """See ``ports.EngineSession``."""
        metadata = await self._call({"op": "load"}, self._deadlines.load)
        if not isinstance(metadata, dict):
            raise self._refused("the metadata is not an object")
        return metadata

    async def unlock(self, keyslot: int | None = None) -> int:
        """See ``ports.EngineSession``."""
        request = {"op": "unlock", "keyslot": keyslot, "volume_key": False}
        opened = await self._call(request, self._deadlines.unlock)
        if type(opened) is not int or (keyslot is not None and opened != keyslot):
            raise self._refused("not the keyslot that was asked for")
        return opened

    async def take_volume_key(self) -> None:
        """See ``ports.EngineSession``."""
        await self._call({"op": "unlock", "keyslot": None, "volume_key": True}, self._deadlines.unlock)

    async def apply(self, edits: Sequence[Edit]) -> None:
        """See ``ports.EngineSession``."""
        await self._call({"op": "apply", "edits": [to_wire(edit) for edit in edits]}, self._deadlines.apply)

    async def opens(self, keyslot: int, secret: str) -> bool:
        """See ``ports.EngineSession``."""
        answer = await self._call({"op": "opens", "keyslot": keyslot, "secret": secret}, self._deadlines.opens)
        if not isinstance(answer, bool):
            raise self._refused("neither yes nor no")
        return answer

    async def _call(self, request: Mapping[str, Any], seconds: float) -> Any:
        if not self._usable:
            raise EngineError("cannot use a worker again after it failed")
        # Until the reply is in: a call that was cancelled half-way would leave its reply to the next one.
        self._usable = False
        try:
            async with asyncio.timeout(seconds):
                line = await self._exchange(wire.encode(request))
            if line is None:
                raise await self._crashed()
            result = wire.result_of(line)
        except TimeoutError as error:
            raise EngineTimeout(f"cannot wait for {request['op']} longer than {seconds:g} s") from error
        except LuksrotdError as error:
            self._annotate(error)
            raise
        self._usable = True
        return result

    async def _exchange(self, request: bytes) -> bytes | None:
        """The line that answers ``request``; None when the worker closes its end instead."""
        loop = asyncio.get_running_loop()
        # A worker that gave up while this was under way has said why: read on.
        with contextlib.suppress(ConnectionError):
            await loop.sock_sendall(self._channel, request)
        while True:
            try:
                chunk = await loop.sock_recv(self._channel, CHUNK)
            except ConnectionError:
                return None
            if not chunk:
                return None
            before = len(self._received)
            self._received += chunk
            end = self._received.find(b"\n", before)
            if end >= 0:
                line = bytes(self._received[:end])
                del self._received[: end + 1]
                return line
            if len(self._received) > wire.MAX_LINE:
                raise EngineError("cannot understand the worker: endless reply")

    async def _crashed(self) -> EngineCrashed:
        try:
            async with asyncio.timeout(EXIT_GRACE):
                status = await self._process.wait()
        except TimeoutError:
            return EngineCrashed("cannot go on: the worker closed its socket")
        if status < 0:
            return EngineCrashed(f"cannot go on: the worker was ended by {_signal_name(-status)}")
        return EngineCrashed(f"cannot go on: the worker ended with status {status}")

    def _refused(self, what: str) -> EngineError:
        self._usable = False
        return EngineError(f"cannot understand the worker: {what}")

    def _annotate(self, error: LuksrotdError) -> None:
        """Put the end of what the worker wrote to stderr (a Python trace, an abort message) into a note."""
        size = os.fstat(self._stderr).st_size
        tail = os.pread(self._stderr, STDERR_TAIL, max(0, size - STDERR_TAIL)).decode("ascii", "replace").strip()
        if tail:
            error.add_note(f"the worker wrote: {tail}")


@contextlib.contextmanager
def _plumbing() -> Iterator[tuple[socket.socket, socket.socket, int]]:
    """Our end of the control socket, the worker's, and a file for its stderr.

    A file, not a pipe: it needs no reader, cannot block the worker, and is bounded by the worker's RLIMIT_FSIZE.
    """
    with contextlib.ExitStack() as stack:
        try:
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            stack.enter_context(theirs)
            stderr = os.memfd_create("luksrotd-worker-stderr", os.MFD_CLOEXEC)
            stack.callback(os.close, stderr)
        except OSError as error:
            raise EngineError(f"cannot start a worker: {error.strerror}") from error
        ours.setblocking(False)
        yield ours, theirs, stderr


@contextlib.contextmanager
def _duplicates(fds: Sequence[int]) -> Iterator[list[int]]:
    """Copies above the standard descriptors, which the child replaces (a caller's secret may be its stdin)."""
    with contextlib.ExitStack() as stack:
        copies = []
        try:
            # Before the first copy: a number that is not open must not come to mean one of ours.
            for fd in fds:
                fcntl.fcntl(fd, fcntl.F_GETFD)
            for fd in fds:
                copies.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
                stack.callback(os.close, copies[-1])
        except OSError as error:
            kind = SecretRejected if error.errno == errno.EBADF else EngineError
            raise kind(f"cannot pass on a descriptor: {error.strerror}") from error
        yield copies


async def _finish(process: Process) -> None:
    """Kill the worker's process group and reap the worker, however often this task is cancelled meanwhile."""
    # The group, not only its leader: a worker that was taken over may have forked.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    cancelled = await _to_the_end(asyncio.ensure_future(process.wait()))
    if cancelled is not None:
        raise cancelled


async def _to_the_end(future: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait until ``future`` is done, whatever its outcome; the last cancellation of this task that came meanwhile."""
    cancelled = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
