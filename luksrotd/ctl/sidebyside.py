# SPDX-License-Identifier: GPL-2.0-or-later
"""The same on many volumes at once, so that one that does not answer keeps none of the others from its turn."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

T = TypeVar("T")

AT_ONCE: Final = 64
"""Of a volume that is in order there is little more than an open device; for others ``local`` has a lower limit."""
SILENT_SECONDS: Final = 30.0
"""After which those that have not answered are named, and what is known of the others is told: whoever waits may give
up soon."""


async def side_by_side(
    names: Sequence[str],
    operate: Callable[[str], Awaitable[T]],
    tell: Callable[[str, T], Sequence[str]],
    *,
    interrupted: T,
    silent_seconds: float = SILENT_SECONDS,
) -> list[T]:
    """What ``operate`` gives for each, in their order; ``tell`` makes lines of one of these.

    An exception of one leaves when all have come to their end.  An interruption reaches all: for those that it stops
    the result is ``interrupted``, as others may have changed a volume by then, which has to be told.  If it stops all
    of them, it leaves.
    """
    places = asyncio.Semaphore(AT_ONCE)

    async def in_turn(name: str) -> T:
        async with places:
            return await operate(name)

    tasks = [asyncio.ensure_future(in_turn(name)) for name in names]
    telling = asyncio.ensure_future(_tell_of_the_silent(names, tasks, tell, silent_seconds))
    try:
        await _all_ended(tasks)
    finally:
        telling.cancel()
    if tasks and all(task.cancelled() for task in tasks):
        raise asyncio.CancelledError
    return [interrupted if task.cancelled() else task.result() for task in tasks]


async def _all_ended(tasks: Sequence["asyncio.Future[T]"]) -> None:
    """Wait for all, and hand on every cancellation to those that have not ended."""
    while pending := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError:
            for task in pending:
                task.cancel()


async def _tell_of_the_silent(
    names: Sequence[str],
    tasks: Sequence["asyncio.Future[T]"],
    tell: Callable[[str, T], Sequence[str]],
    seconds: float,
) -> None:
    await asyncio.sleep(seconds)
    for name, task in zip(names, tasks, strict=True):
        answered = task.done() and not task.cancelled() and task.exception() is None
        for line in tell(name, task.result()) if answered else [f"{name}: does not answer"]:
            print(f"luksrotctl: {line}", file=sys.stderr, flush=True)
