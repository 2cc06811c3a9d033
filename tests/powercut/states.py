# SPDX-License-Identifier: GPL-2.0-or-later
"""Every state in which a power cut can leave a recorded disk, each under a name from which it can be made again.  Pure.

The disk: a write is on the medium when a flush that began after it has completed, or, with FUA, when it has completed
itself.  What lies between two flushes is an *epoch*; all earlier epochs are on the medium.  Of the epoch that is cut

- the first writes are there (``first``: every prefix),
- one of them is lost (``without``), or only one is there (``only``),
- the last one that is there is torn, at 512 or 4096 bytes, in halves, in every other sector, or has a sector of garbage
  (``torn``),
- anything is there: writes dropped, torn and kept at random (``random``), which re-orders them in any way.

Only some parts of the disk are looked at (``Timeline.parts``).  Writes to others, the data of a busy volume, are there
or not as the epoch is, and make no states.
"""

import random
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tests.powercut.writelog import Request
from tests.support.crash import Image
from tests.support.simdisk import Write

SECTOR: Final = 512
BLOCK: Final = 4096
#: How a write is torn: each in every header, in other places by chance.
TEARS: Final = ("head512", "tail512", "head4096", "tail4096", "half", "odd", "garbage")
#: How many epochs before and after a header write are looked at closely, too.
AROUND: Final = 4
#: Of so many others, one is looked at, as it ends.
FAR: Final = 10
_NAME: Final = re.compile(r"e(\d+)\.(?:(first|without|only)(\d+)|torn(\d+)\.(\w+)|random(\d+)s(\d+))")


@dataclass(frozen=True, slots=True)
class Part:
    """A range of the disk that is looked at, in bytes; ``fragile``: a torn write may leave garbage in it.

    In a file system it may not: whether that bears a sector of garbage is not what is asked here.
    """

    name: str
    offset: int
    size: int
    fragile: bool = False

    def holds(self, write: Write) -> bool:
        """Whether a write begins in it; the layout of the disk keeps writes from lying in two."""
        return self.offset <= write.offset < self.offset + self.size


@dataclass(frozen=True, slots=True)
class Epoch:
    """The writes between two flushes: those that are looked at, and others; the numbers of those with FUA."""

    writes: tuple[Write, ...]
    others: tuple[Write, ...] = ()
    fua: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Cut:
    """One state: what of its epoch is on the medium, in the order of writing."""

    name: str
    epoch: int
    writes: tuple[Write, ...]


def epochs_of(requests: Sequence[Request], parts: Sequence[Part]) -> list[Epoch]:
    """The log cut at its flushes, those that had nothing to cover left out; the last epoch, maybe empty, has none."""
    found: list[Epoch] = []
    writes: list[Write] = []
    others: list[Write] = []
    fua: set[int] = set()
    for request in requests:
        if request.flush and (writes or others):
            found.append(Epoch(tuple(writes), tuple(others), frozenset(fua)))
            writes, others, fua = [], [], set()
        if request.write is None:
            continue
        if any(part.holds(request.write) for part in parts):
            fua |= {len(writes)} if request.fua else set()
            writes.append(request.write)
        else:
            others.append(request.write)
    return [*found, Epoch(tuple(writes), tuple(others), frozenset(fua))]


def without_flushes(epochs: Sequence[Epoch]) -> list[Epoch]:
    """The same writes on a disk that ignores flushes: what must go wrong there."""
    writes = tuple(write for epoch in epochs for write in epoch.writes)
    return [Epoch(writes, tuple(write for epoch in epochs for write in epoch.others)), Epoch(())]


