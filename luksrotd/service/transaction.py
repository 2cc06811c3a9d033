# SPDX-License-Identifier: GPL-2.0-or-later
"""The transaction: snapshot, shadow, verification, plan, commit (design §2).

Every change of a header goes through here: rotation, enrolment and reconcile are its users.
"""

import copy
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext

from luksrotd.errors import (
    Conflict,
    DeviceError,
    Internal,
    InvalidRequest,
    LuksrotdError,
    Outcome,
)
from luksrotd.ports import DeviceIdentity, DeviceRef, HeaderDevice, Host, SecretSource
from luksrotd.records import dataclass
from luksrotd.rotation import policy, reconcile
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import UNLOCK, VOLUME_KEY
from luksrotd.rotation.leftovers import Rules
from luksrotd.rotation.plan import plan_commit, plan_heal, plan_revival
from luksrotd.rotation.preview import Difference, preview
from luksrotd.rotation.protocol import CommitPlan
from luksrotd.rotation.view import DeviceView, view
from luksrotd.service.access import Access, Target
from luksrotd.service.audit import Audit
from luksrotd.service.cancellation import PointOfNoReturn, cancellable, heed_cancellation
from luksrotd.service.progress import Progress, Stage, ignore
from luksrotd.service.shadowing import Workbench, workbench
from luksrotd.service.snapshot import Areas, Snapshot, no_areas, unlocking_areas

#: How often a transaction starts again because another tool was faster.
ATTEMPTS = 8

Decide = Callable[[DeviceView], Change]
Deliver = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Basis:
    """A decision, and the keyslot areas that it looks into; those that a credential needs must be among them."""

    areas: Areas
    decide: Callable[[Snapshot], Change]


@dataclass(frozen=True, slots=True)
class Committed:
    """What a transaction did to which volume: the change, and the sequence numbers before and after it."""

    uuid: str
    change: Change
    seqid_before: int
    seqid_after: int


@dataclass(frozen=True, slots=True)
class Mended:
    """A volume after its repairs, and what they have changed."""

    view: DeviceView
    differences: tuple[Difference, ...]


async def nothing_to_deliver() -> None:
    """A ``Deliver`` for a change that generates no secret."""


