# SPDX-License-Identifier: GPL-2.0-or-later
"""Kills what a test process leaves behind when it dies, be it by SIGKILL.

PR_SET_PDEATHSIG is not enough: the kernel forgets it when a process changes its user, as dbus-daemon and polkitd do.
So this small process (``python keeper.py``) is told each pid on its standard input, and when that reaches its end,
because nobody holds the other side any more, it kills them, latest first.  It holds pidfds, so a recycled pid is safe.
"""

import os
import signal
import sys


def main() -> None:
    """Read ``+PID`` and ``-PID`` lines until the end of the input, then kill."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's interrupt is for the tests, which end in order
    kept: dict[int, int] = {}
    for line in sys.stdin:
        pid = int(line[1:])
        if line.startswith("+"):
            try:
                kept[pid] = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
        elif pid in kept:
            os.close(kept.pop(pid))
    for pidfd in reversed(list(kept.values())):
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    main()
