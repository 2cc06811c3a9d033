# SPDX-License-Identifier: GPL-2.0-or-later
"""A generic transaction in the making: any mix of edits, checked as a whole when it is looked at or committed."""

import json
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from luksrotd.errors import InvalidRequest, NeedsPerson, NoFreeKeyslot
from luksrotd.luks2 import jsontext, layout
from luksrotd.luks2.members import quoted
from luksrotd.names import TOKEN_TYPE, WIPE_TOKEN_TYPE
from luksrotd.rotation import policy
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import AddKeyslot, Edit, Pbkdf, SetToken
from luksrotd.rotation.retirement import retire
from luksrotd.rotation.view import DeviceView

OUR_TYPES: Final = (TOKEN_TYPE, WIPE_TOKEN_TYPE)
#: Token types that libcryptsetup checks itself (lib/luks2/luks2_token.c).
BUILTIN_PREFIX: Final = "luks2-"
BUILTIN_TYPES: Final = ("luks2-keyring",)


class Draft:
    """Edits of one volume, as it was when the draft was begun.

    Numbers are given out at once, the lowest free one if the caller does not care.  Whatever is wrong with one edit is
    raised at once (``InvalidRequest``, ``NoFreeKeyslot``), whatever is wrong with all of them together by ``change``.
    """

    def __init__(self, view: DeviceView) -> None:
        self.view = view
        self._adds: dict[int, AddKeyslot] = {}
        self._tokens: dict[int, Mapping[str, Any] | None] = {}
        self._destroyed: set[int] = set()

    @property
    def secrets(self) -> tuple[str, ...]:
        """Names of the secrets that the added keyslots need."""
        return tuple(edit.secret for edit in self._adds.values())

    def add_keyslot(self, secret: str, pbkdf: Pbkdf, keyslot: int | None = None) -> int:
        """A keyslot for the secret of that name; its number."""
        number = _number(keyslot, {*self.view.metadata.keyslots, *self._adds}, layout.KEYSLOTS_MAX, "keyslot")
        self._adds[number] = AddKeyslot(number, secret, pbkdf)
        return number

    def set_token(self, body: Mapping[str, Any], token: int | None = None) -> int:
        """Write a token, a new one or in place of the one of that number; its number."""
        written = _token(body)
        taken = {*self.view.metadata.tokens, *self._tokens} if token is None else set()
        number = _number(token, taken, layout.TOKENS_MAX, "token")
        self._check_foreign(number)
        self._tokens[number] = written
        return number

    def remove_token(self, token: int) -> None:
        """Remove the token of that number."""
        if token not in self.view.metadata.tokens and self._tokens.get(token) is None:
            raise InvalidRequest(f"cannot remove token {token}: there is none of that number")
        if token in self.view.metadata.tokens:
            self._tokens[token] = None
        else:
            del self._tokens[token]

    def destroy_keyslot(self, keyslot: int) -> None:
        """Remove the keyslot of that number, and wipe its area."""
        if keyslot not in self.view.metadata.keyslots:
            raise InvalidRequest(f"cannot remove keyslot {keyslot}: there is none of that number")
        self._destroyed.add(keyslot)

    def change(self) -> Change:
        """All edits as one change; raises a refusal."""
        policy.check_writable(self.view)
        if not (self._adds or self._tokens or self._destroyed):
            raise InvalidRequest("cannot commit: the transaction is empty")
        written = {number: body for number, body in sorted(self._tokens.items()) if body is not None}
        removed = sorted(number for number, body in self._tokens.items() if body is None)
        self._check_references(written)
        self._check_ours(removed)
        self._check_dangling()
        first: tuple[Edit, ...] = (*self._adds.values(), *(SetToken(number, body) for number, body in written.items()))
        destroyed = sorted(self._destroyed)
        # Who removes a keyslot shows one that stays; a new one, which is verified, is as good.
        shown = not destroyed or bool(self._adds)
        survivors = None if shown else policy.ways_in(self.view, without=destroyed)
        change = retire(self.view, destroyed, removed, first=first, survivors=survivors)
        policy.check_retirement(self.view, change)
        policy.check_room(self.view, change.edits)
        return change

    def _check_references(self, written: Mapping[int, Mapping[str, Any]]) -> None:
        """A token names keyslots that will be there, and none that a token of ours names (docs/spec/token.md)."""
        there = {str(keyslot) for keyslot in {*self.view.metadata.keyslots, *self._adds} - self._destroyed}
        managed = {str(keyslot): key for key in self.view.keys for keyslot in key.token.keyslots}
        for number, body in written.items():
            for reference in body["keyslots"]:
                if reference not in there:
                    raise InvalidRequest(f"cannot write token {number}: there will be no keyslot {quoted(reference)}")
                if reference in managed:
                    name = managed[reference].token.name
                    raise InvalidRequest(
                        f"cannot write token {number}: keyslot {reference} belongs to key {name!r}, and a managed "
                        "keyslot has one token only"
                    )

    def _check_ours(self, removed: list[int]) -> None:
        """A managed key goes as a whole or not at all (invariant I3)."""
        for key in self.view.keys:
            slots = set(key.token.keyslots)
            if slots & self._destroyed != (slots if key.token.id in removed else set()):
                raise InvalidRequest(
                    f"cannot remove a part of key {key.token.name!r}: its token and its keyslot go together; "
                    "to keep the keyslot, release the key"
                )
        for token in (*(record.id for record in self.view.records), *self.view.unreadable):
            if token in removed:
                raise NeedsPerson(f"cannot remove token {token}: it is luksrotd's own; see luksrotctl reconcile")

    def _check_foreign(self, token: int) -> None:
        there = self.view.metadata.tokens.get(token)
        if there is not None and there.type in OUR_TYPES:
            raise InvalidRequest(f"cannot write token {token}: it is luksrotd's own; managed keys have their own verbs")

    def _check_dangling(self) -> None:
        for token in self.view.metadata.tokens.values():
            lost = self._destroyed.intersection(token.keyslots)
            if lost and token.id not in self._tokens:
                raise InvalidRequest(
                    f"cannot remove keyslot {min(lost)}: token {token.id} ({token.type}) names it; change that, too"
                )


