# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon does on request and by itself: the use cases as jobs on the volumes of the registry."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from luksrotd.errors import Busy, Outcome
from luksrotd.names import DEFAULT_KEY_NAME
from luksrotd.ports import Caller
from luksrotd.rotation.edits import UNLOCK, Pbkdf
from luksrotd.rotation.reconcile import Action
from luksrotd.service.handover import Secrets
from luksrotd.service.jobs import Job, Kind
from luksrotd.service.reconciling import Reconciled
from luksrotd.service.registry import Registry, Volume
from luksrotd.service.runner import Request, Runner
from luksrotd.service.volume import Volumes

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KeyOptions:
    """How the new key shall be; ``data`` of None keeps the associated data, or is none."""

    name: str = DEFAULT_KEY_NAME
    data: Mapping[str, Any] | None = None
    pbkdf: Pbkdf = field(default_factory=Pbkdf)


class Operations:
    """Starts jobs; looks after the registry when they end, and repairs what the registry finds."""

    def __init__(self, volumes: Volumes, registry: Registry, runner: Runner) -> None:
        self._volumes = volumes
        self._registry = registry
        self._runner = runner
        registry.heed(runner)
        registry.observe(self)
        runner.observe(self)

    def enroll(self, uuid: str, owner: Caller, options: KeyOptions, secrets: Secrets) -> Job:
        """Start an enrolment; ``secrets`` belong to it from now on.

        Raises ``UnknownDevice``, ``NeedsPerson`` and ``Busy``; all else is the job's error.
        """

        async def work(job: Job) -> object:
            result = await self._volumes.enroll(
                self._registry.writable(uuid).ref,
                secrets.sources,
                data=options.data or {},
                pbkdf=options.pbkdf,
                name=options.name,
                progress=job.entered,
                deliver=secrets.deliver,
            )
            await self._registry.settle(uuid)  # who learns that it is done shall find it so
            return result

        return self._change(Kind.ENROLL, uuid, owner, options.name, secrets, work)

    def rotate(self, uuid: str, owner: Caller, options: KeyOptions, secrets: Secrets) -> Job:
        """Start a rotation; as ``enroll``."""

        async def work(job: Job) -> object:
            result = await self._volumes.rotate(
                self._registry.writable(uuid).ref,
                secrets.sources,
                data=options.data,
                pbkdf=options.pbkdf,
                name=options.name,
                progress=job.entered,
                deliver=secrets.deliver,
            )
            await self._registry.settle(uuid)
            return result

        return self._change(Kind.ROTATE, uuid, owner, options.name, secrets, work)

    async def verify(self, uuid: str, owner: Caller, name: str, secrets: Secrets) -> bool:
        """Whether the secret is the managed key ``name``; waits its turn, because it costs as much as a change."""

        async def work(_: Job) -> object:
            return await self._volumes.verify(self._registry.get(uuid).ref, secrets.sources[UNLOCK], name=name)

        job = self._runner.submit(Request(Kind.VERIFY, (uuid,), work, name, owner, secrets))
        return bool(await job.wait())

    async def data(self, uuid: str, name: str) -> Mapping[str, Any]:
        """The associated data of the managed key ``name``, as it is now."""
        return await self._volumes.data(self._registry.get(uuid).ref, name=name)

    async def reconcile(self, uuid: str, owner: Caller | None = None, *, dry_run: bool = False) -> Reconciled:
        """Finish what a crash interrupted, or (``dry_run``) say what would be done; only a repair waits its turn."""
        seen = await self._volumes.reconcile(self._registry.get(uuid).ref, dry_run=True)
        if dry_run:
            return seen
        if not any(finding.action is Action.REPAIR for finding in seen.found):
            return await self._volumes.reconcile(self._registry.get(uuid).ref)  # for its inventory
        result = await self._reconcile(uuid, owner).wait()
        assert isinstance(result, Reconciled)  # noqa: S101 -- for mypy: it is what _reconcile returns
        return result

    # -- what happens ---------------------------------------------------------------------------------------------

    def volume_added(self, volume: Volume) -> None:
        """Nothing: ``volume_changed`` follows."""

    def volume_changed(self, volume: Volume, *, fresh: bool) -> None:
        """Finish what a crash, or a failed job, left."""
        if not fresh or not volume.repairable:
            return
        try:
            self._reconcile(volume.uuid, None)
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

    def _change(
        self,
        kind: Kind,
        uuid: str,
        owner: Caller,
        name: str,
        secrets: Secrets,
        work: Callable[[Job], Awaitable[object]],
    ) -> Job:
        try:
            self._registry.writable(uuid)
        except BaseException:
            secrets.close()
            raise
        return self._runner.submit(Request(kind, (uuid,), work, name, owner, secrets))

    def _reconcile(self, uuid: str, owner: Caller | None) -> Job:
        self._registry.writable(uuid)

        async def work(_: Job) -> object:
            result = await self._volumes.reconcile(self._registry.writable(uuid).ref)
            await self._registry.settle(uuid)
            return result

        return self._runner.submit(Request(Kind.RECONCILE, (uuid,), work, owner=owner))
