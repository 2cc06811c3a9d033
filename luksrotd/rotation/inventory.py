# SPDX-License-Identifier: GPL-2.0-or-later
"""The keyslots that a volume had when it was last seen in order: what has come since, and nobody claims, is a suspect.

A keyslot that another tool has leaked looks like somebody's passphrase; the header alone cannot tell (invariant I5).
So nothing is ever removed on account of an inventory: it only makes people look.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

from luksrotd.errors import FormatError
from luksrotd.records import dataclass
from luksrotd.rotation import token as tokens
from luksrotd.rotation.view import DeviceView

VERSION: Final = 1
#: Bytes of the largest inventory that can be ours.
SIZE_MAX: Final = 256 * 1024
#: Characters of a token type that are kept.
_TYPE_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """A keyslot: its number and the SHA-256 of its kdf salt, which is another one when the passphrase is changed.

    ``first_seen`` is in UTC.  ``claimed`` is the type of the token that names it, or did so last.  ``known``: it may be
    without a token; so were those of the first inventory, and those that somebody has accepted.
    """

    keyslot: int
    salt: str
    first_seen: datetime
    claimed: str | None
    known: bool


@dataclass(frozen=True, slots=True)
class Inventory:
    """The keyslots of a volume, by ascending number."""

    entries: tuple[Entry, ...]

    def find(self, keyslot: int, salt: str) -> Entry | None:
        """The entry of that very keyslot, not of another one with its number."""
        return next((entry for entry in self.entries if (entry.keyslot, entry.salt) == (keyslot, salt)), None)


def take(view: DeviceView, now: datetime, before: Inventory | None) -> Inventory:
    """The inventory of the volume as it is; without one ``before``, everything that has no token is known."""
    return Inventory(tuple(_entry(view, number, now, before) for number in sorted(view.metadata.keyslots)))


def suspects(view: DeviceView, inventory: Inventory) -> tuple[Entry, ...]:
    """Keyslots without a token that have come, or lost their token, since they were last in order."""
    return tuple(entry for entry in inventory.entries if entry.keyslot in view.ordinary and not entry.known)


def accepted(inventory: Inventory, keyslot: int) -> Inventory:
    """The same, with that keyslot known."""
    entries = inventory.entries
    return Inventory(tuple(replace(entry, known=True) if entry.keyslot == keyslot else entry for entry in entries))


def serialise(inventory: Inventory) -> bytes:
    """As JSON text."""
    entries = [
        {
            "keyslot": entry.keyslot,
            "salt": entry.salt,
            "first_seen": tokens.utc(entry.first_seen),
            "claimed": entry.claimed,
            "known": entry.known,
        }
        for entry in inventory.entries
    ]
    return json.dumps({"version": VERSION, "keyslots": entries}, indent=1).encode() + b"\n"


def parse(text: bytes) -> Inventory:
    """What ``serialise`` wrote; raises ``FormatError`` for anything else."""
    try:
        document = json.loads(text) if len(text) <= SIZE_MAX else None
        if not isinstance(document, dict) or document["version"] != VERSION:
            raise ValueError
        entries = tuple(_parse_entry(entry) for entry in document["keyslots"])
        if len({entry.keyslot for entry in entries}) != len(entries):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError("cannot read the inventory: it is not what luksrotd has written") from error
    return Inventory(entries)


def _entry(view: DeviceView, number: int, now: datetime, before: Inventory | None) -> Entry:
    keyslot = view.metadata.keyslots[number]
    salt = f"sha256:{hashlib.sha256((keyslot.kdf_salt or '').encode()).hexdigest()}"
    claimed = _claim(view, number)
    if before is None:
        return Entry(number, salt, now, claimed, claimed is None)
    old = before.find(number, salt)
    if old is None:
        return Entry(number, salt, now, claimed, known=False)
    return replace(old, claimed=claimed or old.claimed)


def _claim(view: DeviceView, keyslot: int) -> str | None:
    types = (token.type for token in view.metadata.tokens.values() if keyslot in token.keyslots)
    return next((kind[:_TYPE_MAX] for kind in types), None)


def _parse_entry(raw: Mapping[str, Any]) -> Entry:
    number, salt, claimed, known = raw["keyslot"], raw["salt"], raw["claimed"], raw["known"]
    first_seen = tokens.moment(raw["first_seen"])
    texts = isinstance(salt, str) and isinstance(claimed, str | None)
    if type(number) is not int or number < 0 or not texts:
        raise ValueError(number)
    if first_seen is None or type(known) is not bool:
        raise ValueError(number)
    return Entry(number, salt, first_seen, claimed, known)
