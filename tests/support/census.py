# SPDX-License-Identifier: GPL-2.0-or-later
"""What a process of asyncio holds: descriptors, tasks, Python objects, memory.  It tells at SIGUSR1."""

import asyncio
import ctypes
import gc
import json
import os
import signal
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

SECONDS = 30.0
_PAGE_KIB = os.sysconf("SC_PAGE_SIZE") // 1024


@dataclass(frozen=True, slots=True)
class Census:
    """Descriptors by what they lead to (without numbers), tasks by their coroutine, how many objects, KiB of memory."""

    fds: list[str]
    tasks: list[str]
    objects: int
    memory_kib: int

    @classmethod
    def here(cls) -> Self:
        """Of this process, after all that is garbage was collected and given back; for its event loop's thread."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        tasks = sorted(str(getattr(task.get_coro(), "__qualname__", "")) for task in asyncio.all_tasks())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(_descriptors(), tasks, len(gc.get_objects()), pages * _PAGE_KIB)

    @property
    def handles(self) -> tuple[list[str], list[str]]:
        """All that must be the same again when nothing is going on."""
        return self.fds, self.tasks


def tell_at_signal(path: Path) -> None:
    """Have this process write its census into the file whenever it gets SIGUSR1."""

    def tell(*_: object) -> None:
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(Census.here())))
        draft.rename(path)

    signal.signal(signal.SIGUSR1, tell)


async def census_of(pid: int, path: Path) -> Census:
    """Of another process, which has been told where to write it."""
    path.unlink(missing_ok=True)  # noqa: ASYNC240 -- a small file in memory
    os.kill(pid, signal.SIGUSR1)
    async with asyncio.timeout(SECONDS):
        while not path.exists():  # noqa: ASYNC110, ASYNC240 -- of another process there is no event
            await asyncio.sleep(0.01)
    told: dict[str, Any] = json.loads(path.read_text())  # noqa: ASYNC240 -- a small file in memory
    return Census(**told)


def _descriptors() -> list[str]:
    links = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 -- names are enough
        with suppress(FileNotFoundError):  # that of the directory
            links.append(os.readlink(f"/proc/self/fd/{name}").split(":[")[0])  # noqa: PTH115 -- "socket:[1]"
    return sorted(links)
