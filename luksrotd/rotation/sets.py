# SPDX-License-Identifier: GPL-2.0-or-later
"""A set of volumes that get the same new key: where it stands, and to which ends it can still be brought.

None of its volumes is finished before all are staged; so while none is finished all can go back, and once one is, all
can go on (docs/spec/token.md, "Sets of volumes").
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Final

from luksrotd.errors import InvalidRequest, NeedsPerson
from luksrotd.records import dataclass
from luksrotd.rotation.lineage import Lineage, lineage
from luksrotd.rotation.token import Group
from luksrotd.rotation.view import DeviceView, ManagedKey


class Standing(StrEnum):
    """Where one volume of a set is."""

    OLD = "old"
    STAGED = "staged"
    FINISHED = "finished"
    OTHER = "other"


class SetState(StrEnum):
    """Where the set is as a whole."""

    UNSTAGED = "unstaged"
    PARTLY_STAGED = "partly-staged"
    STAGED = "staged"
    FINISHING = "finishing"
    FINISHED = "finished"
    MIXED = "mixed"


class Step(StrEnum):
    """What can be done with a set."""

    STAGE = "stage"
    FINISH = "finish"
    ABORT = "abort"


#: The steps that lead on from each state; what is finished can be "finished" again, which does nothing.
STEPS: Final = {
    SetState.UNSTAGED: frozenset({Step.STAGE}),
    SetState.PARTLY_STAGED: frozenset({Step.STAGE, Step.ABORT}),
    SetState.STAGED: frozenset({Step.STAGE, Step.FINISH, Step.ABORT}),
    SetState.FINISHING: frozenset({Step.FINISH}),
    SetState.FINISHED: frozenset({Step.FINISH}),
    SetState.MIXED: frozenset[Step](),
}

_STATES: Final = {
    frozenset({Standing.OLD}): SetState.UNSTAGED,
    frozenset({Standing.OLD, Standing.STAGED}): SetState.PARTLY_STAGED,
    frozenset({Standing.STAGED}): SetState.STAGED,
    frozenset({Standing.STAGED, Standing.FINISHED}): SetState.FINISHING,
    frozenset({Standing.FINISHED}): SetState.FINISHED,
}


@dataclass(frozen=True, slots=True)
class Member:
    """One volume of a set.

    ``generation``: the staged one, else the one in force; 0 if there is none.  ``keyslot`` is that of ``generation``.
    ``why``: what is odd, for ``Standing.OTHER``.
    """

    uuid: str
    standing: Standing
    generation: int = 0
    keyslot: int | None = None
    group: Group | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class SetStatus:
    """A set: its group (``None`` if nothing was ever staged on it), its state, and its volumes as they were given.

    ``why``: what is odd, for ``SetState.MIXED``.
    """

    name: str
    group: Group | None
    state: SetState
    members: tuple[Member, ...]
    why: str = ""

    @property
    def steps(self) -> frozenset[Step]:
        """What can be done with the set."""
        return STEPS[self.state]


def status(views: Sequence[DeviceView], name: str, group: str | None = None) -> SetStatus:
    """Where the key ``name`` stands on these volumes.

    ``group``: the id of the set; without it, the one for which something is staged on them, else the one for which all
    of them were finished.  One volume alone is a set, too, of which its key knows nothing.
    """
    lines = [lineage(view, name) for view in views]
    wanted = group or under_way(views, name) or _through(lines)
    alone = len(views) == 1 and wanted is None
    members = tuple(_member(view, line, wanted, alone=alone) for view, line in zip(views, lines, strict=True))
    groups = {member.group for member in members if member.group is not None}
    odd = [f"{member.uuid}: {member.why}" for member in members if member.why]
    if len(groups) > 1:
        odd.append(f"its volumes do not agree about the size of set {wanted}")
    found = next(iter(groups), None)
    if found is not None and found.size != len(views):
        odd.append(f"{found.size} volumes belong to set {found.id}, not {len(views)}")
    state = SetState.MIXED if odd else _STATES.get(frozenset(member.standing for member in members), SetState.MIXED)
    if state is SetState.MIXED and not odd:
        odd.append("some volumes are finished, and on others nothing is staged")
    return SetStatus(name, found, state, members, "; ".join(odd))


def under_way(views: Iterable[DeviceView], name: str) -> str | None:
    """The id of the one set for which a new generation of the key is staged; ``None`` for no set, or several."""
    staged = {_group_id(line.staged) for line in (lineage(view, name) for view in views) if line.staged}
    return staged.pop() if len(staged) == 1 else None


def check(found: SetStatus, step: Step) -> None:
    """Whether the step can be taken; raises ``InvalidRequest`` where nothing is staged, else ``NeedsPerson``."""
    if step in found.steps:
        return
    what = f"cannot {step} key {found.name!r} on the set"
    match found.state:
        case SetState.UNSTAGED:
            raise InvalidRequest(f"{what}: no new generation of it is staged")
        case SetState.PARTLY_STAGED:
            raise NeedsPerson(f"{what}: it is not staged on all volumes yet; stage it again, or abort")
        case SetState.FINISHING:
            raise NeedsPerson(f"{what}: it is finished on some volumes already; finish the others")
        case SetState.FINISHED:
            raise InvalidRequest(f"{what}: it is finished on all volumes")
        case _:
            raise NeedsPerson(f"{what}: {found.why}")


def _through(lines: Iterable[Lineage]) -> str | None:
    """The id of the one set that all were finished for, if nothing is staged on any."""
    lines = tuple(lines)
    finished = {_group_id(line.current) for line in lines}
    return finished.pop() if len(finished) == 1 and not any(line.staged for line in lines) else None


def _group_id(key: ManagedKey | None) -> str | None:
    return key.token.group.id if key is not None and key.token.group is not None else None


def _member(view: DeviceView, line: Lineage, group: str | None, *, alone: bool) -> Member:
    key = line.staged or line.current
    if view.pair.doubt:
        return Member(view.uuid, Standing.OTHER, why=view.pair.doubt)
    if key is None:
        return Member(view.uuid, Standing.OTHER, why=line.unclear or f"it has no managed key named {line.name!r}")
    found = Member(view.uuid, Standing.OTHER, key.token.generation, key.keyslot.id if key.keyslot else None)
    ours = key.token.group if group is not None and _group_id(key) == group else None
    if not key.complete:
        return replace(found, why=key.oddity)
    if line.staged is None:
        return replace(found, standing=Standing.FINISHED if ours else Standing.OLD, group=ours)
    if ours is None and not alone:
        other = _group_id(key)
        what = f"for set {other}" if other else "on it alone"
        return replace(found, why=f"generation {found.generation} is staged {what}")
    return replace(found, standing=Standing.STAGED, group=ours)
