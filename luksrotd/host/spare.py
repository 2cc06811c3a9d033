# SPDX-License-Identifier: GPL-2.0-or-later
"""One worker started ahead, so that a job need not wait for it (docs/adr/0029-spare-worker.md)."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Final, Protocol, Self

from luksrotd.errors import EngineError
from luksrotd.host.launch import Launched
from luksrotd.host.workerprocess import WorkerProcess, start_worker, to_the_end

#: How long a spare waits for a job, in seconds: who changes one key may well change more, and then nothing for months.
KEEP_SECONDS: Final = 60.0

log = logging.getLogger(__name__)


class Ahead(Protocol):
    """Where workers come from that were started before they were needed."""

    async def take(self) -> WorkerProcess | None:
        """One, which is the caller's from now on, or ``None``.  Not to be cancelled."""

    def replace(self) -> None:
        """Told when one has gone to work."""


class OnlyOne:
    """The one that a program has started before all else; no other one follows.

    ``take``: hands it over the first time.
    """

    def __init__(self, take: Callable[[], Launched | None]) -> None:
        self._take = take

    async def take(self) -> WorkerProcess | None:
        """See ``Ahead``."""
        launched = self._take()
        if launched is None:
            return None
        if launched.alive:
            return WorkerProcess(launched)
        launched.end()
        return None

    def replace(self) -> None:
        """Nothing: the program is about to end."""


class Spare:
    """At most one worker that nobody uses yet: unprivileged, and with nothing but its control socket.

    ``async with``: on leaving it is ended, and no other one is started.
    """

    def __init__(
        self, start: Callable[[], Awaitable[WorkerProcess]] = start_worker, seconds: float = KEEP_SECONDS
    ) -> None:
        self._start = start
        self._seconds = seconds
        self._spare: asyncio.Future[WorkerProcess] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._endings: set[asyncio.Task[None]] = set()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        self._expire()
        if self._endings:
            await asyncio.wait(self._endings)

    async def take(self) -> WorkerProcess | None:
        """The spare, which is the caller's from now on; ``None`` if there is none, or it has died.

        Not to be cancelled.
        """
        spare = self._let_go()
        if spare is None:
            return None
        try:
            worker = await spare
        except EngineError:
            return None  # the caller will hear why, when it starts one itself
        if worker.alive:
            return worker
        await worker.end()
        return None

    def replace(self) -> None:
        """See to it that there is one soon, for a while."""
        if self._spare is None and not self._closed:
            self._spare = asyncio.ensure_future(self._start())
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._expire)

    def _let_go(self) -> asyncio.Future[WorkerProcess] | None:
        if self._timer is not None:
            self._timer.cancel()
        spare, self._spare, self._timer = self._spare, None, None
        return spare

    def _expire(self) -> None:
        spare = self._let_go()
        if spare is not None:
            ending = asyncio.create_task(_end(spare))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)


async def _end(spare: asyncio.Future[WorkerProcess]) -> None:
    # A start that was cancelled half-way would leave a process behind.
    await to_the_end(spare)
    if spare.exception() is None:
        await spare.result().end()
    else:
        log.warning("cannot keep a spare worker: %s", spare.exception())
