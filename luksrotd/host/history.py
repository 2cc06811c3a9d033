# SPDX-License-Identifier: GPL-2.0-or-later
"""The record of what has been done, read back from systemd's journal."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from luksrotd.errors import StateError
from luksrotd.host.journal import OWN_FIELDS, PREFIX, name_of
from luksrotd.names import MessageId
from luksrotd.ports import Query
from systemd import journal as systemd_journal

#: A field of the journal itself: nobody but journald can write it (systemd.journal-fields(7), "Trusted").
_OF_ROOT: Final = {"_UID": "0"}
_TIME: Final = "__REALTIME_TIMESTAMP"


class JournalHistory:
    """``ports.History``."""

    def entries(self, query: Query) -> Sequence[Mapping[str, str]]:
        """See ``ports.History.entries``."""
        try:
            with _Reader(flags=systemd_journal.LOCAL_ONLY | systemd_journal.SYSTEM_ONLY) as reader:
                return _read(reader, query)
        except (OSError, ValueError) as error:
            raise StateError(f"cannot read the journal: {error}") from error


class _Reader(systemd_journal.Reader):  # type: ignore[misc] # of systemd-python, without types
    """Leaves values as they are: systemd-python's times are naive, and its numbers are guesses."""

    def _convert_entry(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        return entry


def _read(reader: systemd_journal.Reader, query: Query) -> list[Mapping[str, str]]:
    reader.add_match(**_OF_ROOT)
    for message_id in MessageId:
        reader.add_match(MESSAGE_ID=message_id.value)
    if query.uuid:
        reader.add_match(**{name_of("uuid"): query.uuid})
    if query.until is None:
        reader.seek_tail()
    else:
        reader.seek_realtime(query.until)
    found: list[Mapping[str, str]] = []
    while len(found) < query.limit and (entry := reader.get_previous()):
        time = entry[_TIME]
        if time < query.since:
            break
        if query.until is None or time < query.until:
            found.append({"time": str(time), **_fields(entry)})
    return found[::-1]


def _fields(entry: Mapping[str, Any]) -> dict[str, str]:
    """What ``host.journal`` has written, under the names that it was given."""
    fields = {name: _text(value) for name, value in entry.items() if name.startswith(PREFIX)}
    own = {field: _text(entry[field.upper()]) for field in OWN_FIELDS if field.upper() in entry}
    return {name.removeprefix(PREFIX).lower(): value for name, value in fields.items()} | own


def _text(value: bytes | list[bytes]) -> str:
    """The value of a field; the first if there are several."""
    first = value[0] if isinstance(value, list) else value
    return first.decode(errors="replace")
