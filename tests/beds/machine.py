# SPDX-License-Identifier: GPL-2.0-or-later
"""A Debian in a virtual machine, with a kernel of its own: device-mapper, disks that come and go, power that fails.

    with restored("bookworm", disk=path) as machine:
        status, output = machine.run("luksrotctl --direct show /dev/vdb")

``restored`` goes on, in less than a second, from the saved state of a machine that has booted, with luksrotd running;
``booted`` boots, which takes ten seconds and more.  What is written to the root file system is gone with the machine.
The disks stay: ``disk`` is /dev/vdb and ``spare`` /dev/vdc, raw files that are made ``DISK_BYTES`` long.  With ``log``
each write and flush of ``disk`` is also recorded, by QEMU's driver blklogwrites, in the format of dm-log-writes.

A machine dies with this process.
"""

import base64
import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.beds import roots
from tests.beds.image import PORT, Image, image
from tests.beds.qemu import PROGRAM, MachineError, Qemu

DISK_BYTES: Final = 256 << 20
#: Bounds for a machine that is busy with others, no verdicts.
RUN_SECONDS: Final = 600.0
BOOT_SECONDS: Final = 600.0
SEED_BYTES: Final = 64
NOTICE: Final = "udevadm trigger --settle /dev/vdb /dev/vdc"
#: To be raised when another device, or another order of them, makes the saved states useless.
LAYOUT: Final = 1
HARDWARE: Final = (
    *("-machine", "pc", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1024"),
    *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-global", "PIIX4_PM.disable_s3=0"),
)
KERNEL_ARGUMENTS: Final = (
    "root=/dev/vda rw console=ttyS0 quiet panic=1 mitigations=off random.trust_cpu=on no_timer_check"
    # On a busy host the time stamp counter is measured wrongly, and the guest's time then runs many times too fast.
    " notsc clocksource=hpet"
    " systemd.show_status=false module_blacklist=kvm_amd,powernow_k8"
)
#: Before the state is saved: what every test would load or look up first.
SETTLE: Final = """
systemctl is-system-running --wait >/dev/null
modprobe --all dm-crypt dm-delay dm-flakey dm-log-writes
udevadm settle
sync
"""


class Machine:
    """A machine that runs; see ``restored`` and ``booted``."""

    def __init__(self, qemu: Qemu) -> None:
        self.qemu = qemu
        self._kept = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def run(
        self,
        script: str,
        files: Mapping[str, bytes] | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        seconds: float = RUN_SECONDS,
    ) -> tuple[int, str]:
        """Run a bash script as root, in a folder with these files (of mode 0600): its exit status, and what it said.

        MachineError if it takes more than ``seconds``, or the machine dies; there is no going on with it then.
        """
        encoded = {name: base64.b64encode(content).decode() for name, content in (files or {}).items()}
        self._send({"script": script, "files": encoded, "environment": dict(environment or {})})
        output = b""
        deadline = time.monotonic() + seconds
        while "status" not in (message := self._receive(deadline, output)):
            output += base64.b64decode(message["output"])
        return int(message["status"]), output.decode(errors="replace")

    def check(
        self,
        script: str,
        files: Mapping[str, bytes] | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        seconds: float = RUN_SECONDS,
    ) -> str:
        """As ``run``, with ``set -e``; MachineError, with what was said, unless the status is 0."""
        status, output = self.run(f"set -eo pipefail\n{script}", files, environment=environment, seconds=seconds)
        if status:
            raise MachineError(f"status {status} of\n{script}\n{output}")
        return output

    def kill(self) -> None:
        """Cut the power; idempotent.  What QEMU has written to the disks is there, what the guest still held is not."""
        self.qemu.close()

    def stand_still(self) -> None:
        """Stop the guest; back when all that it has asked of its disks is done, and logged."""
        self.qemu.command("stop")

    def reboot(self) -> None:
        """Shut down in order, boot again with the same disks, and wait until the boot is complete."""
        self.qemu.command("set-action", reboot="reset")
        self._send({"script": "systemctl reboot", "files": {}, "environment": {}})
        self.wait_for_boot()

    def wait_for_boot(self) -> None:
        """Until the agent is there, and systemd has no jobs left; what has failed by then is for others to judge."""
        self.wait_for_agent()
        self.run("systemctl is-system-running --wait", seconds=BOOT_SECONDS)

    def wait_for_agent(self) -> None:
        """Until the agent is there, which is in the middle of a boot."""
        deadline = time.monotonic() + BOOT_SECONDS
        while "ready" not in self._receive(deadline, b""):
            pass

    def sleep(self) -> None:
        """Suspend to RAM (S3), and wake up again."""
        self._send({"script": "echo mem >/sys/power/state", "files": {}, "environment": {}})
        self.qemu.wait_for("query-status", "suspended")
        self.qemu.command("system_wakeup")
        status = self._receive(time.monotonic() + RUN_SECONDS, b"").get("status")
        if status != 0:
            raise MachineError(f"the machine does not sleep\n{self.qemu.said}")

    def plug(self, disk: Path, name: str) -> None:
        """Plug a raw file in as a disk whose serial number is ``name``; udev makes /dev/disk/by-id/virtio-``name``."""
        file = {"driver": "file", "filename": str(disk)}
        self.qemu.command("blockdev-add", **{"driver": "raw", "node-name": name, "file": file})
        self.qemu.command("device_add", driver="virtio-blk-pci", id=f"plugged-{name}", drive=name, serial=name)

    def unplug(self, name: str) -> None:
        """Pull a disk that was plugged in, whoever uses it; back when the guest has let it go."""
        self.qemu.command("device_del", id=f"plugged-{name}")
        deadline = time.monotonic() + RUN_SECONDS
        while True:
            with contextlib.suppress(MachineError):  # in use until then
                self.qemu.command("blockdev-del", **{"node-name": name})
                return
            if time.monotonic() > deadline:
                raise MachineError(f"the guest does not let go of {name}")
            time.sleep(0.02)

    def wake(self) -> None:
        """After a restore: the clock, and random numbers of its own."""
        seed = base64.b64encode(os.urandom(SEED_BYTES)).decode()
        self._send({"wake": {"now": time.time(), "seed": seed}})
        self._receive(time.monotonic() + RUN_SECONDS, b"")

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self.qemu.agent.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise MachineError(f"the machine has gone: {error}") from error

    def _receive(self, deadline: float, output: bytes) -> dict[str, Any]:
        while b"\n" not in self._kept:
            try:
                self.qemu.agent.settimeout(max(deadline - time.monotonic(), 0.001))
                chunk = self.qemu.agent.recv(1 << 16)
            except OSError as error:
                raise MachineError(f"the machine does not answer: {error!r}\n{self._told(output)}") from error
            if not chunk:
                raise MachineError(f"the machine has gone\n{self._told(output)}")
            self._kept += chunk
        line, _, self._kept = self._kept.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _told(self, output: bytes) -> str:
        return output.decode(errors="replace") + self.qemu.said


@contextmanager
def restored(
    release: str,
    *,
    disk: Path | None = None,
    spare: Path | None = None,
    log: Path | None = None,
    noticed: bool = True,
) -> Iterator[Machine]:
    """A machine that goes on from the saved state of one that has booted; the state is made if it is not there.

    Then its disks were empty.  Unless ``noticed``, what is on them now is for the caller to tell udev, and so luksrotd.
    """
    boot = image(release)
    state = saved(release, boot)
    arguments = [*HARDWARE, *_boot_arguments(boot, ""), *_disk("root", state / "root", "qcow2", snapshot=True)]
    with _disks(disk, spare, log) as disks:
        incoming = ("-incoming", f"exec:cat {state / 'memory'}")
        with Machine(Qemu([*arguments, *disks, *incoming], PORT)) as machine:
            machine.qemu.wait_for("query-status", "paused", "running")
            machine.qemu.command("cont")
            machine.wake()
            if noticed:
                machine.check(NOTICE)
            yield machine


@contextmanager
def booted(
    release: str, *, disk: Path | None = None, spare: Path | None = None, log: Path | None = None, arguments: str = ""
) -> Iterator[Machine]:
    """A machine that has just booted; ``arguments`` are further ones for its kernel."""
    with booting(release, disk=disk, spare=spare, log=log, arguments=arguments) as machine:
        machine.wait_for_boot()
        yield machine


@contextmanager
def booting(
    release: str, *, disk: Path | None = None, spare: Path | None = None, log: Path | None = None, arguments: str = ""
) -> Iterator[Machine]:
    """The same, without waiting for anything."""
    boot = image(release)
    root = _disk("root", boot.disk, "raw", snapshot=True)
    with (
        _disks(disk, spare, log) as disks,
        Machine(Qemu([*HARDWARE, *_boot_arguments(boot, arguments), *root, *disks], PORT)) as machine,
    ):
        yield machine


def saved(release: str, boot: Image) -> Path:
    """A folder with the state of a machine that has booted: its ``memory``, and the overlay of its ``root``."""
    version = subprocess.run([PROGRAM, "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout
    facts = [HARDWARE, KERNEL_ARGUMENTS, SETTLE, DISK_BYTES, str(boot.folder), version, LAYOUT]
    key = roots.digest(json.dumps(facts).encode())
    return roots.made(release, f"saved-{key}", lambda draft: _save(boot, draft))


def _save(boot: Image, draft: Path) -> None:
    draft.mkdir()
    overlay = draft / "root"
    roots.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(boot.disk), "-F", "raw", str(overlay)])
    root = _disk("root", overlay, "qcow2", snapshot=False)
    with (
        _disks(None, None, None) as disks,
        Machine(Qemu([*HARDWARE, *_boot_arguments(boot, ""), *root, *disks], PORT)) as machine,
    ):
        machine.wait_for_boot()
        machine.check(SETTLE)
        machine.qemu.command("stop")
        machine.qemu.command("migrate", uri=f"exec:cat >{draft / 'memory'}")
        if machine.qemu.wait_for("query-migrate", "completed", "failed") == "failed":
            raise OSError("cannot save the state of a machine")


def _boot_arguments(boot: Image, further: str) -> list[str]:
    words = f"{KERNEL_ARGUMENTS} {further}".rstrip()
    return ["-kernel", str(boot.kernel), "-initrd", str(boot.initrd), "-append", words]


@contextmanager
def _disks(disk: Path | None, spare: Path | None, log: Path | None) -> Iterator[list[str]]:
    """QEMU's arguments for both disks; those that nobody wants are empty, and gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="luksrotd-bed-") as scratch:
        disk = disk or Path(scratch, "disk")
        spare = spare or Path(scratch, "spare")
        for path in (disk, spare):
            with path.open("ab") as file:
                file.truncate(max(DISK_BYTES, path.stat().st_size))
        first = _logged_disk(disk, log) if log else _disk("disk", disk, "raw", snapshot=False)
        yield [*first, *_disk("spare", spare, "raw", snapshot=False)]


def _disk(name: str, path: Path, driver: str, *, snapshot: bool) -> list[str]:
    """``snapshot`` throws away what is written."""
    drive = f"if=none,id={name},file={path},format={driver},snapshot={'on' if snapshot else 'off'}"
    return ["-drive", drive, "-device", f"virtio-blk-pci,drive={name},serial={name}"]


def _logged_disk(path: Path, log: Path) -> list[str]:
    log.write_bytes(b"")
    return [
        *("-blockdev", f"driver=file,node-name=disk-file,filename={path}"),
        *("-blockdev", f"driver=file,node-name=log-file,filename={log}"),
        "-blockdev",
        "driver=blklogwrites,node-name=disk,file=disk-file,log=log-file,log-super-update-interval=1",
        *("-device", "virtio-blk-pci,drive=disk,serial=disk"),
    ]
