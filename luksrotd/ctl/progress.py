# SPDX-License-Identifier: GPL-2.0-or-later
"""Where an operation is, on standard error, if somebody is looking."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from luksrotd.ctl.model import Progress

DERIVING: Final = "deriving"
DELIVERING: Final = "delivering"

#: Stages and phases (docs/spec/commit-protocol.md) in words; one that is not here is shown as it is.
STAGES: Final[Mapping[str, str]] = {
    "queued": "waiting for other jobs",
    "locking": "waiting for the volume",
    "reading": "reading the header",
    DERIVING: "deriving keys",
    "verifying": "trying the new key",
    DELIVERING: "handing over the new key",
    "waiting-for-metadata-lock": "waiting for the header lock",
    "new-area": "writing the new keyslot",
    "header-primary": "writing the header",
    "header-secondary": "writing the second header",
    "wipe-old": "wiping the old key",
    "clear-primary": "finishing the header",
    "clear-secondary": "finishing the second header",
    "done": "done",
}


@contextmanager
def shown() -> Iterator[Progress]:
    """Show each stage that is entered, in place; nothing where standard error is no terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console  # noqa: PLC0415 - a tenth of a second that a script need not wait

    with Console(stderr=True).status("starting") as status:

        def show(stage: str) -> None:
            status.update(STAGES.get(stage, stage))
            if stage == DELIVERING:
                status.stop()  # the line belongs to the key now; the rest takes milliseconds
            elif stage == DERIVING:
                status.start()  # but where there is another volume

        yield show
