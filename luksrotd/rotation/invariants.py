# SPDX-License-Identifier: GPL-2.0-or-later
"""The invariants of docs/spec/commit-protocol.md, as predicates over the bytes of a device.

"Opens" is decided without cryptography: a credential that opened a keyslot opens it as long as the keyslot's kdf salt
and the key material in its area are what they were.  The crash tests hold this against real libcryptsetup.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from luksrotd.luks2 import layout
from luksrotd.luks2.areas import Extent, overlapping
from luksrotd.luks2.metadata import Keyslot
from luksrotd.luks2.pair import HeaderCopy, Pair
from luksrotd.names import TOKEN_TYPE, WIPE_TOKEN_TYPE
from luksrotd.records import dataclass
from luksrotd.rotation.token import KeyState
from luksrotd.rotation.view import ManagedKey, view

Read = Callable[[int, int], bytes]
#: The active and the staged generation of a key; 0 for none.
Standing = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Opener:
    """How a credential is recognised: the salt of its keyslot and the hash of the key material."""

    salt: str
    material: str


@dataclass(frozen=True, slots=True)
class Expectation:
    """What must hold at every instant.

    ``keep``: credentials that always open.  ``keys``: for each key name the generations that there may be, each with
    its credential.  ``allowed``: for each key name the combinations that there may be of an active and a staged
    generation (0 for none).  ``foreign``: the tokens, keyslots and config that must not change, each with the contents
    that it may have, as ``foreign_parts`` gives them.  ``alone``: credentials of ``keys`` whose keyslot may be without
    a token: before an adoption, after a release.  ``orphaned``: names and generations of tokens that another tool has
    deprived of their keyslot.
    """

    keep: Mapping[str, Opener]
    keys: Mapping[str, Mapping[int, Opener]]
    allowed: Mapping[str, frozenset[Standing]]
    foreign: tuple[Mapping[str, Any], ...]
    alone: frozenset[Opener] = frozenset()
    orphaned: frozenset[tuple[str, int]] = frozenset()


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken invariant, by its number, and what is wrong."""

    invariant: str
    what: str


def opener(keyslot: Keyslot, read: Read) -> Opener:
    """How the credential of ``keyslot`` is recognised from now on."""
    size = min(keyslot.area.size, keyslot.key_size * layout.STRIPES)
    return Opener(keyslot.kdf_salt or "", hashlib.sha256(read(keyslot.area.offset, size)).hexdigest())


def foreign_parts(copy: HeaderCopy) -> Mapping[str, Any]:
    """Everything in the header that is not ours (invariant I5)."""
    raw = copy.metadata.raw
    ours = {
        keyslot for token in copy.metadata.tokens.values() if token.type == TOKEN_TYPE for keyslot in token.keyslots
    }
    digests = {
        number: {**digest, "keyslots": sorted(slot for slot in digest["keyslots"] if int(slot) not in ours)}
        for number, digest in raw["digests"].items()
    }
    return {
        "uuid": copy.header.uuid,
        "label": copy.header.label,
        "segments": raw["segments"],
        "config": raw["config"],
        "digests": digests,
        "tokens": {
            n: token for n, token in raw["tokens"].items() if token["type"] not in (TOKEN_TYPE, WIPE_TOKEN_TYPE)
        },
        "keyslots": {number: slot for number, slot in raw["keyslots"].items() if int(number) not in ours},
    }


def check_instant(pair: Pair, read: Read, expected: Expectation) -> tuple[Violation, ...]:
    """I1, I2, I3 and I5, for each valid copy alone."""
    return tuple(violation for copy in pair.valid for violation in _check_copy(pair, copy, read, expected))


