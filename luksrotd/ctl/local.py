# SPDX-License-Identifier: GPL-2.0-or-later
"""luksrotd in this process, for ``--direct``: the use cases on the real ports, without a bus."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from luksrotd import direct
from luksrotd.ctl import model, secrets
from luksrotd.ctl.naming import uuid_of
from luksrotd.errors import DeviceError, LockError, NotAuthorized, Outcome
from luksrotd.names import ATOMIC
from luksrotd.ports import DeviceRef, GenerateInto, SecretFd, SecretSource
from luksrotd.rotation.edits import NEW, PBKDF_FOR_RANDOM_KEYS, UNLOCK, Pbkdf

#: The last stage of an operation (``service.progress.Stage.DONE``): from then on there is nothing to be stopped.
_DONE = "done"


class Local:
    """``model.Backend`` without a bus."""

    def __init__(self, engine: str = ATOMIC) -> None:
        """``engine``: who writes the header, of ``names.ENGINES``."""
        #: The use cases, for the verbs of ``ctl.offline``.
        self.volumes = direct.volumes(engine)
        self._done = False

    async def devices(self) -> Sequence[model.Device]:
        """See ``model.Backend``; raises ``NotAuthorized`` for one who must not read block devices."""
        return [model.Device(node) for node in direct.scan()]

    async def volume(self, device: model.Device, *, data: bool) -> model.Volume:
        """See ``model.Backend``."""
        with permissions():
            ref = ref_of(device)
            seen, problems = await self.volumes.look(ref), await self.volumes.findings(ref)
        keys = [
            model.Key(
                token=key.token.id,
                name=key.token.name,
                generation=key.token.generation,
                state=str(key.token.state),
                keyslot=key.keyslot.id if key.keyslot else None,
                rotated_at=key.token.rotated_at,
                wipe_pending=bool(key.token.wipe),
                changed=key.stale,
                data=key.token.data if data else None,
                expires_at=key.token.expires_at,
                set=key.token.group.id if key.token.group else "",
                set_size=key.token.group.size if key.token.group else 0,
            )
            for key in seen.keys
        ]
        return model.Volume(
            device=ref.metadata_path,
            uuid=seen.uuid,
            label=seen.label,
            seqid=seen.seqid,
            keys=keys,
            keyslots=sorted(seen.metadata.keyslots),
            ordinary_keyslots=seen.ordinary,
            tokens={number: token.type for number, token in sorted(seen.metadata.tokens.items())},
            problems=_findings(problems),
        )

    async def enroll(
        self, device: model.Device, request: model.KeyRequest, progress: model.Progress
    ) -> model.KeyChange:
        """See ``model.Backend``."""
        async with self.prepared(request) as (sources, pbkdf, deliver):
            return changed_key(
                await self.volumes.enroll(
                    ref_of(device),
                    sources,
                    data=request.data or {},
                    pbkdf=pbkdf,
                    name=request.name,
                    progress=self.watched(progress),
                    deliver=deliver,
                )
            )

    async def rotate(
        self, device: model.Device, request: model.KeyRequest, progress: model.Progress
    ) -> model.KeyChange:
        """See ``model.Backend``."""
        async with self.prepared(request) as (sources, pbkdf, deliver):
            return changed_key(
                await self.volumes.rotate(
                    ref_of(device),
                    sources,
                    data=request.data,
                    pbkdf=pbkdf,
                    name=request.name,
                    progress=self.watched(progress),
                    deliver=deliver,
                )
            )

    async def verify(self, device: model.Device, name: str, credential: int) -> bool:
        """See ``model.Backend``."""
        with permissions():
            return await self.volumes.verify(ref_of(device), SecretFd(credential), name=name)

    async def reconcile(self, device: model.Device, *, dry_run: bool, retire_expired: bool = False) -> model.Reconciled:
        """See ``model.Backend``."""
        with permissions():
            done = await self.volumes.reconcile(ref_of(device), dry_run=dry_run, retire_expired=retire_expired)
        differences = [
            model.Difference(one.what, one.name, one.how, dict(one.before), dict(one.after)) for one in done.differences
        ]
        return model.Reconciled(_findings(done.found), _findings(done.left), differences)

    def interrupt(self, task: asyncio.Task[Any]) -> None:
        """Cancel; the commit ignores it after its point of no return, and so does this when all is done."""
        if not self._done:
            task.cancel()

    async def close(self) -> None:
        """Nothing to let go of."""

    @asynccontextmanager
    async def prepared(
        self, request: model.KeyRequest, credential_is: str = UNLOCK
    ) -> AsyncIterator[tuple[Mapping[str, SecretSource], Pbkdf, Any]]:
        """The secrets of ``request``, the cost of the new key, and what hands over a generated one.

        ``credential_is``: what the request's credential is, by its name in ``rotation.edits``.
        """
        credential = SecretFd(request.credential)
        with permissions():
            if isinstance(request.new, int):
                sources: Mapping[str, SecretSource] = {credential_is: credential, NEW: SecretFd(request.new)}
                yield sources, request.pbkdf or Pbkdf(), _nothing
                return
            with secrets.memfd() as fd:
                delivery = request.new

                async def deliver() -> None:
                    delivery.deliver(fd)

                yield (
                    {credential_is: credential, NEW: GenerateInto(fd)},
                    request.pbkdf or PBKDF_FOR_RANDOM_KEYS,
                    deliver,
                )

    def watched(self, progress: model.Progress) -> model.Progress:
        """``progress``, with an eye on the end: see ``interrupt``."""

        def entered(step: str) -> None:
            self._done = step == _DONE
            progress(step)

        return entered


async def _nothing() -> None:
    pass


def ref_of(device: model.Device) -> DeviceRef:
    """The volume that the user named; raises ``LuksrotdError``."""
    uuid = uuid_of(device.name)
    return direct.device_ref(direct.node_of(uuid) if uuid else device.name, device.header)


def _findings(findings: Iterable[Any]) -> Sequence[model.Finding]:
    return [
        model.Finding(
            str(found.code),
            str(found.action),
            found.message,
            found.tokens,
            found.keyslots,
            found.name or None,
            found.since or None,
        )
        for found in findings
    ]


def changed_key(change: Any) -> model.KeyChange:
    """What a use case says that became of a key."""
    return model.KeyChange(change.name, change.generation, change.keyslot, change.seqid_before, change.seqid_after)


@contextmanager
def permissions() -> Iterator[None]:
    """What the kernel forbids this user is an authorization error, as it would be over the bus."""
    try:
        yield
    except (DeviceError, LockError) as error:
        if isinstance(error.__cause__, PermissionError) and error.outcome is Outcome.UNCHANGED:
            raise NotAuthorized(error.message) from error
        raise
