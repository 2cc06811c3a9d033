# SPDX-License-Identifier: GPL-2.0-or-later
"""8: rotations of several volumes at once, where key derivation is what takes the time."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from dbus_next.signature import Variant

from luksrotd.config import Limits
from tests.bench.figures import Finding, Result
from tests.bench.rounds import Trial, interleaved
from tests.bench.stage import Stage, stage
from tests.support.daemon_process import BACKUP, NEW, Disk, appeared, start

COUNTS: Final = (1, 2, 8, 32)
ITERATIONS: Final = 400_000
COST: Final = {"pbkdf": Variant("s", "pbkdf2"), "pbkdf-force-iterations": Variant("u", ITERATIONS)}
LIMIT: Final = 1.8
POLL_SECONDS: Final = 0.02
METHOD: Final = f"""The passphrase that unlocks and the new one are pbkdf2 keyslots of {ITERATIONS:,} iterations, some
tenths of a second each, on one core. A client asks the daemon for the rotations of 1, 2, 8 or 32 volumes at once and
waits for the end of all, or for one after the other; the figure is rotations a second. Memory is the sum of the
proportional set sizes of all workers, looked at every {POLL_SECONDS * 1000:.0f} ms in rounds of 32, which are not
among those that are timed; the budget is what the daemon's configuration allows for key derivation (75 % of the
machine's memory)."""


class Fleet:
    """Volumes whose backup keys are rotated, and back."""

    def __init__(self, place: Stage, disks: Sequence[Disk]) -> None:
        self._place, self._disks = place, disks
        self._numbers = dict.fromkeys((disk.path for disk in disks), 0)

    def at_once(self, count: int) -> Trial:
        """So many together; rotations a second."""

        async def trial() -> float:
            begun = time.perf_counter()
            await self._rotate(self._disks[:count])
            return count / (time.perf_counter() - begun)

        return trial

    async def one_by_one(self) -> float:
        """Four, of which none begins before the one before has ended."""
        begun = time.perf_counter()
        for disk in self._disks[:4]:
            await self._rotate([disk])
        return 4 / (time.perf_counter() - begun)

    async def _rotate(self, disks: Sequence[Disk]) -> None:
        client = self._place.client
        jobs = set()
        for disk in disks:
            number = self._numbers[disk.path] = 1 - self._numbers[disk.path]
            jobs.add(await start(client, disk.path, "Rotate", new=(BACKUP, NEW)[number], cost=COST))
        while jobs:
            signal = await client.signal("Completed")
            if signal.path in jobs:
                jobs.remove(signal.path)
                assert signal.body[0], signal.body
        client.signals.clear()


async def _peak_of(pid: int, work: asyncio.Future[float | None]) -> int:
    """The most bytes that the children of a process had together while ``work`` went on."""
    most = 0
    while not work.done():
        most = max(most, await asyncio.to_thread(_workers_pss, pid))
        await asyncio.sleep(POLL_SECONDS)
    work.result()
    return most


def _workers_pss(pid: int) -> int:
    total = 0
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in children.read_text().split():
                lines = Path("/proc", child, "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        except OSError:  # it has ended meanwhile
            continue
    return total


async def concurrent(rounds: int) -> Result:
    """8."""
    async with stage() as place:
        disks = [place.volume(f"fleet-{number}", iterations=ITERATIONS) for number in range(max(COUNTS))]
        for disk in disks:
            await appeared(place.client, disk.path)
            await place.job(disk, "Enroll", new=BACKUP, cost=COST)
        fleet = Fleet(place, disks)
        trials: Mapping[str, Trial] = {
            "one at a time": fleet.one_by_one,
            **{f"{count} volumes": fleet.at_once(count) for count in COUNTS},
        }
        series = await interleaved(trials, rounds, unit="rotations/s")
        largest = asyncio.ensure_future(fleet.at_once(max(COUNTS))())
        peak = await _peak_of(place.daemon.pid, largest)
    ratios = [one.over(series[0]) for one in series[1:]]
    budget = _machine_bytes() * Limits().memory_percent // 100
    findings = [
        *(Finding(f"{one.name}, median", one.median, LIMIT, at_least=True) for one in ratios[1:]),
        Finding("workers' memory with 32 volumes", peak, budget, "B"),
    ]
    growth = {"rotations/s": [(count, one.median) for count, one in zip(COUNTS, series[1:], strict=True)]}
    return Result(8, "Concurrent rotations", METHOD, series, ratios, findings, growth, ("volumes", "rotations/s"))


def _machine_bytes() -> int:
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    return int(line.split()[1]) * 1024
