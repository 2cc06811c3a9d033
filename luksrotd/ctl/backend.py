# SPDX-License-Identifier: GPL-2.0-or-later
"""How a verb reaches luksrotd: over the bus, or with ``--direct`` in this process."""

import argparse
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from luksrotd.ctl.interrupt import interruptible
from luksrotd.ctl.model import Backend, KeyRequest
from luksrotd.ctl.progress import shown
from luksrotd.ctl.report import Report, changed
from luksrotd.ctl.request import device, prints_key
from luksrotd.names import ATOMIC

T = TypeVar("T")
Operation = Callable[[Backend], Coroutine[Any, Any, T]]


def call(options: argparse.Namespace, work: Operation[T]) -> T:
    """Do ``work`` with what the options choose; raises ``LuksrotdError``.

    Ctrl-C stops it up to the point of no return of a commit.
    """

    import asyncio  # noqa: PLC0415 - slow to import: meanwhile the worker of --direct can start (ctl.ahead)

    async def run() -> T:
        backend = _backend(direct=options.direct, engine=getattr(options, "engine", ATOMIC))
        try:
            return await interruptible(work(backend), backend.interrupt)
        finally:
            await backend.close()

    return asyncio.run(run())


def change(options: argparse.Namespace, request: KeyRequest) -> Report:
    """Change a key of the one volume that the options name; the report."""

    if request.if_generation is None:
        request = replace(request, if_generation=options.if_generation)

    async def work(backend: Backend) -> Report:
        with shown() as progress:
            done = await backend.change(device(options), request, progress)
        output = getattr(options, "output", None)
        return changed(request.verb, device(options).name, done, output, to_stderr=prints_key(options))

    return call(options, work)


def _backend(*, direct: bool, engine: str) -> Backend:
    # Imported late: a client of the bus needs none of luksrotd's own code, and --direct no D-Bus.
    if direct:
        from luksrotd.ctl.local import Local  # noqa: PLC0415 - see above

        return Local(engine)
    from luksrotd.ctl.remote import Remote  # noqa: PLC0415 - see above

    return Remote()
