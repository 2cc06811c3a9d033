# SPDX-License-Identifier: GPL-2.0-or-later
"""The keys of one name: which of them is in force, which is staged, which are leftovers (docs/spec/token.md)."""

from luksrotd.records import dataclass
from luksrotd.rotation.token import KeyState
from luksrotd.rotation.view import DeviceView, ManagedKey


@dataclass(frozen=True, slots=True)
class Lineage:
    """The keys of one name.

    ``current``: the one in force; it need not be complete if it is the only one.  ``staged``: the one that waits to
    be confirmed.  ``superseded``: those that a transaction, cut short, was about to remove.  ``unclear``: why it
    cannot be told which is which; then all else is empty.
    """

    name: str
    current: ManagedKey | None = None
    staged: ManagedKey | None = None
    superseded: tuple[ManagedKey, ...] = ()
    unclear: str = ""


def lineage(view: DeviceView, name: str) -> Lineage:
    """Who is who among the keys of that name: of several complete active ones, the highest generation is in force."""
    keys = view.named(name)
    gone = retired(keys)
    rest = [key for key in keys if key not in gone]
    active = [key for key in rest if key.token.state is KeyState.ACTIVE]
    staged = [key for key in rest if key.token.state is KeyState.STAGED]
    complete = sorted((key for key in active if key.complete), key=lambda key: key.token.generation)
    if len(staged) > 1:
        return Lineage(name, unclear=f"{len(staged)} keys named {name!r} are staged")
    if not complete and len(active) > 1:
        return Lineage(name, unclear=f"{len(active)} keys are named {name!r}, none of them as we wrote it")
    if len(complete) > 1 and complete[-1].token.generation == complete[-2].token.generation:
        return Lineage(name, unclear=f"two keys named {name!r} have generation {complete[-1].token.generation}")
    current = complete[-1] if complete else active[0] if active else None
    newest = current.token.generation if current else 0
    if any(key.token.generation >= newest for key in active if key is not current):
        return Lineage(
            name, unclear=f"a key named {name!r} that another tool has changed is newer than the one that opens"
        )
    if any(key.token.generation <= newest for key in staged):
        return Lineage(name, unclear=f"the staged key named {name!r} is not newer than the active one")
    superseded = (*gone, *complete[:-1])
    return Lineage(name, current, staged[0] if staged else None, superseded)


def lineages(view: DeviceView) -> tuple[Lineage, ...]:
    """Of every name in use, sorted by name."""
    return tuple(lineage(view, name) for name in sorted({key.token.name for key in view.keys}))


def retired(keys: tuple[ManagedKey, ...]) -> tuple[ManagedKey, ...]:
    """Those that say so themselves, those that a newer complete one replaces, and what a stepwise birth has left."""
    return tuple(
        key
        for key in keys
        if key.token.state is KeyState.RETIRED or unborn(key) or any(_replaces(other, key) for other in keys)
    )


def _replaces(new: ManagedKey, old: ManagedKey) -> bool:
    """Whether ``new`` is in force and says that it replaces ``old``; by its generation, so never the other way, too."""
    in_force = new.complete and new.token.state is KeyState.ACTIVE
    newer = new.token.generation > old.token.generation
    return in_force and newer and old.token.id in (new.token.retires or ())


def unborn(key: ManagedKey) -> bool:
    """The stepwise engine writes the token first; only with its keyslot it is a key."""
    return key.token.retires is not None and not key.token.keyslots
