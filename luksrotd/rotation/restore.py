# SPDX-License-Identifier: GPL-2.0-or-later
"""Header backup and restore: a backup and a volume → a change that starts from the backup, or a refusal.

The backup is brought into a form that can be written beside what the volume has now: an area of it that lies over
one of the volume's is moved to free space (key material is encrypted from sector 0 of its area on, so it may lie
anywhere), and the sequence number rises above both (invariants I4, I9; docs/adr/0010-header-restore.md).
"""

import copy
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from luksrotd.errors import (
    BackupMismatch,
    FormatError,
    LastKeyslot,
    NeedsPerson,
    NeedsReconcile,
    NoFreeArea,
    NoFreeKeyslot,
    NotLuks2,
    RequirementsPresent,
    UnknownDevice,
)
from luksrotd.luks2 import header, layout
from luksrotd.luks2 import metadata as json
from luksrotd.luks2.areas import Extent, merge, overlapping, subtract, whole_blocks
from luksrotd.luks2.layout import Which
from luksrotd.luks2.metadata import Keyslot
from luksrotd.luks2.pair import HeaderCopy, Pair, parse_pair
from luksrotd.records import dataclass
from luksrotd.rotation import policy
from luksrotd.rotation import token as tokens
from luksrotd.rotation.change import Change, Start
from luksrotd.rotation.difference import mismatch
from luksrotd.rotation.edits import Edit, RemoveToken, SetToken
from luksrotd.rotation.fingerprint import fingerprint
from luksrotd.rotation.view import DeviceView, view

#: Longest backup, in bytes: both copies at their largest, and the largest keyslots area.
BACKUP_MAX = 2 * layout.HEADER_SIZE_MAX + layout.KEYSLOTS_SIZE_MAX


@dataclass(frozen=True, slots=True)
class Backup:
    """A header backup: what its header means, and the bytes of every area that it names."""

    view: DeviceView
    areas: Mapping[Extent, bytes]


def check_backup(seen: DeviceView) -> None:
    """Raise a refusal unless the header is in a state that is worth a backup."""
    if seen.metadata.config.mandatory:
        raise RequirementsPresent(
            f"cannot back up the header: it requires {', '.join(seen.metadata.config.mandatory)}, so nobody could "
            "restore it"
        )
    if not seen.pair.agree:
        raise NeedsReconcile("cannot back up the header: its two copies differ")
    if seen.pending:
        raise NeedsReconcile("cannot back up the header: a retired key has not been wiped yet")


def backup_image(seen: DeviceView, areas: Mapping[Extent, bytes]) -> bytes:
    """The content of a backup file, laid out as cryptsetup-luksHeaderBackup(8) does it.

    Space that no keyslot names is zero in it: on the device it may hold a key that is not in force any more.
    """
    content = bytearray(seen.pair.raw.ljust(seen.pair.length, b"\0"))
    for area in seen.pair.referenced:
        content[area.offset : area.end] = areas[area]
    return bytes(content)


def read_backup(content: bytes) -> Backup:
    """The backup in a file of luksrotctl or cryptsetup; raises ``FormatError``.

    As for libcryptsetup one good copy is enough, and of two the one with the higher sequence number counts.
    """
    try:
        pair = parse_pair(content)
    except (FormatError, NotLuks2, UnknownDevice) as error:
        raise FormatError(f"cannot use the backup: {error.message}") from error
    if pair.doubt:
        raise FormatError(f"cannot use the backup: its two header copies differ, and of one {pair.doubt}")
    areas = pair.winner.metadata.areas
    return Backup(view(pair), {area: content[area.offset : area.end] for area in areas})


def prepare(seen: DeviceView, areas: Mapping[Extent, bytes], backup: Backup, *, prove: bool = False) -> Change:
    """The change that makes the volume have the header of ``backup``; empty if it has it.  Raises a refusal.

    ``areas``: what the volume holds in each of its keyslot areas.  ``prove``: a credential must open the result.
    """
    policy.check_requirements(seen)
    _check_usable(backup)
    if why := mismatch(seen.pair.winner, backup.view.pair.winner):
        raise BackupMismatch(f"cannot restore this header: {why}")
    survivors = policy.ways_in(backup.view) if prove else None
    start = _start(backup, _places(seen, areas, backup), seen.seqid)
    if set(start.areas) == set(seen.pair.referenced) and _same_header(seen.pair.winner, start.pair.winner):
        return Change(survivors=survivors)
    return _with_record(start, seen, survivors, _once_pending(backup, (*seen.pair.referenced, *start.areas)))


