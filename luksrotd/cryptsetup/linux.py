# SPDX-License-Identifier: GPL-2.0-or-later
"""The system calls that the worker needs and that Python 3.11 lacks; here, because cffi is confined to this package."""

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from luksrotd.cryptsetup._ffi import ffi, lib
from luksrotd.cryptsetup.memory import SafeMemory


@contextmanager
def naming(call: str) -> Iterator[None]:
    """Have an ``OSError`` that leaves the block name the system call, as its ``filename``."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, call) from error


def reason(error: OSError) -> str:
    """Which call failed, if the error names it, and why."""
    return ": ".join(str(part) for part in (error.filename, error.strerror) if part)


def forbid_new_privileges() -> None:
    """PR_SET_NO_NEW_PRIVS: no later exec gains anything.  Raises ``OSError``."""
    _prctl(lib.PR_SET_NO_NEW_PRIVS, 1)


def forbid_dumping() -> None:
    """PR_SET_DUMPABLE 0: no core, and nobody but root may read this process's memory.  Raises ``OSError``."""
    _prctl(lib.PR_SET_DUMPABLE, 0)


def die_with_parent() -> None:
    """PR_SET_PDEATHSIG SIGKILL; every change of credentials clears it (prctl(2)).  Raises ``OSError``."""
    _prctl(lib.PR_SET_PDEATHSIG, signal.SIGKILL)


def leave_namespaces() -> list[str]:
    """Move to a network, System V IPC and host name space of its own; the names of those that could not be left."""
    kinds = {"network": lib.CLONE_NEWNET, "ipc": lib.CLONE_NEWIPC, "uts": lib.CLONE_NEWUTS}
    return [name for name, flag in kinds.items() if lib.unshare(flag) != 0]


def fill_randomly(memory: SafeMemory) -> None:
    """Fill all of ``memory`` by getrandom(2), straight into place.  Raises ``OSError``."""
    done = 0
    while done < memory.size:
        count = lib.getrandom(memory.address + done, memory.size - done, 0)
        if count > 0:
            done += count
        elif ffi.errno != errno.EINTR:
            raise OSError(ffi.errno, os.strerror(ffi.errno))


def _prctl(option: int, argument: int) -> None:
    zero = ffi.cast("unsigned long", 0)
    if lib.prctl(option, ffi.cast("unsigned long", argument), zero, zero, zero) != 0:
        raise OSError(ffi.errno, os.strerror(ffi.errno), f"prctl {option}")
