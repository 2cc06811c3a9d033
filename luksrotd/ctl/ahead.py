# SPDX-License-Identifier: GPL-2.0-or-later
"""The worker of ``--direct``, started while luksrotctl itself is still being read in: both take about as long."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from luksrotd.errors import EngineError
from luksrotd.names import ATOMIC

if TYPE_CHECKING:
    from luksrotd.host.launch import Launched

#: The verbs that need one whenever they do anything.
VERBS: Final = frozenset(
    ("enroll", "rotate", "recreate", "stage", "finish", "abort", "adopt", "release", "set-data", "remove", "verify")
)

#: At most one, until somebody has work for it.
_launched: "list[Launched]" = []


@contextmanager
def started(options: argparse.Namespace) -> Iterator[None]:
    """Start one if the verb is going to need it; ended on leaving if nobody has taken it."""
    if _needed(options):
        from luksrotd.host.launch import launch  # noqa: PLC0415 - a client of the bus starts no process

        with suppress(EngineError):  # said by whoever needs a worker and cannot start it either
            _launched.append(launch())
    try:
        yield
    finally:
        if (unused := take()) is not None:
            unused.end()


def take() -> "Launched | None":
    """The worker, which is the caller's from now on; ``None`` if there is none any more."""
    return _launched.pop() if _launched else None


def _needed(options: argparse.Namespace) -> bool:
    # One that asks a token may need a group, which is given to it when it is started.
    by_token = getattr(options, "token", None) is not None
    live = getattr(options, "engine", ATOMIC) != ATOMIC
    return options.direct and options.verb in VERBS and not (live or by_token)
