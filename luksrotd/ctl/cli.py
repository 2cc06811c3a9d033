# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line (a contract: luksrotctl(1))."""

import argparse
from collections.abc import Sequence
from itertools import takewhile
from typing import Final

from luksrotd import __version__
from luksrotd.ctl import verbs
from luksrotd.ctl.arguments import COMMON, Parser, Verbs, add_common
from luksrotd.errors import InvalidRequest

_DESCRIPTION: Final = """\
Enroll, rotate and verify backup keys of LUKS2 volumes, each with associated data in a token of the volume.

Works through the daemon luksrotd, or with --direct in this process (as root for block devices): in a rescue system,
or on an image file.  The volume stays usable, and a power cut at any moment leaves the old key or the new one.
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


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line; raises ``InvalidRequest``, and ``SystemExit`` after --help and --version."""
    parser = build_parser(_verb(arguments))
    options = parser.parse_args(arguments)
    _check(options)
    return options


def build_parser(verb: str = "") -> Parser:
    """The parser, also for tests and for packaging/shell_completions.py.

    Of the verbs that everybody needs first one is told beforehand: the others, which take longer, are left out then.
    """
    parser = Parser(prog="luksrotctl", epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"luksrotctl {__version__}")
    add_common(parser, False)
    found = Verbs(parser)
    verbs.add(found)
    if verb not in verbs.NAMES:
        from luksrotd.ctl import history, keys, offline, scrub, staging  # noqa: PLC0415 - see above

        for module in (staging, keys, scrub, history, *offline.MODULES):
            module.add(found)
    parser.description = f"{_DESCRIPTION}\n{found.overview}"
    return parser


def _verb(arguments: Sequence[str]) -> str:
    """The verb of a command line; no verb if another option comes before it, as --help may."""
    rest = arguments[len(list(takewhile(COMMON.__contains__, arguments))) :]
    return rest[0] if rest else ""


def _check(options: argparse.Namespace) -> None:
    if not (options.bus or options.direct):
        raise InvalidRequest(f"cannot use {options.verb} over the bus: use --direct")
    options.check(options)
