# SPDX-License-Identifier: GPL-2.0-or-later
"""Ctrl-C and its kin during an operation: a wish to stop, after which the true outcome is still told."""

import signal
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar

from luksrotd.errors import Cancelled

if TYPE_CHECKING:
    import asyncio

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

T = TypeVar("T")


def raise_on_signals() -> None:
    """Make all of them raise ``KeyboardInterrupt``, so that a terminal gets its echo back and files go."""
    for number in SIGNALS:
        signal.signal(number, _interrupted)


async def interruptible(operation: Coroutine[Any, Any, T], on_signal: "Callable[[asyncio.Task[T]], None]") -> T:
    """Run ``operation``; ``on_signal`` gets its task at each signal.  Raises ``Cancelled`` if that has stopped it.

    Afterwards the signals are ignored: all that is left to do is to say what happened.
    """
    import asyncio  # noqa: PLC0415 - slow to import, and not needed to understand the command line

    loop = asyncio.get_running_loop()
    task = loop.create_task(operation)
    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal, task)
    try:
        await asyncio.wait([task])
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
    if task.cancelled():
        raise Cancelled("cannot go on: the operation was interrupted")
    return task.result()


def _interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt
