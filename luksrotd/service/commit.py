# SPDX-License-Identifier: GPL-2.0-or-later
"""Carry out a commit plan: the only caller of ``HeaderDevice.write``.

Synchronous, to be run in a thread, with libcryptsetup's exclusive metadata lock held.
"""

from collections.abc import Callable

from luksrotd.errors import Conflict, ConsistencyError, DeviceError, Outcome
from luksrotd.ports import HeaderDevice
from luksrotd.rotation.protocol import CommitPlan, Phase, Step

#: Called before the first write of each phase; may raise until the point of no return has been entered.
Entered = Callable[[Phase], None]


def run(plan: CommitPlan, device: HeaderDevice, entered: Entered) -> None:
    """Write the steps of ``plan`` in their order, each followed by a checked flush, and read back what was written.

    Raises ``Conflict`` if the device does not hold ``plan.base`` and ``plan.held`` (nothing has been written),
    ``DeviceError`` or ``ConsistencyError`` with the outcome that the device shows afterwards.
    """
    try:
        _settle(plan, device)
        for step in plan.steps:
            entered(step.phase)
            if plan.before_wipe(step.phase):
                _check_headers(plan, device, plan.committed)
            _write(step, device)
            _check_written(plan, device, step)
        _check_headers(plan, device, plan.final)
    except DeviceError as error:
        # Never retried: a flush that succeeds after one that failed means nothing.  Look at what is true instead.
        raise DeviceError(error.message, outcome=_truth(plan, device)) from error


def _settle(plan: CommitPlan, device: HeaderDevice) -> None:
    """Build on what is on the medium: a process that was killed may have left a header that was never flushed.

    A header phase would share its epoch with that one, and both copies could be torn.  A new area may: its flush
    comes before any header is written.
    """
    if Phase.NEW_AREA not in {step.phase for step in plan.steps}:
        device.flush()
    if device.read_medium(0, len(plan.base)) != plan.base:
        raise Conflict("cannot commit: another tool has changed the header meanwhile")
    if any(device.read_medium(there.offset, len(there.data)) != there.data for there in plan.held):
        raise Conflict("cannot commit: another tool has changed a keyslot meanwhile")


def _write(step: Step, device: HeaderDevice) -> None:
    for write in step.writes:
        device.write(write.offset, write.data)
    device.flush()


def _check_written(plan: CommitPlan, device: HeaderDevice, step: Step) -> None:
    """No step is built on one that the medium does not hold: a device may lose a write, and report success.

    A header that names a lost area would be the death of the key: reconcile would go forward, and wipe the old one.
    """
    if any(device.read_medium(write.offset, len(write.data)) != write.data for write in step.writes):
        raise ConsistencyError(f"cannot read back what was written ({step.phase})", outcome=_truth(plan, device))


def _check_headers(plan: CommitPlan, device: HeaderDevice, headers: bytes) -> None:
    """Pair assertion: both copies are, as a whole, what a reader after a reboot is to find."""
    if device.read_medium(0, len(headers)) != headers:
        raise ConsistencyError("cannot read back the header that was written", outcome=_truth(plan, device))


def _truth(plan: CommitPlan, device: HeaderDevice) -> Outcome:
    """What the device holds, if the medium and the page cache, which may differ after a failed flush, agree on it."""
    try:
        medium, cached = device.read_medium(0, len(plan.base)), device.read(0, len(plan.base))
    except DeviceError:
        return Outcome.UNKNOWN
    return plan.outcome(medium) if medium == cached else Outcome.UNKNOWN
