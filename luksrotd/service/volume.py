# SPDX-License-Identifier: GPL-2.0-or-later
"""The use cases: enrol, rotate, verify, read the associated data, reconcile."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luksrotd.errors import NeedsPerson
from luksrotd.names import DEFAULT_KEY_NAME
from luksrotd.ports import DeviceRef, Host, SecretSource
from luksrotd.rotation import policy, reconcile
from luksrotd.rotation.edits import Pbkdf, SetToken
from luksrotd.rotation.policy import EnrollRequest, RotateRequest
from luksrotd.rotation.reconcile import Action, Finding
from luksrotd.rotation.view import DeviceView
from luksrotd.service.progress import Progress, ignore
from luksrotd.service.transaction import Committed, Deliver, Transactor, nothing_to_deliver


@dataclass(frozen=True, slots=True)
class KeyChange:
    """What became of a key: its name, generation and keyslot now, the sequence numbers before and after."""

    uuid: str
    name: str
    generation: int
    keyslot: int
    seqid_before: int
    seqid_after: int


@dataclass(frozen=True, slots=True)
class Reconciled:
    """The result of a reconcile: what was found, and what is left now (the same for a dry run)."""

    uuid: str
    found: tuple[Finding, ...]
    left: tuple[Finding, ...]
    seqid: int

    @property
    def repaired(self) -> tuple[Finding, ...]:
        """What was found and is gone."""
        return tuple(finding for finding in self.found if finding not in self.left)

    @property
    def needs_person(self) -> bool:
        """Whether something is left that reconcile must not decide."""
        return any(finding.action is Action.PERSON for finding in self.left)


@dataclass(frozen=True, slots=True)
class Examined:
    """A volume as it is, and what reconcile would find."""

    view: DeviceView
    findings: tuple[Finding, ...]


class Volumes:
    """The use cases on the ports of ``host``."""

    def __init__(self, host: Host, transactor: Transactor | None = None) -> None:
        self._host = host
        self._transactor = transactor or Transactor(host)

    async def look(self, ref: DeviceRef) -> DeviceView:
        """The volume as it is now."""
        return await self._transactor.look(ref)

    async def findings(self, ref: DeviceRef) -> tuple[Finding, ...]:
        """What reconcile would find."""
        return (await self.examine(ref)).findings

    async def examine(self, ref: DeviceRef) -> Examined:
        """The volume as it is now, and what reconcile would find."""
        async with self._transactor.opened(ref) as device:
            foreign = await self._host.probe.foreign(device)
        seen = await self.look(ref)
        return Examined(seen, reconcile.diagnose(seen, foreign))

    async def enroll(
        self,
        ref: DeviceRef,
        secrets: Mapping[str, SecretSource],
        *,
        data: Mapping[str, Any],
        pbkdf: Pbkdf,
        name: str = DEFAULT_KEY_NAME,
        progress: Progress = ignore,
        deliver: Deliver = nothing_to_deliver,
    ) -> KeyChange:
        """Give the volume a managed key: keyslot and token born in one commit."""
        request = EnrollRequest(data, self._host.clock.now(), pbkdf, name)
        done = await self._transactor.run(ref, lambda seen: policy.enroll(seen, request), secrets, progress, deliver)
        return self._changed(done, "key enrolled")

    async def rotate(
        self,
        ref: DeviceRef,
        secrets: Mapping[str, SecretSource],
        *,
        data: Mapping[str, Any] | None,
        pbkdf: Pbkdf,
        name: str = DEFAULT_KEY_NAME,
        progress: Progress = ignore,
        deliver: Deliver = nothing_to_deliver,
    ) -> KeyChange:
        """Replace a managed key: new keyslot, token and the wipe of the old area in one transaction."""
        request = RotateRequest(data, self._host.clock.now(), pbkdf, name)
        done = await self._transactor.run(ref, lambda seen: policy.rotate(seen, request), secrets, progress, deliver)
        return self._changed(done, "key rotated")

    async def verify(self, ref: DeviceRef, secret: SecretSource, *, name: str = DEFAULT_KEY_NAME) -> bool:
        """Whether the secret is that of the managed key ``name``; nothing is changed."""
        return await self._transactor.opens(ref, lambda seen: _keyslot(seen, name), secret)

    async def data(self, ref: DeviceRef, *, name: str = DEFAULT_KEY_NAME) -> Mapping[str, Any]:
        """The associated data of the managed key ``name``."""
        return policy.managed(await self.look(ref), name).token.data

    async def reconcile(self, ref: DeviceRef, *, dry_run: bool = False) -> Reconciled:
        """Finish what a crash interrupted; with ``dry_run`` only say what would be done.  Needs no secret."""
        async with self._transactor.opened(ref) as device:
            foreign = await self._host.probe.foreign(device)
            seen = await self.look(ref)
            found = reconcile.diagnose(seen, foreign)
            if not dry_run and any(finding.action is Action.REPAIR for finding in found):
                async with self._host.locks.job(device):
                    seen = await self._transactor.mend(ref, device, orphans=True)
        left = reconcile.diagnose(seen, foreign)
        result = Reconciled(seen.uuid, found, left, seen.seqid)
        if result.repaired:
            codes = ",".join(finding.code for finding in result.repaired)
            self._host.journal.record("volume reconciled", uuid=seen.uuid, repaired=codes, seqid=seen.seqid)
        return result

    def _changed(self, done: Committed, message: str) -> KeyChange:
        written = next(edit for edit in done.change.edits if isinstance(edit, SetToken))
        changed = KeyChange(
            done.uuid,
            written.body["name"],
            written.body["generation"],
            done.change.added[0].keyslot,
            done.seqid_before,
            done.seqid_after,
        )
        self._host.journal.record(
            message,
            uuid=changed.uuid,
            key=changed.name,
            generation=changed.generation,
            keyslot=changed.keyslot,
            seqid_before=changed.seqid_before,
            seqid_after=changed.seqid_after,
        )
        return changed


def _keyslot(seen: DeviceView, name: str) -> int:
    key = policy.managed(seen, name)
    if key.keyslot is None:
        raise NeedsPerson(f"cannot verify key {name!r}: its token names {len(key.token.keyslots)} keyslots, not one")
    return key.keyslot.id
