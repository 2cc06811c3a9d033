# SPDX-License-Identifier: GPL-2.0-or-later
"""What a change will do, for people and programs, before anything is done."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, assert_never

from luksrotd.luks2.areas import Extent
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import AddKeyslot, DestroyKeyslot, RemoveToken, SetToken
from luksrotd.rotation.view import DeviceView


@dataclass(frozen=True, slots=True)
class Difference:
    """One object of the volume, and what becomes of it.

    ``what``: ``keyslot``, ``token``, ``area`` or ``header``.  ``name``: its number, or for an area its byte offset, for
    a header ``primary`` or ``secondary``.  ``how``: ``add``, ``change``, ``remove``, ``wipe``, ``rewrite``.
    ``before``, ``after``: what can be said of it, without key material; empty where there is nothing.
    """

    what: str
    name: str
    how: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]


def preview(view: DeviceView, change: Change) -> tuple[Difference, ...]:
    """What ``change`` makes of the volume in the end: by object, keyslots first, then tokens, then wiped areas."""
    return (*_keyslots(view, change), *_tokens(view, change), *_areas(view, change))


def _keyslots(view: DeviceView, change: Change) -> Iterator[Difference]:
    for edit in change.edits:
        match edit:
            case AddKeyslot(keyslot, _, pbkdf):
                yield Difference("keyslot", str(keyslot), "add", {}, {"pbkdf": pbkdf.type})
            case DestroyKeyslot(keyslot):
                yield Difference("keyslot", str(keyslot), "remove", keyslot_summary(view, keyslot), {})
            case SetToken() | RemoveToken():
                continue
            case _ as unreachable:  # pragma: no cover - mypy proves it
                assert_never(unreachable)


def _tokens(view: DeviceView, change: Change) -> Iterator[Difference]:
    last: dict[int, Mapping[str, Any]] = {}
    for edit in (*change.edits, *change.closing):
        if isinstance(edit, SetToken):
            last[edit.token] = edit.body
        elif isinstance(edit, RemoveToken):
            last[edit.token] = {}
    for number, after in sorted(last.items()):
        there = view.metadata.tokens.get(number)
        before = {} if there is None else there.raw
        if before != after:
            how = "remove" if not after else "change" if before else "add"
            yield Difference("token", str(number), how, before, after)


def _areas(view: DeviceView, change: Change) -> Iterator[Difference]:
    for extent in sorted((*change.retired(view.metadata), *change.wipe), key=_offset):
        yield Difference("area", str(extent.offset), "wipe", {"size": extent.size}, {})


def keyslot_summary(view: DeviceView, keyslot: int) -> Mapping[str, Any]:
    """Type, key derivation and area of a keyslot."""
    slot = view.metadata.keyslots[keyslot]
    kdf = slot.raw.get("kdf", {})
    return {"type": slot.type, "pbkdf": kdf.get("type", ""), "offset": slot.area.offset, "size": slot.area.size}


def _offset(extent: Extent) -> int:
    return extent.offset
