# SPDX-License-Identifier: GPL-2.0-or-later
"""The three locks within one process: they exclude, remember who did what when, and insist on their nesting order.

Asking for a lock out of order, or twice in one task, is an ``AssertionError``: with the real ones it is a deadlock.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from enum import IntEnum

from luksrotd.errors import Busy, LockTimeout
from luksrotd.ports import DeviceIdentity, HeaderDevice


class Level(IntEnum):
    """The locks, outermost first."""

    JOB = 1
    METADATA = 2
    WHOLE_DISK = 3


@dataclass(frozen=True, slots=True)
class LockEvent:
    """One line of the log."""

    level: Level
    identity: DeviceIdentity
    acquired: bool
    exclusive: bool = True

    @property
    def text(self) -> str:
        """``+`` or ``-``, the lock, and whether it is shared."""
        return ("+" if self.acquired else "-") + self.level.name.lower() + ("" if self.exclusive else " shared")


@dataclass(frozen=True, slots=True, eq=False)
class _Hold:
    level: Level
    identity: DeviceIdentity
    exclusive: bool
    task: object  # None: another process


class SimLocks:
    """``ports.DeviceLocks``; with ``wait`` a lock that is held is waited for, without it the time is up at once."""

    def __init__(self, *, wait: bool = False) -> None:
        self.wait = wait
        self.log: list[LockEvent] = []
        self._holds: list[_Hold] = []
        self._waiting: list[_Hold] = []
        self._released: list[asyncio.Future[None]] = []

    @asynccontextmanager
    async def job(self, device: HeaderDevice) -> AsyncIterator[None]:
        """Hold luksrotd's own lock."""
        hold = await self._acquire(Level.JOB, device, exclusive=True)
        if hold is None:
            raise Busy(f"cannot work on {device.path}: another process is at work on it")
        try:
            yield
        finally:
            self._release(hold)

    @asynccontextmanager
    async def metadata(self, device: HeaderDevice, *, exclusive: bool) -> AsyncIterator[None]:
        """Hold libcryptsetup's lock."""
        hold = await self._acquire(Level.METADATA, device, exclusive=exclusive)
        if hold is None:
            raise LockTimeout(f"cannot lock {device.path}: its LUKS2 metadata lock is held by another process")
        try:
            yield
        finally:
            self._release(hold)

    @asynccontextmanager
    async def whole_disk(self, device: HeaderDevice) -> AsyncIterator[None]:
        """Hold systemd's lock; nothing for a file."""
        if not device.identity.block:
            yield
            return
        hold = await self._acquire(Level.WHOLE_DISK, device, exclusive=True)
        if hold is None:
            raise LockTimeout(f"cannot lock {device.path}: its block device lock is held by another process")
        try:
            yield
        finally:
            self._release(hold)

    @contextmanager
    def held_elsewhere(self, level: Level, device: HeaderDevice, *, exclusive: bool = True) -> Iterator[None]:
        """Hold a lock as another process would; not logged."""
        hold = _Hold(level, device.identity, exclusive, None)
        if self._conflicts(hold):
            raise AssertionError(f"{level.name} is already held")
        self._holds.append(hold)
        try:
            yield
        finally:
            self._drop(hold)

    def held(self, device: HeaderDevice) -> tuple[Level, ...]:
        """The locks of the device that this process holds now, outermost first."""
        return tuple(
            sorted({hold.level for hold in self._holds if hold.identity == device.identity and hold.task is not None})
        )

    async def _acquire(self, level: Level, device: HeaderDevice, *, exclusive: bool) -> _Hold | None:
        hold = _Hold(level, device.identity, exclusive, asyncio.current_task())
        for other in self._holds:
            if other.task is hold.task and other.identity == hold.identity and other.level >= level:
                raise AssertionError(f"{level.name} of {device.path} asked for while {other.level.name} is held")
        self._waiting.append(hold)
        try:
            while self._conflicts(hold) or self._stands_back(hold):
                if not self.wait:
                    return None
                released = asyncio.get_running_loop().create_future()
                self._released.append(released)
                await released
            self._holds.append(hold)
        finally:
            self._waiting.remove(hold)
            if hold.exclusive:
                self._wake()  # those that stood back
        self.log.append(LockEvent(level, hold.identity, True, exclusive))
        return hold

    def _conflicts(self, hold: _Hold) -> bool:
        return any(
            other.level == hold.level and other.identity == hold.identity and (other.exclusive or hold.exclusive)
            for other in self._holds
        )

    def _stands_back(self, hold: _Hold) -> bool:
        """Shared, and an exclusive one waits."""
        return not hold.exclusive and any(
            other.exclusive and other.level == hold.level and other.identity == hold.identity for other in self._waiting
        )

    def _release(self, hold: _Hold) -> None:
        self.log.append(LockEvent(hold.level, hold.identity, False, hold.exclusive))
        self._drop(hold)

    def _drop(self, hold: _Hold) -> None:
        self._holds.remove(hold)
        self._wake()

    def _wake(self) -> None:
        waiting, self._released = self._released, []
        for released in waiting:
            if not released.done():
                released.set_result(None)
