# SPDX-License-Identifier: GPL-2.0-or-later
"""Before-image, shadow and change → ``CommitPlan``; refuses any difference that it cannot explain.

The edits are explained against the header that they were made on: the device's, or another one that the change starts
from.  What is written is the difference between the result and the device.
"""

from collections.abc import Callable, Iterable, Mapping

from luksrotd.errors import ConsistencyError, FormatError, NotLuks2, UnknownDevice
from luksrotd.luks2 import layout
from luksrotd.luks2.areas import Extent, overlapping, subtract
from luksrotd.luks2.layout import Which
from luksrotd.luks2.metadata import Metadata
from luksrotd.luks2.pair import HeaderCopy, Pair, parse_pair
from luksrotd.records import dataclass
from luksrotd.rotation.change import Change
from luksrotd.rotation.difference import check_difference, mismatch
from luksrotd.rotation.protocol import BLOCK, CommitPlan, Phase, Step, Write, header_writes

#: Returns that many random bytes.
Noise = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class ShadowResult:
    """What a worker left in a shadow.

    ``initial``: the areas that were copied into it.  ``committed``, ``final``: the header bytes after the edits and
    after the closing edits.  ``data``: the shadow's content behind the headers, at the end; what is missing is zero.
    """

    initial: Mapping[Extent, bytes]
    committed: bytes
    final: bytes
    data: Mapping[Extent, bytes]


@dataclass(frozen=True, slots=True)
class _Ground:
    """What is on the device: its header bytes, the areas that a copy names, its sequence number.

    ``metadata``: what both copies say; where there is none, what the new header says.
    """

    raw: bytes
    referenced: tuple[Extent, ...]
    seqid: int
    metadata: Metadata


def plan_commit(before: Pair, change: Change, shadow: ShadowResult, noise: Noise) -> CommitPlan:
    """The ordered writes that bring ``change`` to the device; raises ``ConsistencyError``."""
    if not before.agree:
        raise ConsistencyError("cannot plan a commit: the two header copies differ")
    if change.start is not None and (why := mismatch(before.winner, change.start.pair.winner)):
        raise ConsistencyError(f"cannot start from another header: {why}")
    ground = _Ground(before.raw, before.referenced, before.winner.header.seqid, before.winner.metadata)
    return _plan_change(ground, before if change.start is None else change.start.pair, change, shadow, noise)


def plan_revival(raw: bytes, change: Change, shadow: ShadowResult, noise: Noise) -> CommitPlan:
    """The writes that give ``change.start`` to a device without a valid header copy; raises ``ConsistencyError``.

    ``raw`` are the bytes where the copies were.
    """
    if change.start is None or len(raw) != len(change.start.pair.raw):
        raise ConsistencyError("cannot plan a commit: there is no header to start from")
    ground = _Ground(raw, (), 0, change.start.metadata)
    return _plan_change(ground, change.start.pair, change, shadow, noise)


def _plan_change(ground: _Ground, start: Pair, change: Change, shadow: ShadowResult, noise: Noise) -> CommitPlan:
    """``start`` is the header that the edits were made on."""
    committed, final = _parse(shadow.committed, start), _parse(shadow.final, start)
    for which in Which:
        check_difference(_copy(start, which), _copy(committed, which), change.edits)
        check_difference(_copy(committed, which), _copy(final, which), change.closing)
    missing, held = _start_areas(ground, change)
    new = tuple(committed.winner.metadata.keyslots[edit.keyslot].area for edit in change.added)
    retired = change.retired(ground.metadata)
    wiped = (*retired, *change.wipe)
    _check_new_areas(ground, (*new, *(write.extent for write in missing)))
    _check_wiped_areas(ground, (*committed.referenced, *final.referenced), wiped, retired)
    _check_bytes(shadow, allowed=(*new, *retired))
    added = tuple(_new_area(shadow, area, _material_size(committed, area), noise) for area in new)
    steps = (
        Step(Phase.NEW_AREA, (*missing, *added)),
        *_header_steps(ground.raw, shadow.committed, Phase.HEADER_PRIMARY, Phase.HEADER_SECONDARY),
        Step(Phase.WIPE_OLD, tuple(Write(extent.offset, noise(extent.size)) for extent in wiped)),
        *_header_steps(shadow.committed, shadow.final, Phase.CLEAR_PRIMARY, Phase.CLEAR_SECONDARY),
    )
    return _plan(steps, ground, shadow, final.winner.header.seqid, held)


def _start_areas(ground: _Ground, change: Change) -> tuple[tuple[Write, ...], tuple[Write, ...]]:
    """The areas of another start: those that the device must get, and those that it must hold."""
    if change.start is None:
        return (), ()
    pair, areas = change.start.pair, change.start.areas
    if not pair.agree or set(areas) != set(pair.referenced):
        raise ConsistencyError("cannot start from another header: its copies or areas are not whole")
    if any(len(content) != area.size for area, content in areas.items()):
        raise ConsistencyError("cannot start from another header: an area is not whole")
    if pair.winner.header.seqid <= ground.seqid:
        raise ConsistencyError("cannot start from another header: its sequence number is not higher")  # I9
    writes = tuple(Write(area.offset, areas[area]) for area in pair.referenced)
    missing = tuple(write for write in writes if write.extent not in ground.referenced)
    return missing, tuple(write for write in writes if write.extent in ground.referenced)


