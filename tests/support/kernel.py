# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel interfaces that Python's standard library lacks: mount namespaces, mounts, death signals, loop devices."""

import ctypes
import errno
import fcntl
import os
import signal
import struct
from pathlib import Path
from types import TracebackType
from typing import Final, Self

CLONE_NEWNS: Final = 0x00020000
MS_RDONLY: Final = 0x1
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 0x40000
MNT_DETACH: Final = 2
PR_SET_PDEATHSIG: Final = 1

# linux/loop.h
LOOP_CLR_FD: Final = 0x4C01
LOOP_CONFIGURE: Final = 0x4C0A
LOOP_CTL_GET_FREE: Final = 0x4C82
LO_FLAGS_AUTOCLEAR: Final = 4
LOOP_CONFIG_SIZE: Final = 304
LOOP_CONFIG_RANGE_OFFSET: Final = 8 + 24  # struct loop_config.info.lo_offset, and lo_sizelimit behind it
LOOP_CONFIG_FLAGS_OFFSET: Final = 8 + 52  # struct loop_config.info.lo_flags
BLKFLSBUF: Final = 0x1261  # linux/fs.h

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def enter_private_mount_namespace() -> None:
    """Move the calling process into a mount namespace of its own, from which no mount gets back to the host."""
    _check(_libc.unshare(CLONE_NEWNS), "unshare")
    mount("none", "/", "", MS_REC | MS_PRIVATE)


def mount(source: str | Path, target: str | Path, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    arguments = [os.fsencode(str(word)) for word in (source, target, fstype)]
    result = _libc.mount(*arguments, ctypes.c_ulong(flags), os.fsencode(data) if data else None)
    _check(result, f"mount {target}")


def unmount(target: str | Path, *, lazily: bool = True) -> None:
    """umount2(2); lazily: what is still open keeps working, and nothing new finds it."""
    _check(_libc.umount2(os.fsencode(target), MNT_DETACH if lazily else 0), f"umount {target}")


def die_with_parent() -> None:
    """Have the kernel SIGKILL this process when its parent dies.  Forgotten when the process changes its user."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


class LoopDevice:
    """A loop device over an image file, or ``size`` bytes of it from ``offset`` (0: to its end).

    Detached by ``detach``, and by the kernel when this process dies.

    losetup(8) cannot set LO_FLAGS_AUTOCLEAR, hence LOOP_CONFIGURE by hand.  The descriptor held here is what keeps
    the device alive; it is read-only, so that closing it gives no spurious change event.
    """

    def __init__(self, image: Path, sector_size: int = 512, *, offset: int = 0, size: int = 0) -> None:
        self.image = image
        with image.open("r+b", buffering=0) as backing:
            self.path, self._fd = _attach(backing.fileno(), sector_size, offset, size)

    def forget(self) -> None:
        """Have the kernel write and forget what it has cached: the image was, or is to be, changed behind it."""
        fcntl.ioctl(self._fd, BLKFLSBUF)

    def detach(self) -> None:
        """Detach; idempotent.  Completes when the last other user closes the device."""
        if self._fd < 0:
            return
        try:
            fcntl.ioctl(self._fd, LOOP_CLR_FD)
        finally:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def _attach(backing: int, sector_size: int, offset: int, size: int) -> tuple[Path, int]:
    config = bytearray(LOOP_CONFIG_SIZE)
    struct.pack_into("=II", config, 0, backing, sector_size)
    struct.pack_into("=QQ", config, LOOP_CONFIG_RANGE_OFFSET, offset, size)
    struct.pack_into("=I", config, LOOP_CONFIG_FLAGS_OFFSET, LO_FLAGS_AUTOCLEAR)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(64):  # somebody else may take the free one first
            path = Path(f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}")
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, LOOP_CONFIGURE, bytes(config))
                return path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
            finally:
                os.close(device)
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "no free loop device")
