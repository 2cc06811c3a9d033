# SPDX-License-Identifier: GPL-2.0-or-later
"""Take a keyslot that is there under management, let it go again, or make our token or pair anew."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

from luksrotd.errors import InvalidRequest, KeyExists, NeedsPerson, UnknownKey
from luksrotd.luks2.metadata import Token
from luksrotd.names import DEFAULT_KEY_NAME, TOKEN_TYPE
from luksrotd.records import dataclass
from luksrotd.rotation import policy
from luksrotd.rotation import token as tokens
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import AddKeyslot, Pbkdf, RemoveToken, SetToken
from luksrotd.rotation.keys import check_new_name
from luksrotd.rotation.token import BackupToken, KeyState
from luksrotd.rotation.view import DeviceView, ManagedKey

#: Tokens that unlock their keyslot themselves: without them it would not open any more.
UNLOCKING_TYPES: Final = frozenset(
    {"systemd-tpm2", "systemd-fido2", "systemd-pkcs11", "clevis", "luks2-keyring", "ssh"}
)


@dataclass(frozen=True, slots=True)
class AdoptRequest:
    """Manage keyslot ``keyslot`` under ``name`` from now on."""

    keyslot: int
    data: Mapping[str, Any]
    now: datetime
    name: str = DEFAULT_KEY_NAME


@dataclass(frozen=True, slots=True)
class RecreateRequest:
    """Make the token of ``name``, or keyslot and token, anew.

    ``data`` of ``None`` takes what the token that is left says.  ``keyslot``: the one that the managed key itself has
    been seen to open; without it a new keyslot is made for the secret named ``new``.
    """

    data: Mapping[str, Any] | None
    now: datetime
    pbkdf: Pbkdf
    name: str = DEFAULT_KEY_NAME
    keyslot: int | None = None


def adopt(view: DeviceView, request: AdoptRequest) -> Change:
    """Our token on a keyslot that is there, in place of the one that names it; raises a refusal."""
    policy.check_writable(view)
    check_new_name(view, request.name, "adopt")
    where = _adoptable(view, request.keyslot)
    number = policy.free_token(view) if where is None else where.id
    ours = BackupToken(
        number,
        (request.keyslot,),
        request.name,
        1,
        KeyState.ACTIVE,
        tokens.utc(request.now),
        tokens.check_data(request.data),
        adopted={} if where is None else where.raw,
    )
    change = Change((SetToken(number, tokens.body(ours), request.keyslot),))
    policy.check_room(view, change.edits)
    return change


def release(view: DeviceView, name: str) -> Change:
    """The keyslot stays as it is, under the token that it had before it was adopted, or under none."""
    policy.check_writable(view)
    line = policy.known(view, name)
    if line.staged is not None:
        raise NeedsPerson(f"cannot release key {name!r}: a new generation of it is staged; finish or abort that first")
    key = policy.complete(policy.managed(view, name), "release")
    before = key.token.adopted
    if not before:
        return Change((RemoveToken(key.token.id),))
    return Change((SetToken(key.token.id, {**before, "keyslots": [str(slot) for slot in key.token.keyslots]}),))


def recreate(view: DeviceView, request: RecreateRequest) -> Change:
    """A pair out of what is left of it; raises a refusal.

    A token of that name that has lost its keyslot, or whose keyslot another tool has changed, is taken up again, as the
    next generation.
    """
    policy.check_writable(view)
    tokens.check_name(request.name)
    left = _left(view, request)
    data = left.token.data if request.data is None and left else request.data
    if data is None:
        raise InvalidRequest(f"cannot recreate key {request.name!r}: its associated data is lost; give it")
    keyslot = policy.free_keyslot(view) if request.keyslot is None else request.keyslot
    number = left.token.id if left else policy.free_token(view)
    ours = BackupToken(
        number,
        (keyslot,),
        request.name,
        left.token.generation + 1 if left else 1,
        KeyState.ACTIVE,
        tokens.utc(request.now),
        tokens.check_data(data),
    )
    if left:
        ours = replace(ours, adopted=left.token.adopted, extra=left.token.extra)
    added = (AddKeyslot(keyslot, pbkdf=request.pbkdf),) if request.keyslot is None else ()
    change = Change((*added, SetToken(number, tokens.body(ours), keyslot)))
    policy.check_room(view, change.edits)
    return change


def _adoptable(view: DeviceView, keyslot: int) -> Token | None:
    """The token that names the keyslot, if one does; raises a refusal where it must stay as it is."""
    if keyslot not in view.metadata.keyslots:
        raise InvalidRequest(f"cannot adopt keyslot {keyslot}: there is none of that number")
    if keyslot not in policy.ways_in(view) or view.metadata.keyslots[keyslot].kdf_salt is None:
        raise InvalidRequest(f"cannot adopt keyslot {keyslot}: it does not open the volume by a passphrase")
    claims = [token for token in view.metadata.tokens.values() if keyslot in token.keyslots]
    if not claims:
        return None
    token = claims[0]
    if token.type == TOKEN_TYPE:
        raise KeyExists(f"cannot adopt keyslot {keyslot}: token {token.id} manages it already")
    if len(claims) > 1 or len(token.keyslots) > 1:
        raise NeedsPerson(f"cannot adopt keyslot {keyslot}: its token and it do not belong to each other alone")
    if token.type in UNLOCKING_TYPES:
        raise NeedsPerson(f"cannot adopt keyslot {keyslot}: its token ({token.type}) unlocks it, and has to stay")
    return token


def _left(view: DeviceView, request: RecreateRequest) -> ManagedKey | None:
    """What is left of the key: its token, without its keyslot or with a changed one."""
    found = view.named(request.name)
    if len(found) > 1:
        raise NeedsPerson(f"cannot recreate key {request.name!r}: {len(found)} tokens have that name")
    if view.unreadable:
        raise NeedsPerson(f"cannot recreate key {request.name!r}: {'; '.join(view.unreadable.values())}")
    if request.keyslot is not None:
        _check_unclaimed(view, request.keyslot, request.name)
    if not found:
        return None
    key = found[0]
    if key.complete and request.keyslot in (None, *key.token.keyslots):
        raise KeyExists(f"cannot recreate key {request.name!r}: nothing of it is lost; rotate it")
    if key.token.keyslots and request.keyslot not in key.token.keyslots:
        raise NeedsPerson(
            f"cannot recreate key {request.name!r}: its token names keyslot {key.token.keyslots[0]}; remove that first"
        )
    if key.token.generation >= tokens.GENERATION_MAX:
        raise NeedsPerson(f"cannot recreate key {request.name!r}: generation {key.token.generation} is the last one")
    return key


def _check_unclaimed(view: DeviceView, keyslot: int, name: str) -> None:
    if keyslot not in policy.ways_in(view):
        raise UnknownKey(f"cannot recreate key {name!r}: no keyslot {keyslot} opens the volume")
    for token in view.metadata.tokens.values():
        if keyslot in token.keyslots and not (token.type == TOKEN_TYPE and token.raw.get("name") == name):
            raise NeedsPerson(
                f"cannot recreate key {name!r}: keyslot {keyslot} belongs to token {token.id} ({token.type})"
            )