def plan_heal(before: Pair, healed: bytes) -> CommitPlan:
    """The one write that makes the losing copy say what the winner says; raises ``ConsistencyError``.

    ``healed`` are the header bytes after libcryptsetup's own recovery of the shadow.  The winner is not touched.
    """
    loser = before.loser
    after = _parse(healed, before)
    if loser is None:
        raise ConsistencyError("cannot plan a recovery: the two header copies agree")
    if _copy(after, loser.other).raw != before.winner.raw:
        raise ConsistencyError("cannot recover the header: libcryptsetup prefers the other copy")
    phase = Phase.HEADER_PRIMARY if loser is Which.PRIMARY else Phase.HEADER_SECONDARY
    size = before.hdr_size
    start = 0 if loser is Which.PRIMARY else size
    writes = header_writes(before.raw[start : start + size], healed[start : start + size], start)
    ground = _Ground(before.raw, before.referenced, before.winner.header.seqid, before.winner.metadata)
    return _plan((Step(phase, writes),), ground, ShadowResult({}, healed, healed, {}), after.winner.header.seqid)


def _plan(
    steps: Iterable[Step], ground: _Ground, shadow: ShadowResult, seqid: int, held: tuple[Write, ...] = ()
) -> CommitPlan:
    kept = tuple(step for step in steps if step.writes)
    plan = CommitPlan(kept, ground.raw, shadow.committed, shadow.final, ground.seqid, seqid, held)
    if any(write.offset % BLOCK or len(write.data) % BLOCK for write in plan.writes):
        raise ConsistencyError(f"cannot plan a commit: an area is not aligned to {BLOCK} bytes")
    return plan


def _parse(headers: bytes, before: Pair) -> Pair:
    try:
        pair = parse_pair(headers, before.length)
    except (FormatError, NotLuks2, UnknownDevice) as error:
        raise ConsistencyError(f"cannot use the shadow: {error.message}") from error
    if not pair.agree or pair.hdr_size != before.hdr_size:
        raise ConsistencyError("cannot use the shadow: its two header copies differ")
    return pair


def _copy(pair: Pair, which: Which) -> HeaderCopy:
    copy = pair.primary if which is Which.PRIMARY else pair.secondary
    assert isinstance(copy, HeaderCopy)  # noqa: S101 - the copies of this pair agree, so both are valid
    return copy


def _header_steps(before: bytes, after: bytes, primary: Phase, secondary: Phase) -> tuple[Step, Step]:
    size = len(after) // 2
    return (
        Step(primary, header_writes(before[:size], after[:size], 0)),
        Step(secondary, header_writes(before[size:], after[size:], size)),
    )


def _check_new_areas(ground: _Ground, new: tuple[Extent, ...]) -> None:
    """I4: a new area lies where neither copy on the device references anything; metadata has no areas that overlap."""
    for area in new:
        if not ground.metadata.keyslots_area.contains(area) or overlapping(area, ground.referenced):
            raise ConsistencyError(f"cannot write a new keyslot at {area.offset}: that space is not free")


def _check_wiped_areas(
    ground: _Ground, after: tuple[Extent, ...], wiped: tuple[Extent, ...], retired: tuple[Extent, ...]
) -> None:
    """I4: only keyslot space is overwritten that nothing references any more; ``after`` is what is referenced then."""
    for extent in wiped:
        if not ground.metadata.keyslots_area.contains(extent) or overlapping(extent, after):
            raise ConsistencyError(f"cannot wipe {extent.size} bytes at {extent.offset}: they are in use")
    for extent in set(wiped) - set(retired):
        if overlapping(extent, ground.referenced):
            raise ConsistencyError(f"cannot wipe {extent.size} bytes at {extent.offset}: a keyslot still has them")


def _check_bytes(shadow: ShadowResult, allowed: tuple[Extent, ...]) -> None:
    """Nothing but ``allowed`` may differ from what was copied in."""
    for extent, data in shadow.data.items():
        for rest in subtract(extent, allowed):
            found = data[rest.offset - extent.offset : rest.end - extent.offset]
            if found != _content(shadow.initial, rest):
                raise ConsistencyError(
                    f"cannot explain changed bytes of the shadow in {rest.size} bytes at {rest.offset}"
                )


def _content(parts: Mapping[Extent, bytes], wanted: Extent) -> bytes:
    """The bytes of ``wanted``, put together from ``parts``; zero where there is none."""
    content = bytearray(wanted.size)
    for extent, data in parts.items():
        if extent.overlaps(wanted):
            start, end = max(extent.offset, wanted.offset), min(extent.end, wanted.end)
            content[start - wanted.offset : end - wanted.offset] = data[start - extent.offset : end - extent.offset]
    return bytes(content)


def _material_size(pair: Pair, area: Extent) -> int:
    """Bytes of key material in an area; libcryptsetup leaves the rest of it as it was."""
    keyslot = next(slot for slot in pair.winner.metadata.keyslots.values() if slot.area == area)
    return min(area.size, -(-keyslot.key_size * layout.STRIPES // layout.SECTOR) * layout.SECTOR)


def _new_area(shadow: ShadowResult, area: Extent, material: int, noise: Noise) -> Write:
    """The whole area: key material, and random behind it as luksFormat and wipes leave it."""
    key = _content(shadow.data, Extent(area.offset, material))
    return Write(area.offset, key + noise(area.size - material))
