# SPDX-License-Identifier: GPL-2.0-or-later
"""Request and view → change, or a refusal: every decision that can be made before anything is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from luksrotd.errors import (
    ForeignSignature,
    InvalidRequest,
    KeyExists,
    LastKeyslot,
    MetadataFull,
    NeedsPerson,
    NeedsReconcile,
    NoFreeArea,
    NoFreeKeyslot,
    RequirementsPresent,
    UnknownKey,
)
from luksrotd.luks2 import layout, metadata
from luksrotd.luks2.areas import Extent
from luksrotd.names import DEFAULT_KEY_NAME
from luksrotd.rotation import token as tokens
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import AddKeyslot, DestroyKeyslot, Pbkdf, SetToken
from luksrotd.rotation.view import DeviceView, ManagedKey

#: Room for what libcryptsetup adds to the JSON with a keyslot (its object with an argon2id kdf, its digest entry).
KEYSLOT_JSON_MAX: Final = 512
#: Room for the fingerprint and the wipe intent of a token.
TOKEN_EXTRA_JSON_MAX: Final = 192


@dataclass(frozen=True, slots=True)
class EnrollRequest:
    """Give the volume a managed key: ``data`` is the associated data, ``now`` the time written into the token."""

    data: Mapping[str, Any]
    now: datetime
    pbkdf: Pbkdf
    name: str = DEFAULT_KEY_NAME


@dataclass(frozen=True, slots=True)
class RotateRequest:
    """Replace the managed key ``name``; ``data`` of ``None`` keeps the associated data.

    ``only_generation``: refuse unless that generation is the current one.
    """

    data: Mapping[str, Any] | None
    now: datetime
    pbkdf: Pbkdf
    name: str = DEFAULT_KEY_NAME
    only_generation: int | None = None


def enroll(view: DeviceView, request: EnrollRequest) -> Change:
    """A new keyslot and its token, born in one commit; raises a refusal."""
    check_writable(view)
    tokens.check_name(request.name)
    tokens.check_data(request.data)
    if view.named(request.name):
        raise KeyExists(f"cannot enroll key {request.name!r}: the volume has one of that name already")
    if view.unreadable:
        # It may be a key of that name, written by a later version.
        raise NeedsPerson(f"cannot enroll key {request.name!r}: {'; '.join(view.unreadable.values())}")
    keyslot, token = _free_keyslot(view), view.free_token()
    if token is None:
        raise NoFreeKeyslot(f"cannot add a token: all {layout.TOKENS_MAX} are taken")
    _check_area(view)
    written = tokens.body(request.name, 1, keyslot, request.data, request.now)
    _check_metadata_room(view, written, replaces=None)
    return Change((AddKeyslot(keyslot, pbkdf=request.pbkdf), SetToken(token, written, fingerprint_of=keyslot)))


def rotate(view: DeviceView, request: RotateRequest) -> Change:
    """A new keyslot in place of the old one, the token moved over, the old area wiped; raises a refusal.

    Add before destroy: so the new area is never one that the device still references (luks2-facts: shadow order).
    """
    check_writable(view)
    key = managed(view, request.name)
    old, generation = key.keyslot, key.token.generation
    if request.only_generation is not None and generation != request.only_generation:
        raise InvalidRequest(f"cannot rotate generation {request.only_generation}: the key is at {generation}")
    if old is None or key.stale or key.shared:
        raise NeedsPerson(f"cannot rotate key {request.name!r}: {_oddity(key)}; see luksrotctl reconcile")
    if generation >= tokens.GENERATION_MAX:
        raise NeedsPerson(f"cannot rotate key {request.name!r}: generation {generation} is the last one")
    new = _free_keyslot(view)
    _check_area(view)
    data = key.token.data if request.data is None else tokens.check_data(request.data)
    intent = (*key.token.wipe, old.area)
    pending = tokens.body(request.name, generation + 1, new, data, request.now, intent, key.token.extra)
    _check_metadata_room(view, pending, replaces=key.token.id)
    return Change(
        (AddKeyslot(new, pbkdf=request.pbkdf), SetToken(key.token.id, pending, new), DestroyKeyslot(old.id)),
        closing=(SetToken(key.token.id, tokens.without_intent(pending), new),),
    )


def managed(view: DeviceView, name: str) -> ManagedKey:
    """The one managed key of that name; raises ``UnknownKey``, ``NeedsPerson`` or ``NeedsReconcile``."""
    if view.pair.doubt:
        raise NeedsReconcile(f"cannot tell which header copy is in force: {view.pair.doubt}")
    keys = view.named(name)
    if not keys:
        raise UnknownKey(f"cannot find a managed key named {name!r}")
    if len(keys) > 1:
        raise NeedsPerson(f"cannot choose between {len(keys)} keys named {name!r}: see luksrotctl reconcile")
    return keys[0]


def check_writable(view: DeviceView) -> None:
    """Refuse volumes on which luksrotd does not write; raises a refusal."""
    check_requirements(view)
    if not view.pair.agree:
        raise NeedsReconcile("cannot change the volume: its two header copies differ")
    if view.pending:
        raise NeedsReconcile("cannot change the volume: a retired key has not been wiped yet")


def check_requirements(view: DeviceView) -> None:
    """Raise ``RequirementsPresent`` if the header forbids third parties to write (LUKS2 specification, section 3.5)."""
    mandatory = view.metadata.config.mandatory
    if mandatory:
        raise RequirementsPresent(f"cannot change the volume: its header requires {', '.join(mandatory)}")


def check_signatures(foreign: tuple[str, ...]) -> None:
    """Raise ``ForeignSignature`` if libcryptsetup's own recovery would stumble (lib/utils_blkid.c)."""
    if foreign:
        raise ForeignSignature(
            f"cannot change the volume: it also carries signatures of {', '.join(foreign)}, which would stop "
            "libcryptsetup from recovering the header; see wipefs(8)"
        )


