# SPDX-License-Identifier: GPL-2.0-or-later
"""The verbs of a set of volumes as jobs: one job for all of its volumes."""

import asyncio
from collections.abc import Iterator, Sequence

from luksrotd.errors import InvalidRequest, LuksrotdError, Outcome
from luksrotd.ports import Caller, DeviceRef
from luksrotd.rotation.sets import SetStatus
from luksrotd.service import verbs
from luksrotd.service.cancellation import to_the_end
from luksrotd.service.handover import Secrets
from luksrotd.service.jobs import Job, Kind
from luksrotd.service.registry import Registry
from luksrotd.service.runner import Request, Runner
from luksrotd.service.sets import VolumeSets
from luksrotd.service.setwork import Happened, MemberResult, SetRequest, SetResult
from luksrotd.service.verbs import Wanted

#: What leaves a volume other than it was before the call.
_CHANGED = frozenset({Happened.STAGED, Happened.FINISHED, Happened.ABORTED})
_GRAVEST_FIRST = (Outcome.UNKNOWN, Outcome.WIPE_PENDING, Outcome.COMMITTED)


class SetJobs:
    """Starts jobs on several volumes of the registry."""

    def __init__(self, sets: VolumeSets, registry: Registry, runner: Runner) -> None:
        self._sets = sets
        self._registry = registry
        self._runner = runner

    def start(self, kind: Kind, uuids: Sequence[str], owner: Caller, wanted: Wanted, secrets: Secrets) -> Job:
        """Stage, finish or abort on these volumes; ``secrets`` belong to the job from now on.

        Raises ``InvalidRequest``, ``UnknownDevice``, ``NeedsPerson``, ``Busy`` and ``TooMany``; all else is the job's
        error, and its result tells what became of each volume all the same.
        """

        async def work(job: Job) -> object:
            refs = [self._registry.writable(uuid).ref for uuid in uuids]
            result = await self._carry_out(kind, refs, wanted, secrets, job)
            await to_the_end(self._settle(uuids))  # a cancel that comes now must not hide what has been done
            if result.errors:
                job.result = result
                raise failure(result)
            return result

        try:
            _check(uuids)
            views = [self._registry.writable(uuid).view for uuid in uuids]
        except BaseException:
            secrets.close()
            raise
        memory = max(verbs.memory_kib(view, wanted.pbkdf, secrets) for view in views)
        return self._runner.submit(Request(kind, tuple(uuids), work, wanted.name, owner, secrets, memory))

    async def status(self, uuids: Sequence[str], name: str, group: str | None) -> SetStatus:
        """Where the set stands now; raises ``InvalidRequest``, ``UnknownDevice``, and what reading them raises."""
        _check(uuids)
        refs = [self._registry.get(uuid).ref for uuid in uuids]
        return await self._sets.status(refs, name=name, group=group)

    async def _settle(self, uuids: Sequence[str]) -> None:
        await asyncio.gather(*map(self._registry.settle, uuids))  # a disk that hangs holds it up only once

    async def _carry_out(
        self, kind: Kind, refs: Sequence[DeviceRef], wanted: Wanted, secrets: Secrets, job: Job
    ) -> SetResult:
        if kind is not Kind.STAGE:
            end = self._sets.finish if kind is Kind.FINISH else self._sets.abort
            return await end(refs, name=wanted.name, group=wanted.group, progress=job.entered)
        request = SetRequest(wanted.data, wanted.pbkdf, wanted.name, wanted.group, wanted.expires_after, wanted.keep)
        # Cancelling it undoes what has been staged, so it can be until the last one.
        progress = verbs.before_commits(job.entered)
        return await self._sets.stage(refs, secrets.sources, request, progress=progress, deliver=secrets.deliver)


def failure(result: SetResult) -> LuksrotdError:
    """The first error, with what is true of the set as a whole."""
    failed = next(member for member in result.members if member.error is not None)
    assert failed.error is not None  # noqa: S101 -- for mypy
    found = {outcome for member in result.members for outcome in _outcomes(member)}
    outcome = next((grave for grave in _GRAVEST_FIRST if grave in found), Outcome.UNCHANGED)
    return type(failed.error)(f"{failed.error.message} ({failed.ref.path})", outcome=outcome)


def _outcomes(member: MemberResult) -> Iterator[Outcome]:
    if member.happened in _CHANGED:
        yield Outcome.COMMITTED
    if member.error is not None and member.happened is not Happened.UNDONE:
        yield member.error.outcome


def _check(uuids: Sequence[str]) -> None:
    if not uuids:
        raise InvalidRequest("cannot work on a set of no volumes: name at least one")
    if len(set(uuids)) != len(uuids):
        raise InvalidRequest("cannot work on a set that has a volume twice")
