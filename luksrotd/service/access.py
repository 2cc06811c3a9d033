# SPDX-License-Identifier: GPL-2.0-or-later
"""The device of a transaction: read under the shared metadata lock, committed to under the exclusive one."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from luksrotd.errors import DeviceError, LuksrotdError, Outcome
from luksrotd.ports import DeviceRef, HeaderDevice, Host
from luksrotd.records import dataclass
from luksrotd.rotation.protocol import CommitPlan, Phase
from luksrotd.rotation.view import digest
from luksrotd.service import commit
from luksrotd.service.cancellation import PointOfNoReturn
from luksrotd.service.progress import Progress, Stage
from luksrotd.service.snapshot import Areas, Snapshot, read_lost, read_snapshot
from luksrotd.service.threads import in_thread


@dataclass(frozen=True, slots=True)
class Target:
    """What one operation works on: the device, its point of no return, and who follows it."""

    ref: DeviceRef
    device: HeaderDevice
    point: PointOfNoReturn
    progress: Progress
    volume_key: bool = False


class Access:
    """The device as the transactor gets at it, with the ports of ``host``."""

    def __init__(self, host: Host) -> None:
        self._host = host

    @asynccontextmanager
    async def opened(self, ref: DeviceRef) -> AsyncIterator[HeaderDevice]:
        """The header device, open for reading."""
        device = await _open(self._host, ref, writable=False)
        try:
            yield device
        finally:
            device.close()

    async def snapshot(self, ref: DeviceRef, device: HeaderDevice, areas: Areas) -> Snapshot:
        """The volume as it is now, with some of its areas."""
        async with self._host.locks.metadata(device, exclusive=False):
            return await in_thread(lambda: read_snapshot(ref, device, areas), about=device.path)

    async def read_lost(self, ref: DeviceRef, device: HeaderDevice, length: int, headers: int) -> bytes:
        """The bytes where the header copies were of a device that has lost both (``snapshot.read_lost``)."""
        async with self._host.locks.metadata(device, exclusive=False):
            return await in_thread(lambda: read_lost(ref, device, length, headers), about=device.path)

    async def commit(self, target: Target, plan: CommitPlan) -> None:
        """Carry out ``plan``; raises what ``commit.run`` raises, and the errors of the locks."""
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
            why = f"changing the LUKS2 header of {target.ref.metadata_path}"
            await stack.enter_async_context(self._host.inhibitor.held(why))
            async with self._accounted(target, plan):
                await in_thread(lambda: commit.run(plan, writable, entered), about=device.path)

    @asynccontextmanager
    async def _accounted(self, target: Target, plan: CommitPlan) -> AsyncIterator[None]:
        """Tell the ledger of the commit; with the exclusive metadata lock held."""
        uuid, ledger = target.ref.uuid, self._host.ledger
        if uuid is None:  # nobody follows it
            yield
            return
        ledger.writing(uuid, *await in_thread(lambda: (digest(plan.committed), digest(plan.final))))
        try:
            yield
        except BaseException as error:
            if not isinstance(error, LuksrotdError) or error.outcome is Outcome.UNKNOWN:
                ledger.doubt(uuid)
            raise


def _entered(plan: CommitPlan, target: Target) -> Callable[[Phase], None]:
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
    return await in_thread(
        lambda: host.devices.open(ref, writable=writable), about=ref.metadata_path, undo=lambda device: device.close()
    )
