# SPDX-License-Identifier: GPL-2.0-or-later
"""The dry run of a verb, for everybody who may look at volumes: what would change, but no associated data.

Whoever may not read the associated data must not learn it here, nor find out by trying whether he has guessed it; so
data that is given counts as a change, whatever there was before.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

from luksrotd.errors import InvalidRequest
from luksrotd.names import TOKEN_TYPE
from luksrotd.records import dataclass
from luksrotd.rotation import adoption, keys, staging
from luksrotd.rotation.adoption import AdoptRequest
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import Edit, SetToken
from luksrotd.rotation.keys import EnrollRequest, RotateRequest
from luksrotd.rotation.preview import Difference, preview
from luksrotd.rotation.staging import StageRequest
from luksrotd.rotation.view import DeviceView
from luksrotd.service.jobs import Kind
from luksrotd.service.reconciling import Reconciled
from luksrotd.service.verbs import Wanted

#: In place of associated data that is given: equal to none that there can be.
_GIVEN: Final = "given"
#: Members of our token that everybody may see; on the bus they are written as in the property Keys.
_TOLD: Final = ("name", "generation", "state", "rotated_at", "expires_at")
#: The verbs that take associated data.
_WITH_DATA: Final = frozenset({Kind.ENROLL, Kind.ROTATE, Kind.STAGE, Kind.SET_DATA, Kind.ADOPT})


@dataclass(frozen=True, slots=True)
class Planned:
    """What a verb would do to a header that is at sequence number ``seqid``."""

    seqid: int
    differences: tuple[Difference, ...]


def decide(verb: Kind, wanted: Wanted, view: DeviceView, now: datetime) -> Change:
    """What the verb makes of the volume; raises its refusal, and ``InvalidRequest`` for a verb without a dry run."""
    if verb not in _DECISIONS:
        raise InvalidRequest(f"cannot plan {verb}: it is not a verb that changes a key")
    return _DECISIONS[verb](view, wanted, now)


def of_change(verb: Kind, wanted: Wanted, view: DeviceView, change: Change) -> Planned:
    """What ``decide`` has decided, told object by object."""
    if verb in _WITH_DATA and wanted.data is not None:
        change = replace(change, edits=_given(change.edits), closing=_given(change.closing))
    return Planned(view.seqid, public(preview(view, change)))


def of_repairs(found: Reconciled) -> Planned:
    """What reconcile would do."""
    return Planned(found.seqid, public(found.differences))


def public(differences: Iterable[Difference]) -> tuple[Difference, ...]:
    """Of each what everybody may see."""
    return tuple(map(_public, differences))


def _enroll(view: DeviceView, wanted: Wanted, now: datetime) -> Change:
    return keys.enroll(view, EnrollRequest(wanted.data or {}, now, wanted.pbkdf, wanted.name))


def _rotation(wanted: Wanted, now: datetime) -> RotateRequest:
    return RotateRequest(wanted.data, now, wanted.pbkdf, wanted.name)


def _stage(view: DeviceView, wanted: Wanted, now: datetime) -> Change:
    expires = None if wanted.expires_after is None else now + wanted.expires_after
    return staging.stage(view, StageRequest(_rotation(wanted, now), expires))


_DECISIONS: Final[Mapping[Kind, Callable[[DeviceView, Wanted, datetime], Change]]] = {
    Kind.ENROLL: _enroll,
    Kind.ROTATE: lambda view, wanted, now: keys.rotate(view, _rotation(wanted, now)),
    Kind.STAGE: _stage,
    Kind.FINISH: lambda view, wanted, _: staging.finish(view, wanted.name, wanted.key_generation),
    Kind.ABORT: lambda view, wanted, _: staging.abort(view, wanted.name, wanted.key_generation),
    Kind.SET_DATA: lambda view, wanted, _: keys.set_data(view, wanted.name, wanted.data or {}),
    Kind.REMOVE: lambda view, wanted, _: keys.remove(view, wanted.name),
    Kind.ADOPT: lambda view, wanted, now: adoption.adopt(
        view, AdoptRequest(wanted.keyslot, wanted.data or {}, now, wanted.name)
    ),
    Kind.RELEASE: lambda view, wanted, _: adoption.release(view, wanted.name),
}


def _given(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """The edits, with a mark in place of associated data."""
    return tuple(
        replace(edit, body={**edit.body, "data": _GIVEN})
        if isinstance(edit, SetToken) and edit.body["type"] == TOKEN_TYPE
        else edit
        for edit in edits
    )


def _public(difference: Difference) -> Difference:
    if difference.what != "token":
        return difference
    return replace(difference, before=_shown(difference.before), after=_shown(difference.after))


def _shown(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a token its type and keyslots; of ours what the property Keys tells of it."""
    if not body:
        return {}
    shown = {"type": body["type"], "keyslots": [int(number) for number in body["keyslots"]]}
    if body["type"] != TOKEN_TYPE:
        return shown
    told = {member.replace("_", "-"): body[member] for member in _TOLD if member in body}
    group = {"group": body["group"]["id"]} if "group" in body else {}
    given = {"data-given": True} if body.get("data") == _GIVEN else {}
    marks = {"adopted": "adopted" in body, "wipe-pending": bool(body.get("wipe"))}
    return {**shown, **told, **group, **given, **marks}