def check_done(pair: Pair, read: Read, gone: Iterable[Opener], retired: Mapping[Extent, str]) -> tuple[Violation, ...]:
    """I6: both copies agree, nothing is pending, ``gone`` opens nothing, the retired areas hold something else.

    ``retired`` maps an area to the sha256 of the key material that was in it.
    """
    found = []
    if not pair.agree:
        found.append(Violation("I6", "the header copies differ"))
    if view(pair).pending:
        found.append(Violation("I6", "a wipe intent is left"))
    openers = {opener(keyslot, read) for keyslot in pair.winner.metadata.keyslots.values()}
    found.extend(
        Violation("I6", "a retired credential still opens") for retired_opener in gone if retired_opener in openers
    )
    for area, material in retired.items():
        if hashlib.sha256(read(area.offset, area.size)).hexdigest() == material:
            found.append(Violation("I6", f"the retired area at {area.offset} is intact"))
    return tuple(found)


def check_write(pair: Pair, extent: Extent) -> tuple[Violation, ...]:
    """I4: a write behind the headers touches nothing that a valid copy on the device references at that moment."""
    taken = overlapping(extent, pair.referenced)
    if extent.offset < len(pair.raw) or taken is None:
        return ()
    return (Violation("I4", f"a write of {extent.size} bytes at {extent.offset} hits the area at {taken.offset}"),)


def check_sequence(before: Pair, after: Pair, *, changed: bool) -> tuple[Violation, ...]:
    """I9: the sequence number never falls, and rises when the volume was ``changed``."""
    first, last = before.winner.header.seqid, after.winner.header.seqid
    if last < first or (changed and last == first):
        return (Violation("I9", f"the sequence number went from {first} to {last}"),)
    return ()


def _check_copy(pair: Pair, copy: HeaderCopy, read: Read, expected: Expectation) -> Iterator[Violation]:
    alone = view(Pair(copy, copy, pair.raw))
    where = f"{copy.header.which} copy alone"
    openers = {number: opener(keyslot, read) for number, keyslot in copy.metadata.keyslots.items()}
    for name, credential in expected.keep.items():
        if credential not in openers.values():
            yield Violation("I1", f"{where}: {name} does not open any more")
    for name, generations in expected.keys.items():
        yield from _check_key(where, name, [key for key in alone.keys if key.token.name == name], openers, expected)
        known = set(generations.values()) - expected.alone
        claimed = {slot for token in copy.metadata.tokens.values() for slot in token.keyslots}
        if any(found in known and number not in claimed for number, found in openers.items()):
            yield Violation("I3", f"{where}: a keyslot of key {name!r} has no token")
    if _without(foreign_parts(copy), expected) not in [_without(parts, expected) for parts in expected.foreign]:
        yield Violation("I5", f"{where}: something foreign has changed")


def _check_key(
    where: str, name: str, keys: list[ManagedKey], openers: Mapping[int, Opener], expected: Expectation
) -> Iterator[Violation]:
    found = {state: [key for key in keys if key.token.state is state] for state in KeyState}
    active, staged = found[KeyState.ACTIVE], found[KeyState.STAGED]
    standing = (_generation(active), _generation(staged))
    if max(len(active), len(staged)) > 1 or standing not in expected.allowed[name]:
        found_there = ", ".join(f"{key.token.generation} ({key.token.state})" for key in keys) or "none"
        yield Violation("I3", f"{where}: unexpected generations of key {name!r}: {found_there}")
        return
    for key in keys:
        if not key.token.keyslots and (name, key.token.generation) in expected.orphaned:
            continue
        credential = expected.keys[name].get(key.token.generation)
        if credential is None or [openers[number] for number in key.token.keyslots] != [credential]:
            yield Violation("I1", f"{where}: what the token of {name!r} describes does not open")


def _generation(keys: list[ManagedKey]) -> int:
    return keys[0].token.generation if keys else 0


def _without(parts: Mapping[str, Any], expected: Expectation) -> Mapping[str, Any]:
    """Leave out keyslots of ours that have lost their token: I3 has said so already."""
    salts = {found.salt for generations in expected.keys.values() for found in generations.values()}
    ours = {n for n, slot in parts["keyslots"].items() if slot["type"] == "luks2" and slot["kdf"]["salt"] in salts}
    return {
        **parts,
        "keyslots": {number: slot for number, slot in parts["keyslots"].items() if number not in ours},
        "digests": {
            number: {**digest, "keyslots": [slot for slot in digest["keyslots"] if slot not in ours]}
            for number, digest in parts["digests"].items()
        },
    }
