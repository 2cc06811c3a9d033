# SPDX-License-Identifier: GPL-2.0-or-later
"""A Debian in a container, with systemd as PID 1.

    with Container(roots.installed("trixie"), devices=[loop.path]) as container:
        container.run("systemctl", "start", "luksrotd.service")

It boots in half a second on a throw-away layer, and dies with this process; nothing of it is left on the machine.  Real
are systemd with all that confines a service, but for limits of memory; the bus, polkit, logind, the journal, and udevd,
whose events are those of the whole machine.  It has no network and no device-mapper.

At boot only the container's own devices get an event, for those that systemd-udev-trigger.service asks for otherwise
would reach every udevd of the machine.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Final, Self

from tests.beds.supervisor import Orders, cgroup_mounts
from tests.support.kernel import die_with_parent

PROJECT: Final = Path(__file__).resolve().parents[2]
WAIT_SECONDS: Final = 60.0
ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}
TRIGGER: Final = "/etc/systemd/system/systemd-udev-trigger.service.d/50-bed.conf"


class Container:
    """See the module.

    ``binds`` are paths in the container → files or folders of the host, read-only there; ``devices`` are nodes of the
    host, which have the same path in the container; ``files`` are paths → contents, there before the first boot.
    """

    def __init__(
        self,
        root: Path,
        *,
        binds: Mapping[str, Path] | None = None,
        devices: Sequence[Path] = (),
        files: Mapping[str, str] | None = None,
    ) -> None:
        self._root = root
        self._binds = {inside: str(host) for inside, host in (binds or {}).items()}
        self._devices = tuple(str(path) for path in devices)
        self._files = {TRIGGER: _trigger(self._devices), **(files or {})}
        self._leader = 0

    def __enter__(self) -> Self:
        scratch = tempfile.mkdtemp(prefix="luksrotd-bed-")
        self.name = f"luksrotd-bed-{token_hex(4)}"
        orders = Orders(self.name, str(self._root), scratch, self._binds, self._devices, self._files)
        self._console = tempfile.TemporaryFile()
        self._supervisor = subprocess.Popen(
            [sys.executable, "-m", "tests.beds.supervisor", orders.dumps()],
            cwd=PROJECT,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._console,
            text=True,
            start_new_session=True,
        )
        try:
            self._wait_for_boot()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    @property
    def leader(self) -> int:
        """The process id, on the host, of the container's PID 1."""
        return self._leader

    @property
    def console(self) -> str:
        """What the container, and systemd-nspawn, have said there."""
        return os.pread(self._console.fileno(), 1 << 20, 0).decode(errors="replace")

    def popen(
        self,
        *argv: str,
        user: str | None = None,
        stdin: int | None = subprocess.DEVNULL,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> subprocess.Popen[str]:
        """Start a command, with standard streams as of ``subprocess.Popen``.  It dies with this process."""
        words = ["runuser", "--user", user, "--", *argv] if user else list(argv)
        group = cgroup_mounts()[0] / self.name / "payload" / "commands"
        group.mkdir(exist_ok=True)
        return subprocess.Popen(
            ["nsenter", f"--target={self._leader}", "--all", "--", *words],
            env=ENVIRONMENT,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
            preexec_fn=lambda: _enter(group),  # noqa: PLW1509 - takes no lock
        )

    def run(
        self,
        *argv: str,
        user: str | None = None,
        input: str | None = None,  # noqa: A002 - as of subprocess.run
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, as root or another user; CommandFailed, with what it said, unless status 0."""
        process = self.popen(
            *argv,
            user=user,
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        output, errors = process.communicate(input)
        if check and process.returncode:
            raise CommandFailed(f"{' '.join(argv)}: status {process.returncode}\n{output}{errors}")
        return subprocess.CompletedProcess(argv, process.returncode, output, errors)

    def put(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file, and the folders that it is in."""
        script = 'mkdir -p "$(dirname "$1")" && umask 077 && cat >"$1" && chmod "$2" "$1"'
        self.run("sh", "-c", script, "sh", path, f"{mode:o}", input=text)

    def journal(self, unit: str) -> str:
        """What a unit has logged, of all boots: messages only."""
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "--output=cat", f"--unit={unit}").stdout

    def show(self, unit: str) -> dict[str, str]:
        """A unit's properties, as systemd has them now."""
        shown = self.run("systemctl", "show", unit).stdout
        return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)

    def reboot(self) -> None:
        """Shut down in order and boot again, with the same files."""
        self.run("systemctl", "reboot", "--no-wall", check=False)  # may be gone before it has answered
        self._wait_for_boot()

    def _wait_for_boot(self) -> None:
        assert self._supervisor.stdout is not None
        booting = False
        while True:
            line = self._supervisor.stdout.readline().strip()
            if line.isdigit():
                self._leader, booting = int(line), True
            elif line != "ready":
                raise CommandFailed(f"the container does not boot\n{self.console}")
            elif booting:  # systemd says so after a daemon-reload as well
                break
        # Ready may be said before the last job is done; what has failed by then is for the tests to judge.
        self.run("systemctl", "is-system-running", "--wait", check=False)

    def _close(self) -> None:
        assert self._supervisor.stdin is not None
        assert self._supervisor.stdout is not None
        self._supervisor.stdin.close()
        self._supervisor.wait(WAIT_SECONDS)
        self._supervisor.stdout.close()
        self._console.close()


class CommandFailed(AssertionError):
    """A command in a container has ended with another status than 0."""


def _enter(group: Path) -> None:
    die_with_parent()
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _trigger(devices: Sequence[str]) -> str:
    command = f"-udevadm trigger --action=add {' '.join(devices)}" if devices else "true"
    return f"[Service]\nExecStart=\nExecStart={command}\n"
