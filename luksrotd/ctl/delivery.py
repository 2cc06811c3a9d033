# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a generated key goes: to standard output alone, or into a new file; before anything is committed."""

import os
import select
import stat
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from luksrotd.ctl import secrets
from luksrotd.errors import LuksrotdError, Outcome, SecretRejected

_STDOUT: Final = 1
#: Bytes; more than a generated key has.
_ROOM: Final = 4096


class ToStdout:
    """Writes the key to standard output and nothing else, so that ``> FILE`` makes a key file as it must be.

    A terminal gets a newline after it.
    """

    def forget(self) -> None:
        """The key opens nothing after all; it has been seen."""

    def check(self) -> None:
        """Raise ``SecretRejected`` if it is plain already that nobody reads."""
        poll = select.poll()
        poll.register(_STDOUT, select.POLLOUT)
        if any(events & (select.POLLERR | select.POLLNVAL) for _, events in poll.poll(0)):
            raise SecretRejected("cannot write the new key to standard output: nobody reads it")

    def deliver(self, key: int) -> None:
        """Write what the memfd ``key`` holds; raises ``SecretRejected``."""
        try:
            _write(_STDOUT, key, newline=os.isatty(_STDOUT))
            if stat.S_ISREG(os.fstat(_STDOUT).st_mode):
                os.fsync(_STDOUT)
        except OSError as error:
            raise SecretRejected(f"cannot write the new key to standard output: {error.strerror}") from error


class ToFile:
    """Makes a file (0600; there must be none yet) and writes the key into it, durably.

    On leaving, it goes again unless the key was delivered and, as far as anybody knows, something was committed.
    Entering raises ``SecretRejected``.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1
        self._delivered = False
        self._useless = False

    def __enter__(self) -> Self:
        try:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a path"
            raise SecretRejected(f"cannot create {self._path}: {reason}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What is no LuksrotdError is a bug: better one file too many than a key lost.
        unchanged = isinstance(error, LuksrotdError) and error.outcome is Outcome.UNCHANGED
        if self._useless or (error is not None and (unchanged or not self._delivered)):
            self._remove()
        os.close(self._fd)

    def check(self) -> None:
        """Make room in the file; raises ``SecretRejected``."""
        try:
            os.posix_fallocate(self._fd, 0, _ROOM)
        except OSError as error:
            raise SecretRejected(f"cannot write the new key to {self._path}: {error.strerror}") from error

    def deliver(self, key: int) -> None:
        """Write what the memfd ``key`` holds; raises ``SecretRejected``."""
        try:
            _write(self._fd, key)
            os.ftruncate(self._fd, os.lseek(self._fd, 0, os.SEEK_CUR))
            os.fsync(self._fd)
            self._sync_directory()
        except OSError as error:
            raise SecretRejected(f"cannot write the new key to {self._path}: {error.strerror}") from error
        self._delivered = True

    def forget(self) -> None:
        """The key opens nothing after all: the file goes on leaving."""
        self._useless = True

    def _sync_directory(self) -> None:
        fd = os.open(Path(self._path).absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _remove(self) -> None:
        """Unless somebody has put another file there meanwhile."""
        with suppress(OSError):
            os.ftruncate(self._fd, 0)
            if os.path.samestat(os.fstat(self._fd), os.lstat(self._path)):
                Path(self._path).unlink()


def _write(target: int, key: int, *, newline: bool = False) -> None:
    secret = secrets.read(key)
    try:
        with FileIO(target, "w", closefd=False) as stream, memoryview(secret) as view:
            done = 0
            while done < len(secret):
                done += stream.write(view[done:]) or 0
            if newline:
                stream.write(b"\n")
    finally:
        secrets.wipe(secret)
