# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of the command line: the parser, its verbs in groups, and the options that several verbs share."""

import argparse
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, Final, NoReturn

from luksrotd import names
from luksrotd.ctl.report import Report
from luksrotd.errors import InvalidRequest
from luksrotd.rotation.edits import PBKDF_TYPES

DEVICE_HELP: Final = "block device, UUID=… or a LUKS UUID; or an image file, that the daemon manages or with --direct"
#: Options of all verbs, which may stand before them.
COMMON: Final = ("--direct", "--json")
#: ``options.token`` for "any".
ANY_TOKEN: Final = -1

#: What an escrow may take by default: somebody may have to be asked there.
ESCROW_SECONDS: Final = 600

Run = Callable[[argparse.Namespace], Report]
Check = Callable[[argparse.Namespace], None]


class Parser(argparse.ArgumentParser):
    """Raises ``InvalidRequest`` for wrong usage, instead of printing and leaving."""

    def __init__(self, **keywords: Any) -> None:
        keywords.setdefault("allow_abbrev", False)
        keywords.setdefault("formatter_class", _formatter)
        super().__init__(**keywords)

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise InvalidRequest(f"cannot understand the command line: {message}; see {self.prog} --help")


@cache
def _width() -> int:
    """Columns of help, as argparse has it."""
    columns = 0
    with suppress(KeyError, ValueError):
        columns = int(os.environ["COLUMNS"])
    if columns <= 0:
        with suppress(OSError):
            columns = os.get_terminal_size(1).columns
    return columns if columns > 0 else 80  # a serial console does not know


def _formatter(prog: str) -> argparse.HelpFormatter:
    # argparse makes one for each option that is added, and asks for the width each time; by shutil, which is slow to
    # import.
    return argparse.RawDescriptionHelpFormatter(prog, width=_width() - 2)


class Verbs:
    """The verbs, which modules add in groups; ``overview`` is what the help of the whole program says of them."""

    def __init__(self, parser: Parser) -> None:
        self._top = _subparsers(parser, "verb")
        self._nested: dict[str, Any] = {}
        self._groups: dict[str, list[tuple[str, str]]] = {}
        self._title = ""

    def group(self, title: str) -> None:
        """Verbs that are added from now on stand under this title."""
        self._title = title

    def add(
        self,
        name: str,
        run: Run,
        summary: str,
        example: str,
        *,
        check: Check = lambda _: None,
        writes: bool = True,
        bus: bool = False,
    ) -> Parser:
        """A new verb, whose own arguments the caller adds; "header backup" is the verb ``backup`` of ``header``.

        ``run`` does it, ``check`` refuses options that do not go together (``InvalidRequest``).  ``writes``: it may
        change a volume.  ``bus``: it works over the bus too; the others need --direct.
        """
        self._groups.setdefault(self._title, []).append((name, summary))
        parent, _, last = name.rpartition(" ")
        text = f"{summary[0].upper()}{summary[1:]}." + ("" if bus else "\nWorks with --direct only.")
        verb: Parser = self._parent(parent).add_parser(last, description=text, epilog=f"example:\n  {example}")
        verb.set_defaults(run=run, check=check, writes=writes, bus=bus)
        add_common(verb, argparse.SUPPRESS)
        return verb

    @property
    def overview(self) -> str:
        """All verbs, by group."""
        width = max(len(name) for group in self._groups.values() for name, _ in group)
        return "\n\n".join(
            "\n".join((f"{title}:", *(f"  {name.ljust(width)}  {summary}" for name, summary in group)))
            for title, group in self._groups.items()
        )

    def _parent(self, name: str) -> Any:
        if not name:
            return self._top
        if name not in self._nested:
            self._nested[name] = _subparsers(self._top.add_parser(name), "action")
        return self._nested[name]


def _subparsers(parser: Parser, dest: str) -> Any:
    metavar, prog = dest.upper(), parser.prog
    parser.usage = f"{prog} [--direct] [--json] {metavar} ..."
    return parser.add_subparsers(
        dest=dest, metavar=metavar, required=True, prog=prog, parser_class=Parser, help=argparse.SUPPRESS
    )


def add_common(parser: argparse.ArgumentParser, default: Any) -> None:
    """Options that may stand before the verb and behind it."""
    help_direct = "work in this process (as root for block devices), without the daemon"
    direct, json = COMMON
    parser.add_argument(direct, action="store_true", default=default, help=help_direct)
    help_json = "print one JSON document, errors too"
    parser.add_argument(json, action="store_true", default=default, help=help_json)


def add_device(parser: argparse.ArgumentParser, many: str = "") -> None:
    """DEVICE as ``options.device``; with ``many``, "*" or "+", any number of them, as ``options.devices``."""
    if many:
        parser.add_argument("devices", metavar="DEVICE", nargs=many, help=DEVICE_HELP)
    else:
        parser.add_argument("device", metavar="DEVICE", help=DEVICE_HELP)
    parser.add_argument("--header", metavar="FILE", help="detached LUKS2 header of DEVICE (with --direct)")


