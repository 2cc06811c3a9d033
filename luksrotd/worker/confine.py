# SPDX-License-Identifier: GPL-2.0-or-later
"""How the worker gives up what it was started with.

Not limited: RLIMIT_NPROC (it counts per user, threads included, and Argon2 needs threads) and memory (the daemon admits
jobs by memory; ``oom_score_adj`` makes the kernel choose the worker when that was wrong).

``/proc/self/fd/N``, by which libcryptsetup opens the shadow, stays usable with PR_SET_DUMPABLE 0, although its entries
then belong to root: for a process's own descriptors proc(5) asks nothing, and a memfd's mode lets every user in.
"""

import os
import pwd
import resource
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from luksrotd import names
from luksrotd.cryptsetup import linux
from luksrotd.errors import EngineError

#: Where neither user exists (an initramfs): the kernel's overflow uid and gid, what ``nobody`` is everywhere else.
OVERFLOW_ID: Final = 65534
#: Descriptors that may be open at once; libcryptsetup needs about five.
MAX_FILES: Final = 64
HIGHEST_FD: Final = 2**31 - 1


def confine(parent: int, groups: Sequence[int] = ()) -> None:
    """Drop root (for ``names.WORKER_USER``) and all that can be done without; raises ``EngineError`` where it fails.

    ``parent`` is the process that the worker must not outlive; ``groups`` are kept beside the user's own, those of the
    devices that a token needs.
    """
    try:
        # While /proc/self still belongs to this user: with the credentials or the dumpable flag it goes to root.
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
        os.chdir("/")
        os.umask(0o077)
        if os.geteuid() == 0:
            user, group = _unprivileged()
            linux.leave_namespaces()  # best effort: a sandbox may forbid it, and then has done it itself
            # Each says EINVAL of a user or group that the user namespace has not.
            with linux.naming("setgroups"):
                os.setgroups(groups)
            with linux.naming(f"setresgid to {group}"):
                os.setresgid(group, group, group)
            with linux.naming(f"setresuid to {user}"):
                os.setresuid(user, user, user)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        linux.forbid_new_privileges()
        linux.forbid_dumping()
        linux.die_with_parent()
    except OSError as error:
        raise EngineError(f"cannot confine the worker: {linux.reason(error)}") from error
    if os.getppid() != parent:
        # It died before die_with_parent() could take effect.
        raise EngineError("cannot work: the parent has gone")


def keep_only(fds: Iterable[int]) -> None:
    """Close every descriptor but the standard ones and ``fds``, and let few more be opened."""
    last = 2
    for fd in sorted(fd for fd in set(fds) if fd > last):
        os.closerange(last + 1, fd)
        last = fd
    os.closerange(last + 1, HIGHEST_FD)
    # Not before: Python takes a range that ends behind this limit to be endless, and ``fds`` may lie behind it.
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_FILES, MAX_FILES))


def limit_writes(size: int) -> None:
    """Let no file grow beyond ``size`` bytes: the shadow may be filled, the machine's memory not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _unprivileged() -> tuple[int, int]:
    for name in (names.WORKER_USER, names.WORKER_FALLBACK_USER):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid != 0 and entry.pw_gid != 0:
            return entry.pw_uid, entry.pw_gid
    return OVERFLOW_ID, OVERFLOW_ID
