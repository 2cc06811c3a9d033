# SPDX-License-Identifier: GPL-2.0-or-later
"""Enrol, rotate, remove a managed key, change its associated data: request and view → change, or a refusal."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from luksrotd.errors import InvalidRequest, KeyExists, NeedsPerson
from luksrotd.names import DEFAULT_KEY_NAME
from luksrotd.records import dataclass
from luksrotd.rotation import policy
from luksrotd.rotation import token as tokens
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import AddKeyslot, Pbkdf, RemoveToken, SetToken
from luksrotd.rotation.retirement import Carrier, retire
from luksrotd.rotation.token import BackupToken, KeyState
from luksrotd.rotation.view import DeviceView, ManagedKey


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
    policy.check_writable(view)
    check_new_name(view, request.name, "enroll")
    keyslot, token = policy.free_keyslot(view), policy.free_token(view)
    data = tokens.check_data(request.data)
    first = BackupToken(token, (keyslot,), request.name, 1, KeyState.ACTIVE, tokens.utc(request.now), data)
    change = Change((AddKeyslot(keyslot, pbkdf=request.pbkdf), SetToken(token, tokens.body(first), keyslot)))
    policy.check_room(view, change.edits)
    return change


def rotate(view: DeviceView, request: RotateRequest) -> Change:
    """A new keyslot in place of the old one, the token moved over, the old area wiped; raises a refusal.

    Add before destroy: so the new area is never one that the device still references (luks2-facts: shadow order).
    """
    policy.check_writable(view)
    key = to_replace(view, request, "rotate")
    assert key.keyslot is not None  # noqa: S101 - it is complete
    new = policy.free_keyslot(view)
    carrier = Carrier(key.token.id, tokens.body(successor(key.token, new, request)), new)
    change = retire(view, [key.keyslot.id], carrier=carrier, first=(AddKeyslot(new, pbkdf=request.pbkdf),))
    policy.check_room(view, change.edits)
    return change


def remove(view: DeviceView, name: str) -> Change:
    """Keyslot and token gone in one commit, the area wiped; the credential must open another keyslot."""
    policy.check_writable(view)
    line = policy.known(view, name)
    if line.staged is not None:
        raise NeedsPerson(f"cannot remove key {name!r}: a new generation of it is staged; finish or abort that first")
    key = policy.managed(view, name)
    if not key.token.keyslots:
        return Change((RemoveToken(key.token.id),))
    policy.complete(key, "remove")
    survivors = policy.ways_in(view, without=key.token.keyslots)
    change = retire(view, key.token.keyslots, [key.token.id], survivors=survivors)
    policy.check_retirement(view, change)
    return change


def set_data(view: DeviceView, name: str, data: Mapping[str, Any]) -> Change:
    """Other associated data for the same key; raises a refusal."""
    policy.check_writable(view)
    key = policy.managed(view, name)
    body = {**view.metadata.tokens[key.token.id].raw, "data": dict(tokens.check_data(data))}
    change = Change((SetToken(key.token.id, body),))
    policy.check_room(view, change.edits)
    return change


def check_new_name(view: DeviceView, name: str, verb: str) -> None:
    """Whether a key may be called ``name``; raises ``InvalidRequest``, ``KeyExists`` or ``NeedsPerson``."""
    tokens.check_name(name)
    if view.named(name):
        raise KeyExists(f"cannot {verb} key {name!r}: the volume has one of that name already")
    if view.unreadable:
        # It may be a key of that name, written by a later version.
        raise NeedsPerson(f"cannot {verb} key {name!r}: {'; '.join(view.unreadable.values())}")


def to_replace(view: DeviceView, request: RotateRequest, verb: str) -> ManagedKey:
    """The key that ``request`` replaces, complete and without a staged successor; raises a refusal."""
    key = policy.managed(view, request.name)
    generation = key.token.generation
    if policy.known(view, request.name).staged is not None:
        raise NeedsPerson(
            f"cannot {verb} key {request.name!r}: a new generation of it is staged; finish or abort that first"
        )
    if request.only_generation is not None and generation != request.only_generation:
        raise InvalidRequest(f"cannot {verb} generation {request.only_generation}: the key is at {generation}")
    policy.complete(key, verb)
    if generation >= tokens.GENERATION_MAX:
        raise NeedsPerson(f"cannot {verb} key {request.name!r}: generation {generation} is the last one")
    return key


def successor(token: BackupToken, keyslot: int, request: RotateRequest) -> BackupToken:
    """The token of the next generation."""
    data = token.data if request.data is None else tokens.check_data(request.data)
    return replace(
        token,
        keyslots=(keyslot,),
        generation=token.generation + 1,
        state=KeyState.ACTIVE,
        rotated_at=tokens.utc(request.now),
        data=data,
        wipe=(),
        fingerprint=None,
        expires_at="",
        retires=None,
        group=None,
    )
