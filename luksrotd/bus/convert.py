# SPDX-License-Identifier: GPL-2.0-or-later
"""What callers describe, to what the service works with: secrets, names, object paths.

dbus/org.luksrotd1.Device.xml says how a credential and a new secret are described.  Options: ``bus.options``, results:
``bus.results``.
"""

import os
import stat
from typing import Final

from luksrotd import names
from luksrotd.bus.values import OptionTable
from luksrotd.errors import InvalidRequest, SecretRejected
from luksrotd.rotation.token import check_name

_STORED: Final[OptionTable] = {"fd": "h", "keyfile": "s", "credential": "s"}
CREDENTIAL: Final[OptionTable] = {**_STORED, "token": "i", "pin-fd": "h"}
NEW_SECRET: Final[OptionTable] = {**_STORED, "generate": "b"}
_KEYFILE_MODES: Final = frozenset({0o400, 0o600})


def open_keyfile(path: str) -> int:
    """Open a key file; blocks.  Raises ``InvalidRequest`` for a path that is not absolute.

    ``SecretRejected``, with a reason that tells no more than the caller's polkit right to use key files lets him know
    anyway, unless it is a regular file of root's, with mode 0400 or 0600, under this one name.
    """
    if not path.startswith("/") or "\0" in path:
        raise InvalidRequest("cannot use the key file: its path is not absolute")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise SecretRejected(f"cannot open the key file: {error.strerror}") from error
    try:
        _check_keyfile(os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_keyfile(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise SecretRejected("cannot use the key file: it is not a regular file")
    if status.st_uid != 0:
        raise SecretRejected("cannot use the key file: it does not belong to root")
    if stat.S_IMODE(status.st_mode) not in _KEYFILE_MODES:
        raise SecretRejected("cannot use the key file: its mode is neither 0400 nor 0600")
    if status.st_nlink != 1:
        # Anybody may link to root's files, where fs.protected_hardlinks is off.
        raise SecretRejected("cannot use the key file: it has more than one name")


def key_name(name: str) -> str:
    """The name of a managed key; empty means the default.  Raises ``InvalidRequest`` for one that no key can have."""
    return check_name(name or names.DEFAULT_KEY_NAME)


def device_path(uuid: str) -> str:
    """The object path of the volume with that LUKS UUID."""
    return f"{names.DEVICE_PATH}/{uuid.replace('-', '_')}"


def job_path(number: int) -> str:
    """The object path of the job with that number."""
    return f"{names.JOB_PATH}/{number}"
