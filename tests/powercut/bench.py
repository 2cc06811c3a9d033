# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk in memory that is put into one state after the other, and the machine after the power cut around it.

The parts of the disk are loop devices, as they are partitions where it was recorded.  The state file system is mounted
(its journal replayed) where the daemon has it, in a mount namespace of this process; then the reconcile unit's command
runs on each volume.
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Self

from luksrotd.names import STATE_DIRECTORY
from tests.powercut.disk import DISK_SIZE, STATE, VOLUMES
from tests.powercut.launcher import Ended, Launcher
from tests.powercut.states import SECTOR, Part
from tests.support.crash import Image
from tests.support.kernel import MS_BIND, LoopDevice, enter_private_mount_namespace, mount, unmount

#: Bytes that are compared, and put back, at once.
CHUNK: Final = 65536
#: What luksrotd-reconcile@.service has luksrotctl do; the device comes behind it.
COMMAND: Final = ("--direct", "reconcile")


class Bench:
    """See above; the mounts of the calling process change for ever."""

    def __init__(self, base: bytes, parts: Sequence[Part], launcher: Launcher) -> None:
        self._base = base
        self._launcher = launcher
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

    def files(self) -> dict[str, bytes]:
        """The files in the state directory."""
        return {path.name: path.read_bytes() for path in Path(STATE_DIRECTORY).iterdir() if path.is_file()}

    def reconcile(self, *, executable: bool = False) -> list[Ended]:
        """Run the unit's command on each volume: the program itself, or its ``main`` in a fork of this process."""
        run = self._launcher.execute if executable else self._launcher.run
        return [run(*COMMAND, str(volume.path)) for volume in self._volumes]


def prepare_machine() -> None:
    """Mounts of our own for this process: runtime and state directories that are empty, and where they always are."""
    os.environ.pop("STATE_DIRECTORY", None)
    enter_private_mount_namespace()
    mount("none", "/run", "tmpfs")
    mount("none", "/var/lib", "tmpfs")
    for folder in ("/run/state", STATE_DIRECTORY):
        Path(folder).mkdir()
