# SPDX-License-Identifier: GPL-2.0-or-later
"""--escrow: a program that gets the new key on its standard input, before anything is written (docs/unattended.md)."""

import array
import fcntl
import os
import selectors
import signal
import stat
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any, Final

from luksrotd.ctl import secrets
from luksrotd.ctl.request import DATA_LIMIT
from luksrotd.errors import InvalidRequest, LuksrotdError, SecretRejected

#: Seconds that a program has after SIGTERM.
_GRACE: Final = 5
_CHUNK: Final = 65536
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def checked(command: str) -> str:
    """What is to be run for ``command``, without symbolic links; raises ``InvalidRequest``.

    For root, nobody else may be able to put another program in its place.
    """
    path = Path(command)
    if not path.is_absolute():
        raise _unusable(command, "it is not an absolute path")
    try:
        program = path.resolve(strict=True)
        status = program.stat()
    except (OSError, ValueError, RuntimeError) as error:
        raise _unusable(command, getattr(error, "strerror", None) or "it is not a path") from error
    if not stat.S_ISREG(status.st_mode) or not os.access(program, os.X_OK):
        raise _unusable(command, "it is not an executable file")
    if os.geteuid() == 0:
        for way in {path, program}:
            _check_owners(command, way)
    return str(program)


def give(command: str, key: int, facts: Mapping[str, str], seconds: int) -> Mapping[str, Any] | None:
    """Run what ``checked`` has returned, with the key that the memfd ``key`` holds on its standard input.

    ``facts`` are added to its environment.  The associated data that it prints; None if it prints nothing.  It has
    ``seconds``, and must read the whole key and end with status 0.  Raises ``SecretRejected``.
    """
    secret = secrets.read(key)
    try:
        with _readable(secret) as reader:
            printed = _run(command, reader, {**os.environ, **facts}, seconds)
            if _unread(reader):
                raise _failed(command, "it has not read the key")
        return _data(command, printed, secret)
    finally:
        secrets.wipe(secret)


def _check_owners(command: str, path: Path) -> None:
    """The file and its folder are root's, and the folders above, where a sticky one is as good."""
    for up, one in enumerate((path, *path.parents)):
        status = one.stat()
        open_to_others = status.st_mode & _OTHERS_WRITE and not (up > 1 and status.st_mode & stat.S_ISVTX)
        if status.st_uid != 0 or open_to_others:
            raise _unusable(command, f"others than root can write {one}")


@contextmanager
def _readable(secret: bytearray) -> Iterator[int]:
    """The end of a pipe from which ``secret`` can be read, and then an end of file."""
    reader, writer = os.pipe()
    try:
        with FileIO(writer, "w") as stream:
            stream.write(secret)  # far less than a pipe holds
        yield reader
    finally:
        os.close(reader)


def _unread(reader: int) -> int:
    """Bytes that nobody has taken from a pipe."""
    count = array.array("i", [0])
    fcntl.ioctl(reader, termios.FIONREAD, count)
    return count[0]


def _run(command: str, reader: int, environment: Mapping[str, str], seconds: int) -> bytearray:
    """What it prints, when it has ended with status 0; its standard error is ours.  Its process group goes with it."""
    end = time.monotonic() + seconds
    try:
        # In a session of its own: Ctrl-C comes to us alone, and what it has started can be found.
        process = subprocess.Popen(
            [command], stdin=reader, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
    except (OSError, ValueError) as error:
        raise _failed(command, getattr(error, "strerror", None) or "it cannot be run") from error
    try:
        assert process.stdout is not None  # noqa: S101 -- for mypy: it is a pipe
        with process.stdout:
            printed = _printed(command, process.pid, process.stdout, end)
    except BaseException:
        _stop(process)
        raise
    finally:
        # Before it is waited for: until then nobody else can have its number.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    if status != 0:
        raise _failed(command, f"it ended by signal {-status}" if status < 0 else f"its exit status is {status}")
    return printed


def _printed(command: str, pid: int, stdout: IO[bytes], end: float) -> bytearray:
    """All that comes until the process ends."""
    printed, fd = bytearray(), os.pidfd_open(pid)
    with selectors.DefaultSelector() as selector:
        try:
            selector.register(fd, selectors.EVENT_READ)
            selector.register(stdout, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select(max(0, end - time.monotonic()))}
                if not ready:
                    raise _failed(command, "it does not come to an end")
                if stdout not in ready:
                    return printed
                if not (chunk := os.read(stdout.fileno(), _CHUNK)):
                    selector.unregister(stdout)
                printed += chunk
                if len(printed) > DATA_LIMIT:
                    raise _failed(command, f"it prints more than {DATA_LIMIT} bytes")
        finally:
            os.close(fd)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, and wait a little; it is a zombie then, or still there."""
    fd = os.pidfd_open(process.pid)
    try:
        os.killpg(process.pid, signal.SIGTERM)
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            selector.select(_GRACE)
    finally:
        os.close(fd)


def _data(command: str, printed: bytearray, secret: bytearray) -> Mapping[str, Any] | None:
    from luksrotd.rotation.token import parse_data  # noqa: PLC0415 - only where it is needed: start-up stays fast

    try:
        if secret in printed:
            raise _failed(command, "it prints the key, and what it prints can be read by everybody who has the volume")
        text = printed.decode()
        return parse_data(text) if text.strip() else None
    except UnicodeDecodeError as error:
        raise _failed(command, "what it prints is not UTF-8") from error
    except InvalidRequest as error:
        raise _failed(command, error.message) from error
    finally:
        secrets.wipe(printed)


def _unusable(command: str, why: str) -> LuksrotdError:
    return InvalidRequest(f"cannot use the escrow command {command}: {why}")


def _failed(command: str, why: str) -> LuksrotdError:
    return SecretRejected(f"cannot give the new key to {command}: {why}")
