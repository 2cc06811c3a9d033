# SPDX-License-Identifier: GPL-2.0-or-later
"""Structured log: systemd's journal, or standard error where there is none."""

import json
import sys
from pathlib import Path
from typing import Final, TextIO

JOURNAL_SOCKET: Final = "/run/systemd/journal/socket"

OWN_FIELDS: Final = frozenset({"message", "message_id", "priority"})
"""Fields of systemd.journal-fields(7) that go in under their own name."""
PREFIX: Final = "LUKSROTD_"
"""Before the name of every other field."""


class SystemdJournal:
    """``ports.Journal``.  ``field`` becomes ``LUKSROTD_FIELD``; ``message_id`` and ``priority`` stay as they are."""

    def __init__(self, *, socket: str = JOURNAL_SOCKET, stream: TextIO | None = None) -> None:
        self._socket = Path(socket)
        self._stream = stream

    def record(self, message: str, **fields: str | int) -> None:
        """One entry; never raises, because no operation may fail for want of a log."""
        try:
            # Asked each time: sd_journal_send(3) drops entries without a word when nobody listens.
            if self._socket.exists():
                from systemd import journal as systemd_journal  # noqa: PLC0415 - slow, and not needed by who only looks

                named = {name_of(field): str(value) for field, value in fields.items()}
                systemd_journal.send(message, SYSLOG_IDENTIFIER="luksrotd", **named)
            else:
                stream = self._stream or sys.stderr
                stream.write(line_of(message, fields) + "\n")
                stream.flush()
        except Exception:  # noqa: BLE001 -- see above, and there is nowhere left to report it
            return


def name_of(field: str) -> str:
    """The journal's name of a field."""
    return field.upper() if field in OWN_FIELDS else f"{PREFIX}{field.upper()}"


def line_of(message: str, fields: dict[str, str | int]) -> str:
    """One line, whatever is in the values: ``message key=value key="with space"``."""
    pairs = [f"{field}={_quoted(str(value))}" for field, value in fields.items()]
    return " ".join([message if message.isprintable() else json.dumps(message), *pairs])


def _quoted(value: str) -> str:
    plain = value.isprintable() and value and not set(value) & set(' "=\\')
    return value if plain else json.dumps(value)
