# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs one container, and leaves nothing of it on the machine, however the process that wanted it has ended.

tests/beds/container.py starts it with its orders on the command line; it ends when its standard input does.  What it
says on its standard output, a word or a number a line: the process id of the container's PID 1, then ``ready`` when
that has booted, and the same once more after each reboot; ``ended`` when the container is off.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Self

from tests.support import kernel

#: What systemd-nspawn, which has no unit of its own to be started again, ends with when the container reboots.
REBOOT: Final = 133
LEADER: Final = "X_NSPAWN_LEADER_PID="


@dataclass(frozen=True)
class Orders:
    """What to boot.

    ``scratch`` is an empty folder, which is removed at the end.  ``binds`` are paths in the container → on the host,
    read-only there; ``devices`` are nodes; ``files`` are paths → contents, written before the first boot.
    """

    name: str
    root: str
    scratch: str
    binds: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    def dumps(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Self:
        """From the command line."""
        return cls(**json.loads(text))


def cgroup_mounts() -> list[Path]:
    """Where the tree of control groups is mounted that systemd uses, and beside an old one also the new."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place, _, kind = line.partition(" - ")
        fstype, _, options = kind.split(" ", 2)
        if fstype == "cgroup2" or (fstype == "cgroup" and "name=systemd" in options):
            found.append((fstype != "cgroup2", Path(place.split(" ")[4])))
    return [path for _, path in sorted(found)]


def supervise(orders: Orders) -> None:
    """Boot, again and again, until the container is off or nobody wants it any more."""
    with ExitStack() as stack:
        stack.callback(Path(orders.scratch).rmdir)
        kernel.enter_private_mount_namespace()
        root = stack.enter_context(_overlay(orders))
        groups = [stack.enter_context(_cgroup(mount / orders.name)) for mount in cgroup_mounts()]
        address = f"\0{orders.name}-{os.getpid()}"
        notify = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC))
        notify.bind(address)
        status = REBOOT
        while status == REBOOT:
            with subprocess.Popen(
                _nspawn(orders, root),
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                env={
                    **os.environ,
                    "NOTIFY_SOCKET": address.replace("\0", "@"),
                    # A tree of control groups in which systemd can keep services from devices.
                    "UNIFIED_CGROUP_HIERARCHY": "1",
                    # udevd does not start where /sys is read-only.
                    "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "1",
                },
                preexec_fn=lambda: _enter(groups),  # noqa: PLW1509 - there are no threads
            ) as nspawn:
                if not _relay(nspawn, notify):
                    nspawn.kill()
                    break
                status = nspawn.wait()
        _say("ended")


def _nspawn(orders: Orders, root: Path) -> list[str]:
    return [
        *("systemd-nspawn", "--quiet", "--boot", f"--directory={root}", f"--machine={orders.name}"),
        *("--register=no", "--keep-unit", "--link-journal=no", "--console=pipe", "--notify-ready=yes"),
        # Its udevd has no word with those of others; what the kernel says reaches all of them.
        *("--private-network", "--resolv-conf=off", "--timezone=off"),
        # The units' own confinement needs these.
        *("--capability=all", "--system-call-filter=bpf"),
        *(f"--bind-ro={host}:{inside}" for inside, host in orders.binds.items()),
        *(f"--bind={device}" for device in orders.devices),
        "systemd.show_status=false",
    ]


@contextmanager
def _overlay(orders: Orders) -> Iterator[Path]:
    """A throw-away layer over the root, in memory; it outlives a reboot."""
    scratch = Path(orders.scratch)
    kernel.mount("tmpfs", scratch, "tmpfs", data="mode=0755")
    try:
        upper, work, merged = (scratch / name for name in ("upper", "work", "merged"))
        for path in (upper, work, merged):
            path.mkdir()
        for name, text in orders.files.items():
            path = upper / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        kernel.mount("overlay", merged, "overlay", data=f"lowerdir={orders.root},upperdir={upper},workdir={work}")
        try:
            yield merged
        finally:
            kernel.unmount(merged)
    finally:
        kernel.unmount(scratch)


@contextmanager
def _cgroup(path: Path) -> Iterator[Path]:
    """A control group: of its own, for else containers would take each other's services for theirs."""
    path.mkdir()
    try:
        yield path
    finally:
        _kill(path)
        for folder, _, _ in os.walk(path, topdown=False):
            Path(folder).rmdir()


def _kill(path: Path) -> None:
    """Kill all that is in a control group and below it, until nothing is."""
    while pids := [pid for procs in path.rglob("cgroup.procs") for pid in procs.read_text().split()]:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.005)


def _enter(groups: list[Path]) -> None:
    kernel.die_with_parent()
    for group in groups:
        (group / "cgroup.procs").write_text(str(os.getpid()))


def _relay(nspawn: subprocess.Popen[bytes], notify: socket.socket) -> bool:
    """Tell what it notifies of, until it ends; False when nobody wants it any more."""
    pidfd = os.pidfd_open(nspawn.pid)
    try:
        while True:
            ready, _, _ = select.select([sys.stdin, notify, pidfd], [], [])
            if notify in ready:
                for line in notify.recv(65536).decode(errors="replace").splitlines():
                    if line.startswith(LEADER):
                        _say(line.removeprefix(LEADER))
                    elif line == "READY=1":
                        _say("ready")
            else:
                return sys.stdin not in ready
    finally:
        os.close(pidfd)


def _say(line: str) -> None:
    with suppress(BrokenPipeError):
        print(line, flush=True)  # noqa: T201 - what it says


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's interrupt is for the tests, which end in order
    supervise(Orders.loads(sys.argv[1]))
