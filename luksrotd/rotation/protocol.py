# SPDX-License-Identifier: GPL-2.0-or-later
"""The commit protocol as data (docs/spec/commit-protocol.md).

A plan is a list of steps in the order of ``Phase``; every step ends in a checked flush.  The executor
(``service/commit.py``) is a loop that knows nothing else.  Never move a phase, drop a flush or merge two steps: each
has a mutant in ``tests/crash/`` that must be caught.
"""

from collections.abc import Iterator
from enum import StrEnum
from itertools import pairwise

from luksrotd.errors import ConsistencyError, Outcome
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import BINARY_SIZE
from luksrotd.records import dataclass

#: Headers are compared and written in blocks of this many bytes: a multiple of every sector size.
BLOCK = BINARY_SIZE


class Phase(StrEnum):
    """The phases, in their order."""

    NEW_AREA = "new-area"
    HEADER_PRIMARY = "header-primary"
    HEADER_SECONDARY = "header-secondary"
    WIPE_OLD = "wipe-old"
    CLEAR_PRIMARY = "clear-primary"
    CLEAR_SECONDARY = "clear-secondary"


ORDER = tuple(Phase)


@dataclass(frozen=True, slots=True)
class Write:
    """``data`` to be written at byte ``offset``."""

    offset: int
    data: bytes

    @property
    def extent(self) -> Extent:
        """The range that is overwritten."""
        return Extent(self.offset, len(self.data))


@dataclass(frozen=True, slots=True)
class Step:
    """The writes of one phase, none of them empty; a flush follows."""

    phase: Phase
    writes: tuple[Write, ...]


@dataclass(frozen=True, slots=True)
class CommitPlan:
    """What to write, in which order, on which base.

    ``base``: the ``2 * hdr_size`` header bytes that must be on the device when the commit begins (compare-and-swap).
    ``committed``: the header bytes after HEADER_SECONDARY.  ``final``: those after the last step.
    ``seqid_before`` and ``seqid_after`` are sequence numbers.  ``held``: what must be on the device beside ``base``, as
    the new header names it and it is not written.
    """

    steps: tuple[Step, ...]
    base: bytes
    committed: bytes
    final: bytes
    seqid_before: int
    seqid_after: int
    held: tuple[Write, ...] = ()

    def __post_init__(self) -> None:
        order = [ORDER.index(step.phase) for step in self.steps]
        if any(first >= second for first, second in pairwise(order)):
            raise ConsistencyError("cannot commit: the phases of the plan are out of order")

    @property
    def point_of_no_return(self) -> Phase | None:
        """The first phase that a reader of the header can see; before it the commit can still be given up."""
        visible = [step.phase for step in self.steps if step.phase is not Phase.NEW_AREA]
        return visible[0] if visible else None

    @property
    def writes(self) -> Iterator[Write]:
        """All writes in their order."""
        return (write for step in self.steps for write in step.writes)

    def before_wipe(self, phase: Phase) -> bool:
        """Whether the medium must be shown to hold ``committed`` before ``phase`` begins: the old key dies in it."""
        return phase is Phase.WIPE_OLD

    def outcome(self, headers: bytes) -> Outcome:
        """What is true when the device holds ``headers`` after an interrupted commit."""
        if self.final == self.base:  # a scrub: nothing but free space is written
            return Outcome.UNCHANGED if headers == self.base else Outcome.UNKNOWN
        if headers == self.final:
            return Outcome.COMMITTED
        wipes = any(step.phase is Phase.WIPE_OLD for step in self.steps)
        if headers == self.committed and (wipes or headers != self.base):
            return Outcome.WIPE_PENDING
        return Outcome.UNCHANGED if headers == self.base else Outcome.UNKNOWN


def header_writes(before: bytes, after: bytes, offset: int) -> tuple[Write, ...]:
    """The blocks of one copy that change, as few writes; ``offset`` is where the copy lies on the device."""
    writes: list[Write] = []
    for start in range(0, len(after), BLOCK):
        block = after[start : start + BLOCK]
        if before[start : start + BLOCK] == block:
            continue
        if writes and writes[-1].extent.end == offset + start:
            writes[-1] = Write(writes[-1].offset, writes[-1].data + block)
        else:
            writes.append(Write(offset + start, block))
    return tuple(writes)
