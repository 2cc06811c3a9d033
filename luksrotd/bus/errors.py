# SPDX-License-Identifier: GPL-2.0-or-later
"""Errors to D-Bus error names and back: a total table over ``luksrotd.errors``.

The text of an error on the bus is its message and what the device holds now: ``cannot … (device: unchanged)``.
"""

import re
from typing import Final

from luksrotd import names
from luksrotd.errors import Internal, LuksrotdError, Outcome, leaves

STANDARD_PREFIX: Final = "org.freedesktop.DBus.Error."
STANDARD_CODES: Final = frozenset({"InvalidArgs", "InteractiveAuthorizationRequired", "LimitsExceeded"})
"""Codes whose name every D-Bus client knows already."""

_TEXT = re.compile(r"(?P<message>.*) \(device: (?P<outcome>[a-z-]+)\)", re.DOTALL)


def name_of(error: LuksrotdError | type[LuksrotdError]) -> str:
    """The D-Bus error name of an error."""
    return (STANDARD_PREFIX if error.code in STANDARD_CODES else names.ERROR_PREFIX) + error.code


def text_of(error: LuksrotdError) -> str:
    """The text that goes over the bus; never a traceback, never a secret."""
    return f"{error.message} (device: {error.outcome.value})"


def from_bus(name: str, text: str) -> LuksrotdError:
    """The error that a peer running luksrotd raised; ``Internal`` for a name that is not in the table."""
    by_name = {name_of(leaf): leaf for leaf in leaves().values()}
    matched = _TEXT.fullmatch(text)
    if matched is None or matched["outcome"] not in list(Outcome):
        return by_name.get(name, Internal)(text)
    return by_name.get(name, Internal)(matched["message"], outcome=Outcome(matched["outcome"]))
