# SPDX-License-Identifier: GPL-2.0-or-later
"""What the service manager is told (sd_notify(3)), and how often it wants to hear (sd_watchdog_enabled(3))."""

import os
import time
from collections.abc import Mapping

from systemd import daemon as systemd_daemon


class ServiceManager:
    """The service manager; every call is without effect where there is none, and none ever raises."""

    def ready(self, status: str = "") -> None:
        """Start-up is done."""
        self._tell("READY=1", *_status(status))

    def reloading(self) -> None:
        """Reading the configuration again; ``ready`` says that it is done."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def extend(self, seconds: float) -> None:
        """What is going on, a start or a stop, takes this long yet."""
        self._tell(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def status(self, status: str) -> None:
        """One line for ``systemctl status``."""
        self._tell(*_status(status))

    def stopping(self, status: str = "") -> None:
        """Shutting down, on purpose."""
        self._tell("STOPPING=1", *_status(status))

    def watchdog(self) -> None:
        """Still alive."""
        self._tell("WATCHDOG=1")

    def _tell(self, *assignments: str) -> None:
        try:
            systemd_daemon.notify("\n".join(assignments))
        except (OSError, ValueError):  # the socket is gone; systemd notices by itself
            return


def watchdog_interval(environment: Mapping[str, str] = os.environ, *, pid: int | None = None) -> float | None:
    """Seconds between two ``watchdog`` calls, half of what is allowed; None when nobody waits for them from us."""
    try:
        allowed = int(environment["WATCHDOG_USEC"])
        meant_for = int(environment.get("WATCHDOG_PID") or 0)
    except (KeyError, ValueError):
        return None
    if allowed <= 0 or meant_for not in (0, pid if pid is not None else os.getpid()):
        return None
    return allowed / 2_000_000


def _status(text: str) -> tuple[str, ...]:
    # A line break would begin another assignment.
    return (f"STATUS={' '.join(text.split())}",) if text else ()
