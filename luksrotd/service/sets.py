# SPDX-License-Identifier: GPL-2.0-or-later
"""The same new key for a set of volumes: staged on all of them before it is finished on any (``rotation.sets``).

The job locks of all volumes are held meanwhile.  The set has no state of its own: every volume says in its token which
set it belongs to, so whatever is interrupted is taken up again by the same call.
"""

import os
import stat
from collections.abc import Mapping, Sequence
from typing import Final

from luksrotd.errors import Conflict, InvalidRequest, LuksrotdError, SecretRejected, WrongCredential
from luksrotd.names import DEFAULT_KEY_NAME
from luksrotd.ports import DeviceRef, GenerateInto, Host, SecretFd, SecretSource, TokenSource
from luksrotd.rotation import policy, sets, staging
from luksrotd.rotation.edits import NEW
from luksrotd.rotation.keys import RotateRequest
from luksrotd.rotation.lineage import lineage
from luksrotd.rotation.sets import SetStatus, Standing, Step
from luksrotd.rotation.staging import StageRequest
from luksrotd.rotation.token import Group
from luksrotd.rotation.view import DeviceView
from luksrotd.service.progress import Progress, ignore
from luksrotd.service.setwork import SetRequest, SetResult, Work
from luksrotd.service.transaction import Deliver, Transactor, nothing_to_deliver

#: Random bytes in the id of a set.
ID_BYTES: Final = 8


class VolumeSets:
    """The use cases on sets of volumes.  What is refused on one volume is refused before anything is written."""

    def __init__(self, host: Host, transactor: Transactor | None = None) -> None:
        self._host = host
        self._transactor = transactor or Transactor(host)

    async def status(
        self, refs: Sequence[DeviceRef], *, name: str = DEFAULT_KEY_NAME, group: str | None = None
    ) -> SetStatus:
        """Where the set stands now."""
        return sets.status([await self._transactor.look(ref) for ref in refs], name, group)

    async def stage(
        self,
        refs: Sequence[DeviceRef],
        secrets: Mapping[str, SecretSource],
        request: SetRequest,
        *,
        progress: Progress = ignore,
        deliver: Deliver = nothing_to_deliver,
    ) -> SetResult:
        """Put a new generation, with the same secret, beside the current one of every volume.

        Where it is staged already, the secret must open it.  The secrets are read for each volume, so they must be
        files or memfds; one that is to be generated is generated once.  A cancel undoes as an error does.
        """
        for source in secrets.values():
            _check_repeatable(source)
        async with self._transactor.holding(refs) as transactor:
            views = [await transactor.settle(ref) for ref in refs]
            found_id = request.group or sets.under_way(views, request.name) or self._host.entropy.random(ID_BYTES).hex()
            found = sets.status(views, request.name, found_id)
            sets.check(found, Step.STAGE)
            work = Work(self._host, transactor, refs, Group(found_id, len(refs)), found, progress)
            await self._check(work, views, request, secrets[NEW])
            await work.stage(secrets, request, deliver)
            return await work.result()

    async def finish(
        self,
        refs: Sequence[DeviceRef],
        *,
        name: str = DEFAULT_KEY_NAME,
        group: str | None = None,
        progress: Progress = ignore,
    ) -> SetResult:
        """Make the staged key the only one, on one volume after the other; only if it is staged on all of them.

        Once it is finished on one, an error on another does not keep the rest from their turn: there is no way back.
        """
        return await self._end(refs, Step.FINISH, name, group, progress)

    async def abort(
        self,
        refs: Sequence[DeviceRef],
        *,
        name: str = DEFAULT_KEY_NAME,
        group: str | None = None,
        progress: Progress = ignore,
    ) -> SetResult:
        """Take back the staged key on all volumes; only if it is finished on none of them."""
        return await self._end(refs, Step.ABORT, name, group, progress)

    async def _end(
        self, refs: Sequence[DeviceRef], step: Step, name: str, group: str | None, progress: Progress
    ) -> SetResult:
        async with self._transactor.holding(refs) as transactor:
            found = sets.status([await transactor.settle(ref) for ref in refs], name, group)
            sets.check(found, step)
            if found.group is None:
                raise InvalidRequest(f"cannot {step} key {name!r} on the set: no volume belongs to one")
            work = Work(self._host, transactor, refs, found.group, found, progress)
            await work.end(step)
            return await work.result()

    async def _check(self, work: Work, views: Sequence[DeviceView], request: SetRequest, secret: SecretSource) -> None:
        """Everything that can be refused before the first write; raises the refusal, with the volume's name."""
        rotation = RotateRequest(request.data, self._host.clock.now(), request.pbkdf, request.name)
        wanted = StageRequest(rotation, None, work.group)
        for ref, seen, member in zip(work.refs, views, work.found.members, strict=True):
            try:
                if member.standing is Standing.OLD:
                    async with work.transactor.opened(ref) as device:
                        policy.check_signatures(tuple(await self._host.probe.foreign(device)))
                    staging.stage(seen, wanted)
                elif isinstance(secret, GenerateInto):
                    raise InvalidRequest("cannot go on with another key: the first one is staged; give it, or abort")
                elif not await work.transactor.opens(ref, lambda now: _staged_keyslot(now, request.name), secret):
                    raise WrongCredential("cannot go on with this key: another one is staged; give it, or abort")
            except LuksrotdError as error:
                raise type(error)(f"{error.message} ({ref.path})", outcome=error.outcome) from error


def _check_repeatable(source: SecretSource) -> None:
    """Raise ``SecretRejected`` for what can be read only once."""
    if isinstance(source, TokenSource) and source.pin is not None:
        _check_repeatable(source.pin)
    if isinstance(source, SecretFd):
        mode = os.fstat(source.fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise SecretRejected(
                "cannot use this secret for several volumes: it can be read only once; give a file or a memfd"
            )


def _staged_keyslot(seen: DeviceView, name: str) -> int:
    staged = lineage(seen, name).staged
    if staged is None or staged.keyslot is None:
        raise Conflict("cannot go on: another tool has changed the header meanwhile")
    return staged.keyslot.id
