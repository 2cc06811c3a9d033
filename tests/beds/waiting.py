# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for what another machine does."""

import time
from collections.abc import Callable
from typing import Final

#: Far more than anything takes on a machine that is busy: a bound, not a verdict.
PATIENCE: Final = 90.0
_PAUSE: Final = 0.02


def until(condition: Callable[[], object], what: str) -> None:
    """Return when the condition holds; AssertionError with ``what`` if it never does."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(_PAUSE)
