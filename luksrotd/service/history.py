# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads the record of ``service.audit`` back."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

from luksrotd.ports import History, Query
from luksrotd.service.threads import in_thread

#: Readings at once; the others wait, for there are not many threads and devices need them.
READERS: Final = 2


class Chronicle:
    """The use case on the port ``history``."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._turn = asyncio.Semaphore(READERS)

    async def read(self, query: Query) -> Sequence[Mapping[str, str]]:
        """As ``ports.History.entries``."""
        async with self._turn:
            return await in_thread(lambda: self._history.entries(query))
