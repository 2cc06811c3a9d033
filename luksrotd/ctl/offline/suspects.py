# SPDX-License-Identifier: GPL-2.0-or-later
"""Keyslots that have appeared without a token: what they are, and what somebody wants to become of them."""

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from luksrotd.ctl import secrets
from luksrotd.ctl.arguments import Verbs, add_credential, add_device
from luksrotd.ctl.exits import Exit
from luksrotd.ctl.offline.base import call
from luksrotd.ctl.report import Report, Table
from luksrotd.ctl.request import device
from luksrotd.errors import InvalidRequest, Outcome
from luksrotd.rotation.edits import UNLOCK

if TYPE_CHECKING:
    from luksrotd.ctl.local import Local
    from luksrotd.ctl.model import Progress


def add(verbs: Verbs) -> None:
    """The verb."""
    verbs.group("keyslots that nobody knows (--direct only)")
    suspects = verbs.add(
        "suspects",
        _suspects,
        "list keyslots that have appeared without a token; accept or remove one",
        "luksrotctl --direct suspects /dev/sda2 --remove 3 --key-file passphrase.key",
        check=_check,
    )
    add_device(suspects)
    choice = suspects.add_mutually_exclusive_group()
    choice.add_argument("--accept", type=int, metavar="N", help="keyslot N is in order: do not list it any more")
    choice.add_argument("--remove", type=int, metavar="N", help="remove keyslot N, which no token names, and wipe it")
    add_credential(suspects, "with --remove: another key of the volume, one that stays")


def _check(options: argparse.Namespace) -> None:
    if options.key_file is not None and options.remove is None:
        raise InvalidRequest("cannot use --key-file without --remove")


def _suspects(options: argparse.Namespace) -> Report:
    if options.remove is not None:
        return _remove(options)
    return _list(options) if options.accept is None else _accept(options)


def _list(options: argparse.Namespace) -> Report:
    from luksrotd.ctl.local import ref_of  # noqa: PLC0415 - not before --direct is known to be meant

    async def work(local: "Local", _: "Progress") -> Sequence[Any]:
        return await local.volumes.suspects.list(ref_of(device(options)))

    found = call(work)
    now = datetime.now(UTC)
    entries = [
        {
            "keyslot": one.keyslot,
            "first_seen": one.first_seen.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "age_seconds": max(0, int((now - one.first_seen).total_seconds())),
            "claimed": one.claimed,
        }
        for one in found
    ]
    rows = [
        (str(one.keyslot), entry["first_seen"], f"{entry['age_seconds'] // 86400} days", one.claimed or "-")
        for one, entry in zip(found, entries, strict=True)
    ]
    table = Table(("KEYSLOT", "FIRST SEEN", "AGE", "TOKEN THAT NAMED IT"), rows)
    text: Sequence[str | Table] = [table] if rows else [f"{options.device}: no suspects"]
    return Report(Exit.DONE, {"device": options.device, "suspects": entries}, text, read_only=True)


def _accept(options: argparse.Namespace) -> Report:
    from luksrotd.ctl.local import ref_of  # noqa: PLC0415 - as above

    async def work(local: "Local", _: "Progress") -> None:
        await local.volumes.suspects.accept(ref_of(device(options)), options.accept)

    call(work)
    text = f"keyslot {options.accept} of {options.device} is known from now on"
    return Report(Exit.DONE, {"device": options.device, "accepted": options.accept}, [text])


def _remove(options: argparse.Namespace) -> Report:
    from luksrotd.ctl.local import ref_of  # noqa: PLC0415 - as above
    from luksrotd.ports import SecretFd  # noqa: PLC0415 - as above

    with secrets.opened(options.key_file, f"Another key of {options.device}") as credential:

        async def work(local: "Local", progress: "Progress") -> Any:
            sources = {UNLOCK: SecretFd(credential)}
            return await local.volumes.suspects.remove(
                ref_of(device(options)), options.remove, sources, progress=progress
            )

        done = call(work)
    document = {
        "device": options.device,
        "removed": options.remove,
        "seqid_before": done.seqid_before,
        "seqid_after": done.seqid_after,
        "outcome": str(Outcome.COMMITTED),
    }
    return Report(Exit.DONE, document, [f"removed keyslot {options.remove} of {options.device}"])
