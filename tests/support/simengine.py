# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulated ``KeyslotEngine``: what libcryptsetup does to a shadow, without cryptography.

It keeps libcryptsetup's habits that matter: one header write and one sequence number per edit, first fit for areas,
recovery of a bad or older copy on load, removed keyslots taken out of digests and tokens but tokens left behind.
``make_volume`` builds small volumes (areas of 4 KiB) that it understands.
"""

import base64
import hashlib
import json
import os
import random
import stat
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from luksrotd.errors import EngineError, MetadataFull, NoFreeArea, WrongCredential
from luksrotd.luks2 import header, layout, metadata
from luksrotd.luks2.areas import Extent, subtract
from luksrotd.luks2.header import BinaryHeader
from luksrotd.luks2.layout import Which
from luksrotd.luks2.metadata import Keyslot
from luksrotd.luks2.pair import HeaderCopy, parse_pair
from luksrotd.ports import SecretFd, SecretSource, Shadow, TokenSource
from luksrotd.rotation.edits import UNLOCK, VOLUME_KEY, AddKeyslot, DestroyKeyslot, Edit, RemoveToken, SetToken
from luksrotd.rotation.fingerprint import fingerprint
from tests.support import tokenplugin

UUID = "8a0a1d4e-6a0a-4a57-9d3c-3f9f2d1f0b11"
VOLUME_KEY_CONTENT = b"the volume key"
KEY_SIZE = 1  # byte: gives areas of 4096 bytes
HDR_SIZE = layout.HEADER_SIZES[0]
DATA_SIZE = 4096


def material(secret: bytes, salt: str, size: int = layout.AREA_ALIGNMENT) -> bytes:
    """The key material of a keyslot with an area of ``size`` bytes."""
    return hashlib.shake_256(secret + b"\0" + salt.encode()).digest(size)


def make_volume(
    secrets: Sequence[bytes],
    *,
    areas: int = 8,
    uuid: str = UUID,
    seed: int = 1,
    hdr_size: int = HDR_SIZE,
    key_size: int = KEY_SIZE,
) -> bytes:
    """A volume whose keyslots 0, 1, … are opened by ``secrets``; room for ``areas`` keyslots; data of 4 KiB.

    ``key_size`` in bytes: that of the volume key, which says how large an area is.
    """
    rng = random.Random(seed)
    area_size = layout.keyslot_area_size(key_size)
    keyslots_size = areas * area_size
    start = 2 * hdr_size
    image = bytearray(start) + bytearray(rng.randbytes(keyslots_size)) + bytearray(DATA_SIZE)
    raw: dict[str, Any] = {
        "keyslots": {},
        "tokens": {},
        "segments": {
            "0": {
                "type": "crypt",
                "offset": str(start + keyslots_size),
                "size": "dynamic",
                "iv_tweak": "0",
                "encryption": "aes-xts-plain64",
                "sector_size": 512,
            }
        },
        "digests": {"0": {"type": "pbkdf2", "keyslots": [], "segments": ["0"], "salt": "", "digest": ""}},
        "config": {"json_size": str(hdr_size - layout.BINARY_SIZE), "keyslots_size": str(keyslots_size)},
    }
    for number, secret in enumerate(secrets):
        area = Extent(start + number * area_size, area_size)
        salt = _salt(rng)
        cost = {"type": "pbkdf2", "hash": "sha256", "iterations": 1000}
        raw["keyslots"][str(number)] = _keyslot(area, salt, cost, key_size)
        raw["digests"]["0"]["keyslots"].append(str(number))
        image[area.offset : area.end] = material(secret, salt, area.size)
    for which in Which:
        head = BinaryHeader(which, hdr_size, 3, "", "sha256", rng.randbytes(64), uuid, "", b"")
        image[head.hdr_offset : head.hdr_offset + hdr_size] = header.encode(head, metadata.serialise(raw))
    return bytes(image)


def opened_by(image: bytes, secret: bytes) -> list[int]:
    """The keyslots of the winning copy that ``secret`` opens."""
    return _openers(parse_pair(image).winner, lambda offset, size: image[offset : offset + size], secret)


class SimEngine:
    """Starts simulated sessions; ``on_call`` may raise to make the worker fail at a call."""

    def __init__(self, seed: int = 7) -> None:
        self._rng = random.Random(seed)
        self.calls: list[str] = []
        self.live = 0

    def on_call(self, name: str) -> None:
        """Called with the name of each call before it is done; replace it to inject a failure."""
        self.calls.append(name)

    @asynccontextmanager
    async def session(self, shadow: Shadow, secrets: Mapping[str, SecretSource]) -> AsyncIterator["SimSession"]:
        """Read or generate the secrets, and hand out a session."""
        self.live += 1
        try:
            self.on_call("session")
            yield SimSession(self, shadow, {name: self._secret(source) for name, source in secrets.items()})
        finally:
            self.live -= 1

    def salt(self) -> str:
        """A fresh kdf salt."""
        return _salt(self._rng)

    def random(self, length: int) -> bytes:
        """Random bytes."""
        return self._rng.randbytes(length)

    def _secret(self, source: SecretSource) -> "bytes | SimToken":
        if isinstance(source, TokenSource):
            pin = None if source.pin is None else self._secret(source.pin)
            assert not isinstance(pin, SimToken)
            return SimToken(source.token, pin)
        if isinstance(source, SecretFd):
            if stat.S_ISREG(os.fstat(source.fd).st_mode):
                return os.pread(source.fd, source.limit, 0)
            chunks = []
            while chunk := os.read(source.fd, source.limit):
                chunks.append(chunk)
            return b"".join(chunks)
        secret = self._rng.randbytes(32).hex().encode()
        os.pwrite(source.fd, secret, 0)
        return secret


@dataclass(frozen=True)
class SimToken:
    """A token to be asked, or (None) any, and its PIN; its plugin is what tests/support/tokenplugin.c is."""

    number: int | None
    pin: bytes | None

    def opener(self, copy: HeaderCopy, read: Any, keyslot: int | None) -> int:
        """The keyslot that it opens, or that one.  Raises ``WrongCredential`` and ``EngineError``."""
        failures: list[WrongCredential | EngineError] = []
        for number, body in sorted((int(number), body) for number, body in copy.metadata.raw["tokens"].items()):
            if self.number not in (None, number) or body["type"] != tokenplugin.TYPE:
                continue
            if keyslot is not None and str(keyslot) not in body["keyslots"]:
                continue
            if "errno" in body:
                failures.append(EngineError(f"cannot unlock the volume by token {number}: {body['errno']}"))
            elif "pin" in body and (self.pin is None or body["pin"] != tokenplugin.masked(self.pin)):
                failures.append(WrongCredential(f"cannot unlock the volume by token {number}: wrong PIN"))
            else:
                secret = bytes.fromhex(tokenplugin.masked(bytes.fromhex(body["passphrase"])))
                opened = [slot for slot in _openers(copy, read, secret) if str(slot) in body["keyslots"]]
                if opened and keyslot in (None, opened[0]):
                    return opened[0]
                failures.append(WrongCredential(f"cannot unlock the volume by token {number}: it opens no keyslot"))
        if not failures:
            raise WrongCredential("cannot unlock the volume: it has no token that could")
        raise next((error for error in failures if isinstance(error, WrongCredential)), failures[0])


class SimSession:
    """One simulated worker."""

    def __init__(self, engine: SimEngine, shadow: Shadow, secrets: Mapping[str, bytes | SimToken]) -> None:
        self._engine = engine
        self._shadow = shadow
        self._secrets = secrets
        self._unlocked = False

    async def load(self) -> Mapping[str, Any]:
        """Choose the winner, rewrite the loser."""
        self._engine.on_call("load")
        return json.loads(json.dumps(self._recover().metadata.raw))  # type: ignore[no-any-return]  # an object

    async def unlock(self, keyslot: int | None = None) -> int:
        """Try the secret named ``unlock`` on every keyslot."""
        self._engine.on_call("unlock")
        opened = self._opened(UNLOCK, keyslot)
        if not opened:
            raise WrongCredential("cannot unlock the volume: the credential opens no keyslot")
        self._unlocked = True
        return opened[0]

    async def take_volume_key(self) -> None:
        """Compare the secret named ``volume-key`` with the one of every simulated volume."""
        self._engine.on_call("take_volume_key")
        if self._secrets[VOLUME_KEY] != VOLUME_KEY_CONTENT:
            raise WrongCredential("cannot unlock the volume: this is not its volume key")
        self._unlocked = True

    async def apply(self, edits: Sequence[Edit]) -> None:
        """One header write per edit."""
        for edit in edits:
            self._engine.on_call(f"apply-{type(edit).__name__}")
            copy = self._recover()
            raw = json.loads(json.dumps(copy.metadata.raw))
            self._edit(raw, edit, copy)
            self._store(raw, copy.header.seqid + 1)

    async def opens(self, keyslot: int, secret: str) -> bool:
        """Whether the secret opens that keyslot."""
        self._engine.on_call("opens")
        try:
            return bool(self._opened(secret, keyslot))
        except WrongCredential:
            return False

    def _opened(self, name: str, keyslot: int | None) -> list[int]:
        secret, copy = self._secrets[name], self._recover()
        if isinstance(secret, SimToken):
            return [secret.opener(copy, self._shadow.read, keyslot)]
        return [slot for slot in _openers(copy, self._shadow.read, secret) if keyslot in (None, slot)]

    def _edit(self, raw: dict[str, Any], edit: Edit, copy: HeaderCopy) -> None:
        match edit:
            case AddKeyslot(keyslot, secret, pbkdf, token):
                assert self._unlocked
                key_size = _key_size(copy)
                area = _first_fit(copy, layout.keyslot_area_size(key_size))
                salt = self._engine.salt()
                kdf = {"type": pbkdf.type, "hash": pbkdf.hash or "sha256", "iterations": pbkdf.iterations or 1000}
                raw["keyslots"][str(keyslot)] = _keyslot(area, salt, kdf, key_size)
                raw["digests"]["0"]["keyslots"].append(str(keyslot))
                if token is not None:
                    raw["tokens"][str(token)]["keyslots"].append(str(keyslot))
                passphrase = self._secrets[secret]
                assert isinstance(passphrase, bytes)
                self._shadow.write(area.offset, material(passphrase, salt, area.size))
            case SetToken(token, body, fingerprint_of):
                raw["tokens"][str(token)] = dict(body)
                if fingerprint_of is not None:
                    raw["tokens"][str(token)]["fingerprint"] = fingerprint(raw["keyslots"][str(fingerprint_of)])
            case RemoveToken(token):
                raw["tokens"].pop(str(token))
            case DestroyKeyslot(keyslot):
                area = copy.metadata.keyslots[keyslot].area
                self._shadow.write(area.offset, self._engine.random(area.size))
                raw["keyslots"].pop(str(keyslot))
                for owner in (*raw["digests"].values(), *raw["tokens"].values()):
                    owner["keyslots"] = [slot for slot in owner["keyslots"] if slot != str(keyslot)]

    def _store(self, raw: dict[str, Any], seqid: int) -> None:
        pair = parse_pair(self._shadow.read(0, self._shadow.length))
        text = metadata.serialise(raw)
        if len(text) >= pair.winner.header.json_size:
            raise MetadataFull("cannot write the header: the metadata area is full")
        for copy in pair.valid:
            self._write_copy(copy.header, copy.header.which, copy.header.salt, seqid, text)

    def _recover(self) -> HeaderCopy:
        pair = parse_pair(self._shadow.read(0, self._shadow.length))
        winner = pair.winner
        if pair.loser and (len(pair.valid) == 1 or len({copy.header.seqid for copy in pair.valid}) == 2):
            text = winner.raw[layout.BINARY_SIZE :].rstrip(b"\0")
            self._write_copy(winner.header, pair.loser, self._engine.random(64), winner.header.seqid, text)
        return winner

    def _write_copy(self, like: BinaryHeader, which: Which, salt: bytes, seqid: int, text: bytes) -> None:
        head = BinaryHeader(
            which, like.hdr_size, seqid, like.label, like.csum_alg, salt, like.uuid, like.subsystem, b""
        )
        self._shadow.write(head.hdr_offset, header.encode(head, text))


def _openers(copy: HeaderCopy, read: Any, secret: bytes) -> list[int]:
    return [slot.id for slot in copy.metadata.keyslots.values() if _opens(read, slot, secret)]


def _opens(read: Any, slot: Keyslot, secret: bytes) -> bool:
    """By what there is of the material: behind it an area is random (rotation.plan)."""
    size = min(slot.area.size, slot.key_size * layout.STRIPES)
    if not slot.kdf_salt:
        return False
    return bool(read(slot.area.offset, size) == material(secret, slot.kdf_salt, slot.area.size)[:size])


def _key_size(copy: HeaderCopy) -> int:
    """Bytes of the volume key."""
    return next((s.key_size for s in copy.metadata.keyslots.values() if copy.metadata.opens_volume(s.id)), KEY_SIZE)


def _first_fit(copy: HeaderCopy, size: int) -> Extent:
    for gap in subtract(copy.metadata.keyslots_area, copy.metadata.areas):
        if gap.size >= size:
            return Extent(gap.offset, size)
    raise NoFreeArea("cannot add a keyslot: the keyslots area is full")


def _keyslot(area: Extent, salt: str, kdf: Mapping[str, Any], key_size: int = KEY_SIZE) -> dict[str, Any]:
    return {
        "type": "luks2",
        "key_size": key_size,
        "af": {"type": "luks1", "stripes": layout.STRIPES, "hash": "sha256"},
        "area": {
            "type": "raw",
            "offset": str(area.offset),
            "size": str(area.size),
            "encryption": "aes-xts-plain64",
            "key_size": 64,
        },
        "kdf": {**kdf, "salt": salt},
    }


def _salt(rng: random.Random) -> str:
    return base64.b64encode(rng.randbytes(32)).decode()
