# SPDX-License-Identifier: GPL-2.0-or-later
"""Hostile headers out of good ones: random alterations of JSON, fields and copies, checksums made right again.

Everything is chosen by a ``random.Random``: one seed, one result.
"""

import copy
import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Final

from luksrotd.luks2 import layout
from luksrotd.luks2.layout import Which
from tests.support import forge

Json = dict[str, Any]
Path = tuple[str | int, ...]

#: What is read differently by different readers of JSON.
PIECES: Final = (b'"', b"\\", b"/**/", b"\0", b"{", b"}", b"[", b",", b"NaN", b"\\u0000", b"\\ud800", b"e9", b"'")
#: Where numbers are cut off, one beside it, and what C and Python read differently.
NUMBERS: Final = (
    0, 1, 2, 31, 32, 33, 127, 128, 129, 511, 512, 513, 4095, 4096, 4097, 12288, 16384, 32768, 36864, 65536,
    2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 4096, 2**64 - 1, 2**64, 10**20, -1, -(2**63) - 1,
)  # fmt: skip
TEXTS: Final = (
    "", "0", "00", "01", "1 ", " 1", "+1", "-1", "0x10", "1e3", "1.0", "٣", "a\0b", "x" * 300, "\x1b[31m\n", "é", "😀",
    "dynamic", "luks2", "reencrypt", "raw", "none", "journal", "checksum", "datashift", "luks1", "pbkdf2", "argon2i",
    "argon2id", "crypt", "linear", "backup-final", "backup-previous", "backup-moved-segment", "in-reencryption",
    "online-reencrypt", "online-reencrypt-v2", "offline-reencrypt", "sha256", "aes-xts-plain64", "active", "staged",
    "retired", "backup", "spare", "luksrotd", "luksrotd-wipe", "systemd-tpm2", "luks2-keyring",
)  # fmt: skip
NAMES: Final = (
    "type", "keyslots", "segments", "tokens", "digests", "config", "offset", "size", "key_size", "area", "kdf", "af",
    "priority", "salt", "hash", "iterations", "time", "memory", "cpus", "encryption", "sector_size", "iv_tweak",
    "integrity", "flags", "requirements", "mandatory", "json_size", "keyslots_size", "mode", "direction", "stripes",
    "shift_size", "version", "name", "generation", "state", "rotated_at", "data", "wipe", "fingerprint", "expires_at",
    "retires", "group", "adopted", "0", "1", "2", "31", "32", "a\0",
)  # fmt: skip
FIELDS: Final[dict[str, tuple[object, ...]]] = {
    "version": (0, 1, 2, 3, 65535),
    "hdr_size": (0, 1, 512, 4096, 16384, 16385, 20480, 32768, 4 << 20, 8 << 20, 2**63, 2**64 - 1),
    "seqid": (0, 1, 2**63, 2**64 - 2, 2**64 - 1),
    "label": (b"", b"label", b"\xff" * 48, b"a\0b"),
    "csum_alg": (b"", b"sha1", b"sha256", b"SHA256", b"sha512", b"sha3-512", b"blake2b-512", b"md5", b"crc32", b"\xff"),
    "salt": (bytes(64), b"\xff" * 64),
    "uuid": (b"", b"not a uuid", b"8a0a1d4e-6a0a-4a57-9d3c-3f9f2d1f0b12", b"\xff" * 40),
    "subsystem": (b"", b"\x1b[2J"),
    "hdr_offset": (0, 1, 512, 4096, 16384, 32768, 2**64 - 1),
    "padding": (b"", b"\1" * 184),
}


def paths(value: object, path: Path = ()) -> Iterator[Path]:
    """The way to every value inside a JSON value, the value itself left out."""
    children: Iterator[tuple[str | int, object]] = iter(())
    if isinstance(value, dict):
        children = iter(value.items())
    elif isinstance(value, list):
        children = iter(enumerate(value))
    for key, child in children:
        yield (*path, key)
        yield from paths(child, (*path, key))


