# SPDX-License-Identifier: GPL-2.0-or-later
"""The JSON metadata: text → typed, lossless view (LUKS2 specification, section 3; LUKS2_hdr_validate).

At least as strict as libcryptsetup: what it rejects is rejected here.  Where we are stricter (``luks2.jsontext``, key
derivations that we do not know, numbers without sense) a volume is reported, never written.  Unknown objects and
members are kept in ``raw``.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from luksrotd.luks2 import jsontext, layout
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.jsontext import Json
from luksrotd.luks2.members import fail, integer, obj, object_number, quoted, references, string, strings, u64
from luksrotd.records import dataclass

_U64 = 2**64
#: Requirements of which a keyslot of type "reencrypt" is a part.
_REENCRYPT = re.compile("online-reencrypt(-v[0-9]+)?")
_MANDATORY = ("keyslots", "tokens", "segments", "digests", "config")
#: Members of the kdf object, by its type; libcryptsetup drops others from memory, which would change the keyslot.
_KDF_MEMBERS: Mapping[str, frozenset[str]] = {
    "pbkdf2": frozenset({"type", "hash", "iterations", "salt"}),
    "argon2i": frozenset({"type", "time", "memory", "cpus", "salt"}),
    "argon2id": frozenset({"type", "time", "memory", "cpus", "salt"}),
}

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
    """One data segment; ``size`` in bytes, ``None`` for "to the end of the device".

    ``backup``: not in use, it only says what a re-encryption goes from or to.
    """

    id: int
    type: str
    offset: int
    size: int | None
    backup: bool
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
    return validate(jsontext.load(area), hdr_size)


def serialise(raw: Json) -> bytes:
    """Compact JSON text of ``raw``, members in their order."""
    return json.dumps(raw, separators=(",", ":"), ensure_ascii=False).encode()


def validate(raw: Json, hdr_size: int) -> Metadata:
    """The typed view of a parsed object; raises ``FormatError``."""
    for name in _MANDATORY:
        obj(raw, name, "metadata")
    keyslots = _numbered(raw, "keyslots", _keyslot)
    segments = _numbered(raw, "segments", _segment)
    tokens = _numbered(raw, "tokens", _token)
    digests = _numbered(raw, "digests", _digest)
    metadata = Metadata(keyslots, tokens, digests, segments, _config(raw["config"], hdr_size), raw)
    _check_references(metadata)
    _check_segments(metadata)
    _check_reencryption(metadata)
    _check_areas(metadata)
    return metadata


def _keyslot(number: int, raw: Json) -> Keyslot:
    where = f"keyslot {number}"
    kind = string(raw, "type", where)
    key_size = integer(raw, "key_size", where, at_least=1)
    area = obj(raw, "area", where)
    string(area, "type", f"{where}: area")
    size = u64(area, "size", f"{where}: area")
    if size == 0:
        fail(f"{where}: area", "size is 0")
    extent = Extent(u64(area, "offset", f"{where}: area"), size)
    priority = integer(raw, "priority", where, at_least=0) if "priority" in raw else 1
    salt = _luks2_keyslot(where, raw, area) if kind == "luks2" else None
    if kind == "reencrypt":
        _reencrypt_keyslot(where, raw, area)
    return Keyslot(number, kind, key_size, extent, priority, salt, raw)


def _luks2_keyslot(where: str, raw: Json, area: Json) -> str:
    """Check what the format asks of type "luks2" (section 3.2); the salt of its kdf."""
    if area["type"] != "raw":
        fail(f"{where}: area", f"type {quoted(area['type'])} is not 'raw'")
    string(area, "encryption", f"{where}: area")
    integer(area, "key_size", f"{where}: area", at_least=1)
    af = obj(raw, "af", where)
    if string(af, "type", f"{where}: af") != "luks1":
        fail(f"{where}: af", f"type {quoted(af['type'])} is not 'luks1'")
    string(af, "hash", f"{where}: af")
    integer(af, "stripes", f"{where}: af", at_least=1)
    kdf = obj(raw, "kdf", where)
    kind = string(kdf, "type", f"{where}: kdf")
    if kind not in _KDF_MEMBERS:
        fail(f"{where}: kdf", f"type {quoted(kind)} is unknown")
    if kdf.keys() != _KDF_MEMBERS[kind]:
        fail(f"{where}: kdf", f"the members are not those of {kind}")
    for member in kdf:
        if member in ("type", "hash", "salt"):
            string(kdf, member, f"{where}: kdf")
        else:
            integer(kdf, member, f"{where}: kdf", at_least=1)
    return string(kdf, "salt", f"{where}: kdf")


def _reencrypt_keyslot(where: str, raw: Json, area: Json) -> None:
    """Check what libcryptsetup asks of type "reencrypt" (lib/luks2/luks2_keyslot_reenc.c)."""
    if string(raw, "mode", where) not in ("reencrypt", "encrypt", "decrypt"):
        fail(where, f"mode {quoted(raw['mode'])} is unknown")
    if string(raw, "direction", where) not in ("forward", "backward"):
        fail(where, f"direction {quoted(raw['direction'])} is unknown")
    if raw["key_size"] != 1:
        fail(where, "key_size is not 1")
    where = f"{where}: area"
    if area["type"].endswith("checksum"):
        string(area, "hash", where)
        sector_size = integer(area, "sector_size", where, at_least=layout.SECTOR)
        if sector_size.bit_count() != 1:
            fail(where, f"sector_size {sector_size} is not a power of two")
    if area["type"].startswith("datashift"):
        shift_size = u64(area, "shift_size", where)
        if shift_size == 0 or shift_size % layout.SECTOR:
            fail(where, f"shift_size {shift_size} is not a multiple of 512")


def _token(number: int, raw: Json) -> Token:
    where = f"token {number}"
    return Token(number, string(raw, "type", where), references(raw, "keyslots", where), raw)


def _digest(number: int, raw: Json) -> Digest:
    where = f"digest {number}"
    kind = string(raw, "type", where)
    return Digest(number, kind, references(raw, "keyslots", where), references(raw, "segments", where), raw)


def _segment(number: int, raw: Json) -> Segment:
    where = f"segment {number}"
    kind = string(raw, "type", where)
    offset = u64(raw, "offset", where)
    size = None if raw.get("size") == layout.DYNAMIC else u64(raw, "size", where)
    if offset % layout.SECTOR or (size is not None and (size == 0 or size % layout.SECTOR)):
        fail(where, "offset or size is not a multiple of 512")
    flags = strings(raw, "flags", where) if "flags" in raw else ()
    if kind == "crypt":
        _crypt_segment(raw, size, where)
    return Segment(number, kind, offset, size, any(flag.startswith("backup-") for flag in flags), raw)


def _crypt_segment(raw: Json, size: int | None, where: str) -> None:
    """Check what the format asks of type "crypt" (section 3.3)."""
    u64(raw, "iv_tweak", where)
    string(raw, "encryption", where)
    sector_size = integer(raw, "sector_size", where, at_least=layout.SECTOR)
    if sector_size not in (512, 1024, 2048, 4096):
        fail(where, f"sector_size {sector_size} is not 512, 1024, 2048 or 4096")
    if size is not None and size % sector_size:
        fail(where, "size is not a multiple of its sectors")
    if "integrity" in raw:
        integrity = obj(raw, "integrity", where)
        for member in ("type", "journal_encryption", "journal_integrity"):
            string(integrity, member, f"{where}: integrity")


def _config(raw: Json, hdr_size: int) -> Config:
    json_size = u64(raw, "json_size", "config")
    if hdr_size not in layout.HEADER_SIZES:
        fail("config", f"hdr_size {hdr_size} is not one of the allowed sizes")
    if json_size != hdr_size - layout.BINARY_SIZE:
        fail("config", f"json_size {json_size} does not fit a header of {hdr_size} bytes")
    keyslots_size = u64(raw, "keyslots_size", "config")
    if keyslots_size == 0 or keyslots_size % layout.AREA_ALIGNMENT or keyslots_size > layout.KEYSLOTS_SIZE_MAX:
        fail("config", f"keyslots_size {keyslots_size} is not allowed")
    if "flags" in raw:
        strings(raw, "flags", "config")
    mandatory: tuple[str, ...] = ()
    if "requirements" in raw:
        requirements = obj(raw, "requirements", "config")
        if "mandatory" in requirements:
            mandatory = strings(requirements, "mandatory", "config: requirements")
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
            fail(f"keyslot {keyslot.id}", f"it is in {holders} digests, not in one")


def _check_segments(metadata: Metadata) -> None:
    """The segments in use are numbered from 0 on and do not overlap; those that are a backup come behind them."""
    if not metadata.segments:
        fail("segments", "there is none")
    if sorted(metadata.segments) != list(range(len(metadata.segments))):
        fail("segments", "they are not numbered from 0 on without a gap")
    in_use = [segment for segment in metadata.segments.values() if not segment.backup]
    if not in_use or max(segment.id for segment in in_use) != len(in_use) - 1:
        fail("segments", "no regular one comes before those that are a backup")
    bound = {segment for digest in metadata.digests.values() for segment in digest.segments}
    for segment in metadata.segments.values():
        if segment.type == "crypt" and segment.id not in bound:
            fail(f"segment {segment.id}", "no digest is bound to it")
    for segment in in_use:
        if segment.size is None and segment.id != len(in_use) - 1:
            fail(f"segment {segment.id}", "only the last segment may be dynamic")
    _check_overlap(in_use)


def _check_overlap(segments: list[Segment]) -> None:
    end = 0
    for segment in sorted(segments, key=lambda each: each.offset):
        if segment.offset < end:
            fail(f"segment {segment.id}", "it overlaps another one")
        # Of a dynamic one nothing lies behind, not even the end of the numbers.
        end = _U64 - 1 if segment.size is None else segment.offset + segment.size
        if end >= _U64:
            fail(f"segment {segment.id}", "it ends beyond 64 bits")


def _check_reencryption(metadata: Metadata) -> None:
    keyslots = [keyslot for keyslot in metadata.keyslots.values() if keyslot.type == "reencrypt"]
    flags = [flag for flag in metadata.config.mandatory if _REENCRYPT.fullmatch(flag)]
    if len(flags) > 1:
        fail("config: requirements", "there is more than one re-encryption")
    if flags and not keyslots:
        fail("config: requirements", "there is a re-encryption, but no keyslot of type 'reencrypt'")
    if keyslots and not flags:
        fail(f"keyslot {keyslots[0].id}", "it is of type 'reencrypt', without the requirement")
    if len(keyslots) > 1:
        fail("keyslots", f"there are {len(keyslots)} keyslots of type 'reencrypt'")
    if flags:
        _check_backups(metadata.segments.values())


def _check_backups(segments: Iterable[Segment]) -> None:
    """Every segment in use is of the kind that the re-encryption goes from or to."""
    kinds = {flag: _kind(segment) for segment in segments if segment.backup for flag in segment.raw["flags"]}
    if not {"backup-final", "backup-previous"} <= kinds.keys():
        fail("segments", "a backup segment of the re-encryption is missing")
    for segment in segments:
        moved = "in-reencryption" in segment.raw.get("flags", ())
        allowed = [kinds["backup-final"]] if moved else [kinds["backup-final"], kinds["backup-previous"]]
        if not segment.backup and _kind(segment) not in allowed:
            fail(f"segment {segment.id}", "it does not match the backup segments")


def _kind(segment: Segment) -> tuple[object, ...]:
    return (segment.type, segment.raw.get("encryption"), segment.raw.get("sector_size"))


def _check_areas(metadata: Metadata) -> None:
    space = metadata.keyslots_area
    in_use = [segment for segment in metadata.segments.values() if not segment.backup]
    first_data = min((segment.offset for segment in in_use if segment.offset), default=None)
    if first_data is not None and space.end > first_data:
        fail("config", f"the keyslots area ends at {space.end}, behind the first segment at {first_data}")
    previous: Keyslot | None = None
    for keyslot in sorted(metadata.keyslots.values(), key=lambda slot: slot.area):
        if not space.contains(keyslot.area):
            fail(f"keyslot {keyslot.id}: area", "it is not in the keyslots area")
        if previous is not None and previous.area.overlaps(keyslot.area):
            fail(f"keyslot {keyslot.id}: area", f"it overlaps that of keyslot {previous.id}")
        previous = keyslot


def _numbered(raw: Json, name: str, build: Callable[[int, Json], T]) -> Mapping[int, T]:
    built = {}
    if len(raw[name]) > layout.OBJECTS_MAX:
        fail(name, f"there are more than {layout.OBJECTS_MAX}")
    for key in raw[name]:
        number = object_number(key, name)
        built[number] = build(number, obj(raw[name], key, name))
    return built


def _known(references: tuple[int, ...], known: Mapping[int, object], where: str, what: str) -> None:
    for reference in references:
        if reference not in known:
            fail(where, f"it names {what} {reference}, which does not exist")
