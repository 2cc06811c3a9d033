# SPDX-License-Identifier: GPL-2.0-or-later
"""Overwriting of unreferenced keyslot space."""

import argparse

from luksrotd.ctl.arguments import Verbs, add_device, add_if_generation
from luksrotd.ctl.backend import call
from luksrotd.ctl.exits import Exit
from luksrotd.ctl.model import Backend
from luksrotd.ctl.progress import shown
from luksrotd.ctl.report import Report
from luksrotd.ctl.request import device


def add(verbs: Verbs) -> None:
    """The verb."""
    verbs.group("leftovers")
    scrub = verbs.add(
        "scrub",
        _scrub,
        "overwrite all keyslot space that is not in use; needs no key",
        "luksrotctl scrub /dev/sda2",
        bus=True,
    )
    add_device(scrub)
    add_if_generation(scrub)


def _scrub(options: argparse.Namespace) -> Report:
    async def work(backend: Backend) -> int:
        with shown() as progress:
            return await backend.scrub(device(options), progress, options.if_generation)

    written = call(options, work)
    text = f"overwrote {written} bytes of unused keyslot space of {options.device}"
    return Report(Exit.DONE, {"device": options.device, "bytes": written}, [text])
