# SPDX-License-Identifier: GPL-2.0-or-later
"""Two-phase rotation: stage the new key beside the old one, then finish or abort (docs/spec/token.md, "Staged keys").

Both keys open the volume in between, and the header says so; a reboot changes nothing.
"""

from dataclasses import replace
from datetime import datetime

from luksrotd.errors import InvalidRequest, NeedsPerson
from luksrotd.records import dataclass
from luksrotd.rotation import keys, policy
from luksrotd.rotation import token as tokens
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import AddKeyslot, SetToken
from luksrotd.rotation.keys import RotateRequest
from luksrotd.rotation.lineage import Lineage
from luksrotd.rotation.retirement import Carrier, retire
from luksrotd.rotation.token import Group, KeyState
from luksrotd.rotation.view import DeviceView, ManagedKey


@dataclass(frozen=True, slots=True)
class StageRequest:
    """Put a new generation beside the current one.

    ``expires_at``: when the staged key is reported as forgotten.  ``group``: the set of volumes that it belongs to.
    """

    rotation: RotateRequest
    expires_at: datetime | None = None
    group: Group | None = None


def stage(view: DeviceView, request: StageRequest) -> Change:
    """A second keyslot and token, the next generation, staged; the current key is untouched.  Raises a refusal."""
    policy.check_writable(view)
    key = keys.to_replace(view, request.rotation, "stage")
    keyslot, token = policy.free_keyslot(view), policy.free_token(view)
    staged = replace(
        keys.successor(key.token, keyslot, request.rotation),
        state=KeyState.STAGED,
        expires_at="" if request.expires_at is None else tokens.utc(request.expires_at),
        group=request.group and tokens.check_group(request.group),
    )
    change = Change(
        (AddKeyslot(keyslot, pbkdf=request.rotation.pbkdf), SetToken(token, tokens.body(staged), keyslot)),
    )
    policy.check_room(view, change.edits)
    return change


def finish(view: DeviceView, name: str, only_generation: int | None = None, group: str | None = None) -> Change:
    """The staged key becomes the active one, the old one goes, in one commit; needs no secret.  Raises a refusal.

    ``only_generation``: refuse unless that generation is the staged one.  ``group``: the id of the set of volumes for
    which the caller acts; a key that was staged on a set is not finished, nor aborted, without it.
    """
    policy.check_writable(view)
    line, staged = _staged(view, name, only_generation, group, "finish")
    active = replace(staged.token, state=KeyState.ACTIVE, expires_at="")
    carrier = Carrier(staged.token.id, tokens.body(active))
    old = line.current
    if old is None:
        return retire(view, [], carrier=carrier)
    if old.token.keyslots and not old.complete:
        # What is not as we wrote it is not ours to destroy, and left alone it might still open by the old secret.
        raise NeedsPerson(
            f"cannot finish the rotation of key {name!r}: {old.oddity}; remove the old keyslot with "
            "cryptsetup luksKillSlot, then finish"
        )
    return retire(view, old.token.keyslots, [old.token.id], carrier=carrier)


def abort(view: DeviceView, name: str, only_generation: int | None = None, group: str | None = None) -> Change:
    """The staged key goes, the active one stays as it was; needs no secret.  As ``finish``."""
    policy.check_writable(view)
    line, staged = _staged(view, name, only_generation, group, "abort")
    current = line.current
    if current is None or not current.complete:
        raise NeedsPerson(
            f"cannot abort the rotation of key {name!r}: there is no active key to fall back to; finish it, or remove "
            "the key"
        )
    carrier = Carrier(current.token.id, view.metadata.tokens[current.token.id].raw)
    return retire(view, staged.token.keyslots, [staged.token.id], carrier=carrier)


def _staged(
    view: DeviceView, name: str, generation: int | None, group: str | None, verb: str
) -> tuple[Lineage, ManagedKey]:
    line = policy.known(view, name)
    if line.staged is None:
        raise InvalidRequest(f"cannot {verb} the rotation of key {name!r}: no new generation of it is staged")
    found = line.staged.token.generation
    if generation is not None and found != generation:
        raise InvalidRequest(f"cannot {verb} generation {generation} of key {name!r}: generation {found} is staged")
    _check_group(line.staged, group, verb)
    if not line.staged.token.keyslots:
        raise NeedsPerson(f"cannot {verb} the rotation of key {name!r}: the staged keyslot is gone; see reconcile")
    return line, policy.complete(line.staged, f"{verb} the rotation of")


def _check_group(staged: ManagedKey, group: str | None, verb: str) -> None:
    """A set goes one way as a whole: who acts on one of its volumes must know of the others."""
    found, name = staged.token.group, staged.token.name
    if found is not None and found.size > 1 and found.id != group:
        raise NeedsPerson(
            f"cannot {verb} the rotation of key {name!r}: it was staged on set {found.id} of {found.size} volumes; "
            "name all of them"
        )
    if found is None and group is not None:
        raise InvalidRequest(f"cannot {verb} the rotation of key {name!r}: it was not staged on a set of volumes")