def parse_token(text: str, limit: int) -> Mapping[str, Any]:
    """A token from JSON text of at most ``limit`` bytes: strict JSON, an object; raises ``InvalidRequest``."""
    try:
        raw = text.encode()
        if len(raw) > limit:
            raise InvalidRequest(f"cannot write a token: it is longer than the metadata area of {limit} bytes")
        if jsontext.too_many_values(raw):
            raise InvalidRequest("cannot write a token: it has too many values")
        body = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("cannot write a token: it is not JSON") from error
    if not isinstance(body, dict):
        raise InvalidRequest("cannot write a token: it is not a JSON object")
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise InvalidRequest("cannot write a token: an object has a member twice")
    return members


def _constant(name: str) -> NoReturn:
    raise ValueError(name)


def _token(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """A copy of ``body`` as JSON has it; raises ``InvalidRequest`` for what cannot be a token of somebody else's."""
    try:
        written: dict[str, Any] = json.loads(json.dumps(dict(body), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest("cannot write a token: it is not JSON") from error
    kind, keyslots = written.get("type"), written.get("keyslots")
    if not isinstance(kind, str) or not kind:
        raise InvalidRequest("cannot write a token: it has no type")
    if kind in OUR_TYPES:
        raise InvalidRequest(f"cannot write a token of type {kind}: managed keys have verbs of their own")
    if kind.startswith(BUILTIN_PREFIX) and kind not in BUILTIN_TYPES:
        raise InvalidRequest(f"cannot write a token of type {quoted(kind)}: libcryptsetup keeps such names to itself")
    if not isinstance(keyslots, list) or not all(isinstance(reference, str) for reference in keyslots):
        raise InvalidRequest("cannot write a token: its keyslots are not an array of strings")
    if len(set(keyslots)) != len(keyslots):
        raise InvalidRequest("cannot write a token: it names a keyslot twice")
    for value, _ in jsontext.walk(written):
        if what := jsontext.trouble(value):
            raise InvalidRequest(f"cannot write a token: {what}")
    return written


def _number(wanted: int | None, taken: set[int], limit: int, what: str) -> int:
    if wanted is None:
        wanted = next((number for number in range(limit) if number not in taken), None)
        if wanted is None:
            raise NoFreeKeyslot(f"cannot add a {what}: all {limit} are taken; remove one first")
    if wanted in taken:
        raise InvalidRequest(f"cannot add {what} {wanted}: the number is taken")
    if not 0 <= wanted < limit:
        raise InvalidRequest(f"cannot add {what} {wanted}: numbers go from 0 to {limit - 1}")
    return wanted
