# SPDX-License-Identifier: GPL-2.0-or-later
"""10: the daemon while nobody asks it for anything: its start, its memory, what wakes it, and whether it grows."""

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from itertools import combinations
from typing import Final

from tests.bench import procfs, real, udisks
from tests.bench.figures import Finding, Result, Series
from tests.bench.procfs import Activity, Memory
from tests.bench.real import Daemon
from tests.bench.rounds import Trial, interleaved
from tests.bench.stage import Stage, stage
from tests.support.daemon_process import BACKUP, NEW, Disk, appeared, start

COUNTS: Final = (1, 50, 200)
SETTLE_SECONDS: Final = 15.0
WINDOW_SECONDS: Final = 20.0
#: For each round of the other parts; the default number of rounds makes 10,000.
ROTATIONS_A_ROUND: Final = 2000
AT_ONCE: Final = 4
#: Rotations between two looks at the memory.
STRIDE: Final = 100
MORE_BYTES: Final = 25 << 20
#: What a line through figures that go up and down by some pages may show for 10,000 rotations.
NO_GROWTH: Final = 1 << 20
AFTER: Final = "after the rotations"
OURS, THEIRS, SPARE = "luksrotd", "udisksd", "luksrotd and its spare worker"
METHOD: Final = f"""Start: from exec to READY=1 of luksrotd, and to the bus name of udisksd, for which its unit waits;
each must have all volumes on the bus by then. Both run on the same loop devices. Memory: resident pages, and the
proportional set size, {SETTLE_SECONDS:.0f} s after the start. Idle: both at a time with {COUNTS[-1]} volumes, for
windows of {WINDOW_SECONDS:.0f} s; a wake-up is a thread that goes to sleep once more (voluntary context switch),
processor time is the scheduler's. luksrotd has the watchdog of its unit. Growth: rotations over D-Bus, pbkdf2 with 1000
iterations, {AT_ONCE} volumes (images in memory) at once, one daemon; its memory every {STRIDE} rotations. The slope
of the second half is the median of those between any two points (Theil and Sen). The memory after the rotations is that
{SETTLE_SECONDS:.0f} s later. For a minute after a job luksrotd keeps a worker started ahead, which is counted apart."""


@dataclass
class Found:
    """What has been measured; windows by daemon."""

    starts: list[Series] = field(default_factory=list)
    memory: dict[str, Memory] = field(default_factory=dict)
    idle: dict[str, list[Activity]] = field(default_factory=dict)
    growth: list[tuple[float, float]] = field(default_factory=list)


Run = Callable[[], AbstractAsyncContextManager[Daemon]]


async def quiet(rounds: int) -> Result:
    """10."""
    udisks.fetch()
    found = Found()
    async with stage(daemon=False) as place:
        udisks.admit(place.bed)
        daemons: dict[str, Run] = {OURS: lambda: real.daemon(place.bed), THEIRS: lambda: udisks.daemon(place.bed)}
        attached = 0
        for count in COUNTS:
            real.volumes(place, count - attached, f"idle-{count}")
            attached = count
            trials = {_of(name, count): _started(run, count) for name, run in daemons.items()}
            found.starts += await interleaved(trials, rounds)
            await _watch(daemons, count, rounds if count == COUNTS[-1] else 0, found)
        await place.stack.aclose()
        await _rotate(place, rounds * ROTATIONS_A_ROUND, found)
    return _result(found)


def _started(run: Run, count: int) -> Trial:
    async def trial() -> float:
        async with run() as daemon:
            if daemon.volumes != count:
                raise RuntimeError(f"{daemon.volumes} of {count} volumes were there when it was ready")
            return daemon.start_seconds

    return trial


async def _watch(daemons: Mapping[str, Run], count: int, windows: int, found: Found) -> None:
    """Memory of both with so many volumes; and how idle they are, in so many windows."""
    async with AsyncExitStack() as running:
        pids = {name: (await running.enter_async_context(run())).pid for name, run in daemons.items()}
        await asyncio.sleep(SETTLE_SECONDS)
        for name, pid in pids.items():
            found.memory[_of(name, count)] = procfs.memory_of(pid)
        for _ in range(windows):
            for name, activity in (await _idle({name: [pid] for name, pid in pids.items()})).items():
                found.idle.setdefault(name, []).append(activity)


