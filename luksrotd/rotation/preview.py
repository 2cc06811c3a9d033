# SPDX-License-Identifier: GPL-2.0-or-later
"""What a change will do, for people and programs, before anything is done."""

from collections.abc import Iterator, Mapping
from typing import Any, assert_never

from luksrotd.luks2.areas import Extent
from luksrotd.luks2.metadata import Keyslot, Token
from luksrotd.records import dataclass
from luksrotd.rotation.change import Change, Start
from luksrotd.rotation.edits import AddKeyslot, DestroyKeyslot, RemoveToken, SetToken
from luksrotd.rotation.view import DeviceView
from luksrotd.rotation.view import view as view_of


@dataclass(frozen=True, slots=True)
class Difference:
    """One object of the volume, and what becomes of it.

    ``what``: ``keyslot``, ``token``, ``area`` or ``header``.  ``name``: its number, or for an area its byte offset, for
    a header ``primary`` or ``secondary``, or the field or JSON object that differs.  ``how``: ``add``, ``change``,
    ``remove``, ``wipe``, ``rewrite``; of a keyslot also ``replace`` (another key under the same number) and ``move``.
    ``before``, ``after``: what can be said of it, without key material; empty where there is nothing.
    """

    what: str
    name: str
    how: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]


def preview(view: DeviceView, change: Change) -> tuple[Difference, ...]:
    """What ``change`` makes of the volume in the end: by object, keyslots first, then tokens, then wiped areas."""
    if change.start is not None:
        return restored(view, change, change.start)
    return (*_keyslots(view, change), *_tokens(view, change), *_areas(view, change))


def restored(before: DeviceView | None, change: Change, start: Start) -> tuple[Difference, ...]:
    """What a change that starts from another header makes of the volume; ``before`` is None if that has none."""
    after = view_of(start.pair)
    there = () if before is None else before.pair.referenced
    missing = {
        area.offset: Difference("area", str(area.offset), "rewrite", {}, {"size": area.size})
        for area in start.areas
        if area not in there
    }
    base = after if before is None else before
    wiped = {area.offset: _wiped(area) for area in (*change.retired(base.metadata), *change.wipe)}
    return (
        *_compared_keyslots(before, after),
        *_compared_tokens(before, after),
        *_compared_header(before, after),
        *(difference for _, difference in sorted({**missing, **wiped}.items())),
    )


def _compared_keyslots(before: DeviceView | None, after: DeviceView) -> Iterator[Difference]:
    old: Mapping[int, Keyslot] = {} if before is None else before.metadata.keyslots
    new = after.metadata.keyslots
    for number in sorted(old.keys() | new.keys()):
        ours, theirs = old.get(number), new.get(number)
        if ours is not None and theirs is not None and ours.raw == theirs.raw:
            continue
        summaries = [{} if slot is None else _summary(slot) for slot in (ours, theirs)]
        yield Difference("keyslot", str(number), _how(ours, theirs), *summaries)


def _how(ours: Keyslot | None, theirs: Keyslot | None) -> str:
    if ours is None:
        return "add"
    if theirs is None:
        return "remove"
    if ours.kdf_salt is None or ours.kdf_salt != theirs.kdf_salt:
        return "replace"
    moved = {**ours.raw, "area": {**ours.raw["area"], "offset": theirs.raw["area"]["offset"]}}
    return "move" if moved == theirs.raw else "change"


def _compared_tokens(before: DeviceView | None, after: DeviceView) -> Iterator[Difference]:
    old: Mapping[int, Token] = {} if before is None else before.metadata.tokens
    new = after.metadata.tokens
    for number in sorted(old.keys() | new.keys()):
        sides = [token.raw if (token := side.get(number)) else {} for side in (old, new)]
        yield from _changed("token", str(number), sides[0], sides[1])


def _compared_header(before: DeviceView | None, after: DeviceView) -> Iterator[Difference]:
    """Fields of the binary header, the config, and what there is beside the objects that the format knows."""
    if before is None:
        return
    heads = [seen.pair.winner.header for seen in (before, after)]
    for field in ("label", "subsystem", "csum_alg"):
        ours, theirs = (getattr(head, field) for head in heads)
        if ours != theirs:
            yield Difference("header", field, "change", {field: ours}, {field: theirs})
    for name in sorted({*before.metadata.raw, *after.metadata.raw} - {"keyslots", "tokens", "segments", "digests"}):
        sides = [{name: seen.metadata.raw[name]} if name in seen.metadata.raw else {} for seen in (before, after)]
        yield from _changed("header", name, sides[0], sides[1])


def _changed(what: str, name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Difference]:
    if before != after:
        yield Difference(what, name, "remove" if not after else "change" if before else "add", before, after)


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
        yield from _changed("token", str(number), {} if there is None else there.raw, after)


def _areas(view: DeviceView, change: Change) -> Iterator[Difference]:
    for extent in sorted((*change.retired(view.metadata), *change.wipe), key=_offset):
        yield _wiped(extent)


def keyslot_summary(view: DeviceView, keyslot: int) -> Mapping[str, Any]:
    """Type, key derivation and area of a keyslot."""
    return _summary(view.metadata.keyslots[keyslot])


def _summary(slot: Keyslot) -> Mapping[str, Any]:
    kdf = slot.raw["kdf"]["type"] if slot.kdf_salt is not None else ""
    return {"type": slot.type, "pbkdf": kdf, "offset": slot.area.offset, "size": slot.area.size}


def _wiped(extent: Extent) -> Difference:
    return Difference("area", str(extent.offset), "wipe", {"size": extent.size}, {})


def _offset(extent: Extent) -> int:
    return extent.offset