class Transactor:
    """Runs transactions with the ports of ``host``."""

    def __init__(self, host: Host, *, attempts: int = ATTEMPTS) -> None:
        """``attempts``: how often a transaction may be overtaken before it gives up with ``Conflict``."""
        self._host = host
        self._access = Access(host)
        self._audit = Audit(host)
        self._attempts = attempts
        self._held: frozenset[DeviceIdentity] = frozenset()

    async def look(self, ref: DeviceRef) -> DeviceView:
        """The volume as it is now."""
        async with self.opened(ref) as device:
            return await self.look_at(ref, device)

    async def look_at(self, ref: DeviceRef, device: HeaderDevice) -> DeviceView:
        """The same for one that is open."""
        return (await self._access.snapshot(ref, device, no_areas)).view

    async def read(self, ref: DeviceRef, areas: Areas) -> Snapshot:
        """The volume as it is now, with some of its areas."""
        async with self.opened(ref) as device:
            return await self._access.snapshot(ref, device, areas)

    async def read_lost(self, ref: DeviceRef, length: int, headers: int) -> bytes:
        """The bytes where the header copies were of a device that has lost both (``snapshot.read_lost``)."""
        async with self.opened(ref) as device:
            return await self._access.read_lost(ref, device, length, headers)

    def opened(self, ref: DeviceRef) -> AbstractAsyncContextManager[HeaderDevice]:
        """The header device, open for reading."""
        return self._access.opened(ref)

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
        basis = Basis(unlocking_areas, lambda snapshot: decide(snapshot.view))
        return await self.run_on(ref, basis, secrets, progress, deliver)

    async def run_on(
        self,
        ref: DeviceRef,
        basis: Basis,
        secrets: Mapping[str, SecretSource],
        progress: Progress = ignore,
        deliver: Deliver = nothing_to_deliver,
    ) -> Committed:
        """The same for a decision that looks into keyslot areas."""

        async def work(point: PointOfNoReturn) -> Committed:
            async with self.opened(ref) as device:
                progress(Stage.LOCKING)
                async with self._job(device):
                    policy.check_signatures(tuple(await self._host.probe.foreign(device)))
                    await self._finish_crashed(ref, device)
                    progress(Stage.READING)
                    target = Target(ref, device, point, progress, volume_key=VOLUME_KEY in secrets)
                    return await self._change(target, basis, secrets, deliver)

        return await cancellable(work)

    async def revive(
        self,
        ref: DeviceRef,
        decide: Callable[[bytes], Change],
        secrets: Mapping[str, SecretSource],
        size: tuple[int, int],
        progress: Progress = ignore,
    ) -> Committed:
        """Give a header to a device that has lost both copies of its own, as ``run`` would change one.

        ``decide`` is given what is where they were; its change has a start.  ``size``: bytes of the header area, and
        of both copies.  Raises also what ``snapshot.read_lost`` raises.
        """

        async def work(point: PointOfNoReturn) -> Committed:
            async with self.opened(ref) as device:
                progress(Stage.LOCKING)
                async with self._host.locks.job(device):
                    policy.check_signatures(tuple(await self._host.probe.foreign(device)))
                    progress(Stage.READING)
                    raw = await self._access.read_lost(ref, device, *size)
                    change = decide(raw)
                    base = _basis_of(change)
                    async with workbench(self._host, base.pair.length, secrets) as bench:
                        result = await bench.edit(base, change, progress)
                    plan = plan_revival(raw, change, result, self._host.entropy.random)
                    await self._access.commit(Target(ref, device, point, progress), plan)
                    progress(Stage.DONE)
                    return Committed(base.view.uuid, change, 0, plan.seqid_after)

        return await cancellable(work)

    @asynccontextmanager
    async def holding(self, refs: Sequence[DeviceRef]) -> AsyncIterator["Transactor"]:
        """Hold the job locks of several volumes; a transactor that works under them.

        Raises ``InvalidRequest`` if one of them is named twice.
        """
        async with AsyncExitStack() as stack:
            devices = {}
            for ref in refs:
                device = await stack.enter_async_context(self.opened(ref))
                if device.identity in devices:
                    raise InvalidRequest(f"cannot take {ref.metadata_path} twice: it is the same as another one")
                devices[device.identity] = device
            # In one order for everybody: two of us that want the same volumes must not wait for each other.
            for identity in sorted(devices, key=str):
                await stack.enter_async_context(self._host.locks.job(devices[identity]))
            held = copy.copy(self)
            held._held = frozenset(devices)
            yield held

    async def settle(self, ref: DeviceRef) -> DeviceView:
        """Finish what a crash left, as ``run`` does before it begins anything new; the volume afterwards."""
        async with self.opened(ref) as device:
            async with self._job(device):
                await self._finish_crashed(ref, device)
            return (await self._access.snapshot(ref, device, no_areas)).view

    def _job(self, device: HeaderDevice) -> AbstractAsyncContextManager[None]:
        return nullcontext() if device.identity in self._held else self._host.locks.job(device)

    async def opened_by(self, ref: DeviceRef, source: SecretSource) -> int:
        """The keyslot that the secret opens, tried on a shadow; raises ``WrongCredential``."""
        snapshot = await self.read(ref, unlocking_areas)
        async with workbench(self._host, snapshot.pair.length, {UNLOCK: source}) as bench:
            bench.fill(snapshot)
            return await bench.session.unlock()

    async def check_volume_key(self, ref: DeviceRef, source: SecretSource) -> None:
        """Raise ``WrongCredential`` unless the secret is the volume key, tried on a shadow."""
        snapshot = await self.read(ref, no_areas)
        async with workbench(self._host, snapshot.pair.length, {VOLUME_KEY: source}) as bench:
            bench.fill(snapshot)
            await bench.session.take_volume_key()

    async def opens(self, ref: DeviceRef, keyslot: Callable[[DeviceView], int], source: SecretSource) -> bool:
        """Whether the secret opens the keyslot that ``keyslot`` picks, tried on a shadow."""
        snapshot = await self.read(ref, lambda seen: (seen.metadata.keyslots[keyslot(seen)].area,))
        async with workbench(self._host, snapshot.pair.length, {UNLOCK: source}) as bench:
            bench.fill(snapshot)
            return await bench.session.opens(keyslot(snapshot.view), UNLOCK)

    async def mend(self, ref: DeviceRef, device: HeaderDevice, rules: Rules) -> Mended:
        """Make every repair that ``reconcile`` knows, one commit each, with the job lock held.

        Needs no secret.  Once the first commit has begun, it cannot be cancelled any more.
        """

        async def work(point: PointOfNoReturn) -> Mended:
            target = Target(ref, device, point, ignore)
            done: tuple[Difference, ...] = ()
            for _ in range(self._attempts):
                snapshot = await self._access.snapshot(ref, device, no_areas)
                heal = reconcile.needs_heal(snapshot.view)
                try:
                    if heal:
                        plan, step = await self._plan_heal(snapshot), reconcile.heal_difference(snapshot.view)
                    elif change := reconcile.repair(snapshot.view, rules):
                        plan, step = await self._plan_repair(snapshot, change), preview(snapshot.view, change)
                    else:
                        return Mended(snapshot.view, done)
                    await self._access.commit(target, plan)
                    done += step
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
        seen = (await self._access.snapshot(ref, device, no_areas)).view
        policy.check_requirements(seen)
        if reconcile.needs_heal(seen) or reconcile.repair(seen, reconcile.CRASHES_ONLY):
            before = reconcile.diagnose(seen, (), reconcile.CRASHES_ONLY)
            try:
                done = await self.mend(ref, device, reconcile.CRASHES_ONLY)
            except LuksrotdError as error:
                if error.outcome is Outcome.COMMITTED:  # a repair was, not what the caller has asked for
                    error.outcome = Outcome.UNCHANGED
                raise
            left = reconcile.diagnose(done.view, (), reconcile.CRASHES_ONLY)
            self._audit.reconciled(ref, seen, done.view, [finding for finding in before if finding not in left])
            heed_cancellation()

    async def _change(
        self, target: Target, basis: Basis, secrets: Mapping[str, SecretSource], deliver: Deliver
    ) -> Committed:
        """With the job lock held: one worker for all attempts, for it can read a secret from a pipe only once."""
        snapshot = await self._access.snapshot(target.ref, target.device, basis.areas)
        basis.decide(snapshot)
        async with workbench(self._host, snapshot.pair.length, secrets) as bench:
            return await self._attempt(target, basis, bench, snapshot, deliver)

    async def _attempt(
        self,
        target: Target,
        basis: Basis,
        bench: Workbench,
        snapshot: Snapshot,
        deliver: Deliver,
    ) -> Committed:
        progress = target.progress
        delivered = False
        for _ in range(self._attempts):
            change = basis.decide(snapshot)
            policy.check_retirement(snapshot.view, change)
            plan = await self._prepare(bench, snapshot, change, progress, volume_key=target.volume_key)
            if not delivered:
                progress(Stage.DELIVERING)
                await deliver()
                delivered = True
            try:
                await self._access.commit(target, plan)
            except Conflict:
                progress(Stage.READING)
                snapshot = await self._access.snapshot(target.ref, target.device, basis.areas)
                continue
            progress(Stage.DONE)
            return Committed(snapshot.view.uuid, change, plan.seqid_before, plan.seqid_after)
        raise Conflict(f"cannot commit: other tools have changed the header {self._attempts} times meanwhile")

    async def _prepare(
        self,
        bench: Workbench,
        snapshot: Snapshot,
        change: Change,
        progress: Progress,
        *,
        volume_key: bool = False,
    ) -> CommitPlan:
        """Let libcryptsetup make the change on the shadow, verify it there, and plan the difference."""
        base = snapshot if change.start is None else _basis_of(change)
        result = await bench.edit(base, change, progress, volume_key=volume_key)
        return plan_commit(snapshot.pair, change, result, self._host.entropy.random)

    async def _plan_repair(self, snapshot: Snapshot, change: Change) -> CommitPlan:
        async with workbench(self._host, snapshot.pair.length, {}) as bench:
            return await self._prepare(bench, snapshot, change, ignore)

    async def _plan_heal(self, snapshot: Snapshot) -> CommitPlan:
        async with workbench(self._host, snapshot.pair.length, {}) as bench:
            return plan_heal(snapshot.pair, await bench.heal(snapshot))


def _basis_of(change: Change) -> Snapshot:
    """What the edits are made on when it is not the device's header."""
    if change.start is None:
        raise Internal("cannot begin: there is no header to start from")
    return Snapshot(view(change.start.pair), change.start.areas)
