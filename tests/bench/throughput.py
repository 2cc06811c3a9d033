# SPDX-License-Identifier: GPL-2.0-or-later
"""8: rotations of several volumes at once, where key derivation is what takes the time."""

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from dbus_next.signature import Variant

from tests.bench.figures import Finding, Result, Series
from tests.bench.rounds import Trial, interleaved
from tests.bench.stage import BENCH, Stage, stage
from tests.support.daemon_process import BACKUP, NEW, Disk, appeared, start

COUNTS: Final = (1, 2, 8, 32)
#: So many are also rotated one after the other.
SINGLY: Final = (2, 8)
ITERATIONS: Final = 200_000
COST: Final = {"pbkdf": Variant("s", "pbkdf2"), "pbkdf-force-iterations": Variant("u", ITERATIONS)}
LIMIT: Final = 1.8
CORES: Final = 2
KIB: Final = 1024
#: For two jobs of the cost below, with 64 MiB for the worker itself; four are allowed by their number.
BUDGET: Final = 400 * KIB * KIB
ARGON_KIB: Final = 128 * KIB
ARGON: Final = {
    "pbkdf": Variant("s", "argon2id"),
    "pbkdf-memory": Variant("u", ARGON_KIB),
    "pbkdf-parallel": Variant("u", 1),
    "pbkdf-force-iterations": Variant("u", 4),
}
POLL_SECONDS: Final = 0.02
METHOD: Final = f"""The passphrase that unlocks and the new one are pbkdf2 keyslots of {ITERATIONS:,} iterations:
a rotation is half a second of key derivation on one core, and a tenth of all else. A client asks the daemon for the
rotations of 1, 2, 8 or 32 volumes at once and waits for the end of all; or, for 2 and 8, for the end of each before it
asks for the next. The figure is rotations a second; 32 at once are compared with 8 one after the other. What the
machine itself gives is measured beside it: {CORES} threads that do nothing but derive such keys, and one. Memory is
measured apart from that, in one run: 8 rotations are asked for at once whose new keys take {ARGON_KIB // KIB} MiB of
Argon2id each, and the daemon is configured to MemoryMax={BUDGET // KIB // KIB}M. The figure is the most that the
proportional set sizes of all its workers, the spare one too, were together, looked at every
{POLL_SECONDS * 1000:.0f} ms."""


class Fleet:
    """Volumes whose backup keys are rotated, and back."""

    def __init__(self, place: Stage, disks: Sequence[Disk]) -> None:
        self._place, self._disks = place, disks
        self._numbers = dict.fromkeys((disk.path for disk in disks), 0)

    async def enroll(self) -> None:
        """Give all of them their first key."""
        await self._all(self._disks, "Enroll", COST)

    def at_once(self, count: int, cost: Mapping[str, Variant] = COST) -> Trial:
        """So many together; rotations a second."""

        async def trial() -> float:
            begun = time.perf_counter()
            await self._all(self._disks[:count], "Rotate", cost)
            return count / (time.perf_counter() - begun)

        return trial

    def one_by_one(self, count: int) -> Trial:
        """The same ones, of which none begins before the one before has ended."""

        async def trial() -> float:
            begun = time.perf_counter()
            for disk in self._disks[:count]:
                await self._all([disk], "Rotate", COST)
            return count / (time.perf_counter() - begun)

        return trial

    async def _all(self, disks: Sequence[Disk], method: str, cost: Mapping[str, Variant]) -> None:
        client = self._place.client
        jobs = set()
        for disk in disks:
            number = self._numbers[disk.path] = 1 - self._numbers[disk.path]
            jobs.add(await start(client, disk.path, method, new=(BACKUP, NEW)[number], cost=cost))
        while jobs:
            signal = await client.signal("Completed")
            if signal.path in jobs:
                jobs.remove(signal.path)
                if not signal.body[0]:
                    raise RuntimeError(f"{method} has not finished: {signal.body}")
        client.signals.clear()


def deriving(threads: int) -> Trial:
    """So many threads that do nothing but derive a key each; keys a second."""

    def derive() -> None:
        hashlib.pbkdf2_hmac("sha256", b"passphrase", b"salt", 3 * ITERATIONS)

    async def trial() -> float:
        begun = time.perf_counter()
        await asyncio.gather(*(asyncio.to_thread(derive) for _ in range(threads)))
        return threads / (time.perf_counter() - begun)

    return trial


async def _peak_of(pid: int, work: "asyncio.Future[float | None]") -> int:
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
                total += sum(int(line.split()[1]) * KIB for line in lines if line.startswith("Pss:"))
        except OSError:  # it has ended meanwhile
            continue
    return total


def _configured() -> str:
    """The directory of a configuration with the budget."""
    directory = BENCH / "throughput"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "luksrotd.conf").write_text(f"[Limits]\nMemoryMax={BUDGET // KIB // KIB}M\n", encoding="utf-8")
    return str(directory)


async def concurrent(rounds: int) -> Result:
    """8."""
    async with stage(config=_configured()) as place:
        disks = [place.volume(f"fleet-{number}", iterations=ITERATIONS) for number in range(max(COUNTS))]
        for disk in disks:
            await appeared(place.client, disk.path)
        fleet = Fleet(place, disks)
        await fleet.enroll()
        series = await interleaved(
            {f"{count} one after the other": fleet.one_by_one(count) for count in SINGLY}
            | {f"{count} at once": fleet.at_once(count) for count in COUNTS},
            rounds,
            unit="rotations/s",
        )
        ceiling = await interleaved({"one thread": deriving(1), "two": deriving(CORES)}, rounds, unit="keys/s")
        work = asyncio.ensure_future(fleet.at_once(max(SINGLY), ARGON)())
        peak = await _peak_of(place.daemon.pid, work)
    ratios = _ratios(series)
    budget = f"workers' memory, {max(SINGLY)} rotations with Argon2id"
    findings = [
        *(Finding(f"{one.name}, median", one.median, LIMIT, at_least=True) for one in ratios),
        Finding(budget, peak, BUDGET, "B"),
    ]
    nothing_else = ceiling[1].over(ceiling[0])
    ratios.append(Series("keys derived by two threads / by one", "", nothing_else.values))
    at_once = series[len(SINGLY) :]
    growth = {"rotations/s": [(count, one.median) for count, one in zip(COUNTS, at_once, strict=True)]}
    return Result(8, "Concurrent rotations", METHOD, series, ratios, findings, growth, ("volumes", "rotations/s"))


def _ratios(series: Sequence[Series]) -> list[Series]:
    """Those at once to as many one after the other, or to the most of these."""
    singly, at_once = series[: len(SINGLY)], dict(zip(COUNTS, series[len(SINGLY) :], strict=True))
    by_count = dict(zip(SINGLY, singly, strict=True))
    return [at_once[count].over(by_count.get(count, singly[-1])) for count in COUNTS if count > 1]
