# SPDX-License-Identifier: GPL-2.0-or-later
"""Workers to be watched, interrupted and replaced by others."""

import asyncio
import contextlib
import os
import signal
import sys
import textwrap
from pathlib import Path

from luksrotd.host.worker import WorkerEngine
from luksrotd.ports import GenerateInto, SecretFd
from luksrotd.rotation.edits import PBKDF_FOR_RANDOM_KEYS, AddKeyslot
from tests.engine.shadow import memfd
from tests.support.makeimage import KEY

#: Each request, to be interrupted.
OPERATIONS = {
    "load": lambda session: session.load(),
    "unlock": lambda session: session.unlock(),
    "apply": lambda session: session.apply([AddKeyslot(1, "new", PBKDF_FOR_RANDOM_KEYS)]),
    "opens": lambda session: session.opens(0, "unlock"),
}


@contextlib.asynccontextmanager
async def worker(shadow, engine=None):
    fds = [memfd(KEY), memfd()]
    try:
        secrets = {"unlock": SecretFd(fds[0]), "new": GenerateInto(fds[1])}
        async with (engine or WorkerEngine()).session(shadow, secrets) as session:
            yield session
    finally:
        for fd in fds:
            os.close(fd)


def resources():
    """Our descriptors and children."""
    while True:
        with contextlib.suppress(FileNotFoundError):  # a thread has ended meanwhile, and another has its children
            children = [Path(task, "children").read_text() for task in Path("/proc/self/task").iterdir()]
            return len(list(Path("/proc/self/fd").iterdir())), "".join(children).split()


async def ended(pidfd):
    """When the process behind ``pidfd`` has ended, which is closed; if it takes a minute, it is killed."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, done.set)
    try:
        async with asyncio.timeout(60):
            await done.wait()
    finally:
        loop.remove_reader(pidfd)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)


def interpreter(directory, script):
    """An executable to start instead of Python; ``sys.argv`` is that of the interpreter."""
    path = directory / "interpreter"
    path.write_text(f"#!{sys.executable} -s\n{textwrap.dedent(script)}\n")
    path.chmod(0o755)
    return str(path)


def impostor(directory, body):
    """A worker that accepts ``start``; ``body`` goes on with ``channel`` and the lines on it, ``lines``."""
    start = """
    import os, signal, socket, sys, time
    channel = socket.socket(fileno=int(sys.argv[-2]))
    lines = channel.makefile("rb")
    lines.readline()
    channel.sendall(b'{"ok":true,"result":null}\\n')
    lines.readline()
    """
    return WorkerEngine(python=interpreter(directory, textwrap.dedent(start) + textwrap.dedent(body)))
