# SPDX-License-Identifier: GPL-2.0-or-later
"""The system's clock."""

from datetime import UTC, datetime


class SystemClock:
    """``ports.Clock``: CLOCK_REALTIME in whole seconds, as tokens record it."""

    def now(self) -> datetime:
        """The current time, in UTC."""
        return datetime.now(UTC).replace(microsecond=0)
