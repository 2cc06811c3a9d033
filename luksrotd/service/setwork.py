# SPDX-License-Identifier: GPL-2.0-or-later
"""One call at work on a set of volumes, one volume after the other, and its account of what has happened to which."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from enum import StrEnum
from typing import Any

from luksrotd.errors import Cancelled, LuksrotdError, Outcome
from luksrotd.names import DEFAULT_KEY_NAME
from luksrotd.ports import DeviceRef, GenerateInto, Host, SecretFd, SecretSource
from luksrotd.records import dataclass
from luksrotd.rotation import sets
from luksrotd.rotation.edits import Pbkdf
from luksrotd.rotation.protocol import Phase
from luksrotd.rotation.sets import SetState, SetStatus, Standing, Step
from luksrotd.rotation.token import Group
from luksrotd.rotation.view import DeviceView
from luksrotd.service.cancellation import heed_cancellation, to_the_end
from luksrotd.service.progress import Progress, Stage
from luksrotd.service.transaction import Deliver, Transactor, nothing_to_deliver
from luksrotd.service.volume import DEFAULT_HOLD, Hold, KeyChange, Volumes


class Happened(StrEnum):
    """What a call did to one volume of the set.

    ``already``: it was there before.  ``undone``: staged and aborted again.  ``nothing``: its turn did not come.
    """

    NOTHING = "nothing"
    ALREADY = "already"
    STAGED = "staged"
    FINISHED = "finished"
    ABORTED = "aborted"
    UNDONE = "undone"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class MemberResult:
    """What became of one volume: ``change`` is what was done last, ``error`` why something was not."""

    ref: DeviceRef
    happened: Happened = Happened.NOTHING
    change: KeyChange | None = None
    error: LuksrotdError | None = None


@dataclass(frozen=True, slots=True)
class SetResult:
    """What became of the set: ``state`` is read off the volumes afterwards, ``None`` if one cannot be read."""

    name: str
    group: Group
    state: SetState | None
    members: tuple[MemberResult, ...]

    @property
    def errors(self) -> tuple[LuksrotdError, ...]:
        """Of all volumes."""
        return tuple(member.error for member in self.members if member.error is not None)


@dataclass(frozen=True, slots=True)
class SetRequest:
    """What to stage: ``data`` of ``None`` keeps each volume's own.

    ``group``: the id of the set whose staging is to be taken up again.  Without it, that is the set for which the key
    is staged on some of the volumes, else a new one.  ``keep``: when it fails on one volume, what has been staged on
    others stays, to go on later; else it is aborted there.
    """

    data: Mapping[str, Any] | None
    pbkdf: Pbkdf
    name: str = DEFAULT_KEY_NAME
    group: str | None = None
    expires_after: timedelta | None = DEFAULT_HOLD.expires_after
    keep: bool = False


class Work:
    """One call at work, with the locks held; keeps account of what has happened to which volume."""

    def __init__(
        self,
        host: Host,
        transactor: Transactor,
        refs: Sequence[DeviceRef],
        group: Group,
        found: SetStatus,
        progress: Progress,
    ) -> None:
        self.transactor = transactor
        self.refs = refs
        self.group = group
        self.found = found
        self._volumes = Volumes(host, transactor)
        self._progress = progress
        self._results = [MemberResult(ref) for ref in refs]

    async def stage(self, secrets: Mapping[str, SecretSource], request: SetRequest, deliver: Deliver) -> None:
        """Stage where it is not staged yet; undo it if that fails."""
        hold = Hold(request.expires_after, self.group)
        for at in self._where(Standing.OLD, Happened.ALREADY):
            try:
                heed_cancellation()
                change = await self._volumes.stage(
                    self.refs[at],
                    secrets,
                    data=request.data,
                    pbkdf=request.pbkdf,
                    name=request.name,
                    hold=hold,
                    progress=self._step,
                    deliver=deliver,
                )
            except (LuksrotdError, asyncio.CancelledError) as error:
                begun = self._fail(at, error)
                if not request.keep:
                    await to_the_end(self._undo())
                if isinstance(error, asyncio.CancelledError) and not begun:
                    raise
                return
            self._results[at] = replace(self._results[at], happened=Happened.STAGED, change=change)
            secrets, deliver = _for_the_others(secrets), nothing_to_deliver

    async def end(self, step: Step) -> None:
        """Finish or abort where it is staged."""
        finishing = step is Step.FINISH
        call = self._volumes.finish if finishing else self._volumes.abort
        for at in self._where(Standing.STAGED, Happened.ALREADY):
            member = self.found.members[at]
            try:
                heed_cancellation()
                change = await call(
                    self.refs[at],
                    name=self.found.name,
                    generation=member.generation,
                    group=self.group.id,
                    progress=self._step,
                )
            except LuksrotdError as error:
                if not self._fail(at, error) and finishing:
                    return  # all volumes can still go either way
            except asyncio.CancelledError as error:
                if not self._fail(at, error):
                    raise
                return
            else:
                happened = Happened.FINISHED if finishing else Happened.ABORTED
                self._results[at] = replace(self._results[at], happened=happened, change=change)

    async def result(self) -> SetResult:
        """The account, and where the set stands now."""
        state: SetState | None
        try:
            views = await to_the_end(self._look())
            state = sets.status(views, self.found.name, self.group.id).state
        except LuksrotdError:
            state = None
        self._progress(Stage.DONE)
        return SetResult(self.found.name, self.group, state, tuple(self._results))

    async def _look(self) -> list[DeviceView]:
        return [await self.transactor.look(ref) for ref in self.refs]

    async def _undo(self) -> None:
        """Abort what this call has staged, also where it failed too late."""
        for at, done in enumerate(self._results):
            failed_late = done.error is not None and done.error.outcome is not Outcome.UNCHANGED
            if done.happened is not Happened.STAGED and not failed_late:
                continue
            try:
                change = await self._volumes.abort(
                    self.refs[at], name=self.found.name, group=self.group.id, progress=self._step
                )
            except LuksrotdError as error:
                self._results[at] = replace(done, error=done.error or error)
            else:
                self._results[at] = replace(done, happened=Happened.UNDONE, change=change)

    def _where(self, standing: Standing, otherwise: Happened) -> list[int]:
        """The volumes that stand so; the others are done with."""
        found = []
        for at, member in enumerate(self.found.members):
            if member.standing is standing:
                found.append(at)
            else:
                self._results[at] = replace(self._results[at], happened=otherwise)
        return found

    def _fail(self, at: int, error: LuksrotdError | asyncio.CancelledError) -> bool:
        """Note the failure; whether anything has been changed, on any volume, by this call or before it."""
        if isinstance(error, asyncio.CancelledError):
            error = Cancelled("cannot go on: the operation was interrupted")
        self._results[at] = replace(self._results[at], happened=Happened.FAILED, error=error)
        changed = {Happened.STAGED, Happened.FINISHED, Happened.ABORTED}
        return (
            error.outcome is not Outcome.UNCHANGED
            or any(done.happened in changed for done in self._results)
            or self.found.state is SetState.FINISHING
        )

    def _step(self, stage: Stage | Phase) -> None:
        """The end of one volume is not the end of the set."""
        if stage != Stage.DONE:
            self._progress(stage)


def _for_the_others(secrets: Mapping[str, SecretSource]) -> Mapping[str, SecretSource]:
    """What has been generated is there to be read now."""
    return {name: SecretFd(one.fd) if isinstance(one, GenerateInto) else one for name, one in secrets.items()}
