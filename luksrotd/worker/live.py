# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -P -m luksrotd.worker.live CONTROL-FD PARENT-PID``: libcryptsetup on the device itself.

For the stepwise engine only (docs/adr/0009-stepwise-engine.md); the daemon starts no such process.  It serves the same
requests as the sandboxed worker, and "the shadow" is a descriptor of the device.  libcryptsetup takes its own locks
there, so the caller must hold none.  It keeps its user, as it needs the device and libcryptsetup's lock directory.
"""

import os
import resource
import stat
import sys
from pathlib import Path

from luksrotd.cryptsetup import linux
from luksrotd.errors import EngineError, InvalidRequest
from luksrotd.worker.serve import serve
from luksrotd.worker.session import Session


class LiveSession(Session):
    """One device."""

    def _seal(self, *, tokens: bool) -> None:
        """Not this one: it needs the device, the lock directory, and with root what root may."""

    def _writable_size(self, shadow: int) -> int:
        mode = os.fstat(shadow).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise InvalidRequest("cannot work: neither a block device nor a file")
        return os.lseek(shadow, 0, os.SEEK_END)


def confine(parent: int) -> None:
    """Give up what can be done without; raises ``EngineError`` where it fails, or if ``parent`` has gone."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
        os.chdir("/")
        os.umask(0o077)
        linux.leave_namespaces()  # best effort: only root may
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        linux.forbid_new_privileges()
        linux.forbid_dumping()
        linux.die_with_parent()
    except OSError as error:
        raise EngineError(f"cannot confine the worker: {linux.reason(error)}") from error
    if os.getppid() != parent:
        raise EngineError("cannot work: the parent has gone")


if __name__ == "__main__":
    os._exit(serve(int(sys.argv[1]), int(sys.argv[2]), LiveSession, confine))
