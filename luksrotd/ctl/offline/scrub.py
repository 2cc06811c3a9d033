# SPDX-License-Identifier: GPL-2.0-or-later
"""Overwriting of unreferenced keyslot space."""

import argparse
from typing import TYPE_CHECKING

from luksrotd.ctl.arguments import Verbs, add_device
from luksrotd.ctl.exits import Exit
from luksrotd.ctl.offline.base import call
from luksrotd.ctl.report import Report
from luksrotd.ctl.request import device

if TYPE_CHECKING:
    from luksrotd.ctl.local import Local
    from luksrotd.ctl.model import Progress


def add(verbs: Verbs) -> None:
    """The verb."""
    verbs.group("leftovers (--direct only)")
    scrub = verbs.add(
        "scrub",
        _scrub,
        "overwrite all keyslot space that is not in use; needs no key",
        "luksrotctl --direct scrub /dev/sda2",
    )
    add_device(scrub)


def _scrub(options: argparse.Namespace) -> Report:
    from luksrotd.ctl.local import ref_of  # noqa: PLC0415 - not before --direct is known to be meant

    async def work(local: "Local", progress: "Progress") -> int:
        return (await local.volumes.scrub(ref_of(device(options)), progress=progress)).bytes

    written = call(work)
    text = f"overwrote {written} bytes of unused keyslot space of {options.device}"
    return Report(Exit.DONE, {"device": options.device, "bytes": written}, [text])
