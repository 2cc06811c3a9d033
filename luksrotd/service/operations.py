# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon does on request and by itself: the use cases as jobs on the volumes of the registry."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from luksrotd.config import Config
from luksrotd.errors import Busy, Internal, LuksrotdError, Outcome
from luksrotd.ports import Caller
from luksrotd.rotation.edits import UNLOCK, Pbkdf
from luksrotd.rotation.reconcile import Action, Code
from luksrotd.service import planning, verbs
from luksrotd.service.cancellation import to_the_end
from luksrotd.service.handover import Secrets
from luksrotd.service.jobs import Job, Kind
from luksrotd.service.memory import WORKER_KIB
from luksrotd.service.planning import Planned
from luksrotd.service.reconciling import Reconciled
from luksrotd.service.registry import Registry, Volume
from luksrotd.service.runner import Request, Runner
from luksrotd.service.verbs import Call, Wanted
from luksrotd.service.volume import Volumes

log = logging.getLogger(__name__)

RECONCILED_AT_ONCE: Final = 4
"""Volumes that one request looks at at a time."""


class Operations:
    """Starts jobs; looks after the registry when they end, and repairs what the registry finds."""

    def __init__(self, volumes: Volumes, registry: Registry, runner: Runner) -> None:
        self._volumes = volumes
        self._registry = registry
        self._runner = runner
        #: What holds where a caller does not say.
        self.config = Config()
        registry.heed(runner)
        registry.observe(self)
        runner.observe(self)

    def configure(self, config: Config) -> None:
        """From now on this holds where a caller does not say; what is under way goes on as it was begun."""
        self.config = config

    def start(self, kind: Kind, uuid: str, owner: Caller, wanted: Wanted, secrets: Secrets) -> Job:
        """Start a verb (``service.verbs``); ``secrets`` belong to it from now on.

        Raises ``UnknownDevice``, ``NeedsPerson``, ``Busy`` and ``TooMany``; all else is the job's error.
        """

        async def work(job: Job) -> object:
            call = Call(self._registry.writable(uuid).ref, wanted, secrets, job.entered)
            result = await verbs.carry_out(kind, self._volumes, call)
            await self._settle(uuid)
            return result

        try:
            volume = self._registry.writable(uuid)
        except BaseException:
            secrets.close()
            raise
        memory = verbs.memory_kib(volume.view, wanted.pbkdf, secrets)
        return self._runner.submit(Request(kind, (uuid,), work, wanted.name, owner, secrets, memory))

    async def plan(self, uuid: str, verb: Kind, wanted: Wanted, *, retire_expired: bool = False) -> Planned:
        """What the verb would do now (``service.planning``); raises what it would raise before it needs a secret."""
        ref = self._registry.writable(uuid).ref
        if verb is Kind.RECONCILE:
            found = await self._volumes.reconcile(ref, dry_run=True, retire_expired=retire_expired)
            return planning.of_repairs(found)
        seen, change = await self._volumes.plan(ref, lambda view, now: planning.decide(verb, wanted, view, now))
        return planning.of_change(verb, wanted, seen, change)

    async def verify(
        self, uuid: str, owner: Caller, name: str, secrets: Secrets, gone: Callable[[], Awaitable[None]] | None = None
    ) -> bool:
        """Whether the secret is the managed key ``name``; waits its turn, because it costs as much as a change.

        ``gone`` returns when nobody waits for the answer any more: then it is ``Cancelled``.
        """

        async def work(_: Job) -> object:
            return await self._volumes.verify(self._registry.get(uuid).ref, secrets.sources[UNLOCK], name=name)

        try:
            view = self._registry.get(uuid).view
        except BaseException:
            secrets.close()
            raise
        memory = verbs.memory_kib(view, Pbkdf(), secrets)
        needed = replace(secrets, abandoned=gone)
        job = self._runner.submit(Request(Kind.VERIFY, (uuid,), work, name, owner, needed, memory))
        return bool(await job.wait())

    async def data(self, uuid: str, name: str) -> Mapping[str, Any]:
        """The associated data of the managed key ``name``, as it is now."""
        return await self._volumes.data(self._registry.get(uuid).ref, name=name)

    async def reconcile(
        self, uuid: str, owner: Caller | None = None, *, dry_run: bool = False, retire_expired: bool = False
    ) -> Reconciled:
        """Finish what a crash interrupted, or (``dry_run``) say what would be done; only a repair waits its turn.

        ``retire_expired``: abort staged keys that have expired, too.
        """
        ref = self._registry.get(uuid).ref
        seen = await self._volumes.reconcile(ref, dry_run=True, retire_expired=retire_expired)
        if dry_run:
            return seen
        if not any(finding.action is Action.REPAIR for finding in seen.found):
            volume = self._registry.get(uuid)
            # For its inventory, but of which of several devices?  None of them may be written, whatever came meanwhile.
            return seen if volume.ambiguous else await self._volumes.reconcile(volume.ref)
        result = await self._reconcile(uuid, owner, retire_expired=retire_expired).wait()
        assert isinstance(result, Reconciled)  # noqa: S101 -- for mypy: it is what _reconcile returns
        return result

    async def reconcile_all(
        self, owner: Caller | None = None, *, dry_run: bool = False, retire_expired: bool = False
    ) -> Mapping[str, Reconciled | LuksrotdError]:
        """``reconcile`` of all volumes; an error of one does not keep the others from their turn.  By UUID, sorted."""
        places = asyncio.Semaphore(RECONCILED_AT_ONCE)

        async def one(uuid: str) -> Reconciled | LuksrotdError:
            async with places:
                try:
                    return await self.reconcile(uuid, owner, dry_run=dry_run, retire_expired=retire_expired)
                except LuksrotdError as error:
                    return error
                except Exception:  # a header that no code foresaw must not keep the others from their turn
                    log.exception("cannot reconcile %s", uuid)
                    return Internal("cannot reconcile the volume: internal error", outcome=Outcome.UNKNOWN)

        uuids = sorted(self._registry.volumes)
        return dict(zip(uuids, await asyncio.gather(*map(one, uuids)), strict=True))

    # -- what happens ---------------------------------------------------------------------------------------------

    def volume_added(self, volume: Volume) -> None:
        """Nothing: ``volume_changed`` follows."""

    def volume_changed(self, volume: Volume, *, fresh: bool) -> None:
        """Finish what a crash, or a failed job, left, and abort staged keys that have expired, if that is wanted."""
        retire_expired = self.config.staged.retire_expired and _has_expired(volume)
        if not fresh or not (volume.repairable or retire_expired):
            return
        try:
            self._reconcile(volume.uuid, None, retire_expired=retire_expired)
        except Busy as error:
            log.warning("%s is not reconciled now: %s", volume.uuid, error)

    def volume_removed(self, volume: Volume) -> None:
        """Nothing: its jobs find out by themselves."""

    def job_added(self, job: Job) -> None:
        """Nothing yet."""

    def job_ended(self, job: Job) -> None:
        """If it failed, look what it left, and mend that; a reconcile that failed is not tried again."""
        if job.error is not None:
            unfinished = job.error.outcome is not Outcome.UNCHANGED
            for uuid in job.volumes:
                self._registry.refresh(uuid, fresh=unfinished and job.kind is not Kind.RECONCILE)

    def job_forgotten(self, job: Job) -> None:
        """Nothing is left of it."""

    async def _settle(self, uuid: str) -> None:
        """Who learns that it is done shall find it so; a cancel that comes now must not hide that it is."""
        await to_the_end(self._registry.settle(uuid))

    def _reconcile(self, uuid: str, owner: Caller | None, *, retire_expired: bool) -> Job:
        self._registry.writable(uuid)

        async def work(_: Job) -> object:
            ref = self._registry.writable(uuid).ref
            result = await self._volumes.reconcile(ref, retire_expired=retire_expired)
            await self._settle(uuid)
            return result

        return self._runner.submit(Request(Kind.RECONCILE, (uuid,), work, owner=owner, memory_kib=WORKER_KIB))


def _has_expired(volume: Volume) -> bool:
    """Whether a staged key waits that has expired, on a volume that may be written."""
    return not volume.ambiguous and any(problem.code == Code.STAGED_EXPIRED for problem in volume.problems)