def check_retirement(view: DeviceView, change: Change) -> None:
    """Raise ``LastKeyslot`` if nothing would open the volume any more (invariant I5)."""
    remaining = view.metadata.keyslots.keys() - set(change.destroyed)
    ways_in = [keyslot for keyslot in remaining if view.metadata.opens_volume(keyslot)]
    if change.destroyed and not ways_in and not change.added:
        raise LastKeyslot("cannot remove the last keyslot that opens the volume")


def _oddity(key: ManagedKey) -> str:
    if key.keyslot is None:
        return f"its token names {len(key.token.keyslots)} keyslots, not one"
    return "another tool has changed its keyslot" if key.stale else "another token names its keyslot too"


def _free_keyslot(view: DeviceView) -> int:
    keyslot = view.free_keyslot()
    if keyslot is None:
        raise NoFreeKeyslot(f"cannot add a keyslot: all {layout.KEYSLOTS_MAX} are taken")
    return keyslot


def _check_area(view: DeviceView) -> Extent:
    """The first gap that holds the area of a key as long as those that are there."""
    sizes = [slot.key_size for slot in view.metadata.keyslots.values() if view.metadata.opens_volume(slot.id)]
    if not sizes:
        raise NoFreeArea("cannot add a keyslot: no keyslot opens the volume, so its key size is unknown")
    size = layout.keyslot_area_size(max(sizes))
    for gap in view.free:
        if gap.size >= size:
            return gap
    raise NoFreeArea(
        f"cannot add a keyslot: no {size} bytes in a row are free in the keyslots area; remove a keyslot first"
    )


def _check_metadata_room(view: DeviceView, token: Mapping[str, Any], replaces: int | None) -> None:
    """Refuse early what libcryptsetup would refuse on the shadow: a JSON area too small for the token."""
    raw = dict(view.metadata.raw)
    raw["tokens"] = {number: body for number, body in raw["tokens"].items() if number != str(replaces)}
    size = len(metadata.serialise(raw)) + len(metadata.serialise(token))
    if size + KEYSLOT_JSON_MAX + TOKEN_EXTRA_JSON_MAX >= view.metadata.config.json_size:
        raise MetadataFull(
            f"cannot write the token: {len(metadata.serialise(token))} bytes do not fit into the metadata area "
            f"of {view.metadata.config.json_size} bytes; use less associated data"
        )
