# SPDX-License-Identifier: GPL-2.0-or-later
"""What the service knows and returns, to property values and results (dbus/*.xml)."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from dbus_next.signature import Variant

from luksrotd.bus.convert import device_path
from luksrotd.bus.errors import name_of
from luksrotd.rotation.preview import Difference
from luksrotd.rotation.reconcile import Finding
from luksrotd.rotation.sets import SetStatus, Step
from luksrotd.rotation.view import Summary
from luksrotd.service.registry import Problem
from luksrotd.service.scrub import Scrubbed
from luksrotd.service.setwork import MemberResult, SetResult
from luksrotd.service.transaction import Committed
from luksrotd.service.volume import KeyChange

Described = dict[str, Variant]
Row = tuple[str, str, str]
DifferenceRow = tuple[str, str, str, Described, Described]


def keys_property(view: Summary | None) -> list[Described]:
    """The property Keys, by token number; a list, for busctl's JSON has no dictionaries with numbers for keys."""
    return [
        {
            "token": Variant("u", key.token.id),
            "name": Variant("s", key.token.name),
            "generation": Variant("u", key.token.generation),
            "state": Variant("s", key.token.state.value),
            "keyslot": _keyslot(None if key.keyslot is None else key.keyslot.id),
            "rotated-at": Variant("s", key.token.rotated_at),
            "expires-at": Variant("s", key.token.expires_at),
            "group": Variant("s", key.token.group.id if key.token.group else ""),
            "group-size": Variant("u", key.token.group.size if key.token.group else 0),
            "adopted": Variant("b", key.token.adopted is not None),
            "wipe-pending": Variant("b", bool(key.token.wipe)),
            "changed": Variant("b", key.stale),
        }
        for key in sorted(view.keys if view else (), key=lambda key: key.token.id)
    ]


def result_property(result: object) -> Described:
    """The property Result of a job."""
    match result:
        case KeyChange():
            return {"name": Variant("s", result.name), **_changed(result)}
        case Committed():
            return {"seqid-before": Variant("t", result.seqid_before), "seqid-after": Variant("t", result.seqid_after)}
        case Scrubbed():
            return {"bytes": Variant("t", result.bytes)}
        case SetResult():
            return {
                "name": Variant("s", result.name),
                "group": Variant("s", result.group.id),
                "group-size": Variant("u", result.group.size),
                "state": Variant("s", result.state.value if result.state else ""),
                "members": Variant("aa{sv}", [_member(member) for member in result.members]),
            }
        case _:
            return {}


def _changed(change: KeyChange) -> Described:
    return {
        "generation": Variant("u", change.generation),
        "keyslot": _keyslot(change.keyslot),
        "seqid-before": Variant("t", change.seqid_before),
        "seqid-after": Variant("t", change.seqid_after),
    }


def _member(member: MemberResult) -> Described:
    error = member.error
    return {
        "device": Variant("o", device_path(member.ref.uuid or "")),
        "happened": Variant("s", member.happened.value),
        "error": Variant("s", name_of(error) if error else ""),
        "message": Variant("s", error.message if error else ""),
        "outcome": Variant("s", error.outcome.value if error else ""),
        **(_changed(member.change) if member.change else {}),
    }


def set_status(found: SetStatus) -> tuple[Described, list[Described]]:
    """What GetSetStatus tells of a set, and of each of its volumes."""
    status = {
        "group": Variant("s", found.group.id if found.group else ""),
        "group-size": Variant("u", found.group.size if found.group else 0),
        "state": Variant("s", found.state.value),
        "steps": Variant("as", [step.value for step in Step if step in found.steps]),
        "why": Variant("s", found.why),
    }
    members = [
        {
            "device": Variant("o", device_path(member.uuid)),
            "uuid": Variant("s", member.uuid),
            "standing": Variant("s", member.standing.value),
            "generation": Variant("u", member.generation),
            "keyslot": _keyslot(member.keyslot),
            "why": Variant("s", member.why),
        }
        for member in found.members
    ]
    return status, members


def rows(items: Iterable[Finding | Problem]) -> list[Row]:
    """Findings: code, action, message."""
    return [(str(item.code), str(item.action), item.message) for item in items]


def difference_row(one: Difference) -> DifferenceRow:
    """One difference of ``Plan``."""
    return one.what, one.name, one.how, described(one.before), described(one.after)


def described(members: Mapping[str, Any]) -> Described:
    """An ``a{sv}`` of JSON values: text, numbers, truth values, lists of whole numbers; all else as JSON text."""
    return {name: _variant(value) for name, value in members.items()}


def _variant(value: object) -> Variant:
    match value:
        case bool():
            return Variant("b", value)
        case int() if -(2**63) <= value < 2**64:
            return Variant("t" if value >= 0 else "x", value)
        case str():
            return Variant("s", value)
        case list() if all(type(item) is int and 0 <= item < 2**64 for item in value):
            return Variant("at", value)
        case _:
            return Variant("s", json.dumps(value, ensure_ascii=False))


def _keyslot(number: int | None) -> Variant:
    return Variant("i", -1 if number is None else number)
