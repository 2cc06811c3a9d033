# SPDX-License-Identifier: GPL-2.0-or-later
"""A worker's process, started without waiting for anything, and so before there is an event loop.

Without asyncio, which takes a third as long to import as a worker to start: see ``luksrotd.ctl.ahead``.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

from luksrotd.errors import EngineError


class Launched:
    """A worker that waits for requests; whoever has it ends it.

    ``channel``: our end of its control socket; ``stderr``: a descriptor of what it complains about.
    """

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket, stderr: int) -> None:
        self.process = process
        self.channel = channel
        self.stderr = stderr

    @property
    def alive(self) -> bool:
        """Whether it has not ended; it is not reaped by that."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return self.process.returncode is None and os.waitid(os.P_PID, self.process.pid, flags) is None

    def kill(self) -> None:
        """Kill it and all of its process group: a worker that was taken over may have forked."""
        if self.process.returncode is None:  # not reaped, so the number is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close what is ours."""
        self.channel.close()
        os.close(self.stderr)

    def end(self) -> None:
        """Kill and reap it, and close what is ours; once, and not again."""
        self.kill()
        self.process.wait()
        self.close()


def launch(python: str = sys.executable, module: str = "luksrotd.worker", groups: Sequence[int] = ()) -> Launched:
    """Start ``module`` in the interpreter ``python``, with these supplementary groups; raises ``EngineError``."""
    with contextlib.ExitStack() as failed, _plumbing(failed) as (ours, theirs, stderr):
        # PYTHONPATH: for a source tree.  Nothing else of the environment concerns a worker.
        environment = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        arguments = ("-P", "-s", "-B", "-m", module, str(theirs.fileno()), str(os.getpid()), *map(str, groups))
        try:
            process = subprocess.Popen(
                (python, *arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=(theirs.fileno(),),
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise EngineError(f"cannot start a worker: {error.strerror}") from error
        failed.pop_all()
        return Launched(process, ours, stderr)


@contextlib.contextmanager
def _plumbing(failed: contextlib.ExitStack) -> Iterator[tuple[socket.socket, socket.socket, int]]:
    """Our end of the control socket, the worker's, and a file for its stderr; ``failed`` closes what is ours.

    A file, not a pipe: it needs no reader, cannot block the worker, and is bounded by the worker's RLIMIT_FSIZE.
    """
    with contextlib.ExitStack() as always:
        try:
            ours, theirs = socket.socketpair()
            failed.enter_context(ours)
            always.enter_context(theirs)
            stderr = os.memfd_create("luksrotd-worker-stderr", os.MFD_CLOEXEC)
            failed.callback(os.close, stderr)
        except OSError as error:
            raise EngineError(f"cannot start a worker: {error.strerror}") from error
        ours.setblocking(False)
        yield ours, theirs, stderr