def any_value(rng: Random, depth: int = 0) -> object:
    """Some JSON value."""
    kind = rng.randrange(10 if depth < 3 else 7)
    if kind < 2:
        return str(rng.choice(NUMBERS))
    if kind < 4:
        return rng.choice(TEXTS)
    if kind == 4:
        return rng.choice(NUMBERS)
    if kind == 5:
        return rng.choice((None, True, False, 0.5, 1e300, -0.0))
    if kind == 6:
        return rng.choice(([], {}))
    if kind == 7:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 8:
        return {rng.choice(NAMES): any_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    nested: object = []
    for _ in range(rng.choice((5, 16, 28, 31, 33, 60))):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    return nested


def near(rng: Random, value: object) -> object:
    """A value like this one: of its kind, a little off."""
    step = rng.choice((1, -1, 512, -512, 4096, -4096))
    if isinstance(value, bool) or value is None:
        return rng.choice((True, False, None))
    if isinstance(value, int | float):
        return value + step
    if isinstance(value, str):
        return str(int(value) + step) if value.isascii() and value.isdigit() and len(value) < 20 else rng.choice(TEXTS)
    return any_value(rng)


def altered_json(rng: Random, raw: Any) -> Any:
    """A JSON value with one thing in it changed, moved, copied, added or taken away."""
    raw = copy.deepcopy(raw)
    places = list(paths(raw))
    if not places:
        return any_value(rng)
    path = rng.choice(places)
    holder, key = _holder(raw, path)
    kind = rng.randrange(9)
    if kind < 2:
        holder[key] = near(rng, holder[key])
    elif kind < 4:
        holder[key] = any_value(rng)
    elif kind == 4:
        del holder[key]
    elif kind == 5:
        source, name = _holder(raw, rng.choice(places))
        holder[key] = copy.deepcopy(source[name])
    elif kind == 8:
        holder[key] = {"a": holder[key]} if rng.random() < 0.5 else [holder[key]]
    elif isinstance(holder, dict):
        value = copy.deepcopy(holder[key]) if kind == 6 else any_value(rng)
        holder[rng.choice((*NAMES, str(rng.randrange(33))))] = value
    else:
        holder.insert(key, copy.deepcopy(holder[key]) if kind == 6 else any_value(rng))
    return raw


def altered_bytes(rng: Random, data: bytes) -> bytes:
    """Bytes with some of them changed, doubled or lost."""
    at = rng.randrange(len(data) + 1)
    length = rng.choice((1, 1, 1, 2, 4, 16))
    kind = rng.randrange(4)
    if kind == 0:
        return data[:at] + data[at + length :]
    if kind == 1:
        return data[:at] + data[at : at + length] + data[at:]
    if kind == 2:
        return data[:at] + rng.choice(PIECES) + data[at:]
    return data[:at] + rng.randbytes(length) + data[at + length :]


def altered_image(rng: Random, image: bytes) -> bytes:
    """An image with one thing changed, in one copy or in both."""
    which = rng.choice((forge.BOTH, forge.BOTH, forge.BOTH, (Which.PRIMARY,), (Which.SECONDARY,)))
    return rng.choice(_IMAGE_KINDS)(rng, image, which)


def altered(rng: Random, image: bytes, most: int = 4) -> bytes:
    """An image after up to ``most`` alterations, at least one."""
    for _ in range(rng.randint(1, most)):
        if not 2 * layout.BINARY_SIZE <= 2 * forge.hdr_size_of(image) <= len(image):
            break  # one cannot tell any more where the copies are
        image = altered_image(rng, image)
    return image


def _json(rng: Random, image: bytes, which: tuple[Which, ...]) -> bytes:
    try:
        raw = json.loads(forge.text_of(image, which[0]))
    except (ValueError, RecursionError):
        return image
    raw = altered_json(rng, raw)
    text = json.dumps(raw, separators=(",", ":"), ensure_ascii=rng.random() < 0.2).encode("utf-8", "surrogatepass")
    return forge.with_text(image, text, which)


def _text(rng: Random, image: bytes, which: tuple[Which, ...]) -> bytes:
    return forge.with_text(image, altered_bytes(rng, forge.text_of(image, which[0])), which)


def _field(rng: Random, image: bytes, which: tuple[Which, ...]) -> bytes:
    name = rng.choice(tuple(FIELDS))
    value = rng.choice(FIELDS[name])
    for each in reversed(which):  # the primary last: its hdr_size says where the secondary is
        image = forge.with_fields(image, [each], **{name: value})
    return image


def _newer(rng: Random, image: bytes, which: tuple[Which, ...]) -> bytes:
    seqid = (forge.fields_of(image, which[0])["seqid"] + rng.choice((1, 2, -1))) % 2**64
    return forge.with_fields(image, which, seqid=seqid)


def _torn(rng: Random, image: bytes, which: tuple[Which, ...]) -> bytes:
    size = forge.hdr_size_of(image)
    start = forge.offset_of(image, which[0])
    at = start + rng.randrange(size // 512) * 512
    return forge.put(image, at, rng.choice((bytes(512), rng.randbytes(512))))


def _lost(rng: Random, image: bytes, which: tuple[Which, ...]) -> bytes:
    return forge.erased(image, which[0]) if rng.random() < 0.5 else forge.unsealed(image, which[0])


_IMAGE_KINDS: Final[tuple[Callable[[Random, bytes, tuple[Which, ...]], bytes], ...]] = (
    _json, _json, _json, _json, _text, _field, _newer, _torn, _lost,
)  # fmt: skip


def _holder(raw: Any, path: Path) -> tuple[Any, Any]:
    for key in path[:-1]:
        raw = raw[key]
    return raw, path[-1]
