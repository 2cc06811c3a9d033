# SPDX-License-Identifier: GPL-2.0-or-later
"""What every call of libcryptsetup shares: its log, and errno values in, ``EngineError`` out."""

import errno
from typing import Any, Final, NoReturn

from luksrotd.cryptsetup._ffi import ffi, lib
from luksrotd.errors import EngineError

#: Of the last lines that libcryptsetup logged, in characters.
MAX_LOG: Final = 300

_log: list[str] = []


@ffi.def_extern()  # type: ignore[untyped-decorator]  # cffi has no types
def luksrotd_log(level: int, message: Any, user: Any) -> None:
    """Keep libcryptsetup's error lines, which go to stderr by default, for the message of the error to come."""
    if level == lib.CRYPT_LOG_ERROR:
        _log.append(ffi.string(message, MAX_LOG).decode("ascii", "replace"))


lib.crypt_set_debug_level(lib.CRYPT_DEBUG_NONE)
lib.crypt_set_log_callback(ffi.NULL, lib.luksrotd_log, ffi.NULL)


def begin() -> None:
    """Before a call whose log matters."""
    _log.clear()


def check(result: int, what: str) -> int:
    """What a call returned; raises ``EngineError`` if it is a negative errno value."""
    if result < 0:
        _fail(result, what)
    return result


def _fail(result: int, what: str) -> NoReturn:
    name = errno.errorcode.get(-result, str(result))
    raise EngineError(f"cannot {what}: {name}{logged()}")


def logged() -> str:
    """What libcryptsetup said about it, for people; never to decide by."""
    text = "; ".join(line.strip().rstrip(".") for line in _log)[:MAX_LOG]
    return f" ({''.join(c if c.isprintable() else '?' for c in text)})" if text else ""
