# SPDX-License-Identifier: GPL-2.0-or-later
"""The use cases of the stepwise engine: those of ``service.volume``, but nobody but libcryptsetup writes the header."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from luksrotd.names import DEFAULT_KEY_NAME, STEPWISE
from luksrotd.ports import DeviceRef, Host, LiveEngine
from luksrotd.rotation import policy, stepwise
from luksrotd.rotation.edits import Pbkdf
from luksrotd.rotation.keys import EnrollRequest, RotateRequest
from luksrotd.rotation.staging import StageRequest
from luksrotd.rotation.stepwise import Steps
from luksrotd.rotation.view import DeviceView
from luksrotd.service import audit
from luksrotd.service.live import Decide, Stepper
from luksrotd.service.progress import Progress, ignore
from luksrotd.service.transaction import Deliver, nothing_to_deliver
from luksrotd.service.volume import DEFAULT_HOLD, Hold, KeyChange, Run, Sources, Volumes


class StepwiseVolumes(Volumes):
    """The use cases on the ports of ``host``; those that change a key by libcryptsetup on the device itself.

    What is not here (adoption, recreation, restore, reconcile, scrub) is as ever.
    """

    def __init__(self, host: Host, live: LiveEngine) -> None:
        super().__init__(host)
        self._stepper = Stepper(host, live)

    async def enroll(
        self,
        ref: DeviceRef,
        secrets: Sources,
        *,
        data: Mapping[str, Any],
        pbkdf: Pbkdf,
        name: str = DEFAULT_KEY_NAME,
        progress: Progress = ignore,
        deliver: Deliver = nothing_to_deliver,
    ) -> KeyChange:
        """Give the volume a managed key: the token first, then its keyslot."""
        request = EnrollRequest(data, self._now(), pbkdf, name)
        run = Run(audit.ENROLL, secrets, progress, deliver)
        return await self._take(ref, name, lambda seen: stepwise.enroll(seen, request), run)

    async def rotate(
        self,
        ref: DeviceRef,
        secrets: Sources,
        *,
        data: Mapping[str, Any] | None,
        pbkdf: Pbkdf,
        name: str = DEFAULT_KEY_NAME,
        progress: Progress = ignore,
        deliver: Deliver = nothing_to_deliver,
    ) -> KeyChange:
        """Replace a managed key: the new pair first, which says that it replaces the old one, which goes then."""
        request = RotateRequest(data, self._now(), pbkdf, name)
        run = Run(audit.ROTATE, secrets, progress, deliver)
        return await self._take(ref, name, lambda seen: stepwise.rotate(seen, request), run)

    async def stage(
        self,
        ref: DeviceRef,
        secrets: Sources,
        *,
        data: Mapping[str, Any] | None,
        pbkdf: Pbkdf,
        name: str = DEFAULT_KEY_NAME,
        hold: Hold = DEFAULT_HOLD,
        progress: Progress = ignore,
        deliver: Deliver = nothing_to_deliver,
    ) -> KeyChange:
        """Put a new generation of a managed key beside the current one; both open the volume until ``finish``."""
        now = self._now()
        expires = None if hold.expires_after is None else now + hold.expires_after
        request = StageRequest(RotateRequest(data, now, pbkdf, name), expires, hold.group)
        run = Run(audit.STAGE, secrets, progress, deliver, hold.group.id if hold.group else None)
        return await self._take(ref, name, lambda seen: stepwise.stage(seen, request), run)

    async def finish(
        self,
        ref: DeviceRef,
        *,
        name: str = DEFAULT_KEY_NAME,
        generation: int | None = None,
        group: str | None = None,
        progress: Progress = ignore,
    ) -> KeyChange:
        """The staged generation becomes the only one; needs no secret."""
        run = Run(audit.FINISH, {}, progress, group=group)
        return await self._take(ref, name, lambda seen: stepwise.finish(seen, name, generation, group), run)

    async def abort(
        self,
        ref: DeviceRef,
        *,
        name: str = DEFAULT_KEY_NAME,
        generation: int | None = None,
        group: str | None = None,
        progress: Progress = ignore,
    ) -> KeyChange:
        """The staged generation goes; needs no secret."""
        run = Run(audit.ABORT, {}, progress, group=group)
        return await self._take(ref, name, lambda seen: stepwise.abort(seen, name, generation, group), run)

    async def remove(
        self, ref: DeviceRef, secrets: Sources, *, name: str = DEFAULT_KEY_NAME, progress: Progress = ignore
    ) -> KeyChange:
        """Keyslot and token of a managed key go; the credential must open another keyslot."""
        run = Run(audit.REMOVE, secrets, progress)
        return await self._take(ref, name, lambda seen: stepwise.remove(seen, name), run)

    async def set_data(
        self, ref: DeviceRef, data: Mapping[str, Any], *, name: str = DEFAULT_KEY_NAME, progress: Progress = ignore
    ) -> KeyChange:
        """Other associated data for the same key."""
        run = Run(audit.SET_DATA, {}, progress)
        return await self._take(ref, name, lambda seen: stepwise.set_data(seen, name, data), run)

    async def _take(self, ref: DeviceRef, name: str, decide: Decide, run: Run) -> KeyChange:
        def unless_stale(seen: DeviceView) -> Steps:
            policy.check_sequence(seen, self._only_at)
            return decide(seen)

        verb = replace(run.verb, done=f"{run.verb.done} in steps")
        with self.audit.change(verb, ref, name, group=run.group, engine=STEPWISE) as account:
            done = await self._stepper.run(
                ref, account.following(unless_stale), run.secrets, account.progress(run.progress), run.deliver
            )
            steps = done.steps
            account.done(
                done.uuid,
                generation=steps.generation,
                keyslot=-1 if steps.keyslot is None else steps.keyslot,
                seqid_before=done.seqid_before,
                seqid_after=done.seqid_after,
            )
        return KeyChange(done.uuid, name, steps.generation, steps.keyslot, done.seqid_before, done.seqid_after)
