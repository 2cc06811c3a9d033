# SPDX-License-Identifier: GPL-2.0-or-later
"""The same new key for a set of volumes: staged on all of them before it is finished on any (``rotation.sets``).

The job locks of all volumes are held meanwhile.  The set has no state of its own: every volume says in its token which
set it belongs to, so whatever is interrupted is taken up again by the same call.
"""

import asyncio
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from typing import Any, Final

from luksrotd.errors import Cancelled, Conflict, InvalidRequest, LuksrotdError, Outcome, SecretRejected, WrongCredential
from luksrotd.names import DEFAULT_KEY_NAME
from luksrotd.ports import DeviceRef, GenerateInto, Host, SecretFd, SecretSource
from luksrotd.rotation import policy, sets, staging
from luksrotd.rotation.edits import NEW, Pbkdf
from luksrotd.rotation.keys import RotateRequest
from luksrotd.rotation.lineage import lineage
from luksrotd.rotation.protocol import Phase
from luksrotd.rotation.sets import SetState, SetStatus, Standing, Step
from luksrotd.rotation.staging import StageRequest
from luksrotd.rotation.token import Group
from luksrotd.rotation.view import DeviceView
from luksrotd.service.cancellation import heed_cancellation, to_the_end
from luksrotd.service.progress import Progress, Stage, ignore
from luksrotd.service.transaction import Deliver, Transactor, nothing_to_deliver
from luksrotd.service.volume import DEFAULT_HOLD, Hold, KeyChange, Volumes

#: Random bytes in the id of a set.
ID_BYTES: Final = 8


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

    ``hold.group``: the set whose staging is to be taken up again; only its id counts.  Without it, that is the set for
    which the key is staged on some of the volumes, else a new one.  ``keep``: when it fails on one volume, what has
    been staged on others stays, to go on later; else it is aborted there.
    """

    data: Mapping[str, Any] | None
    pbkdf: Pbkdf
    name: str = DEFAULT_KEY_NAME
    group: str | None = None
    expires_after: timedelta | None = DEFAULT_HOLD.expires_after
    keep: bool = False


class VolumeSets:
    """The use cases on sets of volumes.  What is refused on one volume is refused before anything is written."""

    def __init__(self, host: Host, transactor: Transactor | None = None) -> None:
        self._host = host
        self._transactor = transactor or Transactor(host)

    async def status(
        self, refs: Sequence[DeviceRef], *, name: str = DEFAULT_KEY_NAME, group: str | None = None
    ) -> SetStatus:
        """Where the set stands now."""
        return sets.status([await self._transactor.look(ref) for ref in refs], name, group)

    async def stage(
        self,
        refs: Sequence[DeviceRef],
        secrets: Mapping[str, SecretSource],
        request: SetRequest,
        *,
        progress: Progress = ignore,
        deliver: Deliver = nothing_to_deliver,
    ) -> SetResult:
        """Put a new generation, with the same secret, beside the current one of every volume.

        Where it is staged already, the secret must open it.  The secrets are read for each volume, so they must be
        files or memfds; one that is to be generated is generated once.  A cancel undoes as an error does.
        """
        for source in secrets.values():
            _check_repeatable(source)
        async with self._transactor.holding(refs) as transactor:
            views = [await transactor.settle(ref) for ref in refs]
            found_id = request.group or sets.under_way(views, request.name) or self._host.entropy.random(ID_BYTES).hex()
            found = sets.status(views, request.name, found_id)
            sets.check(found, Step.STAGE)
            work = _Work(self._host, transactor, refs, Group(found_id, len(refs)), found, progress)
            await self._check(work, views, request, secrets[NEW])
            await work.stage(secrets, request, deliver)
            return await work.result()

    async def finish(
        self,
        refs: Sequence[DeviceRef],
        *,
        name: str = DEFAULT_KEY_NAME,
        group: str | None = None,
        progress: Progress = ignore,
    ) -> SetResult:
        """Make the staged key the only one, on one volume after the other; only if it is staged on all of them.

        Once it is finished on one, an error on another does not keep the rest from their turn: there is no way back.
        """
        return await self._end(refs, Step.FINISH, name, group, progress)

    async def abort(
        self,
        refs: Sequence[DeviceRef],
        *,
        name: str = DEFAULT_KEY_NAME,
        group: str | None = None,
        progress: Progress = ignore,
    ) -> SetResult:
        """Take back the staged key on all volumes; only if it is finished on none of them."""
        return await self._end(refs, Step.ABORT, name, group, progress)

    async def _end(
        self, refs: Sequence[DeviceRef], step: Step, name: str, group: str | None, progress: Progress
    ) -> SetResult:
        async with self._transactor.holding(refs) as transactor:
            found = sets.status([await transactor.settle(ref) for ref in refs], name, group)
            sets.check(found, step)
            if found.group is None:
                raise InvalidRequest(f"cannot {step} key {name!r} on the set: no volume belongs to one")
            work = _Work(self._host, transactor, refs, found.group, found, progress)
            await work.end(step)
            return await work.result()

    async def _check(
        self, work: "_Work", views: Sequence[DeviceView], request: SetRequest, secret: SecretSource
    ) -> None:
        """Everything that can be refused before the first write; raises the refusal, with the volume's name."""
        rotation = RotateRequest(request.data, self._host.clock.now(), request.pbkdf, request.name)
        wanted = StageRequest(rotation, None, work.group)
        for ref, seen, member in zip(work.refs, views, work.found.members, strict=True):
            try:
                if member.standing is Standing.OLD:
                    async with work.transactor.opened(ref) as device:
                        policy.check_signatures(tuple(await self._host.probe.foreign(device)))
                    staging.stage(seen, wanted)
                elif isinstance(secret, GenerateInto):
                    raise InvalidRequest("cannot go on with another key: the first one is staged; give it, or abort")
                elif not await work.transactor.opens(ref, lambda now: _staged_keyslot(now, request.name), secret):
                    raise WrongCredential("cannot go on with this key: another one is staged; give it, or abort")
            except LuksrotdError as error:
                raise type(error)(f"{error.message} ({ref.path})", outcome=error.outcome) from error


class _Work:
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


def _check_repeatable(source: SecretSource) -> None:
    """Raise ``SecretRejected`` for what can be read only once."""
    if isinstance(source, SecretFd):
        mode = os.fstat(source.fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise SecretRejected(
                "cannot use this secret for several volumes: it can be read only once; give a file or a memfd"
            )


def _for_the_others(secrets: Mapping[str, SecretSource]) -> Mapping[str, SecretSource]:
    """What has been generated is there to be read now."""
    return {name: SecretFd(one.fd) if isinstance(one, GenerateInto) else one for name, one in secrets.items()}


def _staged_keyslot(seen: DeviceView, name: str) -> int:
    staged = lineage(seen, name).staged
    if staged is None or staged.keyslot is None:
        raise Conflict("cannot go on: another tool has changed the header meanwhile")
    return staged.keyslot.id
