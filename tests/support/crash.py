# SPDX-License-Identifier: GPL-2.0-or-later
"""Every state in which a power cut can leave a device, from the log of its writes and flushes.

The model (docs/spec/commit-protocol.md, H1-H3): what lies between two flushes is an *epoch*.  All earlier epochs are
on the medium; within the epoch that is cut, every sector is independently old, new or garbage.  Re-ordering inside an
epoch needs nothing more: any subset of sectors covers it.

Sectors whose bytes do not change are no choice.  Header sectors are enumerated one by one; of a bulk of sectors that
nobody parses (a keyslot area) only "intact or not" can be observed, so it is enumerated by classes.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Protocol

#: More header sectors than this in one epoch are not enumerated one by one but by classes, like a bulk.
SINGLE_SECTORS_MAX = 5


class Writes(Protocol):
    """A write, as ``SimDisk`` logs it."""

    @property
    def offset(self) -> int: ...
    @property
    def data(self) -> bytes: ...


Epoch = Sequence[Writes]


@dataclass(slots=True)
class Crash:
    """One state: the epoch that was cut, and the sectors that differ from the start of that epoch."""

    epoch: int
    sectors: dict[int, bytes]

    def image(self, start: bytes, sector: int) -> bytes:
        """The device after the crash; ``start`` is the device at the start of the epoch."""
        content = bytearray(start)
        for number, data in self.sectors.items():
            content[number * sector : number * sector + len(data)] = data
        return bytes(content)


@dataclass(slots=True)
class Enumeration:
    """All crash states of a log that began on ``base``; sectors below ``headers`` bytes belong to the header."""

    base: bytes
    epochs: Sequence[Epoch]
    headers: int
    sector: int = 512
    seed: int = 5
    starts: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        content = bytearray(self.base)
        for epoch in self.epochs:
            self.starts.append(bytes(content))
            for write in epoch:
                content[write.offset : write.offset + len(write.data)] = write.data
        self.starts.append(bytes(content))

    @property
    def final(self) -> bytes:
        """The device after everything."""
        return self.starts[-1]

    def crashes(self, epochs: Iterable[int] | None = None) -> Iterator[Crash]:
        """Every state of every epoch (or of those given), the undisturbed start of each included."""
        for number in range(len(self.epochs)) if epochs is None else epochs:
            yield from self._epoch(number)

    def images(self) -> Iterator[bytes]:
        """The states as whole images, each once."""
        seen: set[bytes] = set()
        for crash in self.crashes():
            image = crash.image(self.starts[crash.epoch], self.sector)
            if image not in seen:
                seen.add(image)
                yield image

    def _epoch(self, number: int) -> Iterator[Crash]:
        before, after = self.starts[number], self.starts[number + 1]
        size = self.sector
        changed = [
            sector
            for sector in _touched(self.epochs[number], size)
            if before[sector * size : (sector + 1) * size] != after[sector * size : (sector + 1) * size]
        ]
        single = [sector for sector in changed if sector * size < self.headers]
        bulk = [sector for sector in changed if sector * size >= self.headers]
        if len(single) > SINGLE_SECTORS_MAX:
            single, bulk = [], changed
        rng = random.Random(self.seed + number)
        garbage = {sector: rng.randbytes(size) for sector in changed}
        choices = [self._single(sector, after, garbage) for sector in single]
        for picked in product(self._bulk(bulk, after, garbage), *choices):
            merged: dict[int, bytes] = {}
            for part in picked:
                merged |= part
            yield Crash(number, merged)

    def _single(self, sector: int, after: bytes, garbage: dict[int, bytes]) -> list[dict[int, bytes]]:
        new = after[sector * self.sector : (sector + 1) * self.sector]
        return [{}, {sector: new}, {sector: garbage[sector]}]

    def _bulk(self, sectors: list[int], after: bytes, garbage: dict[int, bytes]) -> list[dict[int, bytes]]:
        """Nothing, all, all but the first, all but the last, half of it, every other one, the last torn, all torn."""
        if not sectors:
            return [{}]
        new = {sector: after[sector * self.sector : (sector + 1) * self.sector] for sector in sectors}
        half = len(sectors) // 2
        parts = [[], sectors, sectors[1:], sectors[:-1], sectors[:half], sectors[half:], sectors[::2], sectors[:1]]
        classes = [{sector: new[sector] for sector in part} for part in parts]
        classes.append({**new, sectors[-1]: garbage[sectors[-1]]})
        classes.append({sector: garbage[sector] for sector in sectors})
        return classes


def merged(epochs: Sequence[Epoch], first: int) -> list[Epoch]:
    """The mutant that drops the flush behind epoch ``first``."""
    return [*epochs[:first], [*epochs[first], *epochs[first + 1]], *epochs[first + 2 :]]


def swapped(epochs: Sequence[Epoch], first: int) -> list[Epoch]:
    """The mutant that exchanges epoch ``first`` with the next one."""
    return [*epochs[:first], epochs[first + 1], epochs[first], *epochs[first + 2 :]]


def moved(epochs: Sequence[Epoch], source: int, target: int) -> list[Epoch]:
    """The mutant that carries out epoch ``source`` at place ``target``."""
    rest = [epoch for number, epoch in enumerate(epochs) if number != source]
    return [*rest[:target], epochs[source], *rest[target:]]


Judge = Callable[[bytes], Sequence[str]]


def _touched(epoch: Epoch, size: int) -> list[int]:
    touched = {
        sector
        for write in epoch
        for sector in range(write.offset // size, (write.offset + len(write.data) + size - 1) // size)
    }
    return sorted(touched)
