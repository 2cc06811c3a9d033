# SPDX-License-Identifier: GPL-2.0-or-later
"""Backup and restore of the header."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from luksrotd.ctl import secrets
from luksrotd.ctl.arguments import Verbs, add_device
from luksrotd.ctl.exits import Exit
from luksrotd.ctl.model import Progress
from luksrotd.ctl.offline.base import call
from luksrotd.ctl.render import render
from luksrotd.ctl.report import Report, Table
from luksrotd.ctl.request import device
from luksrotd.errors import Cancelled, InvalidRequest, Outcome
from luksrotd.names import TOKEN_TYPE

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from luksrotd.ctl.local import Local
    from luksrotd.ports import DeviceRef

_YES: Final = "yes"
_HEADINGS: Final = ("WHAT", "NUMBER", "BECOMES", "NOW", "THEN")


def add(verbs: Verbs) -> None:
    """The verbs."""
    verbs.group("header backups (--direct only)")
    backup = verbs.add(
        "header backup",
        _backup,
        "save header and keyslots in a new file, for cryptsetup too",
        "luksrotctl --direct header backup /dev/sda2 sda2.luks",
        writes=False,
    )
    add_device(backup)
    backup.add_argument("file", metavar="FILE", help="the backup; there must be no such file yet")
    restore = verbs.add(
        "header restore",
        _restore,
        "bring header and keyslots back from such a file; old keys come back, newer ones go",
        "luksrotctl --direct header restore /dev/sda2 sda2.luks --dry-run",
        check=_check_restore,
    )
    add_device(restore)
    restore.add_argument("file", metavar="FILE", help="the backup, of luksrotctl or of cryptsetup")
    restore.add_argument("--dry-run", action="store_true", help="change nothing, only tell what would be done")
    restore.add_argument("--yes", action="store_true", help="do it without asking")
    restore.add_argument(
        "--force",
        action="store_true",
        help="also where DEVICE has no header any more, and nobody can tell whose it was",
    )
    help_key = "a key that must open the restored header, tried before anything is written; - for standard input"
    restore.add_argument("--key-file", "-d", metavar="FILE", help=help_key)


def _check_restore(options: argparse.Namespace) -> None:
    if options.yes and options.dry_run:
        raise InvalidRequest("cannot use --yes with --dry-run")
    if options.yes or options.dry_run:
        return
    if options.json or options.key_file == secrets.STDIN or not (sys.stdin and sys.stdin.isatty()):
        raise InvalidRequest(
            "cannot ask whether to restore the header: give --yes, or --dry-run to see what it would do"
        )


def _backup(options: argparse.Namespace) -> Report:
    async def work(ref: "DeviceRef", headers: Any, _: Progress) -> Any:
        return await headers.backup(ref, options.file)

    saved = _on_headers(options, work)
    text = [
        f"saved the header of {options.device} (sequence number {saved.seqid}) in {options.file}: {saved.size} bytes"
    ]
    return Report(Exit.DONE, {"device": options.device, "file": options.file, **asdict(saved)}, text)


def _restore(options: argparse.Namespace) -> Report:
    async def compare(ref: "DeviceRef", headers: Any, _: Progress) -> Any:
        return await headers.compare(ref, options.file, force=options.force)

    compared = _on_headers(options, compare)
    document, text = _shown(options, compared)
    if options.dry_run:
        return Report(Exit.DONE, document, text, read_only=True)
    if not options.yes:
        render(Report(Exit.DONE, {}, text, to_stderr=True), as_json=False)
        _ask(options)
    with ExitStack() as stack:
        key = None
        if options.key_file is not None:
            key = stack.enter_context(secrets.opened(options.key_file, f"Key that opens {options.device} afterwards"))

        async def restore(ref: "DeviceRef", headers: Any, progress: Progress) -> Any:
            from luksrotd.ports import SecretFd  # noqa: PLC0415 - a client of the bus does not need it

            return await headers.restore(ref, compared, None if key is None else SecretFd(key), progress)

        done = _on_headers(options, restore)
    seqids = {"seqid_before": done.seqid_before, "seqid_after": done.seqid_after}
    outcome = Outcome.UNCHANGED if done.seqid_before == done.seqid_after else Outcome.COMMITTED
    text = [*text, _told(options, done)] if options.yes else [_told(options, done)]
    return Report(Exit.DONE, {**document, **seqids, "outcome": str(outcome)}, text)


def _on_headers(options: argparse.Namespace, work: "Callable[[DeviceRef, Any, Progress], Awaitable[Any]]") -> Any:
    async def run(_: "Local", progress: Progress) -> Any:
        from luksrotd import direct  # noqa: PLC0415 - a client of the bus does not need it
        from luksrotd.ctl.local import ref_of  # noqa: PLC0415 - as above

        return await work(ref_of(device(options)), direct.headers(), progress)

    return call(run)


def _ask(options: argparse.Namespace) -> None:
    """Raises ``Cancelled`` for anything but a yes."""
    print(
        f"Restore the header of {options.device} from {options.file}? Type {_YES}: ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    if sys.stdin.readline().strip() != _YES:
        raise Cancelled("cannot restore the header: you did not say yes")


def _told(options: argparse.Namespace, done: Any) -> str:
    if done.seqid_before == done.seqid_after:
        return f"{options.device} has this header already: nothing was written"
    return f"restored the header of {options.device} from {options.file}: sequence number {done.seqid_after}"


def _shown(options: argparse.Namespace, compared: Any) -> tuple[dict[str, Any], list[str | Table]]:
    """What a restore would do, as a document and as text."""
    document = {
        "device": options.device,
        "file": options.file,
        "uuid": compared.uuid,
        "dry_run": options.dry_run,
        "header_lost": compared.before is None,
        "moved_keyslots": list(compared.moved),
        "differences": [asdict(difference) for difference in compared.differences],
    }
    if not compared.differences:
        return document, [f"{options.device} and {options.file}: no difference"]
    rows = [
        (one.what, one.name, one.how, _brief(one.what, one.before), _brief(one.what, one.after))
        for one in compared.differences
    ]
    text: list[str | Table] = [Table(_HEADINGS, rows)]
    if compared.before is None:
        text.insert(0, f"{options.device} has no header any more; whether this one is its own, only a key can tell")
    back, gone = (_keyslots(compared.differences, hows) for hows in (("add", "replace"), ("remove", "replace")))
    if back and compared.before is not None:
        text.append(f"the passphrases of keyslots {back} of the backup open the volume again, whoever knows them")
    if gone:
        text.append(f"the passphrases of keyslots {gone} do not open the volume any more")
    return document, text


def _keyslots(differences: Iterable[Any], hows: Sequence[str]) -> str:
    return ", ".join(one.name for one in differences if one.what == "keyslot" and one.how in hows)


def _brief(what: str, side: Mapping[str, Any]) -> str:
    """One side of a difference in a few words."""
    if not side:
        return "-"
    match what:
        case "keyslot":
            return f"{side['pbkdf'] or side['type']}, {side['size']} bytes at {side['offset']}"
        case "token" if side["type"] == TOKEN_TYPE:
            slots = ", ".join(side["keyslots"]) or "-"
            return f"key {side.get('name')} generation {side.get('generation')}, keyslot {slots}"
        case "token":
            return f"{side['type']}, keyslots {', '.join(side['keyslots']) or '-'}"
        case "area":
            return f"{side['size']} bytes"
        case _:
            return json.dumps(next(iter(side.values())), ensure_ascii=False)
