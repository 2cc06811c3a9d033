# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon as its unit starts it: ``python -m luksrotd``, not the launcher of the tests, whose modules count.

It sees the volumes of the bench alone: others of the machine belong to somebody else, so a drop-in of luksrotd.conf in
the /run of the bed allows only UUIDs that begin with ``MARK``.
"""

import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench.stage import FOLDER, Stage
from tests.support.daemon_process import ENVIRONMENT, OLD, PREFIX, Disk
from tests.support.kernel import LoopDevice
from tests.support.makeimage import make_image, set_uuid
from tests.support.manager import Manager
from tests.support.testbed import PROJECT, TestBed

MARK: Final = f"{os.getpid() % 2**32:08x}"
WATCHDOG_USEC: Final = 60_000_000
"""As luksrotd.service has it."""
_DROP_IN: Final = Path("/run/luksrotd/luksrotd.conf.d/bench.conf")


@dataclass(frozen=True, slots=True)
class Daemon:
    """A daemon that is ready, how many seconds after its start it was, and how many volumes it had then."""

    pid: int
    start_seconds: float
    volumes: int


@asynccontextmanager
async def daemon(bed: TestBed) -> AsyncIterator[Daemon]:
    """It runs from READY=1 until the context is left."""
    _DROP_IN.parent.mkdir(parents=True, exist_ok=True)
    _DROP_IN.parent.parent.chmod(0o700)
    _DROP_IN.write_text(f"[Devices]\nAllow=uuid:{MARK}-*\n")
    with Manager(bed.dir / "notify") as manager, (bed.dir / "luksrotd.log").open("wb") as output:
        manner = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": str(WATCHDOG_USEC)}
        begun = time.perf_counter()
        process = bed.spawn(
            [sys.executable, "-m", "luksrotd"],
            cwd=PROJECT,
            env={**ENVIRONMENT, **manner},
            stdin=subprocess.DEVNULL,
            stderr=output,
        )
        try:
            told = await manager.hears("READY=1")
            took = time.perf_counter() - begun
            status = re.search(r"^STATUS=(\d+) volumes", told, re.MULTILINE)
            yield Daemon(process.pid, took, int(status[1]) if status else 0)
        finally:
            bed.end(process)


def image(name: str, folder: Path = FOLDER) -> Path:
    """A volume in a file, to be attached when it shall appear; the passphrase of keyslot 0 is ``OLD``."""
    path = make_image(folder / f"{PREFIX}{name}.img", key=OLD)
    set_uuid(path, MARK + str(uuid.uuid4())[8:])
    return path


def volumes(place: Stage, count: int, name: str = "many", folder: Path = FOLDER) -> list[Disk]:
    """So many volumes on loop devices, gone with the stage."""
    found = []
    for number in range(count):
        path = image(f"{name}-{number}", folder)
        place.stack.callback(path.unlink)
        found.append(Disk(place.stack.enter_context(LoopDevice(path))))
    return found
