# SPDX-License-Identifier: GPL-2.0-or-later
"""Arithmetic of byte ranges on the device.  Units: bytes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """A half-open byte range ``[offset, offset + size)``; ``size`` is positive."""

    offset: int
    size: int

    def __post_init__(self) -> None:
        if self.offset < 0 or self.size <= 0:
            raise ValueError(f"not an extent: offset {self.offset}, size {self.size}")

    @property
    def end(self) -> int:
        """First byte behind the range."""
        return self.offset + self.size

    def overlaps(self, other: "Extent") -> bool:
        """Whether both share a byte."""
        return self.offset < other.end and other.offset < self.end

    def contains(self, other: "Extent") -> bool:
        """Whether every byte of ``other`` is in this range."""
        return self.offset <= other.offset and other.end <= self.end


def overlapping(extent: Extent, others: Iterable[Extent]) -> Extent | None:
    """The first of ``others`` that shares a byte with ``extent``."""
    return next((other for other in others if extent.overlaps(other)), None)


def subtract(extent: Extent, taken: Iterable[Extent]) -> tuple[Extent, ...]:
    """What is left of ``extent`` without the bytes in ``taken``, in ascending order."""
    return tuple(_gaps(extent, taken))


def merge(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """The same bytes as few ascending ranges: overlapping and touching ones become one."""
    merged: list[Extent] = []
    for extent in sorted(extents):
        if merged and extent.offset <= merged[-1].end:
            last = merged.pop()
            extent = Extent(last.offset, max(last.end, extent.end) - last.offset)
        merged.append(extent)
    return tuple(merged)


def whole_blocks(extent: Extent, block: int) -> Extent:
    """The blocks of ``block`` bytes that ``extent`` touches."""
    start = extent.offset // block * block
    return Extent(start, -(-extent.end // block) * block - start)


def _gaps(space: Extent, used: Iterable[Extent]) -> Iterator[Extent]:
    position = space.offset
    for extent in sorted(used):
        if extent.offset >= space.end:
            break
        if extent.offset > position:
            yield Extent(position, extent.offset - position)
        position = max(position, extent.end)
    if position < space.end:
        yield Extent(position, space.end - position)
