# SPDX-License-Identifier: GPL-2.0-or-later
"""What the verbs of this package share."""

from typing import TYPE_CHECKING, TypeVar

from luksrotd.ctl.interrupt import interruptible
from luksrotd.ctl.progress import shown
from luksrotd.names import ATOMIC

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from luksrotd.ctl.local import Local
    from luksrotd.ctl.model import Progress

T = TypeVar("T")


def call(work: "Callable[[Local, Progress], Awaitable[T]]", engine: str = ATOMIC) -> T:
    """Do ``work`` with the use cases, in this process; raises ``LuksrotdError``.  ``engine``: of ``names.ENGINES``.

    It is told where an operation is by the ``Progress`` that it gets, and cancelled by Ctrl-C up to the point of no
    return of a commit.
    """
    # Imported late: a client of the bus needs none of it.
    import asyncio  # noqa: PLC0415 - see above

    from luksrotd.ctl.local import Local, permissions  # noqa: PLC0415 - see above

    async def run(local: Local) -> T:
        with permissions(), shown() as progress:
            return await work(local, local.watched(progress))

    async def main() -> T:
        local = Local(engine)
        return await interruptible(run(local), local.interrupt)

    return asyncio.run(main())
