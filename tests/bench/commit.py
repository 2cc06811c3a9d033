# SPDX-License-Identifier: GPL-2.0-or-later
"""6: the commit of a rotation, against the same bytes written without any care."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Final

from luksrotd.direct import caller_host
from luksrotd.host.blockdev import BlockDevice, BlockDevices
from luksrotd.luks2.pair import parse_pair
from luksrotd.ports import DeviceRef, HeaderDevice
from luksrotd.rotation.protocol import ORDER, CommitPlan, Phase, Step, Write
from luksrotd.service import commit
from luksrotd.service.access import Access, Target
from luksrotd.service.cancellation import PointOfNoReturn
from luksrotd.service.progress import ignore
from tests.bench.figures import Finding, Result, Series
from tests.bench.rounds import interleaved
from tests.bench.stage import FOLDER
from tests.support.crash import Image
from tests.support.daemon_process import PREFIX
from tests.support.kernel import LoopDevice
from tests.support.realvolume import Recorded, recorded

LIMIT: Final = 1.5
METHOD: Final = """The plan of one rotation (six writes, six flushes, 549 KB), carried out again and again on a loop
device over a file on the disk; the header before it is put back between, which is not timed. "Commit" is
service/commit.py: the comparison with the snapshot, the writes and flushes, and the reading back of all of it past the
page cache; "reading back" is the part of it that those reads take. "Commit with its locks" also opens the device, takes
the metadata lock and the disk lock, and goes to a thread. Against the same bytes in the same order by pwrite and
fdatasync, which checks nothing."""


class Watched(BlockDevice):
    """Knows how long its reads past the page cache took, in seconds."""

    reading = 0.0

    def read_medium(self, offset: int, length: int) -> bytes:
        """As of any device."""
        begun = time.perf_counter()
        try:
            return super().read_medium(offset, length)
        finally:
            self.reading += time.perf_counter() - begun


def plan_of(operation: Recorded) -> CommitPlan:
    """The plan that made such a recording of a rotation; its epochs are the phases."""
    image, ends = Image(operation.before), []
    for epoch in operation.epochs:
        image = image.written(epoch)
        ends.append(image)
    steps = [
        Step(phase, tuple(Write(write.offset, write.data) for write in epoch))
        for phase, epoch in zip(ORDER, operation.epochs, strict=True)
    ]
    size = operation.geometry.headers
    before, after = (parse_pair(content).winner.header.seqid for content in (operation.before, operation.after))
    committed, final = (ends[ORDER.index(phase)].read(0, size) for phase in (Phase.HEADER_SECONDARY, ORDER[-1]))
    return CommitPlan(tuple(steps), operation.before[:size], committed, final, before, after)


class Contenders:
    """Each carries out the plan on the same device, and gives the seconds that it took."""

    def __init__(self, ref: DeviceRef, device: HeaderDevice, fd: int, before: bytes, plan: CommitPlan) -> None:
        self._ref, self._device, self._fd, self._before, self._plan = ref, device, fd, before, plan
        self._access = Access(caller_host())
        self.reading: list[float] = []

    async def alone(self) -> float:
        """The commit, without locks; ``reading`` is longer by what its reads took."""
        self._again()
        with ExitStack() as closing:
            device = Watched(os.open(self._ref.path, os.O_RDWR | os.O_CLOEXEC), self._ref.path, writable=True)
            closing.callback(device.close)
            begun = time.perf_counter()
            commit.run(self._plan, device, ignore)
            took = time.perf_counter() - begun
        self.reading.append(device.reading)
        return took

    async def locked(self) -> float:
        """The commit as the transactor asks for it."""
        self._again()
        begun = time.perf_counter()
        await self._access.commit(Target(self._ref, self._device, PointOfNoReturn(), ignore), self._plan)
        return time.perf_counter() - begun

    async def raw(self) -> float:
        """The bytes, and the flushes."""
        self._again()
        begun = time.perf_counter()
        for step in self._plan.steps:
            for write in step.writes:
                os.pwrite(self._fd, write.data, write.offset)
            os.fdatasync(self._fd)
        return time.perf_counter() - begun

    def _again(self) -> None:
        os.pwrite(self._fd, self._plan.base, 0)
        for write in self._plan.writes:
            if write.offset >= len(self._plan.base):
                os.pwrite(self._fd, self._before[write.offset : write.extent.end], write.offset)
        os.fdatasync(self._fd)


@asynccontextmanager
async def _contenders() -> AsyncIterator[Contenders]:
    operation = await asyncio.to_thread(recorded, "rotation")
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{PREFIX}commit.img"
    with ExitStack() as stack:
        path.write_bytes(operation.before)
        stack.callback(path.unlink)
        node = str(stack.enter_context(LoopDevice(path)).path)
        ref = DeviceRef(node)
        fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        device = BlockDevices().open(ref)
        stack.callback(device.close)
        yield Contenders(ref, device, fd, operation.before, plan_of(operation))


async def alone(rounds: int) -> Result:
    """6."""
    async with _contenders() as made:
        trials = {"commit": made.alone, "commit with its locks": made.locked, "pwrite and fdatasync": made.raw}
        series = await interleaved(trials, rounds)
    commit_alone, locked, raw = series
    reading = Series("reading back", "s", tuple(made.reading[-rounds:]))
    ratios = [commit_alone.over(raw), locked.over(raw), reading.over(commit_alone)]
    findings = [Finding(f"{ratios[0].name}, median", ratios[0].median, LIMIT)]
    return Result(6, "The commit alone", METHOD, [commit_alone, reading, locked, raw], ratios, findings)
