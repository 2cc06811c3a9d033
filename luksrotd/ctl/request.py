# SPDX-License-Identifier: GPL-2.0-or-later
"""What the options of a command line ask for, as values."""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from luksrotd.ctl import secrets
from luksrotd.ctl.delivery import ToFile, ToStdout
from luksrotd.ctl.model import Device, KeyRequest
from luksrotd.errors import InvalidRequest
from luksrotd.rotation.edits import Pbkdf

#: Bytes; associated data has to fit into the 12 KiB or so of a token's metadata area.
DATA_LIMIT: Final = 1024 * 1024


def device(options: argparse.Namespace) -> Device:
    """The one volume."""
    return Device(options.device, options.header)


def prints_key(options: argparse.Namespace) -> bool:
    """Whether standard output belongs to a generated key."""
    return bool(options.generate) and options.output is None


@contextmanager
def key_request(options: argparse.Namespace) -> Iterator[KeyRequest]:
    """An enrolment or a rotation, with its secrets open; raises ``LuksrotdError``."""
    associated, cost = data(options.data), pbkdf(options)
    with ExitStack() as stack:
        credential = stack.enter_context(secrets.opened(options.key_file, f"Any key of {options.device}"))
        new: int | ToFile | ToStdout
        if not options.generate:
            prompt = f"New key {options.name} of {options.device}"
            new = stack.enter_context(secrets.opened(options.new_keyfile, prompt, confirm=True))
        elif options.output is not None:
            new = stack.enter_context(ToFile(options.output))
        else:
            new = ToStdout()
        yield KeyRequest(options.name, credential, new, associated, cost)


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