@dataclass(slots=True)
class Timeline:
    """A recorded disk: its bytes at first, and the epochs that followed; makes the states."""

    base: bytes
    epochs: Sequence[Epoch]
    parts: Sequence[Part]
    starts: list[Image] = field(default_factory=list)
    """What is looked at, at the start of each epoch and at the end."""

    def __post_init__(self) -> None:
        self.starts = [Image(self.base, SECTOR)]
        for epoch in self.epochs:
            self.starts.append(self.starts[-1].written(epoch.writes))

    def image(self, cut: Cut) -> Image:
        """The disk after the cut, but for the parts that are not looked at."""
        return self.starts[cut.epoch].written(cut.writes)

    def key(self, image: Image) -> Hashable:
        """Equal for states that are equal in all parts."""
        return image.key

    def cut(self, name: str) -> Cut:
        """The state of that name; raises ``ValueError`` for a name that none has."""
        match = _NAME.fullmatch(name)
        if match is None or int(match[1]) >= len(self.epochs):
            raise ValueError(f"no state is called {name}")
        number = int(match[1])
        epoch = self.epochs[number]
        pieces: dict[int, tuple[Write, ...]]
        if match[2]:
            kept = _chosen(len(epoch.writes), match[2], int(match[3]))
            pieces = {n: (epoch.writes[n],) for n in kept}
        elif match[4]:
            last = _chosen(len(epoch.writes), "only", int(match[4]))[0]
            pieces = {n: (epoch.writes[n],) for n in range(last)}
            pieces[last] = self._torn(epoch.writes[last], match[5], random.Random(name))
        else:
            pieces = self._random(epoch, random.Random(name))
        return Cut(name, number, _in_order(epoch, pieces))

    def names(self, seed: int) -> Iterator[str]:
        """The names of all states that are made by rule, then, without an end, of those made at random from ``seed``.

        Those by rule are shuffled: who looks at a part of them has some of everything.  The same state may come under
        several names.
        """
        near = self._near()
        ruled = [name for n, epoch in enumerate(self.epochs) if n in near for name in self._by_rule(n, epoch)]
        ruled += [f"e{n}.first{len(self.epochs[n].writes)}" for n in range(0, len(self.epochs), FAR) if n not in near]
        rng = random.Random(seed)
        rng.shuffle(ruled)
        yield from ruled
        weights = self._weights()
        if not sum(weights):
            return
        count = 0
        while True:
            number = rng.choices(range(len(weights)), weights)[0]
            yield f"e{number}.random{count}s{seed}"
            count += 1

    def _by_rule(self, number: int, epoch: Epoch) -> Iterator[str]:
        count = len(epoch.writes)
        yield from (f"e{number}.first{n}" for n in range(count + 1))
        yield from (f"e{number}.{kind}{n}" for n in range(count) for kind in ("without", "only"))
        for n, write in enumerate(epoch.writes):
            if self._fragile(write):
                yield from (f"e{number}.torn{n}.{tear}" for tear in TEARS)

    def _weights(self) -> list[int]:
        """Where chance looks: most at headers, not at all where there is nothing to choose."""
        near = self._near()
        return [
            len(epoch.writes) * (4 if any(map(self._fragile, epoch.writes)) else 1)
            if number in near and sum(len(write.data) for write in epoch.writes) > SECTOR
            else 0
            for number, epoch in enumerate(self.epochs)
        ]

    def _near(self) -> frozenset[int]:
        """The epochs in which a header is written, and those around them; the rest is the work of others."""
        headers = [n for n, epoch in enumerate(self.epochs) if any(map(self._fragile, epoch.writes))]
        return frozenset(n for header in headers for n in range(header - AROUND, header + AROUND + 1))

    def _fragile(self, write: Write) -> bool:
        return any(part.fragile and part.holds(write) for part in self.parts)

    def _random(self, epoch: Epoch, rng: random.Random) -> dict[int, tuple[Write, ...]]:
        pieces: dict[int, tuple[Write, ...]] = {}
        for number, write in enumerate(epoch.writes):
            fate = rng.choices(("kept", "dropped", "torn"), (30, 20, 50))[0]
            if fate == "kept":
                pieces[number] = (write,)
            elif fate == "torn":
                kinds = ["head", "tail", "sectors", "sectors", "sector"]
                kind = rng.choice([*kinds, "garbage", "dirty"] if self._fragile(write) else kinds)
                pieces[number] = self._torn(write, kind, rng)
        return pieces

    def _torn(self, write: Write, how: str, rng: random.Random) -> tuple[Write, ...]:
        """The sectors of a write that are there."""
        count = len(write.data) // SECTOR
        match how:
            case "head512" | "head4096":
                kept = list(range(min(int(how[4:]) // SECTOR, count)))
            case "tail512" | "tail4096":
                kept = list(range(min(int(how[4:]) // SECTOR, count), count))
            case "head":
                kept = list(range(rng.randrange(count) + 1))
            case "tail":
                kept = list(range(rng.randrange(count), count))
            case "half":
                kept = list(range(count // 2))
            case "odd":
                kept = list(range(1, count, 2))
            case "sector":
                kept = [rng.randrange(count)]
            case "sectors" | "dirty":
                kept = [n for n in range(count) if rng.random() < 0.5] or [0]
            case "garbage":
                kept = list(range(rng.randrange(count) + 1))
            case _:
                raise ValueError(f"no write is torn as {how}")
        pieces = [Write(write.offset + n * SECTOR, write.data[n * SECTOR : (n + 1) * SECTOR]) for n in kept]
        if how in ("garbage", "dirty"):
            at = len(pieces) - 1 if how == "garbage" else rng.randrange(len(pieces))
            pieces[at] = Write(pieces[at].offset, rng.randbytes(SECTOR))
        return tuple(pieces)


def _chosen(count: int, kind: str, number: int) -> Sequence[int]:
    """Which of ``count`` writes are there."""
    if number > count - (kind != "first"):
        raise ValueError(f"the epoch has {count} writes only")
    if kind == "first":
        return range(number)
    return [number] if kind == "only" else [n for n in range(count) if n != number]


def _in_order(epoch: Epoch, pieces: Mapping[int, tuple[Write, ...]]) -> tuple[Write, ...]:
    """The pieces as they were written; what had FUA and came before one of them is there as a whole."""
    last = max(pieces, default=-1)
    kept = {**pieces, **{n: (epoch.writes[n],) for n in epoch.fua if n < last}}
    return tuple(piece for number in sorted(kept) for piece in kept[number])