async def _idle(processes: Mapping[str, Sequence[int]]) -> dict[str, Activity]:
    """What each does in one window, by the second."""
    before, begun = {name: procfs.threads_of(*pids) for name, pids in processes.items()}, time.perf_counter()
    await asyncio.sleep(WINDOW_SECONDS)
    took = time.perf_counter() - begun
    return {name: procfs.between(before[name], procfs.threads_of(*pids)).over(took) for name, pids in processes.items()}


async def _rotate(place: Stage, rotations: int, found: Found) -> None:
    """Memory over so many rotations, then with the spare worker that the last one leaves."""
    disks = real.volumes(place, AT_ONCE, "growth", place.bed.dir)
    async with real.daemon(place.bed) as daemon:
        for disk in disks:
            await appeared(place.client, disk.path)
        await _all(place, disks, "Enroll", BACKUP)
        for number, secret in _turns(rotations):
            await _all(place, disks, "Rotate", secret)
            if number % STRIDE == 0:
                found.growth.append((number, procfs.memory_of(daemon.pid).rss))
        spare = procfs.children_of(daemon.pid)
        if len(spare) != 1:
            raise RuntimeError(f"there is not one spare worker, but {len(spare)}")
        await asyncio.sleep(SETTLE_SECONDS)
        found.memory |= {f"{OURS}, {AFTER}": procfs.memory_of(daemon.pid)}
        found.memory |= {"spare worker": procfs.memory_of(*spare)}
        found.idle |= {SPARE: [(await _idle({SPARE: [daemon.pid, *spare]}))[SPARE]]}


def _turns(rotations: int) -> Iterator[tuple[int, bytes]]:
    """How many there are after each turn of all volumes, and its secret."""
    for number in range(AT_ONCE, rotations + 1, AT_ONCE):
        yield number, (BACKUP, NEW)[number // AT_ONCE % 2]


async def _all(place: Stage, disks: Sequence[Disk], method: str, secret: bytes) -> None:
    """A job on each, at once; all must be good."""
    jobs = {await start(place.client, disk.path, method, new=secret) for disk in disks}
    while jobs:
        signal = await place.client.signal("Completed")
        if signal.path in jobs:
            jobs.remove(signal.path)
            if not signal.body[0]:
                raise RuntimeError(f"{method} has not finished: {signal.body}")
    place.client.signals.clear()


def _of(name: str, count: int) -> str:
    """Of which daemon a figure is, with how many volumes."""
    return f"{name}, {count} volume{'' if count == 1 else 's'}"


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line through them; some that lie far off do not matter (Theil and Sen)."""
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2) if a[0] != b[0])


def _result(found: Found) -> Result:
    least, most = COUNTS[0], COUNTS[-1]
    sizes = [
        Series(f"{name}, {kind}", "B", (getattr(memory, kind.lower()),))
        for name, memory in found.memory.items()
        for kind in ("RSS", "PSS")
    ]
    wakes = {name: Series(name, "wake-ups/s", tuple(one.sleeps for one in all_)) for name, all_ in found.idle.items()}
    times = [
        Series(f"{name}, processor time of a second", "s", tuple(one.seconds for one in all_))
        for name, all_ in found.idle.items()
    ]
    rss = {name: memory.rss for name, memory in found.memory.items()}
    half = found.growth[len(found.growth) // 2 :]
    findings = [
        Finding(f"RSS beyond {_of(THEIRS, most)}", rss[_of(OURS, most)] - rss[_of(THEIRS, most)], MORE_BYTES, "B"),
        Finding(
            f"RSS {AFTER} beyond {_of(THEIRS, least)}",
            rss[f"{OURS}, {AFTER}"] - rss[_of(THEIRS, least)],
            MORE_BYTES,
            "B",
        ),
        Finding("growth in 10,000 rotations, by the second half of those made", slope(half) * 10_000, NO_GROWTH, "B"),
        *(Finding(f"wake-ups a second, {name}", wakes[name].median, 1) for name in (OURS, SPARE)),
    ]
    return Result(
        10,
        "The daemon while nothing is asked of it",
        METHOD,
        [*found.starts, *sizes, *wakes.values(), *times],
        [ours.over(theirs) for ours, theirs in zip(found.starts[0::2], found.starts[1::2], strict=True)],
        findings,
        {"luksrotd": [(rotations, size / (1 << 20)) for rotations, size in found.growth]},
        ("rotations", "RSS, MiB"),
    )
