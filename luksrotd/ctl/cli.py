# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line (a contract: luksrotctl(1))."""

import argparse
import os
from collections.abc import Sequence
from typing import Any, Final, NoReturn

from luksrotd import __version__, names
from luksrotd.errors import InvalidRequest
from luksrotd.rotation.edits import PBKDF_TYPES

_DESCRIPTION: Final = """\
Enroll, rotate and verify backup keys of LUKS2 volumes, each with associated data in a token of the volume.

Works through the daemon luksrotd, or with --direct, as root, in this process: in a rescue system, or on an
image file.  The volume stays usable, and a power cut at any moment leaves the old key or the new one.
"""

_EPILOG: Final = """\
examples:
  luksrotctl list
  luksrotctl enroll /dev/sda2 --generate --output backup.key --data '{"escrow": "vault/42"}'
  luksrotctl rotate /dev/sda2 --key-file backup.key --generate --output backup2.key
  luksrotctl --direct reconcile --all --dry-run

exit status:
  0 done (reconcile: clean or repaired)   1 failed, the device is unchanged   2 wrong usage
  3 needs a person   4 device state unknown, or a wipe is pending: reconcile
  5 not authorised   6 busy, or in conflict with another tool: try again

See luksrotctl(1) for the rest.
"""

_DEVICE_HELP: Final = "block device, UUID=… or a LUKS UUID; with --direct also an image file"


class Parser(argparse.ArgumentParser):
    """Raises ``InvalidRequest`` for wrong usage, instead of printing and leaving."""

    def __init__(self, **keywords: Any) -> None:
        keywords.setdefault("allow_abbrev", False)
        keywords.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**keywords)

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise InvalidRequest(f"cannot understand the command line: {message}; see {self.prog} --help")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line; raises ``InvalidRequest``, and ``SystemExit`` after --help and --version."""
    parser = build_parser()
    _complete(parser)
    options = parser.parse_args(arguments)
    _check(options)
    return options


def build_parser() -> Parser:
    """The parser, for completion and tests."""
    parser = Parser(prog="luksrotctl", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"luksrotctl {__version__}")
    _add_common(parser, False)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    _verb(verbs, "list", "list the LUKS2 volumes and their managed keys", "luksrotctl list --json")
    show = _verb(verbs, "show", "show everything about one volume, but no secret", "luksrotctl show /dev/sda2")
    _add_device(show)
    enroll = _verb(
        verbs,
        "enroll",
        "give a volume a managed key",
        "luksrotctl enroll /dev/sda2 --generate --output backup.key --data @escrow.json",
    )
    rotate = _verb(
        verbs,
        "rotate",
        "replace a managed key by a new one; the old one opens nothing any more",
        "luksrotctl rotate /dev/sda2 --key-file backup.key --new-keyfile next.key",
    )
    for verb in (enroll, rotate):
        _add_device(verb)
        _add_name(verb)
        _add_credential(verb, "key that unlocks the volume: any of its keys")
        _add_new_secret(verb)
    verify = _verb(
        verbs,
        "verify",
        "tell whether a key is the managed key; changes nothing",
        "luksrotctl verify /dev/sda2 --key-file backup.key",
    )
    _add_device(verify)
    _add_name(verify)
    _add_credential(verify, "key to be checked")
    reconcile = _verb(
        verbs,
        "reconcile",
        "finish what a crash has interrupted; needs no key",
        "luksrotctl reconcile --all --dry-run",
    )
    _add_device(reconcile, many=True)
    reconcile.add_argument("--all", action="store_true", help="all volumes; goes on when one fails")
    reconcile.add_argument("--dry-run", action="store_true", help="change nothing, only tell what would be done")
    return parser


def _verb(verbs: Any, name: str, summary: str, example: str) -> Parser:
    verb: Parser = verbs.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=f"example:\n  {example}"
    )
    _add_common(verb, argparse.SUPPRESS)
    return verb


def _add_common(parser: argparse.ArgumentParser, default: Any) -> None:
    """Options that may stand before the verb and behind it."""
    help_direct = "work in this process, as root, without the daemon"
    parser.add_argument("--direct", action="store_true", default=default, help=help_direct)
    help_json = "print one JSON document, errors too"
    parser.add_argument("--json", action="store_true", default=default, help=help_json)


def _add_device(parser: argparse.ArgumentParser, *, many: bool = False) -> None:
    if many:
        parser.add_argument("devices", metavar="DEVICE", nargs="*", help=_DEVICE_HELP)
    else:
        parser.add_argument("device", metavar="DEVICE", help=_DEVICE_HELP)
    parser.add_argument("--header", metavar="FILE", help="detached LUKS2 header of DEVICE (with --direct)")


def _add_name(parser: argparse.ArgumentParser) -> None:
    default = names.DEFAULT_KEY_NAME
    parser.add_argument("--name", default=default, help=f"name of the managed key (default: {default})")


def _add_credential(parser: argparse.ArgumentParser, what: str) -> None:
    help_text = f"{what}; the whole file counts, its newlines too; - for standard input; without it you are asked"
    parser.add_argument("--key-file", "-d", metavar="FILE", help=help_text)


def _add_new_secret(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the new key (without one of these you are asked for it)")
    choice = group.add_mutually_exclusive_group()
    choice.add_argument("--new-keyfile", metavar="FILE", help="take it from FILE, or - for standard input")
    choice.add_argument("--generate", action="store_true", help="make one of 256 bits and print it, and nothing else")
    group.add_argument("--output", metavar="FILE", help="with --generate: write it into the new file FILE instead")
    group.add_argument(
        "--data", metavar="JSON|@FILE", help="associated data, a JSON object; rotate keeps the old data without it"
    )
    cost = parser.add_argument_group("cost of guessing the new key (as in cryptsetup(8))")
    cost.add_argument("--pbkdf", choices=PBKDF_TYPES, help="argon2id, or pbkdf2 for a generated key, by default")
    cost.add_argument("--pbkdf-memory", type=int, metavar="KIB", help="argon2: memory in KiB")
    cost.add_argument("--pbkdf-parallel", type=int, metavar="THREADS", help="argon2: threads")
    cost.add_argument(
        "--pbkdf-force-iterations", type=int, metavar="N", help="iterations (argon2: time cost), without a benchmark"
    )


def _check(options: argparse.Namespace) -> None:
    match options.verb:
        case "reconcile":
            if options.all == bool(options.devices):
                raise InvalidRequest("cannot reconcile: name devices or give --all, one of both")
            if options.header is not None and len(options.devices) != 1:
                raise InvalidRequest("cannot use --header: it takes exactly one device")
        case "enroll" | "rotate":
            if options.output is not None and not options.generate:
                raise InvalidRequest("cannot use --output without --generate")
            if options.generate and options.json and options.output is None:
                raise InvalidRequest("cannot print a key and JSON on one standard output: give --output FILE")
            if options.key_file == "-" and options.new_keyfile == "-":
                raise InvalidRequest("cannot read two keys from standard input: give a file for one of them")
        case _:
            pass


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks for completions, if argcomplete is there."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    try:
        import argcomplete  # noqa: PLC0415 - optional, and only for the shell's question
    except ImportError:
        return
    argcomplete.autocomplete(parser)