def prepare_lost(raw: bytes, backup: Backup, *, prove: bool = False) -> Change:
    """The change that gives the header of ``backup`` to a device that has lost both copies of its own.

    ``raw`` are the bytes where they were.  Whether the backup is the device's, it cannot tell any more: it only
    refuses (``BackupMismatch``) if what is left of a copy names another volume.
    """
    _check_usable(backup)
    winner = backup.view.pair.winner
    for which, offset in ((Which.PRIMARY, 0), (Which.SECONDARY, winner.header.hdr_size)):
        try:
            left = header.decode(raw[offset:], which, offset)
        except FormatError:
            continue
        if left.uuid != winner.header.uuid:
            raise BackupMismatch(
                f"cannot restore this header: it is of the volume {winner.header.uuid}, and what is left of the "
                f"{which} copy is of {left.uuid}"
            )
    start = _start(backup, {slot.id: slot.area for slot in backup.view.metadata.keyslots.values()}, 0)
    survivors = policy.ways_in(backup.view) if prove else None
    return _with_record(start, None, survivors, _once_pending(backup, start.areas))


def _check_usable(backup: Backup) -> None:
    mandatory = backup.view.metadata.config.mandatory
    if mandatory:
        raise RequirementsPresent(f"cannot restore this header: it requires {', '.join(mandatory)}")
    if not policy.ways_in(backup.view):
        raise LastKeyslot("cannot restore this header: no keyslot of it opens the volume")


def _same_header(ours: HeaderCopy, theirs: HeaderCopy) -> bool:
    fields = [(head.label, head.subsystem, head.csum_alg) for head in (ours.header, theirs.header)]
    return fields[0] == fields[1] and ours.metadata.raw == theirs.metadata.raw


def _places(seen: DeviceView, areas: Mapping[Extent, bytes], backup: Backup) -> dict[int, Extent]:
    """Where the keyslots of the backup go, by number: where the volume holds their very bytes; else where they were;
    else, if something else of the volume is there, into the first gap that is wide enough.

    Raises ``NoFreeArea``, or ``NeedsPerson`` for one that cannot be moved.
    """
    slots = sorted(backup.view.metadata.keyslots.values(), key=lambda each: (-each.area.size, each.id))
    referenced = seen.pair.referenced
    places: dict[int, Extent] = {}
    for slot in slots:
        here = (slot.area, *(area for area in areas if slot.type == "luks2"))
        same = [area for area in here if areas.get(area) == backup.areas[slot.area] and area not in places.values()]
        if same:
            places[slot.id] = same[0]
        elif not overlapping(slot.area, referenced):
            places[slot.id] = slot.area
    for slot in slots:
        if slot.id not in places:
            places[slot.id] = _gap(backup.view.metadata.keyslots_area, (*referenced, *places.values()), slot)
    return places


