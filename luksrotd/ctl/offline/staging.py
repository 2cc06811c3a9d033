# SPDX-License-Identifier: GPL-2.0-or-later
"""Rotation in two steps: stage, then finish or abort."""

import argparse

from luksrotd.ctl.arguments import Verbs, add_device, add_name
from luksrotd.ctl.model import KeyChange, Progress
from luksrotd.ctl.offline.base import call
from luksrotd.ctl.report import Report, changed
from luksrotd.ctl.request import device


def add(verbs: Verbs) -> None:
    """The verbs."""
    verbs.group("rotation in two steps (--direct only)")
    finish = verbs.add("finish", _finish, "make the staged key the only one", "luksrotctl --direct finish /dev/sda2")
    add_device(finish)
    add_name(finish)
    finish.add_argument("--generation", type=int, metavar="N", help="only if generation N is the staged one")


def _finish(options: argparse.Namespace) -> Report:
    from luksrotd.ctl.local import Local, changed_key, ref_of  # noqa: PLC0415 - a client of the bus does not need it

    async def work(local: Local, progress: Progress) -> KeyChange:
        ref = ref_of(device(options))
        return changed_key(
            await local.volumes.finish(ref, name=options.name, generation=options.generation, progress=progress)
        )

    return changed("finish", options.device, call(work), None, to_stderr=False)
