# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs the reconcile unit's command, ten times as fast as the program starts: by forks of one that has loaded it.

What runs is ``main``, as in the program; what it starts (wipefs, the worker) are real processes.
"""

import gc
import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn, Self

import luksrotd.ctl.local  # noqa: F401 - what it would load when it runs
from luksrotd.ctl.__main__ import main
from tests.support.kernel import die_with_parent

#: Seconds in which a command must have ended.
PATIENCE: Final = 120
_SAID_MAX: Final = 65536


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: exit status (negative: a signal), and what it said."""

    status: int
    said: str


class Launcher:
    """A child of this process, which is small: fork it before much is loaded.  It shares our mounts."""

    def __init__(self, program: Sequence[str]) -> None:
        self._program = program
        self._ours, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            self._ours.close()
            _serve(theirs)
        theirs.close()
        self._answers = self._ours.makefile("r")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.close()
        self._ours.close()
        os.waitpid(self._pid, 0)

    def run(self, *arguments: str) -> Ended:
        """luksrotctl with these arguments, in a fork."""
        self._ours.sendall(json.dumps(arguments).encode() + b"\n")
        return Ended(**json.loads(self._answers.readline()))

    def execute(self, *arguments: str) -> Ended:
        """The same by the program itself."""
        done = subprocess.run(
            [*self._program, *arguments],
            capture_output=True,
            check=False,
            timeout=PATIENCE,
            preexec_fn=die_with_parent,
        )
        return Ended(done.returncode, (done.stdout + done.stderr).decode(errors="replace"))


def _serve(channel: socket.socket) -> NoReturn:
    """Fork for each line, until nobody asks any more."""
    status = 1
    try:
        die_with_parent()
        gc.collect()
        gc.freeze()
        for line in channel.makefile("r"):
            answer = _forked(json.loads(line))
            channel.sendall(json.dumps({"status": answer.status, "said": answer.said}).encode() + b"\n")
        status = 0
    finally:
        os._exit(status)


def _forked(arguments: Sequence[str]) -> Ended:
    said = os.memfd_create("said")
    try:
        child = os.fork()
        if child == 0:
            _become(said, arguments)
        status = _wait(child)
        return Ended(status, os.pread(said, _SAID_MAX, 0).decode(errors="replace"))
    finally:
        os.close(said)


def _become(said: int, arguments: Sequence[str]) -> NoReturn:
    """Be luksrotctl."""
    status = 255
    try:
        die_with_parent()
        null = os.open(os.devnull, os.O_RDONLY)
        for number, fd in enumerate((null, said, said)):
            os.dup2(fd, number)
        status = main(arguments)
    finally:
        os._exit(status)


def _wait(child: int) -> int:
    """The exit status of a child that ends in time; else it is killed."""
    pidfd = os.pidfd_open(child)
    try:
        if not select.select([pidfd], [], [], PATIENCE)[0]:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
