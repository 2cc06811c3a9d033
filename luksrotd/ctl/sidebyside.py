# SPDX-License-Identifier: GPL-2.0-or-later
"""The same on many volumes at once, so that one that does not answer keeps none of the others from its turn."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, TypeVar

T = TypeVar("T")

AT_ONCE: Final = 64
"""Of a volume that is in order there is little more than an open device."""
SILENT_SECONDS: Final = 30.0
"""After which those that have not answered are named, and what is known of the others is told: whoever waits may give
up soon."""


async def side_by_side(
    names: Sequence[str],
    operate: Callable[[str], Awaitable[T]],
    tell: Callable[[str, T], Sequence[str]],
    *,
    silent_seconds: float = SILENT_SECONDS,
) -> list[T]:
    """What ``operate`` gives for each, in their order; ``tell`` makes lines of one of these.

    An exception of one leaves when all have come to their end.
    """
    places = asyncio.Semaphore(AT_ONCE)

    async def in_turn(name: str) -> T:
        async with places:
            return await operate(name)

    tasks = {name: asyncio.ensure_future(in_turn(name)) for name in names}
    telling = asyncio.ensure_future(_tell_of_the_silent(tasks, tell, silent_seconds))
    try:
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        return [task.result() for task in tasks.values()]
    finally:
        telling.cancel()


async def _tell_of_the_silent(
    tasks: Mapping[str, "asyncio.Future[T]"], tell: Callable[[str, T], Sequence[str]], seconds: float
) -> None:
    await asyncio.sleep(seconds)
    for name, task in tasks.items():
        answered = task.done() and not task.cancelled() and task.exception() is None
        for line in tell(name, task.result()) if answered else [f"{name}: does not answer"]:
            print(f"luksrotctl: {line}", file=sys.stderr, flush=True)
