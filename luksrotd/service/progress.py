# SPDX-License-Identifier: GPL-2.0-or-later
"""Where an operation is: stages before the commit, then the phases of the commit."""

from collections.abc import Callable
from enum import StrEnum
from itertools import accumulate
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

#: The stages in which keys are derived: all the others together take no time that a person would notice.
TIMED: Final = frozenset({Stage.DERIVING, Stage.VERIFYING})

_ORDER: Final[tuple[Stage | Phase, ...]] = (*(stage for stage in Stage if stage is not Stage.DONE), *Phase, Stage.DONE)
#: How much of the way each one is.  DERIVING opens a keyslot and makes a new one, VERIFYING opens that.
_LENGTHS: Final = {Stage.DERIVING: 60, Stage.VERIFYING: 20}
_ENDS: Final = tuple(accumulate(_LENGTHS.get(step, 2) if isinstance(step, Stage) else 2 for step in _ORDER[:-1]))
_STARTS: Final = {step: start / _ENDS[-1] for step, start in zip(_ORDER, (0, *_ENDS), strict=True)}

#: Of a stage that has taken as long as expected, so much counts as done: the rest is for what takes longer.
_EXPECTED_PART: Final = 0.9


def fraction(step: Stage | Phase, part: float = 0.0) -> float:
    """How far along it is, from 0 to 1, when ``step`` has been entered and ``part`` (0 to 1) of it is done."""
    following = _ORDER[min(_ORDER.index(step) + 1, len(_ORDER) - 1)]
    return _STARTS[step] + part * (_STARTS[following] - _STARTS[step])


def estimated_part(seconds: float, expected: float) -> float:
    """How much of a stage is taken to be done after ``seconds``, if ``expected`` are; never falls, always below 1."""
    ratio = seconds / expected
    if ratio <= 1:
        return _EXPECTED_PART * ratio
    rest = 1 - _EXPECTED_PART
    # As steep at 1 as it was before, then ever flatter.
    return min(1 - rest / (1 + (ratio - 1) * _EXPECTED_PART / rest), 1 - rest / 1000)


def ignore(_: Stage | Phase) -> None:
    """A ``Progress`` that nobody looks at."""
