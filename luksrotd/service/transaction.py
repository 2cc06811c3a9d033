# SPDX-License-Identifier: GPL-2.0-or-later
"""The transaction: snapshot, shadow, verification, plan, commit (design §2).

Every change of a header goes through here: rotation, enrolment and reconcile are its users.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from luksrotd.errors import (
    Conflict,
    ConsistencyError,
    DeviceError,
    LastKeyslot,
    LuksrotdError,
    NeedsPerson,
    Outcome,
)
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import Which
from luksrotd.ports import DeviceRef, EngineSession, HeaderDevice, Host, SecretSource, Shadow
from luksrotd.rotation import policy, reconcile
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import UNLOCK, VOLUME_KEY
from luksrotd.rotation.plan import ShadowResult, plan_commit, plan_heal
from luksrotd.rotation.protocol import CommitPlan, Phase
from luksrotd.rotation.view import DeviceView
from luksrotd.service import commit
from luksrotd.service.cancellation import PointOfNoReturn, cancellable, heed_cancellation
from luksrotd.service.progress import Progress, Stage, ignore
from luksrotd.service.snapshot import Areas, Snapshot, no_areas, read_snapshot, unlocking_areas
from luksrotd.service.threads import in_thread

#: How often a transaction starts again because another tool was faster.
ATTEMPTS = 8

Decide = Callable[[DeviceView], Change]
Deliver = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Committed:
    """What a transaction did to which volume: the change, and the sequence numbers before and after it."""

    uuid: str
    change: Change
    seqid_before: int
    seqid_after: int


async def nothing_to_deliver() -> None:
    """A ``Deliver`` for a change that generates no secret."""


class Transactor:
    """Runs transactions with the ports of ``host``."""

    def __init__(self, host: Host, *, attempts: int = ATTEMPTS) -> None:
        """``attempts``: how often a transaction may be overtaken before it gives up with ``Conflict``."""
        self._host = host
        self._attempts = attempts

    async def look(self, ref: DeviceRef) -> DeviceView:
        """The volume as it is now."""
        async with self.opened(ref) as device:
            return (await self._snapshot(ref, device, no_areas)).view

    @asynccontextmanager
    async def opened(self, ref: DeviceRef) -> AsyncIterator[HeaderDevice]:
        """The header device, open for reading."""
        device = await _open(self._host, ref, writable=False)
        try:
            yield device
        finally:
            device.close()

    async def run(
        self,
        ref: DeviceRef,
        decide: Decide,
        secrets: Mapping[str, SecretSource],
        progress: Progress = ignore,
        deliver: Deliver = nothing_to_deliver,
    ) -> Committed:
        """Make the change that ``decide`` wants of the volume as it is when the transaction begins.

        ``decide`` is asked again when another tool has changed the header meanwhile.  ``deliver`` is awaited once,
        when everything is verified and nothing has been written: a generated secret must be safe before the old one
        dies.  Raises what ``decide`` raises, and the errors of the ports; the error's ``outcome`` says what is true.
        Cancelling it before the point of no return leaves the device unchanged; afterwards it runs to its end.
        """

        async def work(point: PointOfNoReturn) -> Committed:
            async with self.opened(ref) as device:
                progress(Stage.LOCKING)
                async with self._host.locks.job(device):
                    policy.check_signatures(tuple(await self._host.probe.foreign(device)))
                    await self._finish_crashed(ref, device)
                    progress(Stage.READING)
                    target = _Target(ref, device, point, progress, volume_key=VOLUME_KEY in secrets)
                    return await self._change(target, decide, secrets, deliver)

        return await cancellable(work)

    async def opened_by(self, ref: DeviceRef, source: SecretSource) -> int:
        """The keyslot that the secret opens, tried on a shadow; raises ``WrongCredential``."""
        async with self.opened(ref) as device:
            snapshot = await self._snapshot(ref, device, unlocking_areas)
            async with self._session(snapshot.pair.length, {UNLOCK: source}) as (shadow, session):
                _fill(shadow, snapshot)
                return await session.unlock()

    async def opens(self, ref: DeviceRef, keyslot: Callable[[DeviceView], int], source: SecretSource) -> bool:
        """Whether the secret opens the keyslot that ``keyslot`` picks, tried on a shadow."""
        async with self.opened(ref) as device:
            snapshot = await self._snapshot(ref, device, lambda seen: (seen.metadata.keyslots[keyslot(seen)].area,))
            async with self._session(snapshot.pair.length, {UNLOCK: source}) as (shadow, session):
                _fill(shadow, snapshot)
                return await session.opens(keyslot(snapshot.view), UNLOCK)

    async def mend(self, ref: DeviceRef, device: HeaderDevice, *, orphans: bool) -> DeviceView:
        """Make every repair that ``reconcile`` knows, one commit each, with the job lock held; the volume afterwards.

        Needs no secret.  Once the first commit has begun, it cannot be cancelled any more.
        """

        async def work(point: PointOfNoReturn) -> DeviceView:
            target = _Target(ref, device, point, ignore)
            for _ in range(self._attempts):
                snapshot = await self._snapshot(ref, device, no_areas)
                heal = reconcile.needs_heal(snapshot.view)
                try:
                    if heal:
                        plan = await self._plan_heal(snapshot)
                    elif change := reconcile.repair(snapshot.view, orphans=orphans):
                        plan = await self._plan_repair(snapshot, change)
                    else:
                        return snapshot.view
                    await self._commit(target, plan)
                except Conflict:
                    continue
                except DeviceError as error:
                    if heal and snapshot.view.pending and error.outcome is Outcome.COMMITTED:
                        error.outcome = Outcome.WIPE_PENDING
                    raise
            raise Conflict("cannot reconcile: other tools keep changing the header")

        return await cancellable(work)

    async def _finish_crashed(self, ref: DeviceRef, device: HeaderDevice) -> None:
        """Heal and wipe what a crash left, before anything new is begun."""
        seen = (await self._snapshot(ref, device, no_areas)).view
        policy.check_requirements(seen)
        if reconcile.needs_heal(seen) or reconcile.repair(seen, orphans=False):
            try:
                await self.mend(ref, device, orphans=False)
            except LuksrotdError as error:
                if error.outcome is Outcome.COMMITTED:  # a repair was, not what the caller has asked for
                    error.outcome = Outcome.UNCHANGED
                raise
            heed_cancellation()

    async def _change(
        self, target: "_Target", decide: Decide, secrets: Mapping[str, SecretSource], deliver: Deliver
    ) -> Committed:
        """With the job lock held: one worker for all attempts, for it can read a secret from a pipe only once."""
        snapshot = await self._snapshot(target.ref, target.device, unlocking_areas)
        decide(snapshot.view)
        async with self._session(snapshot.pair.length, secrets) as worker:
            return await self._attempt(target, decide, worker, snapshot, deliver)

    async def _attempt(
        self,
        target: "_Target",
        decide: Decide,
        worker: tuple[Shadow, EngineSession],
        snapshot: Snapshot,
        deliver: Deliver,
    ) -> Committed:
        progress = target.progress
        delivered = False
        for _ in range(self._attempts):
            change = decide(snapshot.view)
            policy.check_retirement(snapshot.view, change)
            plan = await self._prepare(worker, snapshot, change, progress, volume_key=target.volume_key)
            if not delivered:
                progress(Stage.DELIVERING)
                await deliver()
                delivered = True
            try:
                await self._commit(target, plan)
            except Conflict:
                progress(Stage.READING)
                snapshot = await self._snapshot(target.ref, target.device, unlocking_areas)
                continue
            progress(Stage.DONE)
            return Committed(snapshot.view.uuid, change, plan.seqid_before, plan.seqid_after)
        raise Conflict(f"cannot commit: other tools have changed the header {self._attempts} times meanwhile")

    async def _prepare(
        self,
        worker: tuple[Shadow, EngineSession],
        snapshot: Snapshot,
        change: Change,
        progress: Progress,
        *,
        volume_key: bool = False,
    ) -> CommitPlan:
        """Let libcryptsetup make the change on the shadow, verify it there, and plan the difference."""
        shadow, session = worker
        progress(Stage.DERIVING)
        _fill(shadow, snapshot)
        await _load_same(session, snapshot)
        if change.needs_unlock:
            await _unlock(session, change, volume_key=volume_key)
        await session.apply(change.edits)
        progress(Stage.VERIFYING)
        for added in change.added:
            if not await session.opens(added.keyslot, added.secret):
                raise ConsistencyError(f"cannot open the new keyslot {added.keyslot} with its own secret")
        committed = shadow.read(0, len(snapshot.pair.raw))
        if change.closing:
            await session.apply(change.closing)
        return plan_commit(snapshot.pair, change, _result(shadow, snapshot, committed), self._host.entropy.random)

    async def _plan_repair(self, snapshot: Snapshot, change: Change) -> CommitPlan:
        async with self._session(snapshot.pair.length, {}) as worker:
            return await self._prepare(worker, snapshot, change, ignore)

    async def _plan_heal(self, snapshot: Snapshot) -> CommitPlan:
        """Let libcryptsetup recover the losing copy on a shadow.

        It leaves two valid copies with one sequence number alone, even if they differ; so if its first load has
        chosen the winner that we have chosen, and changed nothing, the loser is blanked and it is asked again.
        """
        async with self._session(snapshot.pair.length, {}) as (shadow, session):
            _fill(shadow, snapshot)
            await _load_same(session, snapshot)
            healed = shadow.read(0, len(snapshot.pair.raw))
            if healed == snapshot.pair.raw:
                size = snapshot.pair.hdr_size
                shadow.write(0 if snapshot.pair.loser is Which.PRIMARY else size, bytes(size))
                await _load_same(session, snapshot)
                healed = shadow.read(0, len(snapshot.pair.raw))
            return plan_heal(snapshot.pair, healed)

    @asynccontextmanager
    async def _session(
        self, length: int, secrets: Mapping[str, SecretSource]
    ) -> AsyncIterator[tuple[Shadow, EngineSession]]:
        shadow = self._host.shadows.create(length)
        try:
            async with self._host.engine.session(shadow, secrets) as session:
                yield shadow, session
        finally:
            shadow.close()

    async def _snapshot(self, ref: DeviceRef, device: HeaderDevice, areas: Areas) -> Snapshot:
        async with self._host.locks.metadata(device, exclusive=False):
            return await in_thread(lambda: read_snapshot(ref, device, areas))

    async def _commit(self, target: "_Target", plan: CommitPlan) -> None:
        target.progress(Stage.WAITING_FOR_LOCK)
        device = target.device
        async with AsyncExitStack() as stack:
            # The writable descriptor is closed last: udev probes the device then, and must find it unlocked.
            writable = await _open(self._host, target.ref, writable=True)
            stack.callback(writable.close)
            if writable.identity != device.identity:
                raise DeviceError(f"cannot write {target.ref.metadata_path}: it is another device than before")
            await stack.enter_async_context(self._host.locks.metadata(device, exclusive=True))
            await stack.enter_async_context(self._host.locks.whole_disk(device))
            entered = _entered(plan, target)
            await in_thread(lambda: commit.run(plan, writable, entered))


@dataclass(frozen=True, slots=True)
class _Target:
    """What one operation works on: the device, its point of no return, and who follows it."""

    ref: DeviceRef
    device: HeaderDevice
    point: PointOfNoReturn
    progress: Progress
    volume_key: bool = False


def _entered(plan: CommitPlan, target: _Target) -> Callable[[Phase], None]:
    """For the committing thread: pass the point of no return where the plan has it, and tell the loop."""
    loop = asyncio.get_running_loop()

    def entered(phase: Phase) -> None:
        if phase is plan.point_of_no_return:
            target.point.pass_it()
        elif phase is Phase.NEW_AREA:
            target.point.check()
        loop.call_soon_threadsafe(target.progress, phase)

    return entered


async def _open(host: Host, ref: DeviceRef, *, writable: bool) -> HeaderDevice:
    return await in_thread(lambda: host.devices.open(ref, writable=writable), undo=lambda device: device.close())


def _fill(shadow: Shadow, snapshot: Snapshot) -> None:
    if shadow.length != snapshot.pair.length:
        raise Conflict("cannot go on: the size of the header has changed meanwhile")
    shadow.clear()
    shadow.write(0, snapshot.pair.raw)
    for area, content in snapshot.areas.items():
        shadow.write(area.offset, content)


async def _unlock(session: EngineSession, change: Change, *, volume_key: bool) -> None:
    """Get the volume key; if keyslots go, by a credential that opens one of those that stay."""
    if volume_key and change.survivors is None:
        return await session.take_volume_key()
    opened = await session.unlock()
    if change.survivors is None or opened in change.survivors:
        return None
    # The same passphrase may open a keyslot that stays, too.
    for keyslot in sorted(change.survivors):
        if await session.opens(keyslot, UNLOCK):
            return None
    raise LastKeyslot(f"cannot remove keyslot {opened}: the credential opens no other one; use one that stays")


async def _load_same(session: EngineSession, snapshot: Snapshot) -> None:
    """libcryptsetup must read the header as we do; else we do not understand it, and leave it alone."""
    if await session.load() != snapshot.view.metadata.raw:
        if snapshot.pair.doubt:
            raise NeedsPerson(
                f"cannot use the header: libcryptsetup accepts a copy that we refuse: {snapshot.pair.doubt}"
            )
        raise ConsistencyError("cannot use the header: libcryptsetup reads it otherwise")


def _result(shadow: Shadow, snapshot: Snapshot, committed: bytes) -> ShadowResult:
    headers = len(snapshot.pair.raw)
    data = {}
    for extent in shadow.data_extents():
        start = max(extent.offset, headers)
        if start < extent.end:
            data[Extent(start, extent.end - start)] = shadow.read(start, extent.end - start)
    return ShadowResult(snapshot.areas, committed, shadow.read(0, headers), data)
