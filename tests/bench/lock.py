# SPDX-License-Identifier: GPL-2.0-or-later
"""5: how long the exclusive metadata lock of a volume is held, and so an unlocking of it held up."""

import asyncio
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from tests.bench.figures import Finding, Result, Series
from tests.bench.rotation import ARGON, OverDBus
from tests.bench.rounds import interleaved
from tests.bench.stage import FOLDER, run, stage
from tests.support import makeimage
from tests.support.daemon_process import NEW, OLD, Disk
from tests.support.kernel import mount, unmount

METHOD: Final = """Both derive Argon2id keys at the default cost. The kernel itself tells when flock(2) gives the
exclusive lock on the volume's file in /run/cryptsetup, and when it is let go (its trace event flock_lock_inode; nobody
is stopped at it); a figure is the sum of these times in one rotation by the daemon over D-Bus, or one luksAddKey. With
fewer than a hundred rounds the 99th percentile is the most of all."""
LIMIT: Final = 1 / 50
KEYSLOT: Final = "5"
#: Where libcryptsetup keeps its locks.
LOCKS: Final = Path("/run/cryptsetup")

_EVENT = re.compile(
    r" (\d+\.\d+): flock_lock_inode: .* dev=0x([0-9a-f]+):0x([0-9a-f]+) .* fl_owner=([0-9a-f]+) fl_pid=(\d+) "
    r".* fl_type=F_(\w+) .* ret=(-?\d+)"
)


def holds(lines: Iterable[str], device: int, pid: int) -> Iterator[tuple[float, float]]:
    """When (seconds) the process got an exclusive lock on that file system, and let it go, by the kernel's lines."""
    held: dict[str, float] = {}
    for line in lines:
        match = _EVENT.search(line)
        if match is None or os.makedev(int(match[2], 16), int(match[3], 16)) != device or match[7] != "0":
            continue
        now, owner = float(match[1]), match[4]
        if match[6] == "WRLCK":
            if int(match[5]) == pid:
                held.setdefault(owner, now)
        elif owner in held:
            yield held.pop(owner), now


class Flocks:
    """What the kernel tells of flock(2), all over the machine, since ``forget``."""

    def __init__(self, folder: Path) -> None:
        self._trace = folder / "trace"

    def forget(self) -> None:
        """From now on."""
        self._trace.write_text("")

    def held(self, pid: int) -> float:
        """For how many seconds the process had exclusive locks of libcryptsetup's."""
        lines = self._trace.read_text().splitlines()
        return sum(end - start for start, end in holds(lines, LOCKS.stat().st_dev, pid))


@contextmanager
def flocks() -> Iterator[Flocks]:
    """An instance of the kernel's tracing (Documentation/trace/ftrace.rst), gone afterwards."""
    with ExitStack() as undone:
        mount("tmpfs", LOCKS, "tmpfs", data="mode=0700")  # nobody else's locks are on a file system of its own
        undone.callback(unmount, LOCKS)
        root = Path(undone.enter_context(tempfile.TemporaryDirectory(prefix="luksrotd-tracefs-")))
        mount("tracefs", root, "tracefs")
        undone.callback(unmount, root)
        folder = root / "instances" / f"luksrotd-{os.getpid()}"
        folder.mkdir()
        undone.callback(folder.rmdir)
        (folder / "events/filelock/flock_lock_inode/enable").write_text("1")
        yield Flocks(folder)


class AddKey:
    """cryptsetup luksAddKey, whose keyslot is killed again without being watched."""

    def __init__(self, disk: Disk, locks: Flocks) -> None:
        self._disk, self._locks = disk, locks
        self._files = [FOLDER / "lock-old", FOLDER / "lock-new"]
        for path, secret in zip(self._files, (OLD, NEW), strict=True):
            path.write_bytes(secret)

    async def add(self) -> float:
        """Seconds."""
        old, new = map(str, self._files)
        command = ("luksAddKey", "--key-file", old, "--key-slot", KEYSLOT, *ARGON, self._disk.node, new)
        self._locks.forget()
        process = await asyncio.create_subprocess_exec("cryptsetup", "--batch-mode", *command)
        if await process.wait():
            raise RuntimeError(f"luksAddKey on {self._disk.node} has failed")
        took = self._locks.held(process.pid)
        run(("cryptsetup", "--batch-mode", "luksKillSlot", self._disk.node, KEYSLOT))
        return took


async def held(rounds: int) -> Result:
    """5."""
    async with stage() as place:
        disks = [place.volume(name) for name in ("held", "added")]
        for disk in disks:
            makeimage.run("luksConvertKey", *ARGON, "--key-file", "-", disk.node, stdin=OLD)
        ours = OverDBus(place, await place.known(disks[0]), {})
        await ours.enroll()
        with flocks() as locks:

            async def rotate() -> float:
                locks.forget()
                await ours.rotate()
                return locks.held(place.daemon.pid)

            series = await interleaved(
                {"luksrotd": rotate, "cryptsetup luksAddKey": AddKey(disks[1], locks).add}, rounds
            )
    assert min(one.minimum for one in series) > 0, "a lock was not seen"
    ratio = series[0].over(series[1])
    finding = Finding(f"{ratio.name}, 99th percentile", ratio.percentile(99), LIMIT)
    most = Series(series[0].name, "s", (series[0].percentile(99),))
    title = "How long the exclusive metadata lock is held"
    told = f"{METHOD} Of all rounds luksrotd's 99th percentile is {most.maximum * 1000:.1f} ms."
    return Result(5, title, told, series, [ratio], [finding])
