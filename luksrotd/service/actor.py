# SPDX-License-Identifier: GPL-2.0-or-later
"""Who acts: known to everything that runs for a caller, without being passed through every call."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from luksrotd.ports import Caller
from luksrotd.records import dataclass


@dataclass(frozen=True, slots=True)
class Actor:
    """A caller (None: this process by itself), and the number of the job that runs for it (0: none)."""

    caller: Caller | None = None
    job: int = 0


_NOBODY = Actor()
_actor: ContextVar[Actor] = ContextVar("actor", default=_NOBODY)


def current() -> Actor:
    """For whom the current task runs."""
    return _actor.get()


@contextmanager
def acting(caller: Caller | None, job: int = 0) -> Iterator[None]:
    """Within it, the task, and every task that it starts, acts for ``caller``."""
    token = _actor.set(Actor(caller, job))
    try:
        yield
    finally:
        _actor.reset(token)
