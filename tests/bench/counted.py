# SPDX-License-Identifier: GPL-2.0-or-later
"""4: what a rotation asks of the device, counted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from luksrotd.luks2.layout import Which
from luksrotd.luks2.pair import Pair, parse_pair
from luksrotd.rotation.view import view
from tests.bench.figures import Finding, Result, Series
from tests.bench.rivals import Cryptenroll, Cryptsetup
from tests.bench.rotation import Direct
from tests.bench.stage import stage
from tests.support.crash import Epoch, Image
from tests.support.daemon_process import Disk
from tests.support.recorder import Recording, record

#: Bytes of a logical block of the devices of this measurement, and the most flushes that a rotation may need.
SECTOR: Final = 512
FLUSHES: Final = 6
METHOD: Final = f"""No time: strace sees every write and flush that a rotation asks of the device; what was seen is
replayed on the bytes before and held against those after. A loop device, headers of 16 KiB, a key of 512 bit. The
bound is what cannot be left out: the area of the new keyslot, that of the old one (which is wiped), and, in each of
the four times that a header copy is written (two copies, with the record of the wipe and without it), the blocks of
{SECTOR} bytes that really change. luksrotd is luksrotctl --direct, which commits as the daemon does; the others are
those of measurement 1. They overwrite an old keyslot 40 times, as the loop device says that it rotates; on an image
they overwrite it once, and write 680 KB."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one rotation: bytes and calls of writes, and flushes."""

    bytes: int
    writes: int
    flushes: int


def counts_of(epochs: Sequence[Epoch]) -> Counts:
    """Of a recording; its last epoch was not flushed."""
    writes = [write for epoch in epochs for write in epoch]
    return Counts(sum(len(write.data) for write in writes), len(writes), len(epochs) - 1)


def bound_of(before: bytes, epochs: Sequence[Epoch], sector: int = SECTOR) -> int:
    """The least bytes for a rotation of ours: two areas, and the blocks that change in each writing of a header."""
    start = Image(before, sector)
    ends = [start]
    for epoch in epochs:
        ends.append(ends[-1].written(epoch))
    size = parse_pair(before).hdr_size
    changed = sum(_differing(first, second, size, sector) for first, second in pairwise(ends))
    areas = [_key_area(parse_pair(bytes(image))) for image in (start, ends[-1])]
    return sum(areas) + changed * sector


def _differing(before: Image, after: Image, size: int, sector: int) -> int:
    """Blocks of either header copy that are not the same."""
    headers = [image.read(0, len(Which) * size) for image in (before, after)]
    places = range(0, len(headers[0]), sector)
    return sum(headers[0][at : at + sector] != headers[1][at : at + sector] for at in places)


def _key_area(pair: Pair) -> int:
    """Bytes of the area of the one key that we manage."""
    (key,) = view(pair).keys
    assert key.keyslot is not None
    return key.keyslot.area.size


class Recorder:
    """Runs commands under strace, and keeps what each did to a volume."""

    def __init__(self, disk: Disk) -> None:
        self.recordings: list[Recording] = []
        self._path = Path(disk.node)

    def __call__(
        self, command: Sequence[str], *, stdin: bytes = b"", environment: Mapping[str, str] | None = None
    ) -> bytes:
        """See ``stage.Runner``."""
        done = record(command, self._path, stdin=stdin, environment=environment)
        if done.status:
            raise RuntimeError(f"{command} ended with status {done.status}: {done.stderr.decode(errors='replace')}")
        self.recordings.append(done)
        return done.stdout

    def taken(self) -> tuple[bytes, list[Epoch]]:
        """The device before, and the epochs, of everything since the last call."""
        epochs: list[Epoch] = [[]]
        for one in self.recordings:
            first, *rest = one.epochs
            epochs = [*epochs[:-1], [*epochs[-1], *first], *rest]
        before = self.recordings[0].before
        self.recordings.clear()
        return before, epochs


async def counted(rounds: int) -> Result:
    """4."""
    async with stage(daemon=False) as place:
        disks = [place.volume(name) for name in ("counted", "cryptsetup", "cryptenroll")]
        recorders = [Recorder(disk) for disk in disks]
        ours, first, second = recorders
        contenders: dict[str, Direct | Cryptsetup | Cryptenroll] = {
            "luksrotd": Direct(disks[0], runner=ours),
            Cryptsetup.name: Cryptsetup(disks[1], runner=first),
            Cryptenroll.name: Cryptenroll(disks[2], runner=second),
        }
        for recorder in recorders:
            recorder.taken()  # how it was enrolled
        found: dict[str, list[Counts]] = {name: [] for name in contenders}
        bounds = []
        for _ in range(rounds):
            for (name, contender), recorder in zip(contenders.items(), recorders, strict=True):
                await contender.rotate()
                before, epochs = recorder.taken()
                found[name].append(counts_of(epochs))
                if recorder is ours:
                    bounds.append(bound_of(before, epochs))
    return _result(found, bounds)


def _result(found: Mapping[str, Sequence[Counts]], bounds: Sequence[int]) -> Result:
    bound = Series("lower bound", "B", tuple(bounds))
    written = {name: Series(name, "B", tuple(one.bytes for one in counts)) for name, counts in found.items()}
    calls = [
        Series(f"{name}, {what}", what, tuple(getattr(one, what) for one in counts))
        for what in ("writes", "flushes")
        for name, counts in found.items()
    ]
    ratios = [one.over(bound) for one in written.values()]
    flushes = max(one.flushes for one in found["luksrotd"])
    findings = [
        Finding("bytes over the lower bound, most of all rounds", ratios[0].maximum, 1.05),
        Finding("flushes of a rotation", flushes, FLUSHES),
    ]
    return Result(4, "What a rotation writes", METHOD, [*written.values(), bound, *calls], ratios, findings)
