# SPDX-License-Identifier: GPL-2.0-or-later
"""--older-than: whether a key is due to be rotated."""

from datetime import datetime, timedelta

from luksrotd.ctl.model import Key, Volume
from luksrotd.records import dataclass


@dataclass(frozen=True, slots=True)
class NotDue:
    """A key that is younger than it may become; ``warning``: what is odd about that."""

    key: Key
    due_at: str
    warning: str = ""


def not_due(volume: Volume, name: str, seconds: int, now: datetime) -> NotDue | None:
    """None if the key is to be rotated, also where nobody can tell its age, or the rotation will refuse it."""
    from luksrotd.rotation.token import moment, utc  # noqa: PLC0415 - only where it is needed: start-up stays fast

    active = [key for key in volume.keys if (key.name, key.state) == (name, "active")]
    rotated = moment(active[0].rotated_at) if len(active) == 1 else None
    if rotated is None or now - rotated >= timedelta(seconds=seconds):
        return None
    odd = "it was rotated in the future, as this clock has it: is the clock right?" if rotated > now else ""
    return NotDue(active[0], utc(rotated + timedelta(seconds=seconds)), odd)
