# SPDX-License-Identifier: GPL-2.0-or-later
"""What the options of a command line ask for, as values."""

import argparse
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from luksrotd.ctl import secrets
from luksrotd.ctl.arguments import ANY_TOKEN
from luksrotd.ctl.delivery import ToFile, ToStdout
from luksrotd.ctl.model import Credential, Device, KeyRequest, Token
from luksrotd.errors import InvalidRequest
from luksrotd.rotation.edits import PBKDF_FOR_RANDOM_KEYS, Pbkdf

#: Bytes; associated data has to fit into the 12 KiB or so of a token's metadata area.
DATA_LIMIT: Final = 1024 * 1024

_DURATION: Final = re.compile(r"([1-9][0-9]{0,4})([mhdw])")
_UNITS: Final = {"m": 60, "h": 3600, "d": 86400, "w": 604800}


def device(options: argparse.Namespace) -> Device:
    """The one volume."""
    return Device(options.device if "device" in options else options.devices[0], options.header)


def target(options: argparse.Namespace) -> str:
    """The volume, or all of them, as the user has named them."""
    return options.device if "device" in options else ", ".join(options.devices)


def devices(options: argparse.Namespace) -> list[Device]:
    """All volumes."""
    return [Device(name, options.header) for name in options.devices]


def prints_key(options: argparse.Namespace) -> bool:
    """Whether standard output belongs to a generated key."""
    generates = bool(getattr(options, "generate", False))
    return generates and options.output is None and getattr(options, "escrow", None) is None


@contextmanager
def credential(options: argparse.Namespace, prompt: str) -> Iterator[Credential]:
    """What --key-file or --token gives, else what somebody types; raises ``LuksrotdError``."""
    check_token(options)
    if options.token is None:
        with secrets.opened(options.key_file, prompt) as key:
            yield key
        return
    number = None if options.token == ANY_TOKEN else options.token
    if options.pin_file is None:
        yield Token(number)
        return
    with secrets.opened(options.pin_file, "PIN") as pin:
        yield Token(number, pin)


def check_token(options: argparse.Namespace) -> None:
    """Options that do not go together; raises ``InvalidRequest``."""
    if options.pin_file is not None and options.token is None:
        raise InvalidRequest("cannot use --pin-file without --token")
    others = (options.key_file, getattr(options, "volume_key_file", None))
    if options.token is not None and others != (None, None):
        raise InvalidRequest("cannot use --token together with a key file")
    if options.pin_file == secrets.STDIN == getattr(options, "new_keyfile", None):
        raise InvalidRequest("cannot read two secrets from standard input: give a file for one of them")


@contextmanager
def key_request(options: argparse.Namespace, key_file: str | None = None) -> Iterator[KeyRequest]:
    """A new key, with its secrets open; ``key_file`` in place of --key-file.  Raises ``LuksrotdError``."""
    associated, cost = data(options.data), pbkdf(options)
    with ExitStack() as stack:
        prompt = f"Any key of {target(options)}"
        check_token(options)
        opened = credential(options, prompt) if key_file is None else secrets.opened(key_file, prompt)
        unlock = stack.enter_context(opened)
        new: int | ToFile | ToStdout
        if getattr(options, "escrow", None) is not None:
            new = stack.enter_context(secrets.generated())
            cost = cost or PBKDF_FOR_RANDOM_KEYS
        elif not options.generate:
            prompt = f"New key {options.name} of {target(options)}"
            new = stack.enter_context(secrets.opened(options.new_keyfile, prompt, confirm=True))
        elif options.output is not None:
            new = stack.enter_context(ToFile(options.output))
        else:
            new = ToStdout()
        yield KeyRequest(options.verb, options.name, unlock, new, associated, cost)


def seconds(text: str, option: str = "--expires") -> int:
    """ "30d", "12h" and the like in seconds, for --expires 0 for "never"; raises ``InvalidRequest``."""
    can_be_never = option == "--expires"
    if text == "never" and can_be_never:
        return 0
    if not (match := _DURATION.fullmatch(text)):
        never = ", or never" if can_be_never else ""
        raise InvalidRequest(f"cannot understand {option}: it takes a number with m, h, d or w, as 30d{never}")
    return int(match[1]) * _UNITS[match[2]]


def data(option: str | None) -> Mapping[str, Any] | None:
    """The value of --data; raises ``InvalidRequest``."""
    if option is None:
        return None
    from luksrotd.rotation.token import parse_data  # noqa: PLC0415 - only where it is needed: start-up stays fast

    if not option.startswith("@"):
        return parse_data(option)
    path = option.removeprefix("@")
    try:
        with Path(path).open("rb") as file:
            text = file.read(DATA_LIMIT + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise InvalidRequest(f"cannot read the associated data from {path}: {reason}") from error
    if len(text) > DATA_LIMIT:
        raise InvalidRequest(f"cannot use the associated data: it is longer than {DATA_LIMIT} bytes")
    try:
        return parse_data(text.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest("cannot use the associated data: it is not UTF-8") from error


def pbkdf(options: argparse.Namespace) -> Pbkdf | None:
    """None if the command line says nothing of it; raises ``InvalidRequest``."""
    cost = (options.pbkdf_force_iterations, options.pbkdf_memory, options.pbkdf_parallel)
    if options.pbkdf is None and cost == (None, None, None):
        return None
    iterations, memory, parallel = cost
    return Pbkdf(options.pbkdf or Pbkdf().type, iterations=iterations, memory_kib=memory, parallel=parallel)
