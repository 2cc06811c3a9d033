# SPDX-License-Identifier: GPL-2.0-or-later
"""A terminal with luksrotctl in it."""

import errno
import fcntl
import os
import pty
import select
import subprocess
import termios
from contextlib import contextmanager

from tests.ctl.conftest import LUKSROTCTL, die_with_parent, environment

PATIENCE = 60.0
"""Seconds without any output after which a test is given up: a bound, not a synchronization."""


class Terminal:
    def __init__(self, process, master):
        self.process = process
        self.seen = b""
        self._master = master

    def expect(self, text):
        """Wait until ``text`` has been shown since the last time."""
        while text not in self.seen:
            assert self._read(), self.seen
        before, _, self.seen = self.seen.partition(text)
        return before

    def wait(self):
        """Until something, a spinner for one, has been shown."""
        assert self._read(), self.seen

    def type(self, text):
        os.write(self._master, text)

    def echoes(self):
        return bool(termios.tcgetattr(self._master)[3] & termios.ECHO)

    def end(self):
        """What is shown until the end, and the exit status."""
        while self._read():
            pass
        return self.seen, self.process.wait()

    def _read(self):
        readable, _, _ = select.select([self._master], [], [], PATIENCE)
        assert readable, self.seen
        try:
            data = os.read(self._master, 65536)
        except OSError as error:
            if error.errno != errno.EIO:  # how a terminal says that nobody is left on the other side
                raise
            return False
        self.seen += data
        return bool(data)


@contextmanager
def terminal(*arguments, **streams):
    """luksrotctl with a terminal of its own, on which all standard streams are but ``streams``."""
    master, slave = pty.openpty()

    def take_terminal():
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        die_with_parent()

    streams = {"stdin": slave, "stdout": slave, "stderr": slave, **streams}
    command = [*LUKSROTCTL, *map(str, arguments)]
    process = subprocess.Popen(
        command,
        preexec_fn=take_terminal,  # noqa: PLW1509 -- no threads here
        pass_fds=[slave],
        env=environment(TERM="xterm", COLUMNS="200"),
        **streams,
    )
    try:
        os.close(slave)
        yield Terminal(process, master)
    finally:
        process.kill()
        process.wait()
        os.close(master)