def _gap(space: Extent, taken: Iterable[Extent], slot: Keyslot) -> Extent:
    if slot.type != "luks2":
        raise NeedsPerson(
            f"cannot restore this header: its keyslot {slot.id} of type {slot.type!r} lies where the volume has "
            "another keyslot now, and only keyslots of type 'luks2' can be moved"
        )
    for gap in subtract(space, taken):
        offset = -(-gap.offset // layout.AREA_ALIGNMENT) * layout.AREA_ALIGNMENT
        if offset + slot.area.size <= gap.end:
            return Extent(offset, slot.area.size)
    raise NoFreeArea(
        f"cannot restore this header: its keyslot {slot.id} lies where the volume has another keyslot now, and "
        f"{slot.area.size} bytes in a row are not free for it beside all that must stay until the end; remove a "
        "keyslot of the volume that the backup does not have, then try again"
    )


def _start(backup: Backup, places: Mapping[int, Extent], seqid: int) -> Start:
    """The header of the backup as it can be written: keyslots moved, no wipe intents, a higher sequence number."""
    pair = backup.view.pair
    text = json.serialise(_rewritten(backup.view, places))
    above = max(seqid, pair.winner.header.seqid) + 1
    areas = {places[slot.id]: backup.areas[slot.area] for slot in backup.view.metadata.keyslots.values()}
    try:
        copies = b"".join(_copy(pair, which, above, text) for which in Which)
        return Start(parse_pair(copies, pair.length), areas)
    except FormatError as error:
        raise FormatError(f"cannot use the backup: {error.message}") from error


def _copy(pair: Pair, which: Which, seqid: int, text: bytes) -> bytes:
    """One copy from the winner's; the salt is that copy's own, or, if the backup has lost it, any other."""
    own = pair.primary if which is Which.PRIMARY else pair.secondary
    winner = pair.winner
    salt = own.header.salt if isinstance(own, HeaderCopy) else hashlib.sha512(winner.header.salt).digest()
    return header.derive(winner.header, winner.raw, which, salt, seqid, text)


def _rewritten(seen: DeviceView, places: Mapping[int, Extent]) -> dict[str, Any]:
    raw: dict[str, Any] = copy.deepcopy(dict(seen.metadata.raw))
    for number, area in places.items():
        raw["keyslots"][str(number)]["area"]["offset"] = str(area.offset)
    for key in seen.keys:
        token = raw["tokens"][str(key.token.id)] = tokens.with_intent(raw["tokens"][str(key.token.id)], ())
        if key.token.fingerprint is not None and key.keyslot is not None and not key.stale:
            token["fingerprint"] = fingerprint(raw["keyslots"][str(key.keyslot.id)])
    for record in seen.records:
        del raw["tokens"][str(record.id)]
    return raw


def _once_pending(backup: Backup, taken: Iterable[Extent]) -> tuple[Extent, ...]:
    """What waited to be wiped when the backup was made, and is not in use: it may hold a retired key still."""
    space = backup.view.metadata.keyslots_area
    size = layout.AREA_ALIGNMENT
    blocks = [whole_blocks(area, size) for area in taken]
    usable = [
        extent
        for extent in backup.view.pending
        if space.contains(extent) and extent.offset % size == 0 and extent.size % size == 0
    ]
    return tuple(rest for extent in merge(usable) for rest in subtract(extent, blocks))


def _with_record(
    start: Start, before: DeviceView | None, survivors: frozenset[int] | None, wipe: tuple[Extent, ...]
) -> Change:
    """The start, and the edits that record what is to be wiped, and take the record back; raises a refusal.

    There is always an edit: so the bytes that are committed are libcryptsetup's own.
    """
    change = Change(wipe=wipe, survivors=survivors, start=start)
    retired = change.retired(start.metadata if before is None else before.metadata)
    there = () if before is None else before.pair.referenced
    for area in (*retired, *(area for area in start.areas if area not in there)):
        if area.offset % layout.AREA_ALIGNMENT or area.size % layout.AREA_ALIGNMENT:
            raise NeedsPerson(
                f"cannot restore this header: the area at {area.offset} is not aligned to {layout.AREA_ALIGNMENT} bytes"
            )
    ranges = merge((*retired, *wipe))
    seen = view(start.pair)
    record, clear = _record(seen, ranges)
    change = (
        Change((record,), (clear,), wipe, survivors, start)
        if ranges
        else Change((record, clear), (), (), survivors, start)
    )
    policy.check_room(seen, change.edits)
    return change


def _record(seen: DeviceView, ranges: tuple[Extent, ...]) -> tuple[Edit, Edit]:
    """The wipe record, and its end; without a free token number a key of ours carries the ranges."""
    if len(ranges) > tokens.WIPE_MAX:
        raise NeedsPerson(f"cannot restore this header: it leaves {len(ranges)} areas to be wiped, which is too many")
    number = seen.free_token()
    if number is not None:
        return SetToken(number, tokens.record(ranges)), RemoveToken(number)
    carriers = [key.token.id for key in seen.keys if key.token.id < layout.TOKENS_MAX]
    if not (carriers or ranges):
        carriers = [0]  # any will do
    if not carriers:
        raise NoFreeKeyslot(
            f"cannot restore this header: all {layout.TOKENS_MAX} of its tokens are taken, and one is needed to record "
            "which areas are to be wiped"
        )
    raw = dict(seen.metadata.tokens[carriers[0]].raw)
    return SetToken(carriers[0], tokens.with_intent(raw, ranges)), SetToken(carriers[0], raw)
