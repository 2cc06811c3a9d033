# SPDX-License-Identifier: GPL-2.0-or-later
"""Cancelling, up to the point of no return."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from luksrotd.errors import Cancelled

T = TypeVar("T")


class PointOfNoReturn:
    """Is passed once, by the thread that commits, right before the first write that a reader of the header can see."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._passed = False
        self._cancelled = False

    def cancel(self) -> bool:
        """Ask not to pass it; whether that was in time."""
        with self._lock:
            self._cancelled = self._cancelled or not self._passed
            return self._cancelled

    def check(self) -> None:
        """Raise ``Cancelled`` if somebody has asked not to go on."""
        with self._lock:
            if self._cancelled:
                raise Cancelled("cannot go on: the operation was cancelled")

    def pass_it(self) -> None:
        """Pass it; raises ``Cancelled`` if somebody has asked not to."""
        with self._lock:
            if self._cancelled:
                raise Cancelled("cannot go on: the operation was cancelled")
            self._passed = True


async def cancellable(work: Callable[[PointOfNoReturn], Coroutine[Any, Any, T]]) -> T:
    """What ``work`` returns or raises.  A cancel reaches it only before it has passed its point of no return.

    Afterwards it runs to its end, its clean-up too, so that the caller always learns what became of the device.
    """
    point = PointOfNoReturn()
    task = asyncio.ensure_future(work(point))
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            if point.cancel():
                task.cancel()
    return task.result()


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns or raises; a cancel does not reach it, and is left for ``heed_cancellation``."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    return task.result()


def heed_cancellation() -> None:
    """Be cancelled now if a cancel came while something could not be interrupted."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
