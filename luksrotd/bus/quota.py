# SPDX-License-Identifier: GPL-2.0-or-later
"""How much of something one user may have at a time, over all connections: the bus allows hundreds to each."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from luksrotd.errors import TooMany

CALLS_PER_USER: Final = 128
"""Calls of one user that may be under way: as many as over one connection (``connection.CALLS_PER_CALLER``)."""
_ROOT: Final = 0


class Quota:
    """At most ``limit`` at a time for each user but root; ``what`` there are then, for the message."""

    def __init__(self, limit: int = CALLS_PER_USER, what: str = "calls of the user are under way") -> None:
        self._limit = limit
        self._what = what
        self._taken: Counter[int] = Counter()

    @contextmanager
    def one_of(self, uid: int) -> Iterator[None]:
        """Take one, for as long as the context lasts; raises ``TooMany``."""
        if uid != _ROOT and self._taken[uid] >= self._limit:
            raise TooMany(f"cannot start: {self._limit} {self._what}")
        self._taken[uid] += 1
        try:
            yield
        finally:
            self._taken[uid] -= 1
            if not self._taken[uid]:
                del self._taken[uid]
