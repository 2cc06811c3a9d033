# SPDX-License-Identifier: GPL-2.0-or-later
"""Our token: type ``luksrotd`` (docs/spec/token.md).

It names exactly one keyslot and says how its passphrase can be had (``data``, the caller's), which generation of the
key it is, and, while a rotation is not finished, which ranges still hold a retired key (``wipe``, the wipe intent).
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, NoReturn

from luksrotd.errors import FormatError, InvalidRequest
from luksrotd.luks2 import jsontext
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import KEYSLOTS_MAX, TOKENS_MAX
from luksrotd.luks2.members import quoted, u64
from luksrotd.luks2.metadata import Token
from luksrotd.names import TOKEN_TYPE, WIPE_TOKEN_TYPE

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
    "expires_at",
    "retires",
    "group",
    "adopted",
)
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MOMENT: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
#: Nesting of the associated data: well below json-c's limit of 32 for the whole header.
DATA_DEPTH_MAX: Final = 16
GENERATION_MAX: Final = 2**31 - 1
#: Volumes in a set.
GROUP_MAX: Final = 4096
#: Ranges in a wipe intent: one for each keyslot that a header can have.
WIPE_MAX: Final = KEYSLOTS_MAX


class KeyState(StrEnum):
    """Where a key is in its life; ``retired``: it is being removed, step by step."""

    ACTIVE = "active"
    STAGED = "staged"
    RETIRED = "retired"


@dataclass(frozen=True, slots=True)
class Group:
    """A set of volumes that get a new key together: its id, and how many volumes belong to it."""

    id: str
    size: int


@dataclass(frozen=True, slots=True)
class BackupToken:
    """A token of ours.

    ``rotated_at`` and ``expires_at`` (of a staged key; '' for never) are RFC 3339 UTC text, ``wipe`` are byte ranges of
    the device.  ``retires``: the tokens that this one replaces, while the stepwise engine has not settled it.
    ``group``: the set of volumes that the key was staged on.  ``adopted``: the token that was here before ours, or
    an empty object if there was none.
    """

    id: int
    keyslots: tuple[int, ...]
    name: str
    generation: int
    state: KeyState
    rotated_at: str
    data: Mapping[str, Any]
    wipe: tuple[Extent, ...] = ()
    fingerprint: str | None = None
    expires_at: str = ""
    retires: tuple[int, ...] | None = None
    group: Group | None = None
    adopted: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WipeRecord:
    """A token of type ``luksrotd-wipe``: ranges that still hold a retired key which no token of ours describes."""

    id: int
    wipe: tuple[Extent, ...]


def parse(token: Token) -> BackupToken:
    """Our view of a token of type ``luksrotd``; raises ``FormatError``.

    Only ``name``, ``generation`` and ``data`` must be there; what is missing besides has its default.
    """
    raw = token.raw
    where = f"token {token.id}"
    _check_version(raw, where)
    name, generation, data = raw.get("name"), raw.get("generation"), raw.get("data")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        _fail(where, "the name is missing or malformed")
    if not isinstance(generation, int) or isinstance(generation, bool) or not 1 <= generation <= GENERATION_MAX:
        _fail(where, "the generation is missing or out of range")
    if not isinstance(data, dict):
        _fail(where, "the associated data is not an object")
    state, adopted = raw.get("state", KeyState.ACTIVE), raw.get("adopted")
    if not isinstance(state, str) or state not in set(KeyState):
        _fail(where, f"state {quoted(str(state))} is unknown")
    if not (adopted is None or isinstance(adopted, dict)):
        _fail(where, "the adopted token is not an object")
    return BackupToken(
        token.id,
        token.keyslots,
        name,
        generation,
        KeyState(state),
        _text(raw, "rotated_at", where) or "",
        data,
        _extents(raw, where),
        _text(raw, "fingerprint", where),
        _text(raw, "expires_at", where) or "",
        _retires(raw, where),
        _group(raw, where),
        adopted,
        {member: value for member, value in raw.items() if member not in MEMBERS},
    )


def parse_record(token: Token) -> WipeRecord:
    """Our view of a token of type ``luksrotd-wipe``; raises ``FormatError``."""
    where = f"token {token.id}"
    _check_version(token.raw, where)
    if token.keyslots:
        _fail(where, "a wipe record names a keyslot")
    wipe = _extents(token.raw, where)
    if not wipe:
        _fail(where, "a wipe record names no range")
    return WipeRecord(token.id, wipe)


def body(token: BackupToken) -> dict[str, Any]:
    """The JSON object of a token; what has its default is left out, but for what a reader wants to see."""
    written: dict[str, Any] = {
        "type": TOKEN_TYPE,
        "keyslots": [str(keyslot) for keyslot in token.keyslots],
        "version": SCHEMA_VERSION,
        "name": token.name,
        "generation": token.generation,
        "state": str(token.state),
        "rotated_at": token.rotated_at,
        "data": dict(token.data),
    }
    optional = {
        "wipe": _ranges(token.wipe) or None,
        "fingerprint": token.fingerprint,
        "expires_at": token.expires_at or None,
        "group": token.group and {"id": token.group.id, "size": token.group.size},
    }
    written |= {member: value for member, value in optional.items() if value is not None}
    if token.retires is not None:
        written["retires"] = [str(number) for number in token.retires]
    if token.adopted is not None:
        written["adopted"] = dict(token.adopted)
    return written | dict(token.extra)


def record(wipe: Iterable[Extent]) -> dict[str, Any]:
    """The JSON object of a wipe record."""
    return {"type": WIPE_TOKEN_TYPE, "keyslots": [], "version": SCHEMA_VERSION, "wipe": _ranges(wipe)}


def with_intent(raw: Mapping[str, Any], wipe: Iterable[Extent]) -> dict[str, Any]:
    """The same token with that wipe intent; without one if there is nothing to wipe."""
    rest = {member: value for member, value in raw.items() if member != "wipe"}
    ranges = _ranges(wipe)
    return {**rest, "wipe": ranges} if ranges else rest


def utc(moment: datetime) -> str:
    """``moment``, which is in UTC, as our tokens write it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(text: str) -> datetime | None:
    """The time that ``utc`` wrote; ``None`` for anything else."""
    try:
        return datetime.fromisoformat(text) if _MOMENT.fullmatch(text) else None
    except ValueError:
        return None


