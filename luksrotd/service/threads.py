# SPDX-License-Identifier: GPL-2.0-or-later
"""Blocking calls in threads, which are never left alone with a descriptor."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def _keep(_: object) -> None:
    """Nothing to undo."""


async def in_thread(call: Callable[[], T], *, undo: Callable[[T], None] = _keep) -> T:
    """What ``call`` returns or raises, run in a thread.

    When cancelled, wait for the thread all the same, ``undo`` what it returned, and only then go: it would otherwise
    use a descriptor that is being closed, or open one for nobody.
    """
    running = asyncio.ensure_future(asyncio.to_thread(call))
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait({running})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return running.result()
    if not running.cancelled() and running.exception() is None:
        undo(running.result())
    raise cancelled
