# SPDX-License-Identifier: GPL-2.0-or-later
"""Child processes that never outlive the process that started them."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support import keeper
from tests.support.kernel import die_with_parent

TERM_SECONDS = 5.0


class Children:
    """Starts processes and ends them in reverse order."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[Any]] = []
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(keeper.__file__))], stdin=subprocess.PIPE, start_new_session=True
        )

    def spawn(self, argv: Sequence[str | Path], **popen: Any) -> subprocess.Popen[Any]:
        """Start a process that dies with this one; ``popen`` are further arguments of ``subprocess.Popen``."""
        command = [str(word) for word in argv]
        child = subprocess.Popen(command, preexec_fn=die_with_parent, **popen)  # noqa: PLW1509 - takes no lock
        self._running.append(child)
        self._tell("+", child.pid)
        return child

    def end(self, child: subprocess.Popen[Any]) -> int:
        """Terminate the process, kill it if it does not obey, reap it; its exit status."""
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(TERM_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream is not None and not stream.closed:
                stream.close()
        if child in self._running:
            self._running.remove(child)
            self._tell("-", child.pid)
        return child.returncode

    def close(self) -> None:
        """End all processes, the latest first."""
        for child in reversed(self._running.copy()):
            self.end(child)
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait()

    def _tell(self, sign: str, pid: int) -> None:
        assert self._keeper.stdin is not None
        self._keeper.stdin.write(f"{sign}{pid}\n".encode())
        self._keeper.stdin.flush()
