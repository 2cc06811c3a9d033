# SPDX-License-Identifier: GPL-2.0-or-later
"""The three locks of a volume, all of them flock(2): job, libcryptsetup's metadata lock, systemd's disk lock.

The metadata lock does what libcryptsetup's lib/utils_device_locking.c does, so that both exclude each other.
flock(2) has no time-out and cannot be awaited, so every wait here is a LOCK_NB that is tried again, a little later
each time, until its deadline.
"""

import asyncio
import errno
import fcntl
import os
import stat
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final

from luksrotd import names
from luksrotd.errors import Busy, LockError, LockTimeout
from luksrotd.host.blockdev import identity_of
from luksrotd.host.precedence import WritersFirst
from luksrotd.ports import DeviceIdentity, HeaderDevice

LOCK_WAIT: Final = 30.0
"""Seconds; ``cryptsetup luksAddKey`` holds the metadata lock for as long as it derives its key."""

_FIRST_DELAY: Final = 0.001
_LONGEST_DELAY: Final = 0.05


def runtime_directory(environment: Mapping[str, str] = os.environ, *, uid: int | None = None) -> str:
    """Where job locks are: /run/luksrotd for root, ``$XDG_RUNTIME_DIR/luksrotd`` for others (else ``LockError``)."""
    if (os.geteuid() if uid is None else uid) == 0:
        return names.RUNTIME_DIRECTORY
    base = environment.get("XDG_RUNTIME_DIR", "")
    if not base.startswith("/"):
        raise LockError("cannot lock: XDG_RUNTIME_DIR is not set")
    return str(Path(base, Path(names.RUNTIME_DIRECTORY).name))


class HostLocks:
    """``ports.DeviceLocks``.  Waits in seconds; with 0 a lock is had at once or not at all."""

    def __init__(
        self,
        *,
        runtime: str | None = None,
        cryptsetup: str = names.CRYPTSETUP_LOCK_DIRECTORY,
        job_wait: float = 0.0,
        lock_wait: float = LOCK_WAIT,
    ) -> None:
        self._runtime = runtime
        self._cryptsetup = cryptsetup
        self._job_wait = job_wait
        self._lock_wait = lock_wait
        self._precedence = WritersFirst()

    @asynccontextmanager
    async def job(self, device: HeaderDevice) -> AsyncIterator[None]:
        """Hold luksrotd's own lock; ``Busy`` when it is not to be had within ``job_wait``."""
        runtime = self._runtime or runtime_directory()
        async with _named_lock(runtime, f"lock-{device.identity}", fcntl.LOCK_EX, self._job_wait, own=True) as held:
            if not held:
                raise Busy(f"cannot work on {device.path}: another process is at work on it")
            yield

    @asynccontextmanager
    async def metadata(self, device: HeaderDevice, *, exclusive: bool) -> AsyncIterator[None]:
        """Hold libcryptsetup's lock; ``LockTimeout`` when it is not to be had within ``lock_wait``."""
        operation = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        identity = device.identity
        with ExitStack() as waiting:
            if exclusive:
                waiting.enter_context(self._precedence.writer(identity))
            elif not await self._precedence.reader(identity, self._lock_wait):
                raise LockTimeout(f"cannot lock {device.path}: a change of it waits for its LUKS2 metadata lock")
            if identity.block:
                lock = _named_lock(self._cryptsetup, f"L_{identity.major}:{identity.minor}", operation, self._lock_wait)
            else:
                lock = _image_lock(device, operation, self._lock_wait)
            async with lock as held:
                waiting.close()
                if not held:
                    raise LockTimeout(f"cannot lock {device.path}: its LUKS2 metadata lock is held by another process")
                yield

    @asynccontextmanager
    async def whole_disk(self, device: HeaderDevice) -> AsyncIterator[None]:
        """Hold systemd's block device lock (systemd.io/BLOCK_DEVICE_LOCKING); ``LockTimeout`` as for ``metadata``."""
        if not device.identity.block:
            yield
            return
        with ExitStack() as closing:
            node, fd = _open_whole_disk(device.identity)
            closing.callback(os.close, fd)
            if not await _flock(fd, fcntl.LOCK_EX, _deadline(self._lock_wait), node):
                raise LockTimeout(f"cannot lock {node}: its block device lock is held by another process")
            yield


# -- a lock file in a directory ----------------------------------------------------------------------------------


@asynccontextmanager
async def _named_lock(
    directory: str, name: str, operation: int, wait: float, *, own: bool = False
) -> AsyncIterator[bool]:
    path = f"{directory}/{name}"
    with _open_directory(directory, own=own) as base:
        fd = await _lock_file(base, name, path, operation, _deadline(wait))
        if fd is None:
            yield False
            return
        try:
            yield True
        finally:
            _unlock_file(base, name, fd)


