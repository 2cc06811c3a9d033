# SPDX-License-Identifier: GPL-2.0-or-later
"""Options and result of ``org.luksrotd1.Manager.GetHistory``."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from dbus_next.signature import Variant

from luksrotd import names
from luksrotd.bus.values import OptionTable
from luksrotd.errors import InvalidRequest, plain
from luksrotd.ports import Query

OPTIONS: Final[OptionTable] = {"device": "o", "uuid": "s", "since": "t", "until": "t", "limit": "u"}
LIMIT: Final = 500
"""Records in one reply: it is made in the event loop."""
DEFAULT_LIMIT: Final = 100

#: Types of the fields that are numbers; all others are texts.
NUMBERS: Final[Mapping[str, str]] = {
    "time": "t",
    "seqid_before": "t",
    "seqid_after": "t",
    "backup_seqid": "t",
    "bytes": "t",
    "generation": "u",
    "generation_before": "u",
    "keyslot": "i",
    "edits": "u",
    "uid": "u",
    "job": "u",
    "unrecorded": "u",
    "priority": "u",
}
_UUID: Final = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")


def query(options: Mapping[str, Any]) -> Query:
    """What is asked for; raises ``InvalidRequest``."""
    if {"device", "uuid"} <= options.keys():
        raise InvalidRequest("cannot look for a device and a uuid at once")
    uuid = _uuid_of(options["device"]) if "device" in options else options.get("uuid", "").lower()
    if uuid and not _UUID.fullmatch(uuid):
        raise InvalidRequest("cannot look for a uuid that is malformed")
    limit = options.get("limit", DEFAULT_LIMIT)
    if limit > LIMIT:
        raise InvalidRequest(f"cannot give {limit} records at once: {LIMIT} is the most")
    return Query(uuid, options.get("since", 0), options.get("until"), limit)


def records(entries: Iterable[Mapping[str, str]]) -> list[dict[str, Variant]]:
    """The records as the bus wants them; a number that is none is left out."""
    return [
        {name: variant for name, text in entry.items() if (variant := _variant(name, text)) is not None}
        for entry in entries
    ]


def _variant(name: str, text: str) -> Variant | None:
    kind = NUMBERS.get(name)
    if kind is None:
        return Variant("s", plain(text))
    try:
        return Variant(kind, int(text))
    except ValueError:
        return None


def _uuid_of(path: str) -> str:
    if not path.startswith(f"{names.DEVICE_PATH}/"):
        raise InvalidRequest(f"cannot look for {path[:64]!r}: that is no volume")
    return path.removeprefix(f"{names.DEVICE_PATH}/").replace("_", "-")
