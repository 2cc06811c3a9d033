# SPDX-License-Identifier: GPL-2.0-or-later
"""Blocking calls in threads, which are never left alone with a descriptor.

A call on a disk that has died does not come back, and a thread cannot be ended.  So there are many more threads than
asyncio has, and of the calls about one thing, which may all hang when one does, only few have one at a time: a dead
disk that callers ask about again and again holds up nobody else.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import Final, TypeVar
from weakref import WeakKeyDictionary

from luksrotd.errors import Busy

T = TypeVar("T")

THREADS: Final = 512
"""Made when they are needed; one that waits costs some KiB."""
THREADS_ABOUT_ONE: Final = 3
"""Of the calls about one thing; the others wait, in order."""

#: Of each event loop its own, which end with it: a thread keeps the mount namespace that it was made in.
_threads: WeakKeyDictionary[asyncio.AbstractEventLoop, ThreadPoolExecutor] = WeakKeyDictionary()
_places: dict[tuple[asyncio.AbstractEventLoop, str], "_Places"] = {}


class _Places:
    def __init__(self) -> None:
        self.free = asyncio.Semaphore(THREADS_ABOUT_ONE)
        self.users = 0


def _keep(_: object) -> None:
    """Nothing to undo."""


async def in_thread(call: Callable[[], T], *, about: str = "", undo: Callable[[T], None] = _keep) -> T:
    """What ``call`` returns or raises, run in a thread.

    ``about``: the path of the device that it may hang with, or another name of what it is about; '' if it cannot hang.

    When cancelled, wait for the thread all the same, ``undo`` what it returned, and only then go: it would otherwise
    use a descriptor that is being closed, or open one for nobody.  A call that has no thread yet is not made at all;
    raises ``Busy`` if there are none to be had.
    """
    async with _place(about):
        return await _run(call, undo)


@asynccontextmanager
async def _place(about: str) -> AsyncIterator[None]:
    if not about:
        yield
        return
    key = (asyncio.get_running_loop(), about)
    places = _places.setdefault(key, _Places())
    places.users += 1
    try:
        async with places.free:
            yield
    finally:
        places.users -= 1
        if not places.users:
            del _places[key]


async def _run(call: Callable[[], T], undo: Callable[[T], None]) -> T:
    loop = asyncio.get_running_loop()
    if loop not in _threads:
        _threads[loop] = ThreadPoolExecutor(THREADS, "luksrotd")
    running = asyncio.wrap_future(_begun(_threads[loop], call))
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


def _begun(executor: ThreadPoolExecutor, call: Callable[[], T]) -> "Future[T]":
    """``call`` in a thread of ``executor``, which queues it even where no thread can be started for it."""
    done: Future[T] = Future()
    context = copy_context()

    def work() -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            done.set_result(context.run(call))
        except BaseException as error:  # noqa: BLE001 - whoever waits has it
            done.set_exception(error)

    try:
        executor.submit(work)
    except RuntimeError as error:
        # Unless a thread that had nothing to do has taken it, nobody is to do so later.
        if done.cancel():
            raise Busy(f"cannot go on: no thread is to be had: {error}") from error
    return done
