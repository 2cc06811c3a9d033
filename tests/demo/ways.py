# SPDX-License-Identifier: GPL-2.0-or-later
"""The two ways in which the demo works: through the daemon on a loop device, or without one on an image file."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from luksrotd import names
from tests.demo.commands import CHEAP, Commands
from tests.demo.screen import Broken, Screen, check
from tests.support.testbed import PROJECT, TestBed

PREFIX = "luksrotd-demo-"
"""Of the name of the image: the demo's daemon sees no other volume of the machine."""
FIRST_HEADER_WRITE = 2
"""Counted from 0: the new key area and its flush come before (docs/spec/commit-protocol.md)."""
KILLED_THERE = {"kill": FIRST_HEADER_WRITE, "when": "after"}
WAIT_SECONDS = 30.0
STATE_UNKNOWN = 4
NAME = names.DEFAULT_KEY_NAME
T = TypeVar("T")


class Way(Protocol):
    """How a key is enrolled and rotated; ``target`` is the volume, and ``name`` how commands name it."""

    target: Path
    name: str

    def rotate(self, old: str, new: str, data: str) -> None:
        """Rotate the key to completion."""

    def enroll(self, main: str, new: str, data: str) -> None:
        """Give the volume its key."""

    def rotate_until_killed(self, old: str, new: str, data: str) -> None:
        """Begin a rotation that is killed right after its first header write."""


