# SPDX-License-Identifier: GPL-2.0-or-later
"""Carry out the steps of ``rotation.stepwise`` on the device itself, by libcryptsetup (docs/spec/stepwise.md).

Nothing here writes.  libcryptsetup ignores failed flushes, and may report an error of a change that was made, so after
every step both header copies are read back, past the page cache too, and compared with what the step should have done.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from luksrotd.errors import (
    Conflict,
    ConsistencyError,
    DeviceError,
    EngineError,
    LuksrotdError,
    NeedsReconcile,
    Outcome,
)
from luksrotd.luks2.areas import Extent
from luksrotd.ports import DeviceRef, EngineSession, HeaderDevice, Host, LiveEngine, SecretSource
from luksrotd.records import dataclass
from luksrotd.rotation import policy, reconcile, stepwise
from luksrotd.rotation.edits import VOLUME_KEY, AddKeyslot, DestroyKeyslot, Edit
from luksrotd.rotation.protocol import Phase
from luksrotd.rotation.stepwise import Steps
from luksrotd.rotation.view import DeviceView
from luksrotd.service.audit import Audit
from luksrotd.service.cancellation import PointOfNoReturn, cancellable, heed_cancellation
from luksrotd.service.progress import Progress, Stage, ignore
from luksrotd.service.shadowing import unlock
from luksrotd.service.snapshot import Snapshot, no_areas, read_snapshot
from luksrotd.service.threads import in_thread
from luksrotd.service.transaction import ATTEMPTS, Deliver, nothing_to_deliver

Decide = Callable[[DeviceView], Steps]


@dataclass(frozen=True, slots=True)
class Stepped:
    """What the steps did to which volume; the sequence numbers before and after them."""

    uuid: str
    steps: Steps
    seqid_before: int
    seqid_after: int


@dataclass(slots=True)
class _Volume:
    """What one operation works on, and how many of its steps are on the device."""

    ref: DeviceRef
    device: HeaderDevice
    point: PointOfNoReturn
    progress: Progress = ignore
    made: int = 0


class Stepper:
    """Runs steps with the ports of ``host``, on ``live``."""

    def __init__(self, host: Host, live: LiveEngine, *, attempts: int = ATTEMPTS) -> None:
        self._host = host
        self._audit = Audit(host)
        self._live = live
        self._attempts = attempts

    async def run(
        self,
        ref: DeviceRef,
        decide: Decide,
        secrets: Mapping[str, SecretSource],
        progress: Progress = ignore,
        deliver: Deliver = nothing_to_deliver,
    ) -> Stepped:
        """Take the steps that ``decide`` wants; as ``Transactor.run``.

        ``deliver`` is awaited before anything is written.  Cancelling it before the first step leaves the device as it
        was; afterwards it runs to its end.
        """

        async def work(point: PointOfNoReturn) -> Stepped:
            # Writable, because only such a descriptor is told of write errors (fdatasync); it writes nothing.
            async with self._opened(ref) as device:
                progress(Stage.LOCKING)
                async with self._host.locks.job(device):
                    policy.check_signatures(tuple(await self._host.probe.foreign(device)))
                    progress(Stage.READING)
                    await self._settle(ref, device)
                    decide((await self._look(ref, device)).view)
                    volume = _Volume(ref, device, point, progress)
                    async with self._live.session(device, secrets) as session:
                        return await self._attempt(volume, session, decide, deliver, volume_key=VOLUME_KEY in secrets)

        return await cancellable(work)

    async def _attempt(
        self, volume: _Volume, session: EngineSession, decide: Decide, deliver: Deliver, *, volume_key: bool
    ) -> Stepped:
        delivered = False
        for _ in range(self._attempts):
            before = await self._loaded(volume, session)
            steps = decide(before.view)
            policy.check_retirement(before.view, steps.change)
            volume.progress(Stage.DERIVING)
            if steps.change.needs_unlock:
                await unlock(session, steps.change, volume_key=volume_key)
            if not delivered:
                volume.progress(Stage.DELIVERING)
                await deliver()
                delivered = True
            if (await self._loaded(volume, session)).pair.raw != before.pair.raw:
                continue  # another tool was faster
            after = await self._carry_out(volume, session, before, steps)
            volume.progress(Stage.DONE)
            return Stepped(before.view.uuid, steps, before.view.seqid, after.view.seqid)
        raise Conflict(f"cannot begin: other tools have changed the header {self._attempts} times meanwhile")

    async def _carry_out(self, volume: _Volume, session: EngineSession, before: Snapshot, steps: Steps) -> Snapshot:
        volume.point.pass_it()
        try:
            return await self._steps(volume, session, before, steps)
        except LuksrotdError as error:
            error.outcome = await self._clean_up(volume, steps, error)
            if isinstance(error, Conflict) and error.outcome is Outcome.COMMITTED:
                return await self._look(volume.ref, volume.device)
            raise

    async def _steps(self, volume: _Volume, session: EngineSession, before: Snapshot, steps: Steps) -> Snapshot:
        """Raises an error whose ``outcome`` says what the device shows."""
        current = before
        for number, edit in enumerate(steps.edits):
            volume.progress(_phase(number, edit))
            try:
                current = await self._step(volume, session, current, edit)
                if isinstance(edit, AddKeyslot) and not await self._is_born(volume, session, current, edit):
                    await self._withdraw(volume, session, current, edit)
            except LuksrotdError as error:
                if error.outcome is not Outcome.UNKNOWN:
                    error.outcome = steps.outcome(volume.made)
                raise
        return current

    async def _is_born(self, volume: _Volume, session: EngineSession, current: Snapshot, added: AddKeyslot) -> bool:
        """Whether the new secret opens the new keyslot, and would after a reboot."""
        area = current.view.metadata.keyslots[added.keyslot].area
        return await self._landed(volume.device, area) and await session.opens(added.keyslot, added.secret)

    async def _landed(self, device: HeaderDevice, area: Extent) -> bool:
        """Whether the medium holds what the page cache shows there: libcryptsetup ignores a flush that failed."""

        def same() -> bool:
            return device.read_medium(area.offset, area.size) == device.read(area.offset, area.size)

        async with self._host.locks.metadata(device, exclusive=False):
            return await in_thread(same, about=device.path)

    async def _withdraw(self, volume: _Volume, session: EngineSession, current: Snapshot, added: AddKeyslot) -> None:
        """Before the old pair is touched: the new one is no good.  Raises ``ConsistencyError``."""
        assert added.token is not None  # noqa: S101 - all that ``stepwise`` adds are born with one
        for edit in stepwise.withdraw(current.view, added.token).edits:
            current = await self._step(volume, session, current, edit)
        volume.made = 0
        raise ConsistencyError(f"cannot open the new keyslot {added.keyslot} with its own secret from the medium")

    async def _step(self, volume: _Volume, session: EngineSession, before: Snapshot, edit: Edit) -> Snapshot:
        """One edit, and the volume after it.

        Raises an error of outcome ``UNKNOWN`` if the device does not show clearly whether it was made; else
        ``volume.made`` tells.
        """
        if await session.load() != before.view.metadata.raw:
            raise Conflict("cannot go on: another tool has changed the header meanwhile")
        failure: LuksrotdError | None = None
        try:
            await session.apply([edit])
        except LuksrotdError as error:
            failure = error
        try:
            after = await self._look(volume.ref, volume.device)
            made = stepwise.made(before.pair, after.pair, edit)
            if made and isinstance(edit, DestroyKeyslot):
                await self._check_wiped(volume.device, before.view.metadata.keyslots[edit.keyslot].area)
        except LuksrotdError as error:
            if failure is None:
                error.outcome = Outcome.UNKNOWN
                raise
            failure.outcome = Outcome.UNKNOWN
            raise failure from error
        volume.made += made
        if failure is not None:
            raise failure
        if not made:
            raise EngineError("cannot go on: libcryptsetup reports a change that it has not made")
        return after

    async def _check_wiped(self, device: HeaderDevice, area: Extent) -> None:
        """Raise ``ConsistencyError`` if the medium still holds the key that went."""
        if not await self._landed(device, area):
            raise ConsistencyError(
                f"cannot wipe {area.size} bytes at {area.offset}: the medium still holds a retired key"
            )

    async def _clean_up(self, volume: _Volume, steps: Steps, error: LuksrotdError) -> Outcome:
        """Take back, or finish, what a failure has cut short; what is true then.

        Not after an error that may be the device's: nothing is written to it again by itself.
        """
        at_an_end = error.outcome in (Outcome.UNCHANGED, Outcome.COMMITTED)
        if at_an_end or isinstance(error, DeviceError) or type(error) in (EngineError, ConsistencyError):
            return error.outcome
        try:
            await self._settle(volume.ref, volume.device)
            seen = (await self._look(volume.ref, volume.device)).view
        except LuksrotdError:
            return error.outcome
        return Outcome.COMMITTED if stepwise.reached(seen, steps) else Outcome.UNCHANGED

    async def _settle(self, ref: DeviceRef, device: HeaderDevice) -> None:
        """Let libcryptsetup recover a header copy, and finish what earlier steps have left, before anything is begun.

        Once the first of these steps has begun, it cannot be cancelled any more.
        """

        async def work(point: PointOfNoReturn) -> None:
            found: DeviceView | None = None
            for _ in range(self._attempts):
                seen = (await self._look(ref, device)).view
                found = found or seen
                policy.check_requirements(seen)
                if seen.pair.doubt:
                    raise NeedsReconcile(f"cannot tell which header copy is in force: {seen.pair.doubt}")
                if seen.pair.agree and stepwise.leftovers(seen) is None:
                    self._record(ref, found, seen)
                    return
                try:
                    await self._settle_once(_Volume(ref, device, point))
                except Conflict:
                    continue
            raise Conflict("cannot begin: other tools keep changing the header")

        await cancellable(work)
        heed_cancellation()

    def _record(self, ref: DeviceRef, before: DeviceView, after: DeviceView) -> None:
        left = reconcile.diagnose(after, (), reconcile.CRASHES_ONLY)
        gone = [one for one in reconcile.diagnose(before, (), reconcile.CRASHES_ONLY) if one not in left]
        if before.pair.raw != after.pair.raw:
            self._audit.reconciled(ref, before, after, gone)

    async def _settle_once(self, volume: _Volume) -> None:
        async with self._live.session(volume.device, {}) as session:
            current = await self._loaded(volume, session)  # a copy that is bad or older has been rewritten by this
            steps = stepwise.leftovers(current.view)
            policy.check_writable(current.view)
            if steps is None:
                return
            policy.check_retirement(current.view, steps.change)
            volume.point.pass_it()
            for edit in steps.edits:
                current = await self._step(volume, session, current, edit)

    async def _loaded(self, volume: _Volume, session: EngineSession) -> Snapshot:
        """The volume as libcryptsetup has loaded it; it must read the header as we do."""
        for _ in range(self._attempts):
            loaded = await session.load()
            snapshot = await self._look(volume.ref, volume.device)
            if snapshot.view.metadata.raw == loaded:
                return snapshot
        raise ConsistencyError("cannot use the header: libcryptsetup reads it otherwise")

    async def _look(self, ref: DeviceRef, device: HeaderDevice) -> Snapshot:
        """The header as it is on the medium; raises ``DeviceError`` if a write to it has failed."""

        def read() -> Snapshot:
            device.flush()
            snapshot = read_snapshot(ref, device, no_areas)
            if device.read_medium(0, len(snapshot.pair.raw)) != snapshot.pair.raw:
                raise ConsistencyError("cannot read back the header: the medium holds another one than the page cache")
            return snapshot

        async with self._host.locks.metadata(device, exclusive=False):
            return await in_thread(read, about=device.path)

    @asynccontextmanager
    async def _opened(self, ref: DeviceRef) -> AsyncIterator[HeaderDevice]:
        devices = self._host.devices
        device = await in_thread(
            lambda: devices.open(ref, writable=True), about=ref.metadata_path, undo=lambda device: device.close()
        )
        try:
            yield device
        finally:
            device.close()


def _phase(number: int, edit: Edit) -> Phase:
    """What the step of that number is like in the other engine."""
    if isinstance(edit, DestroyKeyslot):
        return Phase.WIPE_OLD
    return Phase.CLEAR_PRIMARY if number > 1 else Phase.HEADER_PRIMARY
