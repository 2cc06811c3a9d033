# SPDX-License-Identifier: GPL-2.0-or-later
"""What a crash, or somebody else, left: findings, and the change that mends those that may be mended (design §6).

Pure and idempotent: everything is read off the header, no secret is needed, and a repaired volume gives no repairs.
docs/spec/reconcile.md has the table.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Any, Final

from luksrotd.errors import plain
from luksrotd.luks2.areas import merge, subtract, whole_blocks
from luksrotd.luks2.layout import Which
from luksrotd.luks2.pair import BadCopy, Pair
from luksrotd.records import dataclass
from luksrotd.rotation import token as tokens
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import Edit, RemoveToken, SetToken
from luksrotd.rotation.fingerprint import fingerprint
from luksrotd.rotation.leftovers import Leftovers, Rules, good_intents, intents, leftovers
from luksrotd.rotation.lineage import unborn
from luksrotd.rotation.preview import Difference, preview
from luksrotd.rotation.protocol import BLOCK
from luksrotd.rotation.retirement import Carrier, retire
from luksrotd.rotation.token import BackupToken, KeyState, WipeRecord
from luksrotd.rotation.view import DeviceView, ManagedKey
from luksrotd.rotation.view import view as view_of

#: Everything that may be mended, and no staged key is touched.
DEFAULT_RULES: Final = Rules()
#: What stands in the way of a new transaction: the crash of an earlier one.
CRASHES_ONLY: Final = Rules(orphans=False)


class Code(StrEnum):
    """Reason codes, stable, for machines."""

    HEADER_COPY_BAD = "header-copy-bad"
    HEADER_COPIES_DIFFER = "header-copies-differ"
    WIPE_PENDING = "wipe-pending"
    WIPE_INTENT_BAD = "wipe-intent-bad"
    KEY_SUPERSEDED = "key-superseded"
    KEY_RETIRED = "key-retired"
    KEY_UNBORN = "key-unborn"
    KEY_UNSETTLED = "key-unsettled"
    STAGED_EXPIRED = "staged-expired"
    STAGED_ALONE = "staged-alone"
    TOKEN_WITHOUT_KEYSLOT = "token-without-keyslot"
    TOKEN_UNREADABLE = "token-unreadable"
    TOKEN_AMBIGUOUS = "token-ambiguous"
    NAME_AMBIGUOUS = "name-ambiguous"
    KEYSLOT_CHANGED = "keyslot-changed"
    REQUIREMENTS = "requirements"
    FOREIGN_SIGNATURE = "foreign-signature"
    KEYSLOT_SUSPECT = "keyslot-suspect"
    INVENTORY_UNAVAILABLE = "inventory-unavailable"


class Action(StrEnum):
    """What happens to a finding; a note is for information: nothing has to be done."""

    REPAIR = "repair"
    PERSON = "person"
    NOTE = "note"


_REPAIRABLE: Final = frozenset(
    {
        Code.HEADER_COPY_BAD,
        Code.HEADER_COPIES_DIFFER,
        Code.WIPE_PENDING,
        Code.KEY_SUPERSEDED,
        Code.KEY_RETIRED,
        Code.KEY_UNBORN,
        Code.KEY_UNSETTLED,
        Code.TOKEN_WITHOUT_KEYSLOT,
    }
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be, what it is about, and who mends it.

    ``tokens`` and ``keyslots`` are the numbers, ``name`` is the key, as far as it is about such.  ``since``: when it
    was first seen (or has expired), RFC 3339 UTC, where that is known.
    """

    code: Code
    action: Action
    message: str
    tokens: tuple[int, ...] = ()
    keyslots: tuple[int, ...] = ()
    name: str = ""
    since: str = ""


def diagnose(view: DeviceView, foreign: Iterable[str] = (), rules: Rules = DEFAULT_RULES) -> tuple[Finding, ...]:
    """Everything that is not as it should be.  ``foreign`` are the signatures that ``ports.SignatureProbe`` found."""
    mandatory = view.metadata.config.mandatory
    left = leftovers(view, rules.now)
    found = [
        *_header_findings(view),
        *(_finding(Code.TOKEN_UNREADABLE, why, tokens=(number,)) for number, why in view.unreadable.items()),
        *_intent_findings(view, left),
        *(finding for key in view.keys for finding in _key_findings(key, left, rules)),
        *_name_findings(view, left),
    ]
    if foreign:
        found.append(_finding(Code.FOREIGN_SIGNATURE, f"the device also carries signatures of {', '.join(foreign)}"))
    if mandatory:
        # Somebody else's unfinished work: nothing is mended under it (LUKS2 specification, section 3.5).
        found = [replace(finding, action=Action.PERSON) for finding in found]
        why = "a re-encryption has not been finished" if any("reencrypt" in one for one in mandatory) else "left alone"
        found.append(_finding(Code.REQUIREMENTS, f"the header requires {', '.join(mandatory)}: {why}"))
    return tuple(found)


