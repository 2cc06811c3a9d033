# SPDX-License-Identifier: GPL-2.0-or-later
"""What a process that passes secrets on does to itself first."""

import ctypes
import os
import resource
from typing import Final

from luksrotd.errors import Internal

PR_SET_DUMPABLE: Final = 4
"""linux/prctl.h"""


FILES: Final = 16384
"""Descriptors that are enough for the secrets of all transactions and jobs that may be open, many times over."""


def allow_files() -> None:
    """As many open descriptors as are needed and allowed; callers' secrets are kept as such until they are used."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(FILES, hard)), hard))


def harden() -> None:
    """No core dumps, no ptrace(2) by the same user, and files for nobody else; raises ``Internal`` if refused."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise Internal(f"cannot forbid core dumps: {os.strerror(ctypes.get_errno())}")