def add_name(parser: argparse.ArgumentParser) -> None:
    """Which managed key."""
    default = names.DEFAULT_KEY_NAME
    parser.add_argument("--name", default=default, help=f"name of the managed key (default: {default})")


def add_credential(parser: argparse.ArgumentParser, what: str) -> None:
    """--key-file, which is ``what``."""
    help_text = f"{what}; the whole file counts, its newlines too; - for standard input; without it you are asked"
    parser.add_argument("--key-file", "-d", metavar="FILE", help=help_text)


def add_token(parser: argparse.ArgumentParser) -> None:
    """--token, in place of --key-file; ``request.credential`` heeds it."""
    instead = "in place of --key-file: a LUKS2 token of the volume opens it (a TPM2, say), number N or any that does"
    parser.add_argument("--token", type=_token, metavar="N|any", help=instead)
    help_pin = "with --token: its PIN, all of the file; - for standard input"
    parser.add_argument("--pin-file", metavar="FILE", help=help_pin)


def _token(text: str) -> int:
    if text == "any":
        return ANY_TOKEN
    if (number := int(text)) < 0:
        raise ValueError(text)
    return number


def add_new_secret(
    parser: argparse.ArgumentParser, otherwise: str = "you are asked for it", *, escrow: bool = True
) -> None:
    """The new key, its data and the cost of guessing it; ``check_new_secret`` goes with it.

    ``escrow``: with --escrow, which ``ctl.escrow`` heeds.
    """
    group = parser.add_argument_group(f"the new key (without one of these {otherwise})")
    choice = group.add_mutually_exclusive_group()
    choice.add_argument("--new-keyfile", metavar="FILE", help="take it from FILE, or - for standard input")
    choice.add_argument("--generate", action="store_true", help="make one of 256 bits and print it, and nothing else")
    group.add_argument("--output", metavar="FILE", help="with --generate: write it into the new file FILE instead")
    if escrow:
        help_escrow = "with --generate: give it to this program first, on its standard input; see luksrotctl(1)"
        group.add_argument("--escrow", metavar="COMMAND", help=help_escrow)
        default = ESCROW_SECONDS
        help_timeout = f"how long that program may take (default: {default})"
        group.add_argument("--escrow-timeout", type=int, metavar="SECONDS", default=default, help=help_timeout)
    group.add_argument(
        "--data", metavar="JSON|@FILE", help="associated data, a JSON object; without it the old data, if any, is kept"
    )
    cost = parser.add_argument_group("cost of guessing the new key (as in cryptsetup(8))")
    cost.add_argument("--pbkdf", choices=PBKDF_TYPES, help="argon2id, or pbkdf2 for a generated key, by default")
    cost.add_argument("--pbkdf-memory", type=int, metavar="KIB", help="argon2: memory in KiB")
    cost.add_argument("--pbkdf-parallel", type=int, metavar="THREADS", help="argon2: threads")
    cost.add_argument(
        "--pbkdf-force-iterations", type=int, metavar="N", help="iterations (argon2: time cost), without a benchmark"
    )


def check_new_secret(options: argparse.Namespace) -> None:
    """Options that do not go together; raises ``InvalidRequest``."""
    if options.output is not None and not options.generate:
        raise InvalidRequest("cannot use --output without --generate")
    escrow = getattr(options, "escrow", None)
    if escrow is not None:
        _check_escrow(options)
    if options.generate and options.json and options.output is None and escrow is None:
        raise InvalidRequest("cannot print a key and JSON on one standard output: give --output FILE")
    if options.key_file == "-" and options.new_keyfile == "-":
        raise InvalidRequest("cannot read two keys from standard input: give a file for one of them")


def _check_escrow(options: argparse.Namespace) -> None:
    if not options.generate or options.output is not None:
        raise InvalidRequest("cannot use --escrow without --generate, or with --output: the key goes there alone")
    if options.escrow_timeout < 1:
        raise InvalidRequest("cannot use --escrow-timeout: it takes a number of seconds from 1 on")
    if len(getattr(options, "devices", ())) > 1 or getattr(options, "set", None) is not None:
        raise InvalidRequest("cannot use --escrow with a set of devices: it takes exactly one")


def add_if_generation(parser: argparse.ArgumentParser) -> None:
    """Only on the header that the user has seen."""
    help_text = "only if the sequence number of the header, as show tells it, is still N"
    parser.add_argument("--if-generation", type=int, metavar="N", help=help_text)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Who writes the header; ``check_engine`` goes with it."""
    help_engine = f"who writes the header: luksrotd in one commit, or libcryptsetup in steps (default: {names.ATOMIC})"
    parser.add_argument("--engine", choices=names.ENGINES, default=names.ATOMIC, help=help_engine)


def check_engine(options: argparse.Namespace) -> None:
    """Raises ``InvalidRequest`` for what the stepwise engine does not do."""
    if options.engine == names.ATOMIC:
        return
    if not options.direct:
        raise InvalidRequest(f"cannot use --engine {options.engine} over the bus: give --direct")
    if len(getattr(options, "devices", ())) > 1 or getattr(options, "set", None) is not None:
        raise InvalidRequest(f"cannot use --engine {options.engine} with a set of devices: it takes exactly one")