def check_group(group: Group) -> Group:
    """``group`` if a set may be called so, and be so large; raises ``InvalidRequest``."""
    if not NAME.fullmatch(group.id):
        raise InvalidRequest(
            "cannot use this id of a set: it takes 1 to 64 letters, digits, dots, underscores or dashes"
        )
    if not 1 <= group.size <= GROUP_MAX:
        raise InvalidRequest(f"cannot have a set of {group.size} volumes: it takes 1 to {GROUP_MAX}")
    return group


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


def _check_version(raw: Mapping[str, Any], where: str) -> None:
    version = raw.get("version", SCHEMA_VERSION)
    if type(version) is not int or version != SCHEMA_VERSION:
        _fail(where, f"schema version {quoted(str(version))} is not {SCHEMA_VERSION}")


def _text(raw: Mapping[str, Any], member: str, where: str) -> str | None:
    value = raw.get(member)
    if not (value is None or isinstance(value, str)):
        _fail(where, f"{member} is not a string")
    return value


def _group(raw: Mapping[str, Any], where: str) -> Group | None:
    value = raw.get("group")
    if value is None:
        return None
    found, size = (value.get("id"), value.get("size")) if isinstance(value, dict) else (None, None)
    if not isinstance(found, str) or not NAME.fullmatch(found) or type(size) is not int or not 1 <= size <= GROUP_MAX:
        _fail(where, "the group is not an id and a number of volumes")
    return Group(found, size)


def _retires(raw: Mapping[str, Any], where: str) -> tuple[int, ...] | None:
    value = raw.get("retires")
    if value is None:
        return None
    numbers = {str(number): number for number in range(TOKENS_MAX)}
    if not isinstance(value, list) or any(not isinstance(number, str) or number not in numbers for number in value):
        _fail(where, "retires is not an array of token numbers")
    return tuple(numbers[number] for number in value)


def _extents(raw: Mapping[str, Any], where: str) -> tuple[Extent, ...]:
    value = raw.get("wipe", [])
    if not isinstance(value, list) or len(value) > WIPE_MAX:
        _fail(where, f"the wipe intent is not an array of at most {WIPE_MAX} ranges")
    return tuple(_extent(entry, where) for entry in value)


def _ranges(wipe: Iterable[Extent]) -> list[dict[str, str]]:
    return [{"offset": str(extent.offset), "size": str(extent.size)} for extent in wipe]


def _extent(entry: object, where: str) -> Extent:
    if not isinstance(entry, dict):
        _fail(where, "a range of the wipe intent is not an object")
    offset, size = (u64(entry, member, f"{where}: wipe intent") for member in ("offset", "size"))
    if size == 0:
        _fail(where, "a range of the wipe intent is empty")
    return Extent(offset, size)


def _fail(where: str, what: str) -> NoReturn:
    raise FormatError(f"cannot read {where}: {what}")