class ThroughTheDaemon:
    """Over the system bus."""

    def __init__(self, screen: Screen, commands: Commands, bed: TestBed, node: Path) -> None:
        self.target = node
        self.name = str(node)
        self._screen = screen
        self._commands = commands
        self._bed = bed
        self._object = ""

    def enroll(self, main: str, new: str, data: str) -> None:
        """With luksrotctl; before it, somebody who may not."""
        keys = ("--key-file", main, "--new-keyfile", new)
        with self._daemon():
            with self._screen.step("the daemon owns org.luksrotd1, and has found the volume by udev"):
                said = self._commands.luksrotctl("list")
                check(self.name in said, "luksrotctl does not list the volume")
            with self._screen.step("a user without the right is refused by polkit, and nothing is changed"):
                self._refused(main, new)
            with self._screen.step("luksrotctl enrols a backup key with associated data, over D-Bus"):
                self._commands.luksrotctl("enroll", self.name, *keys, "--data", data, *CHEAP)
            with self._screen.step("the daemon shows it, with its associated data"):
                said = self._commands.luksrotctl("show", self.name)
                check(data in said, "luksrotctl show does not show the associated data")

    def rotate(self, old: str, new: str, data: str) -> None:
        """With busctl: the call of D-Bus itself."""
        busctl = self._commands.busctl_call
        with self._daemon(), self._screen.step("busctl rotates the key over D-Bus: keys go as key files of root"):
            credential = ("1", "keyfile", "s", str(self._commands.directory / old))
            secret = ("1", "keyfile", "s", str(self._commands.directory / new))
            options = ("3", "data", "s", data, "pbkdf", "s", "pbkdf2", "pbkdf-force-iterations", "u", "1000")
            job = busctl(self._object, "Device", "Rotate", "sa{sv}a{sv}a{sv}", NAME, *credential, *secret, *options)
            self._wait(lambda: self._commands.property(job, "Job", "State", quiet=True) not in _UNDER_WAY)
            state = self._commands.property(job, "Job", "State")
            error = self._commands.property(job, "Job", "ErrorMessage", quiet=True)
            check(state == "finished", f"the job is {state}: {error}")
            outcome = self._commands.property(job, "Job", "Outcome")
            check(outcome == "committed", f"the outcome is {outcome}")

    def rotate_until_killed(self, old: str, new: str, data: str) -> None:
        """The daemon is killed."""
        with self._daemon(KILLED_THERE) as daemon:
            with self._screen.step(
                "luksrotctl begins a rotation, and loses the daemon: exit status 4, state not known"
            ):
                keys = ("--key-file", old, "--new-keyfile", new)
                arguments = ("rotate", self.name, *keys, "--data", data, *CHEAP)
                self._commands.luksrotctl(*arguments, status=STATE_UNKNOWN)
            with self._screen.step("the daemon was ended by SIGKILL, right after its first header write"):
                status = daemon.wait(WAIT_SECONDS)
                check(status == -signal.SIGKILL, f"the daemon ended with {status}")

    def _refused(self, main: str, new: str) -> None:
        before = self.target.read_bytes()
        credential = ("1", "keyfile", "s", str(self._commands.directory / main))
        secret = ("1", "keyfile", "s", str(self._commands.directory / new))
        arguments = ("sa{sv}a{sv}a{sv}", NAME, *credential, *secret, "0")
        nobody = self._bed.user("nobody").pw_uid
        said = self._commands.busctl_call(self._object, "Device", "Enroll", *arguments, user=nobody, status=1)
        check("not allowed by polkit" in said, "the refusal is not one of polkit")
        check(self.target.read_bytes() == before, "the volume has changed")

    @contextmanager
    def _daemon(self, fault: dict[str, Any] | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """The daemon, which has found the volume; what it says is told only if something goes wrong."""
        log = self._bed.dir / "luksrotd.log"
        argv = [sys.executable, "-m", "tests.support.daemon_launcher", json.dumps({"prefix": PREFIX, **(fault or {})})]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, log.open("wb") as output:
            manager.bind(f"\0luksrotd-demo-{time.monotonic_ns()}")
            address = manager.getsockname().decode().replace("\0", "@")
            environment = {
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "PYTHONPATH": str(PROJECT),
                "NOTIFY_SOCKET": address,
                "STATE_DIRECTORY": str(self._bed.dir / "state"),
            }
            daemon = self._bed.spawn(argv, cwd=PROJECT, env=environment, stdin=subprocess.DEVNULL, stderr=output)
            try:
                self._wait_until_ready(manager, daemon)
                self._object = self._wait(self._find)
                yield daemon
            except (Broken, subprocess.SubprocessError) as error:
                raise Broken(f"{error}\nthe daemon said:\n{log.read_text(errors='replace')}") from error
            finally:
                self._bed.end(daemon)

    def _wait_until_ready(self, manager: socket.socket, daemon: subprocess.Popen[bytes]) -> None:
        manager.settimeout(0.1)

        def ready() -> bool:
            check(daemon.poll() is None, f"the daemon ended with {daemon.returncode} before it was ready")
            try:
                return b"READY=1" in manager.recv(4096)
            except TimeoutError:
                return False

        self._wait(ready)

    def _find(self) -> str:
        """The volume's object; empty while udev has not told the daemon of it."""
        quietly: dict[str, Any] = {"status": None, "quiet": True}
        said = self._commands.busctl_call(names.ROOT_PATH, "Manager", "GetDevice", "sa{sv}", self.name, "0", **quietly)
        return said if said.startswith(names.DEVICE_PATH) else ""

    def _wait(self, asked: Callable[[], T]) -> T:
        """Ask until there is an answer."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not (answer := asked()):
            check(time.monotonic() < deadline, f"nothing happened within {WAIT_SECONDS:g} s")
            time.sleep(0.02)
        return answer


_UNDER_WAY = ("queued", "running", "committing")


class WithoutDaemon:
    """``luksrotctl --direct`` on an image file."""

    def __init__(self, screen: Screen, commands: Commands, image: Path) -> None:
        self.target = image
        self.name = image.name  # commands run where it is
        self._screen = screen
        self._commands = commands

    def enroll(self, main: str, new: str, data: str) -> None:
        """With luksrotctl."""
        keys = ("--key-file", main, "--new-keyfile", new)
        with self._screen.step("luksrotctl enrols a backup key with associated data"):
            self._commands.luksrotctl("--direct", "enroll", self.name, *keys, "--data", data, *CHEAP)
        with self._screen.step("it is shown, with its associated data"):
            said = self._commands.luksrotctl("--direct", "show", self.name)
            check(data in said, "luksrotctl show does not show the associated data")

    def rotate(self, old: str, new: str, data: str) -> None:
        """With luksrotctl."""
        with self._screen.step("luksrotctl rotates the key"):
            self._commands.luksrotctl(*self._rotation(old, new, data))

    def rotate_until_killed(self, old: str, new: str, data: str) -> None:
        """luksrotctl is killed."""
        real = (sys.executable, "-m", "tests.demo.killed", json.dumps(KILLED_THERE))
        with self._screen.step("luksrotctl was ended by SIGKILL, right after its first header write"):
            self._commands.run("luksrotctl", *self._rotation(old, new, data), real=real, status=-signal.SIGKILL)

    def _rotation(self, old: str, new: str, data: str) -> tuple[str, ...]:
        keys = ("--key-file", old, "--new-keyfile", new)
        return ("--direct", "rotate", self.name, *keys, "--data", data, *CHEAP)
