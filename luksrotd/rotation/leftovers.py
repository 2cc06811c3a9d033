# SPDX-License-Identifier: GPL-2.0-or-later
"""What transactions that were cut, and other tools, have left among our tokens, and what of it may go by itself.

Findings and repairs are both taken from here, so that what is announced is what is done.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime

from luksrotd.luks2.areas import Extent
from luksrotd.records import dataclass
from luksrotd.rotation import lineage, policy
from luksrotd.rotation import token as tokens
from luksrotd.rotation.lineage import Lineage
from luksrotd.rotation.protocol import BLOCK
from luksrotd.rotation.token import BackupToken, WipeRecord
from luksrotd.rotation.view import DeviceView, ManagedKey


@dataclass(frozen=True, slots=True)
class Rules:
    """How far a repair goes.

    ``orphans``: remove tokens whose keyslot another tool has removed; without it only a crash of ours is finished.
    ``now``: the time, to tell which staged keys have expired; ``None``: none has.  ``retire_expired``: abort those.
    """

    orphans: bool = True
    now: datetime | None = None
    retire_expired: bool = False


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What is to go, or has to be settled, by kind; a key is in one of the first five at most.

    ``superseded``: an older active one, or one that is being retired, with its keyslot.  ``unborn``: the token of a
    key that never came into being, or whose keyslot has gone in the same stepwise transaction.  ``orphans``: tokens
    whose keyslot another tool has removed.  ``unsettled``: whole, but its token still says what it retires.
    ``expired``: staged and forgotten.  ``abortable``: those of them with an active key to fall back to, and that belong
    to no set.
    ``unclear``: names, each with why its keys cannot be told apart.  ``alone``: staged without an active key.
    ``bad``: tokens whose wipe intent we cannot have written.  ``last_way_in``: without the superseded ones nothing
    would open the volume, so they stay.  ``keeper``: a key that stays, whatever is done; it
    carries wipe intents.
    """

    superseded: tuple[ManagedKey, ...]
    unborn: tuple[ManagedKey, ...]
    orphans: tuple[ManagedKey, ...]
    unsettled: tuple[ManagedKey, ...]
    expired: tuple[ManagedKey, ...]
    abortable: tuple[ManagedKey, ...]
    alone: tuple[ManagedKey, ...]
    unclear: tuple[Lineage, ...]
    bad: frozenset[int]
    last_way_in: bool
    keeper: ManagedKey | None


def leftovers(view: DeviceView, now: datetime | None = None) -> Leftovers:
    """Sort everything of ours on the volume; never raises."""
    bad = frozenset(token.id for token in intents(view) if _is_bad(view, token))
    # A token without a keyslot is no rival of the keys that open: it goes, whatever it says of itself.
    orphans = tuple(_orphans(view))
    lines = lineage.lineages(replace(view, keys=tuple(key for key in view.keys if key not in orphans)))
    gone = [key for line in lines for key in line.superseded]
    superseded = tuple(key for key in gone if key.complete and key.token.id not in bad)
    staged = [line for line in lines if line.staged is not None]
    expired = [line for line in staged if _expired(line, now)]
    standing = [key for line in lines for key in (line.current, line.staged) if key is not None and key.complete]
    kept = [key for key in standing if key.token.id not in bad and not any(key is one.staged for one in expired)]
    ways = policy.ways_in(view, without=[slot for key in superseded for slot in key.token.keyslots])
    return Leftovers(
        superseded,
        tuple(key for key in gone if not key.token.keyslots and key.token.id not in bad),
        tuple(key for key in orphans if key.token.id not in bad),
        tuple(key for key in standing if key.token.retires is not None and key.token.id not in bad),
        tuple(line.staged for line in expired if line.staged),
        tuple(line.staged for line in expired if line.staged and _abortable(line, bad)),
        tuple(line.staged for line in staged if line.staged and line.current is None),
        tuple(line for line in lines if line.unclear),
        bad,
        bool(superseded) and not ways,
        _keeper(kept, {key.token.name for key in superseded}),
    )


def intents(view: DeviceView) -> tuple[BackupToken | WipeRecord, ...]:
    """Every token of ours that can name ranges to be wiped."""
    return (*(key.token for key in view.keys), *view.records)


def _orphans(view: DeviceView) -> Iterator[ManagedKey]:
    for name in sorted({key.token.name for key in view.keys}):
        keys = view.named(name)
        retired = lineage.retired(keys)
        yield from (key for key in keys if not key.token.keyslots and key not in retired)


def _keeper(kept: list[ManagedKey], names: set[str]) -> ManagedKey | None:
    """One of the keys that lose something, if possible."""
    return next((key for key in kept if key.token.name in names), kept[0] if kept else None)


def _expired(line: Lineage, now: datetime | None) -> bool:
    end = tokens.moment(line.staged.token.expires_at) if line.staged else None
    return now is not None and end is not None and end <= now


def _abortable(line: Lineage, bad: Iterable[int]) -> bool:
    """What belongs to a set is not: it may be finished on another volume of the set."""
    group = line.staged.token.group if line.staged else None
    if group is not None and group.size > 1:
        return False
    keys = (line.current, line.staged)
    return all(key is not None and key.complete and key.token.id not in bad for key in keys)


def _is_bad(view: DeviceView, token: BackupToken | WipeRecord) -> bool:
    """Whether it names ranges that no keyslot can have had."""
    space = view.metadata.keyslots_area
    return any(not space.contains(extent) or extent.offset % BLOCK or extent.size % BLOCK for extent in token.wipe)


def good_intents(view: DeviceView, bad: Iterable[int]) -> tuple[Extent, ...]:
    """The ranges of all intents but the bad ones."""
    return tuple(extent for token in intents(view) if token.id not in bad for extent in token.wipe)
