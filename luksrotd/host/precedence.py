# SPDX-License-Identifier: GPL-2.0-or-later
"""Who goes first, within this process, where flock(2) has no order."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from luksrotd.ports import DeviceIdentity


class WritersFirst:
    """An exclusive lock that is waited for comes before all shared ones that are asked for later.

    flock(2) gives a shared lock to whoever comes while another one is held: callers who read one after the other, as
    anybody may, would keep a commit waiting until it gives up.
    """

    def __init__(self) -> None:
        self._writers: Counter[DeviceIdentity] = Counter()
        self._passed: dict[DeviceIdentity, asyncio.Event] = {}

    @contextmanager
    def writer(self, identity: DeviceIdentity) -> Iterator[None]:
        """The time that a writer waits."""
        self._passed.setdefault(identity, asyncio.Event())
        self._writers[identity] += 1
        try:
            yield
        finally:
            self._writers[identity] -= 1
            if not self._writers[identity]:
                del self._writers[identity]
                self._passed.pop(identity).set()

    async def reader(self, identity: DeviceIdentity, seconds: float) -> bool:
        """Return when no writer waits; whether that was in time."""
        try:
            async with asyncio.timeout(seconds):
                while identity in self._passed:
                    await self._passed[identity].wait()
        except TimeoutError:
            return False
        return True
