# SPDX-License-Identifier: GPL-2.0-or-later
"""When a volume is examined: soon, and not more often than is of use, however many events it has."""

import asyncio
from collections.abc import Awaitable, Callable

#: Examines the volume; ``fresh``: because a device came or went.
Examine = Callable[[str, bool], Awaitable[None]]


class Agenda:
    """One examination of a volume at a time; what comes up meanwhile, and for a pause afterwards, is one more.

    What is ``urgent`` does not wait for the pause, only for the examination that has begun before.
    """

    def __init__(self, examine: Examine, pause_seconds: float) -> None:
        self._examine = examine
        self._pause_seconds = pause_seconds
        self._group: asyncio.TaskGroup | None = None
        self._due: dict[str, bool] = {}
        self._urgent: set[str] = set()
        self._active: dict[str, asyncio.Task[None]] = {}
        self._pauses: dict[str, asyncio.TimerHandle] = {}

    def begin(self, group: asyncio.TaskGroup) -> None:
        """From now on examine, in tasks of the group."""
        self._group = group

    def end(self) -> None:
        """Begin no more examinations."""
        self._group = None
        for uuid in list(self._pauses):
            self._pauses.pop(uuid).cancel()

    def add(self, uuid: str, *, fresh: bool, urgent: bool) -> None:
        """Examine the volume soon; any number of calls meanwhile are one."""
        if self._group is None:
            return
        self._due[uuid] = fresh or self._due.get(uuid, False)
        if urgent:
            self._urgent.add(uuid)
        self._next(uuid)

    def inherit(self, uuid: str, *, fresh: bool) -> None:
        """An examination was in vain: what it was for is for the next one, if there is one."""
        if uuid in self._due:
            self._due[uuid] |= fresh

    def forget(self, uuid: str) -> None:
        """It is gone; when it comes again, that is news."""
        self._due.pop(uuid, None)
        self._urgent.discard(uuid)
        if uuid in self._pauses:
            self._pauses.pop(uuid).cancel()

    async def done(self, uuid: str, seconds: float) -> None:
        """Wait until what is urgent has been done, or the time is over."""
        if uuid in self._active:
            await asyncio.wait({self._active[uuid]}, timeout=seconds)

    async def idle(self) -> None:
        """Wait for all examinations that have begun."""
        if self._active:
            await asyncio.wait(list(self._active.values()))

    def _next(self, uuid: str) -> None:
        if self._group is None or uuid not in self._due or uuid in self._active:
            return
        if uuid in self._urgent or uuid not in self._pauses:
            self._active[uuid] = self._group.create_task(self._work(uuid))

    async def _work(self, uuid: str) -> None:
        try:
            while uuid in self._due and (uuid in self._urgent or uuid not in self._pauses):
                self._urgent.discard(uuid)
                fresh = self._due.pop(uuid)
                await self._examine(uuid, fresh)
                self._rest(uuid)
        finally:
            del self._active[uuid]

    def _rest(self, uuid: str) -> None:
        if uuid in self._pauses:
            self._pauses.pop(uuid).cancel()
        if self._pause_seconds > 0 and self._group is not None:
            loop = asyncio.get_running_loop()
            self._pauses[uuid] = loop.call_later(self._pause_seconds, self._rested, uuid)

    def _rested(self, uuid: str) -> None:
        del self._pauses[uuid]
        self._next(uuid)