@contextmanager
def _open_directory(path: str, *, own: bool) -> Iterator[int]:
    """The lock directory, made if it is missing; ``own``: nobody else may be able to put anything into it."""
    try:
        fd = _open_or_make(path)
    except OSError as error:
        raise LockError(f"cannot use the lock directory {path}: {_reason(error)}") from error
    try:
        status = os.fstat(fd)
        if own and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
            raise LockError(f"cannot use the lock directory {path}: others can write to it")
        yield fd
    finally:
        os.close(fd)


def _open_or_make(path: str) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    parent = os.open(Path(path).parent, flags)
    try:
        base = Path(path).name
        try:
            return os.open(base, flags | os.O_NOFOLLOW, dir_fd=parent)
        except FileNotFoundError:
            with suppress(FileExistsError):
                os.mkdir(base, 0o700, dir_fd=parent)
            return os.open(base, flags | os.O_NOFOLLOW, dir_fd=parent)
    finally:
        os.close(parent)


async def _lock_file(base: int, name: str, path: str, operation: int, deadline: float) -> int | None:
    while True:
        with ExitStack() as closing:
            try:
                fd = os.open(name, os.O_CREAT | os.O_NOFOLLOW | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=base)
            except OSError as error:
                raise LockError(f"cannot open the lock file {path}: {_reason(error)}") from error
            closing.callback(os.close, fd)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise LockError(f"cannot use the lock file {path}: not a regular file")
            if not await _flock(fd, operation, deadline, path):
                return None
            # Whoever had it before may have unlinked it: then this lock excludes nobody.
            if _is_named(base, name, fd):
                closing.pop_all()
                return fd


def _unlock_file(base: int, name: str, fd: int) -> None:
    """Release, and remove the file if nobody else is using it (libcryptsetup: release_lock_handle)."""
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_named(base, name, fd):
            os.unlink(name, dir_fd=base)
    os.close(fd)


def _is_named(base: int, name: str, fd: int) -> bool:
    try:
        named = os.stat(name, dir_fd=base, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(named, os.fstat(fd))


# -- a lock on the file or node itself ---------------------------------------------------------------------------


@asynccontextmanager
async def _image_lock(device: HeaderDevice, operation: int, wait: float) -> AsyncIterator[bool]:
    with ExitStack() as closing:
        fd = _open_image(device.path)
        closing.callback(os.close, fd)
        _check_same(device, os.fstat(fd))
        held = await _flock(fd, operation, _deadline(wait), device.path)
        if held:
            # Renamed over while we waited: libcryptsetup would lock, and read, the new file.
            _check_same(device, _stat_image(device.path))
        yield held


def _open_image(path: str) -> int:
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        try:
            return os.open(path, os.O_RDWR | flags)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY):
                raise
            return os.open(path, os.O_RDONLY | flags)
    except OSError as error:
        raise LockError(f"cannot lock {path}: {_reason(error)}") from error


def _stat_image(path: str) -> os.stat_result:
    try:
        return Path(path).stat()
    except OSError as error:
        raise LockError(f"cannot lock {path}: {_reason(error)}") from error


def _check_same(device: HeaderDevice, status: os.stat_result) -> None:
    if identity_of(status) != device.identity:
        raise LockError(f"cannot lock {device.path}: it was replaced by another file")


def _open_whole_disk(identity: DeviceIdentity) -> tuple[str, int]:
    """The node of the disk that the device is (a partition of), and a descriptor; ``LockError`` if there is none.

    Opened for reading: closing a descriptor that was open for writing would make udev probe the disk.
    """
    number = f"{identity.major}:{identity.minor}"
    try:
        entry = Path("/sys/dev/block", number).resolve(strict=True)
        if (entry / "partition").exists():
            entry = entry.parent
        uevent = dict(line.split("=", 1) for line in (entry / "uevent").read_text().splitlines() if "=" in line)
        node = f"/dev/{uevent['DEVNAME']}"
        fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except (OSError, KeyError) as error:
        raise LockError(f"cannot find the disk of block device {number}: {_reason(error)}") from error
    found = identity_of(os.fstat(fd))
    if found != DeviceIdentity(True, int(uevent["MAJOR"]), int(uevent["MINOR"])):
        os.close(fd)
        raise LockError(f"cannot lock {node}: another device has its name")
    return node, fd


# -- waiting -----------------------------------------------------------------------------------------------------


def _deadline(wait: float) -> float:
    return asyncio.get_running_loop().time() + wait


async def _flock(fd: int, operation: int, deadline: float, path: str) -> bool:
    """flock(2) until ``deadline`` (loop time); whether it was had."""
    loop = asyncio.get_running_loop()
    delay = _FIRST_DELAY
    while True:
        try:
            fcntl.flock(fd, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            left = deadline - loop.time()
            if left <= 0:
                return False
            await asyncio.sleep(min(delay, left))
            delay = min(delay * 1.5, _LONGEST_DELAY)
        except OSError as error:
            raise LockError(f"cannot lock {path}: {_reason(error)}") from error
        else:
            return True


def _reason(error: OSError | KeyError) -> str:
    if isinstance(error, KeyError):
        return "it has no name"
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return "not what it must be (a symbolic link or another kind of file)"
    return error.strerror or str(error)
