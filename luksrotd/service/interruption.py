# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for something that is worth it only as long as nothing else has happened."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from luksrotd.errors import Cancelled


class Interruption:
    """Ends, once it has happened, whatever waits in ``heeded``."""

    def __init__(self) -> None:
        self._reason = ""
        self._waiting: set[asyncio.Timeout] = set()

    def happen(self, reason: str) -> None:
        """It happens, for good; the first reason is kept."""
        if self._reason:
            return
        self._reason = reason
        for waiting in self._waiting:
            waiting.reschedule(0)

    def check(self) -> None:
        """Raise ``Cancelled`` if it has happened."""
        if self._reason:
            raise Cancelled(f"cannot go on: {self._reason}")

    @asynccontextmanager
    async def heeded(self) -> AsyncIterator[None]:
        """A block that is cancelled, its clean-up awaited, when it happens; then raises ``Cancelled``."""
        self.check()
        try:
            # It knows to tell its own cancelling from anybody else's.
            async with asyncio.timeout(None) as waiting:
                self._waiting.add(waiting)
                try:
                    yield
                finally:
                    self._waiting.discard(waiting)
        except TimeoutError:
            self.check()
            raise
        self.check()
