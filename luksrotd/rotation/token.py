# SPDX-License-Identifier: GPL-2.0-or-later
"""Our token: type ``luksrotd`` (docs/spec/token.md).

It names exactly one keyslot and says how its passphrase can be had (``data``, the caller's), which generation of the
key it is, and, while a rotation is not finished, which ranges still hold a retired key (``wipe``, the wipe intent).
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, NoReturn

from luksrotd.errors import FormatError, InvalidRequest
from luksrotd.luks2 import jsontext
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import KEYSLOTS_MAX
from luksrotd.luks2.members import quoted, u64
from luksrotd.luks2.metadata import Token
from luksrotd.names import TOKEN_TYPE

SCHEMA_VERSION: Final = 1
#: Members that this version of the schema defines; all others are kept as they are.
MEMBERS: Final = (
    "type",
    "keyslots",
    "version",
    "name",
    "generation",
    "state",
    "rotated_at",
    "data",
    "wipe",
    "fingerprint",
)
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: Nesting of the associated data: well below json-c's limit of 32 for the whole header.
DATA_DEPTH_MAX: Final = 16
GENERATION_MAX: Final = 2**31 - 1
#: Ranges in a wipe intent: one for each keyslot that a header can have.
WIPE_MAX: Final = KEYSLOTS_MAX


class KeyState(StrEnum):
    """Where a key is in its life."""

    ACTIVE = "active"
    STAGED = "staged"


@dataclass(frozen=True, slots=True)
class BackupToken:
    """A token of ours; ``rotated_at`` is RFC 3339 UTC text, ``wipe`` are byte ranges of the device."""

    id: int
    keyslots: tuple[int, ...]
    name: str
    generation: int
    state: KeyState
    rotated_at: str
    data: Mapping[str, Any]
    wipe: tuple[Extent, ...]
    fingerprint: str | None
    extra: Mapping[str, Any]


def parse(token: Token) -> BackupToken:
    """Our view of a token of type ``luksrotd``; raises ``FormatError``.

    Only ``name``, ``generation`` and ``data`` must be there; what is missing besides has its default.
    """
    raw = token.raw
    where = f"token {token.id}"
    version = raw.get("version", SCHEMA_VERSION)
    if type(version) is not int or version != SCHEMA_VERSION:
        _fail(where, f"schema version {quoted(str(version))} is not {SCHEMA_VERSION}")
    name, generation, data = raw.get("name"), raw.get("generation"), raw.get("data")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        _fail(where, "the name is missing or malformed")
    if not isinstance(generation, int) or isinstance(generation, bool) or not 1 <= generation <= GENERATION_MAX:
        _fail(where, "the generation is missing or out of range")
    if not isinstance(data, dict):
        _fail(where, "the associated data is not an object")
    state = raw.get("state", KeyState.ACTIVE)
    if not isinstance(state, str) or state not in set(KeyState):
        _fail(where, f"state {quoted(str(state))} is unknown")
    rotated_at, fingerprint = raw.get("rotated_at", ""), raw.get("fingerprint")
    if not isinstance(rotated_at, str) or not (fingerprint is None or isinstance(fingerprint, str)):
        _fail(where, "rotated_at or fingerprint is not a string")
    extra = {member: value for member, value in raw.items() if member not in MEMBERS}
    wipe = tuple(_extent(entry, where) for entry in _list(raw.get("wipe", []), where))
    return BackupToken(
        token.id, token.keyslots, name, generation, KeyState(state), rotated_at, data, wipe, fingerprint, extra
    )


def body(
    name: str,
    generation: int,
    keyslot: int,
    data: Mapping[str, Any],
    rotated_at: datetime,
    wipe: Iterable[Extent] = (),
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The JSON object of an active token, without the fingerprint, which the worker adds."""
    written: dict[str, Any] = {
        "type": TOKEN_TYPE,
        "keyslots": [str(keyslot)],
        "version": SCHEMA_VERSION,
        "name": name,
        "generation": generation,
        "state": str(KeyState.ACTIVE),
        "rotated_at": rotated_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "data": dict(data),
    }
    ranges = [{"offset": str(extent.offset), "size": str(extent.size)} for extent in wipe]
    if ranges:
        written["wipe"] = ranges
    return written | dict(extra or {})


def without_intent(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The same token with its wipe intent cleared."""
    return {member: value for member, value in raw.items() if member != "wipe"}


def check_name(name: str) -> str:
    """``name`` if a key may be called so; raises ``InvalidRequest``."""
    if not NAME.fullmatch(name):
        raise InvalidRequest("cannot use this key name: it takes 1 to 64 letters, digits, dots, underscores or dashes")
    return name


def parse_data(text: str) -> Mapping[str, Any]:
    """Associated data from JSON text: an object, strict JSON, not nested too deeply; raises ``InvalidRequest``."""
    try:
        data = json.loads(text, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("cannot use the associated data: it is not JSON") from error
    if not isinstance(data, dict):
        raise InvalidRequest("cannot use the associated data: it is not a JSON object")
    return check_data(data)


def check_data(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """``data`` if json-c keeps it as it is; raises ``InvalidRequest``."""
    for value, depth in jsontext.walk(data):
        if isinstance(value, dict | list) and depth > DATA_DEPTH_MAX:
            raise InvalidRequest(f"cannot use the associated data: it is nested deeper than {DATA_DEPTH_MAX} levels")
        if what := jsontext.trouble(value):
            raise InvalidRequest(f"cannot use the associated data: {what}")
    return data


def _constant(name: str) -> NoReturn:
    raise ValueError(name)


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > WIPE_MAX:
        _fail(where, f"the wipe intent is not an array of at most {WIPE_MAX} ranges")
    return value


def _extent(entry: object, where: str) -> Extent:
    if not isinstance(entry, dict):
        _fail(where, "a range of the wipe intent is not an object")
    offset, size = (u64(entry, member, f"{where}: wipe intent") for member in ("offset", "size"))
    if size == 0:
        _fail(where, "a range of the wipe intent is empty")
    return Extent(offset, size)


def _fail(where: str, what: str) -> NoReturn:
    raise FormatError(f"cannot read {where}: {what}")
