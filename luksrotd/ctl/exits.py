# SPDX-License-Identifier: GPL-2.0-or-later
"""Exit status of luksrotctl (luksrotctl(1), "EXIT STATUS"): a contract, as scripts and units rely on it."""

from collections.abc import Iterable
from enum import IntEnum
from typing import Final

from luksrotd.errors import (
    AuthorizationError,
    BusyError,
    Cancelled,
    InvalidRequest,
    LuksrotdError,
    NeedsPerson,
    Outcome,
)


class Exit(IntEnum):
    """The exit statuses."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    PERSON = 3
    UNKNOWN = 4
    NOT_AUTHORIZED = 5
    BUSY = 6


#: Which one counts when several devices ended differently: the more somebody has to do, the later.
_GRAVITY: Final = (
    Exit.DONE,
    Exit.BUSY,
    Exit.NOT_AUTHORIZED,
    Exit.FAILED,
    Exit.USAGE,
    Exit.PERSON,
    Exit.UNKNOWN,
)


def status_of(error: LuksrotdError) -> Exit:
    """What the device holds counts first, then why."""
    if error.outcome is not Outcome.UNCHANGED:
        return Exit.UNKNOWN
    match error:
        case Cancelled():
            return Exit.FAILED
        case InvalidRequest():
            return Exit.USAGE
        case NeedsPerson():
            return Exit.PERSON
        case AuthorizationError():
            return Exit.NOT_AUTHORIZED
        case BusyError():
            return Exit.BUSY
        case _:
            return Exit.FAILED


def worst(statuses: Iterable[Exit]) -> Exit:
    """The status of several devices together."""
    return max(statuses, key=_GRAVITY.index, default=Exit.DONE)
