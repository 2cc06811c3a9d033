# SPDX-License-Identifier: GPL-2.0-or-later
"""The stepwise engine's decisions: view and request → the calls of libcryptsetup on the device itself, in order.

Each edit is one header write of libcryptsetup, and after each of them the header says what is in force and what is
left to do (docs/spec/stepwise.md): the token comes first, the keyslot is born assigned to it, and what goes is marked
before it goes.  Refuses what the atomic engine refuses.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from luksrotd.errors import ConsistencyError, Outcome
from luksrotd.luks2.pair import Pair
from luksrotd.records import dataclass
from luksrotd.rotation import keys, policy, staging
from luksrotd.rotation import token as tokens
from luksrotd.rotation.change import Change
from luksrotd.rotation.difference import check_difference
from luksrotd.rotation.edits import AddKeyslot, DestroyKeyslot, Edit, Pbkdf, RemoveToken, SetToken
from luksrotd.rotation.keys import EnrollRequest, RotateRequest
from luksrotd.rotation.lineage import lineages
from luksrotd.rotation.staging import StageRequest
from luksrotd.rotation.token import KeyState
from luksrotd.rotation.view import DeviceView, ManagedKey


@dataclass(frozen=True, slots=True)
class Steps:
    """``edits`` in their order; after the one numbered ``decisive`` (from 0) the new state is in force.

    ``generation``, ``keyslot``: of the key when all is done (0 and ``None`` if it is gone).  ``survivors``: as
    ``Change.survivors``.
    """

    edits: tuple[Edit, ...]
    generation: int = 0
    keyslot: int | None = None
    decisive: int = 0
    survivors: frozenset[int] | None = None

    @property
    def change(self) -> Change:
        """The same edits, for the checks that all changes pass."""
        return Change(self.edits, survivors=self.survivors)

    def outcome(self, made: int) -> Outcome:
        """What is true of the device when the first ``made`` edits are on it, and nothing else.

        Before the decisive one the old state is in force, but something is there that reconcile has to take away.
        """
        if made in (0, len(self.edits)):
            return Outcome.COMMITTED if made else Outcome.UNCHANGED
        return Outcome.WIPE_PENDING if made > self.decisive else Outcome.UNKNOWN


def enroll(view: DeviceView, request: EnrollRequest) -> Steps:
    """A first generation; raises a refusal."""
    added, written = _pair(keys.enroll(view, request))
    return _checked(view, Steps(_birth(added, written), 1, added.keyslot, decisive=1))


def rotate(view: DeviceView, request: RotateRequest) -> Steps:
    """The next generation beside the old one, which goes then; raises a refusal."""
    policy.check_writable(view)
    old = keys.to_replace(view, request, "rotate")
    keyslot, token = policy.free_keyslot(view), policy.free_token(view)
    new = keys.successor(old.token, keyslot, request)
    written = SetToken(token, tokens.body(new), keyslot)
    first, born, settled = _birth(_added(keyslot, request.pbkdf), written, retires=old.token.id)
    edits = (first, born, *_gone(old), settled)
    return _checked(view, Steps(edits, new.generation, keyslot, decisive=1))


def stage(view: DeviceView, request: StageRequest) -> Steps:
    """The next generation beside the current one; raises a refusal."""
    added, written = _pair(staging.stage(view, request))
    return _checked(view, Steps(_birth(added, written), written.body["generation"], added.keyslot, decisive=1))


def finish(view: DeviceView, name: str, only_generation: int | None = None, group: str | None = None) -> Steps:
    """The staged generation becomes the active one and the old one goes; raises a refusal."""
    staging.finish(view, name, only_generation, group)
    line = policy.known(view, name)
    staged, old = line.staged, line.current
    assert staged is not None  # noqa: S101 - else it would have been refused
    token = replace(staged.token, state=KeyState.ACTIVE, expires_at="", retires=None)
    settled = SetToken(token.id, tokens.body(token))
    generation, keyslot = token.generation, token.keyslots[0]
    if old is None:
        return _checked(view, Steps((settled,), generation, keyslot))
    first = SetToken(token.id, tokens.body(replace(token, retires=(old.token.id,))))
    return _checked(view, Steps((first, *_gone(old), settled), generation, keyslot))


def abort(view: DeviceView, name: str, only_generation: int | None = None, group: str | None = None) -> Steps:
    """The staged generation goes; raises a refusal."""
    staging.abort(view, name, only_generation, group)
    line = policy.known(view, name)
    staged, current = line.staged, line.current
    assert staged is not None  # noqa: S101 - else it would have been refused
    assert current is not None  # noqa: S101 - the same
    edits = (_marked(view, staged), *_gone(staged))
    return _checked(view, Steps(edits, current.token.generation, current.token.keyslots[0]))


def remove(view: DeviceView, name: str) -> Steps:
    """The key goes; raises a refusal."""
    survivors = keys.remove(view, name).survivors
    key = policy.managed(view, name)
    if not key.token.keyslots:
        return Steps(tuple(_gone(key)))
    return _checked(view, Steps((_marked(view, key), *_gone(key)), survivors=survivors))


def set_data(view: DeviceView, name: str, data: Mapping[str, Any]) -> Steps:
    """Other associated data for the same key; raises a refusal."""
    change = keys.set_data(view, name, data)
    key = policy.managed(view, name)
    return Steps(change.edits, key.token.generation, key.keyslot.id if key.keyslot else None)


def leftovers(view: DeviceView) -> Steps | None:
    """What earlier steps, cut short, have left to do; ``None`` if nothing is left.  Needs no secret.

    A pair that another tool has changed since is left alone.
    """
    edits: list[Edit] = []
    for line in lineages(view):
        for key in line.superseded:
            if key.complete or not key.token.keyslots:
                edits += _gone(key)
        for settling in (line.current, line.staged):
            if settling is not None and settling.complete and settling.token.retires is not None:
                edits.append(_settled(view, settling))
    return Steps(tuple(edits)) if edits else None


def withdraw(view: DeviceView, token: int) -> Steps:
    """What takes a pair away again that was born a moment ago and turned out not to open; the old one stays."""
    key = next(key for key in view.keys if key.token.id == token)
    return Steps((_marked(view, key), *_gone(key)))


def made(before: Pair, after: Pair, edit: Edit) -> bool:
    """Whether the step was taken; raises ``ConsistencyError`` unless the two headers show that it was, or was not."""
    if after.raw == before.raw:
        return False
    if not after.agree:
        raise ConsistencyError("cannot explain the header: its two copies differ")
    for old, new in zip(before.valid, after.valid, strict=True):
        check_difference(old, new, (edit,))
    return True


def reached(view: DeviceView, steps: Steps) -> bool:
    """Whether the volume is as the last step leaves it."""
    last = steps.edits[-1]
    token = view.metadata.tokens.get(last.token) if isinstance(last, SetToken | RemoveToken) else None
    if not isinstance(last, SetToken):
        return token is None
    return token is not None and {**token.raw, "fingerprint": ""} == {**last.body, "fingerprint": ""}


def _pair(change: Change) -> tuple[AddKeyslot, SetToken]:
    """The keyslot and the token that the atomic engine would add."""
    added, written = change.edits
    assert isinstance(added, AddKeyslot)  # noqa: S101 - as keys.enroll and staging.stage write it
    assert isinstance(written, SetToken)  # noqa: S101 - the same
    return added, written


def _added(keyslot: int, pbkdf: Pbkdf) -> AddKeyslot:
    return AddKeyslot(keyslot, pbkdf=pbkdf)


def _birth(added: AddKeyslot, written: SetToken, retires: int | None = None) -> tuple[Edit, Edit, Edit]:
    """The token without a keyslot; the keyslot, assigned to it in the same write; the token as it is to stay."""
    replaced = [] if retires is None else [str(retires)]
    unborn = SetToken(written.token, {**written.body, "keyslots": [], "retires": replaced})
    return unborn, replace(added, token=written.token), written


def _gone(key: ManagedKey) -> Iterator[Edit]:
    """libcryptsetup overwrites the area before it takes the keyslot out of the header."""
    yield from (DestroyKeyslot(keyslot) for keyslot in key.token.keyslots)
    yield RemoveToken(key.token.id)


def _marked(view: DeviceView, key: ManagedKey) -> SetToken:
    """The token of a pair that goes: it replaces nothing any more, either."""
    raw = {member: value for member, value in view.metadata.tokens[key.token.id].raw.items() if member != "retires"}
    return SetToken(key.token.id, {**raw, "state": str(KeyState.RETIRED)})


def _settled(view: DeviceView, key: ManagedKey) -> SetToken:
    raw = {member: value for member, value in view.metadata.tokens[key.token.id].raw.items() if member != "retires"}
    return SetToken(key.token.id, raw, key.token.keyslots[0])


def _checked(view: DeviceView, steps: Steps) -> Steps:
    """Refuse early what libcryptsetup would refuse half-way."""
    policy.check_room(view, steps.edits)
    return steps
