# SPDX-License-Identifier: GPL-2.0-or-later
"""The JSON metadata: text → typed, lossless view (LUKS2 specification, section 3; LUKS2_hdr_validate).

At least as strict as libcryptsetup: what it rejects is rejected here.  Where we are stricter (strict JSON, unique
members, UTF-8, canonical numbers) a volume is reported, never written.  Unknown members are kept in ``raw``.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from luksrotd.errors import FormatError
from luksrotd.luks2 import layout
from luksrotd.luks2.areas import Extent

_U64 = 2**64
_U32 = 2**32
_MANDATORY = ("keyslots", "tokens", "segments", "digests", "config")
#: Members of the kdf object, by its type; libcryptsetup drops others from memory, which would change the keyslot.
_KDF_MEMBERS: Mapping[str, frozenset[str]] = {
    "pbkdf2": frozenset({"type", "hash", "iterations", "salt"}),
    "argon2i": frozenset({"type", "time", "memory", "cpus", "salt"}),
    "argon2id": frozenset({"type", "time", "memory", "cpus", "salt"}),
}

Json = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Keyslot:
    """One keyslot; ``key_size`` in bytes; ``kdf_salt`` is base64 text, absent where the type has no kdf."""

    id: int
    type: str
    key_size: int
    area: Extent
    priority: int
    kdf_salt: str | None
    raw: Json


@dataclass(frozen=True, slots=True)
class Token:
    """One token and the keyslots that it names."""

    id: int
    type: str
    keyslots: tuple[int, ...]
    raw: Json


@dataclass(frozen=True, slots=True)
class Digest:
    """One digest: which keyslots hold the key of which segments."""

    id: int
    type: str
    keyslots: tuple[int, ...]
    segments: tuple[int, ...]
    raw: Json


@dataclass(frozen=True, slots=True)
class Segment:
    """One data segment; ``size`` in bytes, ``None`` for "to the end of the device"."""

    id: int
    type: str
    offset: int
    size: int | None
    raw: Json


@dataclass(frozen=True, slots=True)
class Config:
    """Sizes in bytes; ``mandatory`` are the requirements that forbid third parties to write."""

    json_size: int
    keyslots_size: int
    mandatory: tuple[str, ...]
    raw: Json


@dataclass(frozen=True, slots=True)
class Metadata:
    """The whole JSON area.  ``raw`` is the parsed object with everything in it."""

    keyslots: Mapping[int, Keyslot]
    tokens: Mapping[int, Token]
    digests: Mapping[int, Digest]
    segments: Mapping[int, Segment]
    config: Config
    raw: Json

    @property
    def areas(self) -> tuple[Extent, ...]:
        """The areas that the keyslots reference, ascending."""
        return tuple(sorted(keyslot.area for keyslot in self.keyslots.values()))

    @property
    def keyslots_area(self) -> Extent:
        """Where keyslot areas may lie."""
        return Extent(2 * (self.config.json_size + layout.BINARY_SIZE), self.config.keyslots_size)

    def opens_volume(self, keyslot: int) -> bool:
        """Whether the keyslot holds a key of the data (it is in a digest that is bound to a segment)."""
        return any(keyslot in digest.keyslots and digest.segments for digest in self.digests.values())


def parse(area: bytes, hdr_size: int) -> Metadata:
    """The metadata in a JSON ``area`` of a copy of ``hdr_size`` bytes; raises ``FormatError`` naming what and where."""
    return validate(_load(area), hdr_size)


def serialise(raw: Json) -> bytes:
    """Compact JSON text of ``raw``, members in their order."""
    return json.dumps(raw, separators=(",", ":"), ensure_ascii=False).encode()


def validate(raw: Json, hdr_size: int) -> Metadata:
    """The typed view of a parsed object; raises ``FormatError``."""
    for name in _MANDATORY:
        _object(raw, name, "metadata")
    keyslots = _numbered(raw, "keyslots", _keyslot)
    segments = _numbered(raw, "segments", _segment)
    tokens = _numbered(raw, "tokens", _token)
    digests = _numbered(raw, "digests", _digest)
    metadata = Metadata(keyslots, tokens, digests, segments, _config(raw["config"], hdr_size), raw)
    _check_references(metadata)
    _check_segments(metadata)
    _check_areas(metadata)
    return metadata


def _load(area: bytes) -> Json:
    if not area.startswith(b"{"):
        _fail("metadata", "the JSON area does not start with an object")
    text = area.rstrip(b"\0")
    if len(text) == len(area):
        _fail("metadata", "the JSON area is not terminated")
    try:
        loaded = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_constant)
    except FormatError:
        raise
    except RecursionError as error:
        raise FormatError("cannot read LUKS2 metadata: it is nested too deeply") from error
    except ValueError as error:
        raise FormatError(f"cannot read LUKS2 metadata: not JSON: {error}") from error
    return loaded  # type: ignore[no-any-return]  # it starts with "{": a dict, or ValueError


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        _fail("metadata", "an object has a member twice")
    return members


def _constant(name: str) -> NoReturn:
    _fail("metadata", f"{name} is not JSON")


def _keyslot(number: int, raw: Json) -> Keyslot:
    where = f"keyslot {number}"
    kind = _string(raw, "type", where)
    key_size = _integer(raw, "key_size", where, at_least=1)
    area = _object(raw, "area", where)
    _string(area, "type", f"{where}: area")
    size = _u64(area, "size", f"{where}: area")
    if size == 0:
        _fail(f"{where}: area", "size is 0")
    extent = Extent(_u64(area, "offset", f"{where}: area"), size)
    priority = _integer(raw, "priority", where, at_least=0) if "priority" in raw else 1
    salt = _luks2_keyslot(where, raw, area) if kind == "luks2" else None
    return Keyslot(number, kind, key_size, extent, priority, salt, raw)


def _luks2_keyslot(where: str, raw: Json, area: Json) -> str:
    """Check what the format asks of type "luks2" (section 3.2); the salt of its kdf."""
    if area["type"] != "raw":
        _fail(f"{where}: area", f"type {area['type']!r} is not 'raw'")
    _string(area, "encryption", f"{where}: area")
    _integer(area, "key_size", f"{where}: area", at_least=1)
    af = _object(raw, "af", where)
    if _string(af, "type", f"{where}: af") != "luks1":
        _fail(f"{where}: af", f"type {af['type']!r} is not 'luks1'")
    _string(af, "hash", f"{where}: af")
    _integer(af, "stripes", f"{where}: af", at_least=1)
    kdf = _object(raw, "kdf", where)
    kind = _string(kdf, "type", f"{where}: kdf")
    if kind not in _KDF_MEMBERS:
        _fail(f"{where}: kdf", f"type {kind!r} is unknown")
    if kdf.keys() != _KDF_MEMBERS[kind]:
        _fail(f"{where}: kdf", f"the members are not those of {kind}")
    for member in kdf:
        if member in ("type", "hash", "salt"):
            _string(kdf, member, f"{where}: kdf")
        else:
            _integer(kdf, member, f"{where}: kdf", at_least=1)
    return _string(kdf, "salt", f"{where}: kdf")


def _token(number: int, raw: Json) -> Token:
    where = f"token {number}"
    return Token(number, _string(raw, "type", where), _references(raw, "keyslots", where), raw)


def _digest(number: int, raw: Json) -> Digest:
    where = f"digest {number}"
    kind = _string(raw, "type", where)
    return Digest(number, kind, _references(raw, "keyslots", where), _references(raw, "segments", where), raw)


def _segment(number: int, raw: Json) -> Segment:
    where = f"segment {number}"
    kind = _string(raw, "type", where)
    offset = _u64(raw, "offset", where)
    size = None if raw.get("size") == layout.DYNAMIC else _u64(raw, "size", where)
    if offset % layout.SECTOR or (size is not None and (size == 0 or size % layout.SECTOR)):
        _fail(where, "offset or size is not a multiple of 512")
    if kind == "crypt":
        _u64(raw, "iv_tweak", where)
        _string(raw, "encryption", where)
        if _integer(raw, "sector_size", where, at_least=layout.SECTOR) not in (512, 1024, 2048, 4096):
            _fail(where, f"sector_size {raw['sector_size']} is not 512, 1024, 2048 or 4096")
    return Segment(number, kind, offset, size, raw)


def _config(raw: Json, hdr_size: int) -> Config:
    json_size = _u64(raw, "json_size", "config")
    if json_size != hdr_size - layout.BINARY_SIZE:
        _fail("config", f"json_size {json_size} does not fit a header of {hdr_size} bytes")
    keyslots_size = _u64(raw, "keyslots_size", "config")
    if keyslots_size == 0 or keyslots_size % layout.AREA_ALIGNMENT or keyslots_size > layout.KEYSLOTS_SIZE_MAX:
        _fail("config", f"keyslots_size {keyslots_size} is not allowed")
    if "flags" in raw:
        _strings(raw, "flags", "config")
    mandatory: tuple[str, ...] = ()
    if "requirements" in raw:
        requirements = _object(raw, "requirements", "config")
        if "mandatory" in requirements:
            mandatory = _strings(requirements, "mandatory", "config: requirements")
    return Config(json_size, keyslots_size, mandatory, raw)


def _check_references(metadata: Metadata) -> None:
    for token in metadata.tokens.values():
        _known(token.keyslots, metadata.keyslots, f"token {token.id}", "keyslot")
    for digest in metadata.digests.values():
        _known(digest.keyslots, metadata.keyslots, f"digest {digest.id}", "keyslot")
        _known(digest.segments, metadata.segments, f"digest {digest.id}", "segment")
    for keyslot in metadata.keyslots.values():
        holders = sum(keyslot.id in digest.keyslots for digest in metadata.digests.values())
        if keyslot.type == "luks2" and holders != 1:
            _fail(f"keyslot {keyslot.id}", f"it is in {holders} digests, not in one")


def _check_segments(metadata: Metadata) -> None:
    if not metadata.segments:
        _fail("segments", "there is none")
    last = max(metadata.segments)
    for segment in metadata.segments.values():
        if segment.size is None and segment.id != last:
            _fail(f"segment {segment.id}", "only the last segment may be dynamic")
        if segment.type == "crypt" and not any(segment.id in d.segments for d in metadata.digests.values()):
            _fail(f"segment {segment.id}", "no digest is bound to it")


def _check_areas(metadata: Metadata) -> None:
    space = metadata.keyslots_area
    first_data = min((segment.offset for segment in metadata.segments.values() if segment.offset), default=None)
    if first_data is not None and space.end > first_data:
        _fail("config", f"the keyslots area ends at {space.end}, behind the first segment at {first_data}")
    previous: Keyslot | None = None
    for keyslot in sorted(metadata.keyslots.values(), key=lambda slot: slot.area):
        if not space.contains(keyslot.area):
            _fail(f"keyslot {keyslot.id}: area", "it is not in the keyslots area")
        if previous is not None and previous.area.overlaps(keyslot.area):
            _fail(f"keyslot {keyslot.id}: area", f"it overlaps that of keyslot {previous.id}")
        previous = keyslot


def _numbered(raw: Json, name: str, build: Callable[[int, Json], T]) -> Mapping[int, T]:
    built = {}
    for key in raw[name]:
        number = _number(key, name)
        built[number] = build(number, _object(raw[name], key, name))
    return built


def _references(raw: Json, name: str, where: str) -> tuple[int, ...]:
    return tuple(_number(entry, f"{where}: {name}") for entry in _strings(raw, name, where))


def _known(references: tuple[int, ...], known: Mapping[int, object], where: str, what: str) -> None:
    for reference in references:
        if reference not in known:
            _fail(where, f"it names {what} {reference}, which does not exist")


def _number(text: str, where: str) -> int:
    """The number that an object key or a reference stands for: decimal, without leading zeros, 32 bit."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and str(int(text)) == text):  # noqa: PLR2004 - 2**32 has 10 digits
        _fail(where, f"{text[:40]!r} is not a number")
    return int(text)


