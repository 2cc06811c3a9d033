# SPDX-License-Identifier: GPL-2.0-or-later
"""Every state in which a power cut can leave a device, from the log of its writes and flushes.

The model (docs/spec/commit-protocol.md, H1-H3): what lies between two flushes is an *epoch*.  All earlier epochs are
on the medium; within the epoch that is cut, every sector is independently old, new or garbage.  Re-ordering inside an
epoch needs nothing more: any subset of sectors covers it.

Sectors whose bytes do not change are no choice.  Header sectors are enumerated one by one; of a bulk of sectors that
nobody parses (a keyslot area) only "intact or not" can be observed, so it is enumerated by classes.  A state is its
difference from the device before the operation: copies of megabytes would cost more than all the judging.
"""

import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Protocol

#: More changed sectors than this in one header copy are not enumerated one by one but by classes, like a bulk.
SINGLE_SECTORS_MAX = 5


class Writes(Protocol):
    """A write, as ``SimDisk`` logs it."""

    @property
    def offset(self) -> int: ...
    @property
    def data(self) -> bytes: ...


Epoch = Sequence[Writes]


class Image:
    """The bytes of a device: a ``base`` that many states share, and the sectors that differ from it.  Immutable."""

    __slots__ = ("_key", "base", "changes", "sector")

    def __init__(self, base: bytes, sector: int = 512, changes: Mapping[int, bytes] | None = None) -> None:
        self.base = base
        self.sector = sector
        self.changes = {n: data for n, data in (changes or {}).items() if data != base[n * sector : (n + 1) * sector]}
        self._key: Hashable = None

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, part: slice) -> bytes:
        start, end, _ = part.indices(len(self.base))
        return self.read(start, max(end - start, 0))

    def __bytes__(self) -> bytes:
        return self.read(0, len(self.base))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and self.key == other.key and self.base == other.base

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def key(self) -> Hashable:
        """Equal for equal states of one base."""
        if self._key is None:
            self._key = frozenset(self.changes.items())
        return self._key

    def changes_from(self, offset: int) -> Hashable:
        """Equal for states that are equal from ``offset`` on."""
        return self.changes_within(offset, len(self.base))

    def changes_within(self, offset: int, end: int) -> Hashable:
        """Equal for states of one base that are equal from ``offset`` to ``end``."""
        changes = self.changes
        return frozenset([(n, changes[n]) for n in self._changed(offset // self.sector, -(-end // self.sector))])

    def _changed(self, first: int, last: int) -> list[int]:
        """The numbers of the sectors that differ, from ``first`` on and below ``last``."""
        if len(self.changes) < last - first:
            return [n for n in self.changes if first <= n < last]
        return [n for n in range(first, last) if n in self.changes]

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of it, fewer at its end."""
        end = min(offset + length, len(self.base))
        size = self.sector
        first, last = offset // size, -(-end // size)
        touched = self._changed(first, last)
        if not touched:
            return self.base[offset:end]
        parts: list[bytes | memoryview] = []
        base, at = memoryview(self.base), first * size
        for number in sorted(touched):
            parts += (base[at : number * size], self.changes[number])
            at = (number + 1) * size
        parts.append(base[at : last * size])
        content = b"".join(parts)
        start = offset - first * size
        return content if len(content) == end - offset else content[start : start + end - offset]

    def with_sectors(self, sectors: Mapping[int, bytes]) -> "Image":
        """With other sectors."""
        base, size = self.base, self.sector
        changed = Image(base, size)
        changed.changes = {**self.changes, **sectors}
        for number, data in sectors.items():  # all others are known to differ from the base
            if data == base[number * size : (number + 1) * size]:
                del changed.changes[number]
        return changed

    def written(self, epoch: Epoch) -> "Image":
        """After these writes."""
        sectors: dict[int, bytes] = {}
        for write in epoch:
            sectors |= self._merged(write.offset, write.data, sectors)
        return self.with_sectors(sectors)

    def _merged(self, offset: int, data: bytes, pending: Mapping[int, bytes]) -> dict[int, bytes]:
        """The sectors that a write touches, with its bytes in them."""
        size = self.sector
        merged: dict[int, bytes] = {}
        for number in range(offset // size, -(-(offset + len(data)) // size)):
            start = number * size
            part = data[max(start - offset, 0) : start + size - offset]
            if len(part) < size:
                whole = bytearray(pending.get(number, self.read(start, size)))
                place = max(offset - start, 0)
                whole[place : place + len(part)] = part
                part = bytes(whole)
            merged[number] = part
        return merged


@dataclass(slots=True)
class Crash:
    """One state: the epoch that was cut, and the sectors that differ from the start of that epoch."""

    epoch: int
    sectors: dict[int, bytes]

    def image(self, start: Image) -> Image:
        """The device after the crash; ``start`` is the device at the start of the epoch."""
        return start.with_sectors(self.sectors)


@dataclass(slots=True)
class Enumeration:
    """All crash states of a log that began on ``base``; what lies below ``headers`` bytes belongs to the headers."""

    base: bytes | Image
    epochs: Sequence[Epoch]
    headers: int
    sector: int = 512
    seed: int = 5
    starts: list[Image] = field(default_factory=list)
    """The device at the start of each epoch, and at the end."""

    def __post_init__(self) -> None:
        self.starts = [self.base if isinstance(self.base, Image) else Image(self.base, self.sector)]
        for epoch in self.epochs:
            self.starts.append(self.starts[-1].written(epoch))

    @property
    def final(self) -> bytes:
        """The device after everything."""
        return bytes(self.starts[-1])

    def crashes(self, epochs: Iterable[int] | None = None) -> Iterator[Crash]:
        """Every state of every epoch (or of those given), the undisturbed start of each included."""
        for number in range(len(self.epochs)) if epochs is None else epochs:
            yield from self._epoch(number)

    def images(self) -> Iterator[Image]:
        """The states as whole images, each once."""
        seen: set[Hashable] = set()
        for crash in self.crashes():
            image = crash.image(self.starts[crash.epoch])
            if image.key not in seen:
                seen.add(image.key)
                yield image

    def _epoch(self, number: int) -> Iterator[Crash]:
        size = self.sector
        versions = _versions(self.starts[number], self.epochs[number])
        rng = random.Random(self.seed + number)
        garbage = {sector: rng.randbytes(size) for sector in versions}
        half = self.headers // 2
        copies = [[s for s in versions if first <= s * size < first + half] for first in (0, half)]
        after = self.starts[number + 1]
        choices = [self._bulk([s for s in versions if s * size >= self.headers], after, garbage)]
        for copy in copies:
            if len(copy) > SINGLE_SECTORS_MAX:
                choices.append(self._bulk(copy, after, garbage))
            else:
                choices += [self._single(sector, versions[sector], garbage) for sector in copy]
        for picked in product(*choices):
            merged: dict[int, bytes] = {}
            for part in picked:
                merged |= part
            yield Crash(number, merged)

    def _single(self, sector: int, versions: Sequence[bytes], garbage: dict[int, bytes]) -> list[dict[int, bytes]]:
        return [{}, *({sector: version} for version in versions), {sector: garbage[sector]}]

    def _bulk(self, sectors: list[int], after: Image, garbage: dict[int, bytes]) -> list[dict[int, bytes]]:
        """Nothing, all, all but the first, all but the last, half of it, every other one, the last torn, all torn."""
        if not sectors:
            return [{}]
        new = {sector: after.read(sector * self.sector, self.sector) for sector in sectors}
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


Judge = Callable[[Image], Sequence[str]]


def _versions(start: Image, epoch: Epoch) -> dict[int, list[bytes]]:
    """What else each sector may hold, ascending: libcryptsetup writes some of them twice between two flushes."""
    found: dict[int, list[bytes]] = {}
    image = start
    for write in epoch:
        image = image.written([write])
        for number in range(write.offset // start.sector, -(-(write.offset + len(write.data)) // start.sector)):
            data = image.read(number * start.sector, start.sector)
            versions = found.setdefault(number, [])
            if data not in versions and data != start.read(number * start.sector, start.sector):
                versions.append(data)
    return {number: versions for number, versions in sorted(found.items()) if versions}
