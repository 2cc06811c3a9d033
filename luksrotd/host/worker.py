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
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from luksrotd.errors import EngineCrashed, EngineError, EngineTimeout, LuksrotdError, SecretRejected
from luksrotd.host.sources import TPM_DEVICE, declared, fds_of, groups_for
from luksrotd.host.spare import Ahead
from luksrotd.host.workerprocess import WorkerProcess, start_worker, to_the_end
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
    """Starts workers.  ``python`` is the interpreter that they run in, ``module`` their program, ``tpm`` the device.

    ``spare``: has one started ahead, of those that need no device.
    """

    deadlines: Deadlines = field(default_factory=Deadlines)
    python: str = sys.executable
    module: str = "luksrotd.worker"
    tpm: str = TPM_DEVICE
    spare: Ahead | None = None

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
        fds = [target, *(fd for source in secrets.values() for fd in fds_of(source))]
        with _duplicates(fds) as copies:
            obtaining = asyncio.ensure_future(self._obtain(groups_for(secrets.values(), self.tpm)))
            cancelled = await to_the_end(obtaining)
            process = obtaining.result()
            try:
                if cancelled is not None:
                    raise cancelled
                worker = WorkerSession(process, self.deadlines)
                await worker.start(copies, declared(secrets, range(1, len(copies))))
            except BaseException:
                await process.end()
                raise
        try:
            if self.spare is not None:
                self.spare.replace()
            yield worker
        finally:
            await process.end()

    async def _obtain(self, groups: Sequence[int]) -> WorkerProcess:
        """A worker that nobody has used; not to be cancelled."""
        spare = await self.spare.take() if self.spare is not None and not groups else None
        return spare or await start_worker(self.python, self.module, groups)


class WorkerSession:
    """``ports.EngineSession`` on a running worker."""

    def __init__(self, worker: WorkerProcess, deadlines: Deadlines) -> None:
        self._process = worker.process
        self._channel = worker.channel
        self._stderr = worker.stderr
        self._deadlines = deadlines
        self._received = bytearray()
        self._usable = True

    @property
    def pid(self) -> int:
        """Process id of the worker, for the log."""
        return self._process.pid

    async def start(self, fds: Sequence[int], secrets: Mapping[str, Any]) -> None:
        """Hand over descriptors, the shadow's first; ``secrets`` tell their places.  Only for ``WorkerEngine``."""
        seconds = self._deadlines.secret
        request = {"op": "start", "shadow": 0, "secrets": secrets, "secret_seconds": seconds}
        await self._call(request, seconds + self._deadlines.start, fds)

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

    async def _call(self, request: Mapping[str, Any], seconds: float, fds: Sequence[int] = ()) -> Any:
        if not self._usable:
            raise EngineError("cannot use a worker again after it failed")
        # Until the reply is in: a call that was cancelled half-way would leave its reply to the next one.
        self._usable = False
        try:
            async with asyncio.timeout(seconds):
                line = await self._exchange(wire.encode(request), fds)
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

    async def _exchange(self, request: bytes, fds: Sequence[int]) -> bytes | None:
        """The line that answers ``request``; None when the worker closes its end instead."""
        loop = asyncio.get_running_loop()
        # A worker that gave up while this was under way has said why: read on.
        with contextlib.suppress(ConnectionError):
            sent = self._send_fds(request, fds) if fds else 0
            await loop.sock_sendall(self._channel, request[sent:])
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

    def _send_fds(self, request: bytes, fds: Sequence[int]) -> int:
        """Send them with the beginning of ``request``, for which a fresh socket has room; how much of it went."""
        try:
            return socket.send_fds(self._channel, [request], fds)
        except ConnectionError:
            raise
        except OSError as error:
            raise EngineError(f"cannot pass on descriptors: {error.strerror}") from error

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
def _duplicates(fds: Sequence[int]) -> Iterator[list[int]]:
    """Copies, which are there until a worker has them, whatever becomes of what was given; closed on leaving."""
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


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