def needs_heal(view: DeviceView) -> bool:
    """Whether one copy must be rewritten from the other before anything else."""
    return view.pair.loser is not None and not view.metadata.config.mandatory


def repair(view: DeviceView, rules: Rules = DEFAULT_RULES) -> Change | None:
    """The change that mends everything that may be mended once both copies agree; ``None`` if there is nothing to do.

    One commit; a volume whose tokens name more ranges than one token can takes two.
    """
    if view.metadata.config.mandatory:
        return None
    left = leftovers(view, rules.now)
    retired = _to_retire(left, rules)
    change = _retire(view, retired, left) if retired else Change()
    concerned = {edit.token for edit in (*change.edits, *change.closing) if isinstance(edit, SetToken | RemoveToken)}
    first, closing = list(change.edits), list(change.closing)
    for token, last in _last_words(view, left, rules):
        if token.id in concerned:
            continue
        # What still has to say which ranges are to be wiped says so until they are; all else changes at once.
        (closing if token.wipe or not retired else first).append(last)
    if not (first or closing):
        return None
    # Since the crash, another tool may have put a key of its own there: that part is not ours any more (I4).
    taken = [whole_blocks(area, BLOCK) for area in view.pair.referenced]
    ranges = tuple(rest for extent in merge(good_intents(view, left.bad)) for rest in subtract(extent, taken))
    return Change(tuple(sorted(first, key=_makes_room)), tuple(closing), ranges)


def differences(view: DeviceView, rules: Rules = DEFAULT_RULES) -> tuple[Difference, ...]:
    """Exactly what the repairs will do: a header copy that is written again, then what ``preview`` says of a change."""
    if not needs_heal(view):
        change = repair(view, rules)
        return preview(view, change) if change else ()
    winner = view.pair.winner
    return (*heal_difference(view), *differences(view_of(Pair(winner, winner, view.pair.raw)), rules))


def heal_difference(view: DeviceView) -> tuple[Difference, ...]:
    """What becomes of the losing header copy."""
    pair = view.pair
    copy = pair.primary if pair.loser is Which.PRIMARY else pair.secondary
    before: Mapping[str, Any] = {"invalid": copy.reason} if isinstance(copy, BadCopy) else {"seqid": copy.header.seqid}
    return (Difference("header", str(pair.loser), "rewrite", before, {"seqid": view.seqid}),)


def _to_retire(left: Leftovers, rules: Rules) -> tuple[ManagedKey, ...]:
    superseded = () if left.last_way_in else left.superseded
    keys = (*superseded, *left.abortable) if rules.retire_expired else superseded
    inherited = [extent for key in (*keys, left.keeper) if key is not None for extent in key.token.wipe]
    # What is pending already, first, if one token cannot name all of it.
    return keys if len(keys) + len(inherited) <= tokens.WIPE_MAX else () if inherited else keys


def _last_words(
    view: DeviceView, left: Leftovers, rules: Rules
) -> Iterator[tuple[BackupToken | WipeRecord, SetToken | RemoveToken]]:
    """Every token that goes, or has to be written once more, and how it ends."""
    going = (*left.unborn, *(left.orphans if rules.orphans else ()))
    for key in view.keys:
        if key in going:
            yield key.token, RemoveToken(key.token.id)
        elif key.token.id not in left.bad and (key.token.wipe or key in left.unsettled):
            yield key.token, _settle(view, key, left)
    yield from ((record, RemoveToken(record.id)) for record in view.records if record.id not in left.bad)


def _makes_room(edit: Edit) -> int:
    """The order of edits: tokens that go, what has to be written, keyslots that go."""
    return 0 if isinstance(edit, RemoveToken) else 1 if isinstance(edit, SetToken) else 2


def _retire(view: DeviceView, keys: tuple[ManagedKey, ...], left: Leftovers) -> Change:
    """Keyslots and tokens of ``keys`` go; what was to be wiped on account of them is recorded by the key that stays."""
    also = tuple(extent for key in keys for extent in key.token.wipe)
    carrier = None
    if left.keeper is not None:
        also += left.keeper.token.wipe
        settled = _settle(view, left.keeper, left)
        carrier = Carrier(settled.token, settled.body, settled.fingerprint_of)
    keyslots = [keyslot for key in keys for keyslot in key.token.keyslots]
    return retire(view, keyslots, [key.token.id for key in keys], carrier=carrier, also=also)


