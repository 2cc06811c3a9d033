# SPDX-License-Identifier: GPL-2.0-or-later
"""What a crash, or somebody else, left: findings, and the change that mends those that may be mended (design §6).

Pure and idempotent: everything is read off the header, no secret is needed, and a repaired volume gives no repairs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from luksrotd.errors import plain
from luksrotd.luks2.areas import Extent, merge, subtract, whole_blocks
from luksrotd.luks2.pair import BadCopy
from luksrotd.rotation import token as tokens
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import Edit, RemoveToken, SetToken
from luksrotd.rotation.protocol import BLOCK
from luksrotd.rotation.view import DeviceView, ManagedKey


class Code(StrEnum):
    """Reason codes, stable, for machines."""

    HEADER_COPY_BAD = "header-copy-bad"
    HEADER_COPIES_DIFFER = "header-copies-differ"
    WIPE_PENDING = "wipe-pending"
    TOKEN_WITHOUT_KEYSLOT = "token-without-keyslot"
    WIPE_INTENT_BAD = "wipe-intent-bad"
    TOKEN_UNREADABLE = "token-unreadable"
    TOKEN_AMBIGUOUS = "token-ambiguous"
    NAME_AMBIGUOUS = "name-ambiguous"
    KEYSLOT_CHANGED = "keyslot-changed"
    REQUIREMENTS = "requirements"
    FOREIGN_SIGNATURE = "foreign-signature"


class Action(StrEnum):
    """What happens to a finding."""

    REPAIR = "repair"
    PERSON = "person"


_REPAIRABLE = frozenset(
    {Code.HEADER_COPY_BAD, Code.HEADER_COPIES_DIFFER, Code.WIPE_PENDING, Code.TOKEN_WITHOUT_KEYSLOT}
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be, what it is about, and who mends it."""

    code: Code
    action: Action
    message: str


def diagnose(view: DeviceView, foreign: Iterable[str] = ()) -> tuple[Finding, ...]:
    """Everything that is not as it should be.  ``foreign`` are the signatures that ``ports.SignatureProbe`` found."""
    mandatory = view.metadata.config.mandatory
    found = [
        *_header_findings(view),
        *(_finding(Code.TOKEN_UNREADABLE, message) for message in view.unreadable.values()),
        *(finding for key in view.keys for finding in _key_findings(view, key)),
        *_name_findings(view),
    ]
    if foreign:
        found.append(_finding(Code.FOREIGN_SIGNATURE, f"the device also carries signatures of {', '.join(foreign)}"))
    if mandatory:
        # Somebody else's unfinished work: nothing is mended under it (LUKS2 specification, section 3.5).
        found = [Finding(finding.code, Action.PERSON, finding.message) for finding in found]
        found.append(_finding(Code.REQUIREMENTS, f"the header requires {', '.join(mandatory)}: left alone"))
    return tuple(found)


def needs_heal(view: DeviceView) -> bool:
    """Whether one copy must be rewritten from the other before anything else."""
    return view.pair.loser is not None and not view.metadata.config.mandatory


def repair(view: DeviceView, *, orphans: bool = True) -> Change | None:
    """The change that mends everything that may be mended once both copies agree; ``None`` if there is nothing to do.

    Without ``orphans``, tokens that have lost their keyslot stay: only what a crash of ours left is finished.
    """
    if view.metadata.config.mandatory:
        return None
    closing: list[Edit] = []
    wipe: list[Extent] = []
    for key in view.keys:
        usable = not _bad_ranges(view, key)
        if usable:
            wipe.extend(key.token.wipe)
        if orphans and usable and not key.token.keyslots:
            closing.append(RemoveToken(key.token.id))
        elif key.token.wipe and usable:
            raw = view.metadata.tokens[key.token.id].raw
            closing.append(SetToken(key.token.id, tokens.with_intent(raw, ())))
    if not closing:
        return None
    # Since the crash, another tool may have put a key of its own there: that part is not ours any more (I4).
    taken = [whole_blocks(area, BLOCK) for area in view.pair.referenced]
    ranges = tuple(rest for extent in merge(wipe) for rest in subtract(extent, taken))
    return Change(closing=tuple(closing), wipe=ranges)


def _header_findings(view: DeviceView) -> Iterable[Finding]:
    pair = view.pair
    for copy in (pair.primary, pair.secondary):
        if isinstance(copy, BadCopy):
            yield _finding(Code.HEADER_COPY_BAD, f"the {copy.which} header copy is not valid: {copy.reason}")
            return
    if not pair.agree:
        seqids = " and ".join(str(copy.header.seqid) for copy in pair.valid)
        yield _finding(Code.HEADER_COPIES_DIFFER, f"the header copies differ (sequence numbers {seqids})")


def _key_findings(view: DeviceView, key: ManagedKey) -> Iterable[Finding]:
    where = f"key {key.token.name!r} generation {key.token.generation} (token {key.token.id})"
    bad = _bad_ranges(view, key)
    if bad:
        yield _finding(Code.WIPE_INTENT_BAD, f"{where}: its wipe intent names ranges that no keyslot can have had")
    elif key.token.wipe:
        ranges = ", ".join(f"{extent.size} bytes at {extent.offset}" for extent in key.token.wipe)
        yield _finding(Code.WIPE_PENDING, f"{where}: a retired key has not been wiped ({ranges})")
    if not key.token.keyslots:
        if not bad:  # else it stays until somebody has looked at the ranges
            yield _finding(Code.TOKEN_WITHOUT_KEYSLOT, f"{where}: its keyslot is gone, removed by another tool")
    elif key.keyslot is None:
        yield _finding(Code.TOKEN_AMBIGUOUS, f"{where}: it names {len(key.token.keyslots)} keyslots")
    elif key.shared:
        yield _finding(Code.TOKEN_AMBIGUOUS, f"{where}: another token names keyslot {key.keyslot.id} too")
    elif key.stale:
        yield _finding(Code.KEYSLOT_CHANGED, f"{where}: another tool has changed keyslot {key.keyslot.id}")


def _name_findings(view: DeviceView) -> Iterable[Finding]:
    names = [key.token.name for key in view.keys]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield _finding(Code.NAME_AMBIGUOUS, f"{names.count(name)} keys are named {name!r}")


def _bad_ranges(view: DeviceView, key: ManagedKey) -> bool:
    space = view.metadata.keyslots_area
    return any(not space.contains(extent) or extent.offset % BLOCK or extent.size % BLOCK for extent in key.token.wipe)


def _finding(code: Code, message: str) -> Finding:
    return Finding(code, Action.REPAIR if code in _REPAIRABLE else Action.PERSON, plain(message))
