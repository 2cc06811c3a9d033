# SPDX-License-Identifier: GPL-2.0-or-later
"""Landlock (Linux 5.13): what of the file system this process may still open, whatever its user may."""

import contextlib
import enum
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from typing import Final

from luksrotd.cryptsetup._ffi import ffi, lib


class Access(enum.IntFlag):
    """Those of the rights that are ever granted (linux/landlock.h); the numbers are the kernel's."""

    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3


#: How many rights the versions of Landlock know; all of them are taken away.  Later ones have rights of other kinds.
_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
#: For anything but a directory.
_OF_FILES: Final = Access.READ_FILE | Access.WRITE_FILE
#: Of the system calls, for errors.
_NAMES: Final = {
    lib.SYS_landlock_create_ruleset: "landlock_create_ruleset",
    lib.SYS_landlock_add_rule: "landlock_add_rule",
    lib.SYS_landlock_restrict_self: "landlock_restrict_self",
}
#: The kernel was built or started without Landlock, or a sandbox around this process forbids it.
_ABSENT: Final = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})


def allow_only(granted: Mapping[str, Access]) -> bool:
    """From now on only open what is at or beneath these paths, in these ways; what is open already stays open.

    What lies on no mounted file system (memfds, pipes, sockets) is not concerned.  A path that does not exist is left
    out.  Returns whether the kernel has Landlock; without it, nothing changes.  Raises ``OSError``.
    """
    version = _version()
    if version == 0:
        return False
    handled = (1 << _RIGHTS[min(version, max(_RIGHTS))]) - 1
    attributes = ffi.new("struct landlock_ruleset_attr *", {"handled_access_fs": handled})
    # The size of the first version of the structure: the rest of it is about other things than files.
    size = ffi.sizeof("uint64_t")
    ruleset = _call(lib.SYS_landlock_create_ruleset, ffi.cast("void *", attributes), ffi.cast("size_t", size), 0)
    try:
        for path, access in granted.items():
            with _opened(path) as fd:
                if fd is not None:
                    _grant(ruleset, fd, access)
        _call(lib.SYS_landlock_restrict_self, ruleset, 0)
    finally:
        os.close(ruleset)
    return True


def _version() -> int:
    try:
        none = ffi.cast("size_t", 0)
        return _call(lib.SYS_landlock_create_ruleset, ffi.NULL, none, lib.LANDLOCK_CREATE_RULESET_VERSION)
    except OSError as error:
        if error.errno in _ABSENT:
            return 0
        raise


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int | None]:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        # Nor could it be opened later: for want of the path itself, or of the right to walk there.
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _grant(ruleset: int, fd: int, access: Access) -> None:
    is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
    attributes = ffi.new("struct landlock_path_beneath_attr *")
    attributes.allowed_access, attributes.parent_fd = access if is_directory else access & _OF_FILES, fd
    _call(lib.SYS_landlock_add_rule, ruleset, lib.LANDLOCK_RULE_PATH_BENEATH, ffi.cast("void *", attributes), 0)


def _call(number: int, *arguments: object) -> int:
    result = lib.syscall(number, *(ffi.cast("long", a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(ffi.errno, os.strerror(ffi.errno), _NAMES[number])
    return int(result)
