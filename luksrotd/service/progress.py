# SPDX-License-Identifier: GPL-2.0-or-later
"""Where an operation is: stages before the commit, then the phases of the commit."""

from collections.abc import Callable
from enum import StrEnum
from typing import Final

from luksrotd.rotation.protocol import Phase


class Stage(StrEnum):
    """The stages of an operation up to its commit."""

    QUEUED = "queued"
    LOCKING = "locking"
    READING = "reading"
    DERIVING = "deriving"
    VERIFYING = "verifying"
    DELIVERING = "delivering"
    WAITING_FOR_LOCK = "waiting-for-metadata-lock"
    DONE = "done"


#: Called with each stage and phase that is entered, always on the event loop.
Progress = Callable[[Stage | Phase], None]

_ORDER: Final[tuple[Stage | Phase, ...]] = (*(stage for stage in Stage if stage is not Stage.DONE), *Phase, Stage.DONE)


def fraction(step: Stage | Phase) -> float:
    """How far along ``step`` is, from 0 to 1: by its place in the order, not by time."""
    return _ORDER.index(step) / (len(_ORDER) - 1)


def ignore(_: Stage | Phase) -> None:
    """A ``Progress`` that nobody looks at."""