def _object(raw: Json, name: str, where: str) -> Json:
    value = raw.get(name)
    if not isinstance(value, dict):
        _fail(where, f"object {name!r} is missing")
    return value


def _string(raw: Json, name: str, where: str) -> str:
    value = raw.get(name)
    if not isinstance(value, str) or not value:
        _fail(where, f"string {name!r} is missing")
    return value


def _strings(raw: Json, name: str, where: str) -> tuple[str, ...]:
    value = raw.get(name)
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        _fail(where, f"array of strings {name!r} is missing")
    return tuple(value)


def _integer(raw: Json, name: str, where: str, *, at_least: int) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value < _U32:
        _fail(where, f"integer {name!r} is missing or out of range")
    return value


def _u64(raw: Json, name: str, where: str) -> int:
    """A 64-bit number, which LUKS2 writes as a decimal string."""
    value = raw.get(name)
    if not isinstance(value, str) or not (value.isascii() and value.isdigit()) or len(value) > 20:  # noqa: PLR2004 - 2**64 has 20 digits
        _fail(where, f"number {name!r} is missing or not a decimal string")
    if int(value) >= _U64:
        _fail(where, f"number {name!r} is out of range")
    return int(value)


def _fail(where: str, what: str) -> NoReturn:
    raise FormatError(f"cannot read LUKS2 metadata: {where}: {what}")
