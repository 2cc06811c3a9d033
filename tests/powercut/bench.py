# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk in memory that is put into one state after the other, and the machine after the power cut around it.

The parts of the disk are loop devices, as they are partitions where it was recorded.  The state file system is mounted
(its journal replayed) where the daemon has it, in a mount namespace of this process; then the reconcile unit's command
runs on each volume.
"""

import mmap
import os
import select
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from luksrotd.ctl.__main__ import main
from luksrotd.names import STATE_DIRECTORY
from tests.powercut.disk import DISK_SIZE, STATE, VOLUMES
from tests.powercut.states import SECTOR, Part
from tests.support.crash import Image
from tests.support.kernel import MS_BIND, LoopDevice, die_with_parent, enter_private_mount_namespace, mount, unmount

#: Bytes that are compared, and put back, at once.
CHUNK: Final = 65536
#: Seconds in which a reconcile must have ended.
PATIENCE: Final = 120
#: What luksrotd-reconcile@.service runs; the last word is the device.
COMMAND: Final = ("/usr/bin/luksrotctl", "--direct", "reconcile")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a reconcile ended: exit status (negative: a signal), and what it said."""

    status: int
    said: str


class Bench:
    """See above; the mounts of the calling process change for ever."""

    def __init__(self, base: bytes, parts: Sequence[Part], executable: Sequence[str]) -> None:
        self._base = base
        self._executable = executable
        with ExitStack() as closing:
            self._fd = os.memfd_create("powercut-disk")
            closing.callback(os.close, self._fd)
            os.ftruncate(self._fd, DISK_SIZE)
            os.pwrite(self._fd, base, 0)
            self._disk = closing.enter_context(mmap.mmap(self._fd, len(base)))
            self._watched = [*parts]
            path = Path(f"/proc/self/fd/{self._fd}")
            self._state = LoopDevice(path, offset=STATE.offset, size=STATE.size)
            closing.callback(self._state.detach)
            names = {part.name for part in parts}
            self._volumes = [LoopDevice(path, offset=v.offset, size=v.size) for v in VOLUMES if v.name in names]
            for volume in self._volumes:
                closing.callback(volume.detach)
            self._closing = closing.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def put(self, image: Image) -> None:
        """Have the disk hold this state, whatever it holds."""
        for device in (self._state, *self._volumes):
            device.forget()
        for part in self._watched:
            for offset in range(part.offset, part.offset + part.size, CHUNK):
                wanted = self._base[offset : offset + CHUNK]
                if self._disk[offset : offset + CHUNK] != wanted:
                    self._disk[offset : offset + CHUNK] = wanted
        for number, data in image.changes.items():
            self._disk[number * SECTOR : (number + 1) * SECTOR] = data

    def read(self, part: Part) -> bytes:
        """The bytes of a part as they are now."""
        for device in (self._state, *self._volumes):
            device.forget()
        return self._disk[part.offset : part.offset + part.size]

    @contextmanager
    def booted(self) -> Iterator[bool]:
        """The state file system is mounted; whether it could be."""
        with ExitStack() as leaving:
            try:
                mount(self._state.path, "/run/state", "ext4", data="noinit_itable")
            except OSError:
                yield False
                return
            leaving.callback(unmount, "/run/state", lazily=False)
            Path("/run/state/luksrotd").mkdir(exist_ok=True)
            mount("/run/state/luksrotd", STATE_DIRECTORY, flags=MS_BIND)
            leaving.callback(unmount, STATE_DIRECTORY, lazily=False)
            yield True

    def kept(self) -> dict[str, bytes]:
        """The files in the state directory."""
        return {path.name: path.read_bytes() for path in Path(STATE_DIRECTORY).iterdir() if path.is_file()}

    def reconcile(self, *, executable: bool = False) -> list[Ended]:
        """Run the unit's command on each volume: the program itself, or its ``main`` in a fork of this process."""
        return [self._reconcile(str(volume.path), executable=executable) for volume in self._volumes]

    def _reconcile(self, device: str, *, executable: bool) -> Ended:
        if executable:
            command = [*self._executable, *COMMAND[1:], device]
            done = subprocess.run(
                command, capture_output=True, check=False, timeout=PATIENCE, preexec_fn=die_with_parent
            )
            return Ended(done.returncode, (done.stdout + done.stderr).decode(errors="replace"))
        said = os.memfd_create("said")
        try:
            child = os.fork()
            if child == 0:
                _become(said, [*COMMAND[1:], device])
            status = _wait(child)
            return Ended(status, os.pread(said, 65536, 0).decode(errors="replace"))
        finally:
            os.close(said)


def prepare_machine() -> None:
    """Mounts of our own for this process: runtime and state directories that are empty."""
    enter_private_mount_namespace()
    mount("none", "/run", "tmpfs")
    mount("none", "/var/lib", "tmpfs")
    for folder in ("/run/state", STATE_DIRECTORY):
        Path(folder).mkdir()


def _become(said: int, arguments: Sequence[str]) -> None:
    """Be luksrotctl; never returns."""
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