def _settle(view: DeviceView, key: ManagedKey, left: Leftovers) -> SetToken:
    """The token without a wipe intent, and without what only a stepwise transaction needs."""
    body = tokens.with_intent(view.metadata.tokens[key.token.id].raw, ())
    if key not in left.unsettled or key.keyslot is None:
        return SetToken(key.token.id, body)
    rest = {member: value for member, value in body.items() if member != "retires"}
    return SetToken(key.token.id, {**rest, "fingerprint": fingerprint(key.keyslot.raw)}, key.keyslot.id)


def _header_findings(view: DeviceView) -> Iterable[Finding]:
    pair = view.pair
    for copy in (pair.primary, pair.secondary):
        if isinstance(copy, BadCopy):
            yield _finding(Code.HEADER_COPY_BAD, f"the {copy.which} header copy is not valid: {copy.reason}")
            return
    if not pair.agree:
        seqids = " and ".join(str(copy.header.seqid) for copy in pair.valid)
        yield _finding(Code.HEADER_COPIES_DIFFER, f"the header copies differ (sequence numbers {seqids})")


def _intent_findings(view: DeviceView, left: Leftovers) -> Iterable[Finding]:
    for token in intents(view):
        name = token.name if isinstance(token, BackupToken) else ""
        about: Mapping[str, Any] = {"tokens": (token.id,), "name": name}
        where = _where(token) if isinstance(token, BackupToken) else f"wipe record (token {token.id})"
        if token.id in left.bad:
            what = "its wipe intent names ranges that no keyslot can have had"
            yield _finding(Code.WIPE_INTENT_BAD, f"{where}: {what}", **about)
        elif token.wipe:
            ranges = ", ".join(f"{extent.size} bytes at {extent.offset}" for extent in token.wipe)
            yield _finding(Code.WIPE_PENDING, f"{where}: a retired key has not been wiped ({ranges})", **about)


def _key_findings(key: ManagedKey, left: Leftovers, rules: Rules) -> Iterable[Finding]:
    token = key.token
    where = _where(token)
    about: Mapping[str, Any] = {"tokens": (token.id,), "keyslots": token.keyslots, "name": token.name}
    for code, what in _oddities(key, left):
        found = _finding(code, f"{where}: {what}", **about)
        yield replace(found, action=Action.PERSON) if key in left.superseded and left.last_way_in else found
    if key in left.expired:
        action = Action.REPAIR if rules.retire_expired and key in left.abortable else Action.PERSON
        what = f"staged, and neither finished nor aborted by {token.expires_at}"
        yield Finding(Code.STAGED_EXPIRED, action, f"{where}: {what}", **about, since=token.expires_at)


def _where(token: BackupToken) -> str:
    return f"key {token.name!r} generation {token.generation} (token {token.id})"


def _oddities(key: ManagedKey, left: Leftovers) -> Iterable[tuple[Code, str]]:
    """What is wrong with a key, its wipe intent aside."""
    token = key.token
    if key in left.orphans:
        yield Code.TOKEN_WITHOUT_KEYSLOT, "its keyslot is gone, removed by another tool"
    elif key in left.unborn and unborn(key):
        yield Code.KEY_UNBORN, "its keyslot has never been made"
    elif key in left.unborn:
        yield Code.KEY_RETIRED, "its keyslot has gone, its token has not"
    elif key in left.superseded:
        stays = "; but nothing else opens the volume, so it stays" if left.last_way_in else ""
        if token.state is KeyState.RETIRED:
            yield Code.KEY_RETIRED, f"it has not been removed to the end{stays}"
        else:
            yield Code.KEY_SUPERSEDED, f"a newer generation is in force{stays}"
    elif len(token.keyslots) > 1:
        yield Code.TOKEN_AMBIGUOUS, f"it names {len(token.keyslots)} keyslots"
    elif key.shared:
        yield Code.TOKEN_AMBIGUOUS, f"another token names keyslot {token.keyslots[0]} too"
    elif key.stale:
        what = f"another tool has changed keyslot {token.keyslots[0]}, so what the token says of it may not be true"
        yield Code.KEYSLOT_CHANGED, f"{what}; see luksrotctl recreate"
    if key in left.unsettled:
        yield Code.KEY_UNSETTLED, "the transaction that made it has not come to its end"
    if key in left.alone:
        yield Code.STAGED_ALONE, "staged, and the active key has gone; finish the rotation to keep it"


def _name_findings(view: DeviceView, left: Leftovers) -> Iterable[Finding]:
    for line in left.unclear:
        keys = view.named(line.name)
        keyslots = tuple(sorted({keyslot for key in keys for keyslot in key.token.keyslots}))
        ids = tuple(key.token.id for key in keys)
        yield _finding(Code.NAME_AMBIGUOUS, line.unclear, tokens=ids, keyslots=keyslots, name=line.name)


def _finding(code: Code, message: str, **about: Any) -> Finding:
    return Finding(code, Action.REPAIR if code in _REPAIRABLE else Action.PERSON, plain(message), **about)
