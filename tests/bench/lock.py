# SPDX-License-Identifier: GPL-2.0-or-later
"""5: how long the exclusive metadata lock of a volume is held, and so an unlocking of it held up."""

import asyncio
import re
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from tests.bench.figures import Finding, Result, Series
from tests.bench.rotation import ARGON, OverDBus
from tests.bench.rounds import interleaved
from tests.bench.stage import FOLDER, run, stage
from tests.support import makeimage
from tests.support.daemon_process import NEW, OLD, Disk

METHOD: Final = """Both derive Argon2id keys at the default cost. strace sees when flock(2) gives the exclusive lock on
the volume's file in /run/cryptsetup, and when it is let go; a figure is the sum of these times in one rotation by the
daemon over D-Bus, or one luksAddKey. The daemon is attached to, so that all of its system calls are stopped at, some
tens of microseconds each; cryptsetup is stopped at flock and close alone: what strace adds, it adds to our side. With
fewer than a hundred rounds the 99th percentile is the most of all."""
LIMIT: Final = 1 / 50
TRACE: Final = ("strace", "-f", "-y", "-ttt", "-T", "-e", "trace=flock,close", "-e", "signal=none")
KEYSLOT: Final = "5"

_CALL = re.compile(r"(\d+) +(\d+\.\d+) (flock|close)\(\d+<([^>]*)>(.*)")
_RESUMED = re.compile(r"(\d+) +\d+\.\d+ <\.\.\. flock resumed>(.*)")
_GIVEN = re.compile(r"\) += 0 <(\d+\.\d+)>")


def holds(lines: Iterable[str], lock: str) -> Iterator[tuple[float, float]]:
    """When (seconds) the exclusive lock on the file ``lock`` was had and let go, by the lines of strace."""
    had: float | None = None
    waiting: dict[str, float] = {}
    for line in lines:
        if match := _RESUMED.match(line):
            entered = waiting.pop(match[1], None)
            if entered is not None and (given := _GIVEN.search(match[2])):
                had = entered + float(given[1])
            continue
        match = _CALL.match(line)
        if not match or match[4] != lock:
            continue
        entered, exclusive = float(match[2]), "LOCK_EX" in match[5]
        if exclusive and "<unfinished" in match[5]:
            waiting[match[1]] = entered
        elif exclusive:
            given = _GIVEN.search(match[5])
            had = entered + float(given[1]) if given else had
        elif had is not None:
            yield had, entered
            had = None


class Followed:
    """The daemon's locks, while it is traced."""

    def __init__(self, log: Path, disk: Disk) -> None:
        self._log, self._lock = log, lock_of(disk)

    def held(self, begun: float, ended: float) -> float:
        """Seconds of holds that began in that time (of the wall clock)."""
        found = holds(self._log.read_text().splitlines(), self._lock)
        return sum(end - start for start, end in found if begun <= start <= ended)


@asynccontextmanager
async def followed(pid: int, disk: Disk) -> AsyncIterator[Followed]:
    """Trace a process, from the time that strace is attached."""
    with tempfile.TemporaryDirectory(prefix="luksrotd-strace-") as directory:
        log = Path(directory) / "log"
        command = (*TRACE, "-o", str(log), "-p", str(pid))
        tracer = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        assert tracer.stderr is not None
        await tracer.stderr.readline()
        reading = asyncio.ensure_future(tracer.stderr.read())
        try:
            yield Followed(log, disk)
        finally:
            tracer.terminate()
            await tracer.wait()
            await reading


class AddKey:
    """cryptsetup luksAddKey, whose keyslot is killed again without being watched."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._files = [FOLDER / "lock-old", FOLDER / "lock-new"]
        for path, secret in zip(self._files, (OLD, NEW), strict=True):
            path.write_bytes(secret)

    async def add(self) -> float:
        """Seconds."""
        old, new = map(str, self._files)
        with tempfile.NamedTemporaryFile(prefix="luksrotd-strace-") as log:
            trace = (*TRACE, "--seccomp-bpf", "-o", log.name, "cryptsetup", "--batch-mode")
            add = ("luksAddKey", "--key-file", old, "--key-slot", KEYSLOT, *ARGON, self._disk.node, new)
            await asyncio.to_thread(run, (*trace, *add))
            lines = log.read().decode().splitlines()
        run(("cryptsetup", "--batch-mode", "luksKillSlot", self._disk.node, KEYSLOT))
        return sum(end - start for start, end in holds(lines, lock_of(self._disk)))


def lock_of(disk: Disk) -> str:
    """The file that libcryptsetup locks."""
    number = Path("/sys/class/block", Path(disk.node).name, "dev").read_text().strip()
    return f"/run/cryptsetup/L_{number}"


async def held(rounds: int) -> Result:
    """5."""
    async with stage() as place:
        disks = [place.volume(name) for name in ("held", "added")]
        for disk in disks:
            makeimage.run("luksConvertKey", *ARGON, "--key-file", "-", disk.node, stdin=OLD)
        ours = OverDBus(place, await place.known(disks[0]), {})
        await ours.enroll()
        async with followed(place.daemon.pid, disks[0]) as locks:

            async def rotate() -> float:
                begun = time.time()
                await ours.rotate()
                return locks.held(begun, time.time())

            series = await interleaved({"luksrotd": rotate, "cryptsetup luksAddKey": AddKey(disks[1]).add}, rounds)
    assert min(one.minimum for one in series) > 0, "a lock was not seen"
    ratio = series[0].over(series[1])
    finding = Finding(f"{ratio.name}, 99th percentile", ratio.percentile(99), LIMIT)
    most = Series(series[0].name, "s", (series[0].percentile(99),))
    title = "How long the exclusive metadata lock is held"
    told = f"{METHOD} Of all rounds luksrotd's 99th percentile is {most.maximum * 1000:.1f} ms."
    return Result(5, title, told, series, [ratio], [finding])
