# SPDX-License-Identifier: GPL-2.0-or-later
"""What the service manager is told (sd_notify(3)), how often it wants to hear, and what it has opened for us."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Final

from systemd import daemon as systemd_daemon

#: What luksrotd-udev.socket calls its socket (``FileDescriptorName=``).
UDEV_SOCKET: Final = "udev"


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


class StatusLine:
    """One line for ``systemctl status``: what troubles the service, and ``usual``; shown from ready to stopping."""

    def __init__(self, manager: ServiceManager, usual: Callable[[], str]) -> None:
        self._manager = manager
        self._usual = usual
        self._troubles: dict[str, str] = {}
        self._shown = False
        self._stopping = False

    def reloading(self) -> None:
        """The configuration is being read again; nothing once it is stopping."""
        if not self._stopping:
            self._manager.reloading()

    def ready(self, **troubles: str) -> None:
        """Start-up, or a reload, is done, with these troubles ('' for none any more); nothing once it is stopping."""
        if self._stopping:
            return
        self._shown = True
        self._note(troubles)
        self._manager.ready(self._text())

    def say(self, about: str, trouble: str) -> None:
        """There is that trouble now, or ('') it is over."""
        self._note({about: trouble})
        self.show()

    def show(self) -> None:
        """As it is now."""
        if self._shown:
            self._manager.status(self._text())

    def stopping(self, text: str) -> None:
        """The last line."""
        self._shown, self._stopping = False, True
        self._manager.stopping(text)

    def _note(self, troubles: dict[str, str]) -> None:
        self._troubles = {about: text for about, text in (self._troubles | troubles).items() if text}

    def _text(self) -> str:
        return "; ".join([*self._troubles.values(), self._usual()])


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


def inherited_socket(name: str) -> int | None:
    """The socket of that name that the service manager has opened for us (sd_listen_fds(3)); ``None`` for none.

    To be called once, before there are other threads: the environment tells of it no more afterwards.
    """
    given = systemd_daemon.listen_fds_with_names(unset_environment=True)
    return next((fd for fd, called in given.items() if called == name), None)


def _status(text: str) -> tuple[str, ...]:
    # A line break would begin another assignment.
    return (f"STATUS={' '.join(text.split())}",) if text else ()
