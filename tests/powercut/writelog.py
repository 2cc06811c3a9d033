# SPDX-License-Identifier: GPL-2.0-or-later
"""The log of a disk's writes and flushes, as QEMU's blklogwrites filter and dm-log-writes keep it.  Pure.

The format is the kernel's (Documentation/admin-guide/device-mapper/log-writes.rst): a super block, then for each
request a sector that describes it, and the data behind that.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from tests.support.simdisk import Write

MAGIC: Final = 0x6A736677736872
VERSION: Final = 1
_SUPER: Final = struct.Struct("<QQQI")
_ENTRY: Final = struct.Struct("<QQQQ")

FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8


@dataclass(frozen=True, slots=True)
class Request:
    """What the disk was asked for: ``write`` or nothing, after a flush (``flush``), and durable at once (``fua``)."""

    write: Write | None = None
    flush: bool = False
    fua: bool = False


def parse(log: bytes) -> list[Request]:
    """The requests, in their order; raises ``ValueError`` for what is no such log, or is cut short.

    A discard leaves the content undefined, and the disks of our machines ignore it: it is no write.
    """
    return list(_requests(log))


def _requests(log: bytes) -> Iterator[Request]:
    if len(log) < _SUPER.size:
        raise ValueError("the log has no super block")
    magic, version, count, sector = _SUPER.unpack_from(log)
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError(f"no write log of version {VERSION}")
    at = sector
    for number in range(count):
        if at + sector > len(log):
            raise ValueError(f"the log ends before its entry {number} of {count}")
        where, sectors, flags, _ = _ENTRY.unpack_from(log, at)
        at += sector
        if flags & (DISCARD | MARK):  # neither has data behind it
            continue
        data = log[at : at + sectors * sector]
        if len(data) < sectors * sector:
            raise ValueError(f"the log ends in its entry {number} of {count}")
        at += len(data)
        write = Write(where * sector, data) if data else None
        if write or flags & FLUSH:
            yield Request(write, bool(flags & FLUSH), bool(flags & FUA))


def serialise(requests: Sequence[Request], sector: int = 512) -> bytes:
    """The log of these requests: what ``parse`` reads."""
    parts = [_SUPER.pack(MAGIC, VERSION, len(requests), sector).ljust(sector, b"\0")]
    for one in requests:
        flags = FLUSH * one.flush | FUA * one.fua
        offset, data = (one.write.offset, one.write.data) if one.write else (0, b"")
        parts += [_ENTRY.pack(offset // sector, len(data) // sector, flags, 0).ljust(sector, b"\0"), data]
    return b"".join(parts)
