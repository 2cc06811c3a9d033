# SPDX-License-Identifier: GPL-2.0-or-later
"""Header backups in files of the file system."""

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

from luksrotd.errors import DeviceError, InvalidRequest, UnknownDevice

#: As cryptsetup makes them: not even the owner writes a backup by mistake.
MODE: Final = 0o400
_CHUNK: Final = 1024 * 1024


class BackupFiles:
    """``ports.HeaderFiles``."""

    def create(self, path: str, content: bytes, headers: int) -> None:
        """Write the file in two steps, each flushed, then its name in the directory."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, MODE)
        except FileExistsError as error:
            raise InvalidRequest(
                f"cannot write {path}: there is something of that name, which is left alone"
            ) from error
        except (OSError, ValueError) as error:
            _fail("write", path, error)
        try:
            os.fchmod(fd, MODE)  # whatever the umask is
            _write(fd, content, headers, len(content))
            os.fsync(fd)
            _write(fd, content, 0, headers)
            os.fsync(fd)
            _flush_directory(path)
        except BaseException as error:
            with suppress(OSError):
                if os.path.samestat(os.fstat(fd), Path(path).lstat()):
                    Path(path).unlink()
            if isinstance(error, OSError):
                _fail("write", path, error)
            raise
        finally:
            os.close(fd)

    def read(self, path: str, limit: int) -> bytes:
        """As much of the file as is wanted; a pipe or a device is refused."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise UnknownDevice(f"cannot open {path}: {error.strerror}") from error
        except (OSError, ValueError) as error:
            _fail("open", path, error)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise InvalidRequest(f"cannot use {path}: it is not a regular file")
            return _read(fd, limit)
        except OSError as error:
            _fail("read", path, error)
        finally:
            os.close(fd)


def _write(fd: int, content: bytes, start: int, end: int) -> None:
    with memoryview(content) as whole:
        while start < end:
            start += os.pwrite(fd, whole[start : min(end, start + _CHUNK)], start)


def _read(fd: int, limit: int) -> bytes:
    parts = []
    while limit and (part := os.read(fd, min(limit, _CHUNK))):
        parts.append(part)
        limit -= len(part)
    return b"".join(parts)


def _flush_directory(path: str) -> None:
    directory = os.open(Path(path).absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _fail(verb: str, path: str, error: OSError | ValueError) -> NoReturn:
    reason = error.strerror if isinstance(error, OSError) else "not a path"
    raise DeviceError(f"cannot {verb} {path}: {reason}") from error
