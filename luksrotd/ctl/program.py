# SPDX-License-Identifier: GPL-2.0-or-later
"""The program luksrotctl: ``ctl.__main__.main`` in a process that has nothing else to do, and so can make it short."""

import gc
import os
import sys
from typing import Final, NoReturn

#: New objects after which Python looks for garbage (700 by default): most of what is made here lasts, being code.
_ENOUGH: Final = 100_000


def command() -> NoReturn:
    """Run it and leave the process with its status."""
    gc.set_threshold(_ENOUGH)
    # asyncio would import it, for a quarter of its own time; here nobody speaks TLS.  None: as if there were none.
    sys.modules["ssl"] = None  # type: ignore[assignment] # as Python's import documents it
    from luksrotd.ctl.__main__ import main  # noqa: PLC0415 - see above

    # Python would free, object by object, what the kernel frees at once.
    os._exit(main())
