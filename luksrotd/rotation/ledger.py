# SPDX-License-Identifier: GPL-2.0-or-later
"""Who has changed a header: luksrotd itself, or somebody else.  Pure.

Whoever commits says before the first write what the header is going to be, with the exclusive metadata lock held.
Whoever looks at a volume takes a mark first, and reads under the shared lock.  So what was written before the mark is
on the volume by then, has been undone, or never came to be.
"""

from enum import StrEnum
from itertools import count
from typing import Final

from luksrotd.records import dataclass

#: Headers of one volume that were written since it was looked at, and volumes that are remembered.
WRITTEN_MAX: Final = 64
SEEN_MAX: Final = 4096


class Direction(StrEnum):
    """Where a change has led, by the sequence number; ``SAME``: the number is the same, and the header is not."""

    NEWER = "newer"
    OLDER = "older"
    SAME = "same"


@dataclass(frozen=True, slots=True)
class ForeignChange:
    """A header that is not what it was when it was seen last, and not one that we wrote: its sequence numbers."""

    before: int
    after: int

    @property
    def direction(self) -> Direction:
        """Whether it has risen, fallen or stayed."""
        if self.after == self.before:
            return Direction.SAME
        return Direction.NEWER if self.after > self.before else Direction.OLDER


@dataclass(frozen=True, slots=True)
class _Written:
    number: int
    digest: str | None


class Ledger:
    """What was written and what was seen, by LUKS UUID; digests are of both header copies (``DeviceView.digest``)."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._last = 0
        self._written: dict[str, list[_Written]] = {}
        self._seen: dict[str, tuple[int, str]] = {}

    def writing(self, uuid: str, *digests: str) -> None:
        """The header is going to be each of these, one after the other."""
        for digest in digests:
            self._write(uuid, digest)

    def doubt(self, uuid: str) -> None:
        """A commit of ours has failed: the header may be anything, and we were it."""
        self._write(uuid, None)

    def mark(self) -> int:
        """To be taken before a header is read."""
        return self._last

    def saw(self, uuid: str, seqid: int, digest: str, mark: int) -> ForeignChange | None:
        """The header is this now, as was read after ``mark``; None if it is known, ours, or the first that is seen."""
        written = self._written.pop(uuid, [])
        ours = [item.number for item in written if item.digest in (digest, None)]
        rest = [item for item in written if item.number > max(mark, *ours, 0)]
        if rest:
            self._written[uuid] = rest
        before = self._seen.pop(uuid, None)
        self._seen[uuid] = seqid, digest
        if len(self._seen) > SEEN_MAX:
            del self._seen[next(iter(self._seen))]
        if before is None or before[1] == digest or ours:
            return None
        return ForeignChange(before[0], seqid)

    def _write(self, uuid: str, digest: str | None) -> None:
        self._last = next(self._numbers)
        written = self._written.setdefault(uuid, [])
        written.append(_Written(self._last, digest))
        del written[:-WRITTEN_MAX]
