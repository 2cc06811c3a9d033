# SPDX-License-Identifier: GPL-2.0-or-later
"""luksrotd in this process, for ``--direct``: the use cases on the real ports, without a bus."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Final

from luksrotd import direct
from luksrotd.ctl import ahead, model, secrets
from luksrotd.ctl.differences import new_generation
from luksrotd.ctl.naming import uuid_of
from luksrotd.errors import DeviceError, InvalidRequest, LockError, NotAuthorized, Outcome
from luksrotd.names import ATOMIC
from luksrotd.ports import DeviceRef, GenerateInto, SecretFd, SecretSource, TokenSource
from luksrotd.rotation.edits import NEW, PBKDF_FOR_RANDOM_KEYS, UNLOCK, VOLUME_KEY, Pbkdf

#: The last stage of an operation (``service.progress.Stage.DONE``): from then on there is nothing to be stopped.
_DONE = "done"
WORKED_ON_AT_ONCE: Final = 16
"""A repair starts a worker; a machine that boots has other things to do as well."""


class Local:
    """``model.Backend`` without a bus."""

    def __init__(self, engine: str = ATOMIC) -> None:
        """``engine``: who writes the header, of ``names.ENGINES``."""
        #: The use cases, for the verbs of ``ctl.offline``.
        self.volumes = direct.volumes(engine, ahead.take)
        self._turns = direct.Turns()
        self._places = asyncio.Semaphore(WORKED_ON_AT_ONCE)
        self._done = False

    async def devices(self) -> Sequence[model.Device]:
        """See ``model.Backend``; raises ``NotAuthorized`` for one who must not read block devices."""
        return [model.Device(node) for node in await direct.scan_in_time()]

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

    async def change(
        self, device: model.Device, request: model.KeyRequest, progress: model.Progress
    ) -> model.KeyChange:
        """See ``model.Backend``."""
        ref, volumes = ref_of(device), self.volumes.at(request.if_generation)
        async with self._prepared(request) as (sources, pbkdf, deliver):
            watched = self.watched(progress)
            anew: dict[str, Any] = {"pbkdf": pbkdf, "progress": watched, "deliver": deliver}
            name: dict[str, Any] = {"name": request.name}
            match request.verb:
                case "enroll":
                    done = await volumes.enroll(ref, sources, data=request.data or {}, **anew, **name)
                case "rotate":
                    done = await volumes.rotate(ref, sources, data=request.data, **anew, **name)
                case "recreate":
                    done = await volumes.recreate(ref, sources, data=request.data, **anew, **name)
                case "stage":
                    hold = direct.Hold(_expiry(request))
                    done = await volumes.stage(ref, sources, data=request.data, hold=hold, **anew, **name)
                case "finish" | "abort":
                    use = volumes.abort if request.verb == "abort" else volumes.finish
                    group = await self._set_of(ref, request.name) if request.alone else None
                    done = await use(ref, generation=request.generation, group=group, progress=watched, **name)
                case "remove":
                    done = await volumes.remove(ref, sources, progress=watched, **name)
                case "set-data":
                    done = await volumes.set_data(ref, request.data or {}, progress=watched, **name)
                case "adopt":
                    assert request.keyslot is not None  # noqa: S101 -- for mypy: the command line has it
                    adopted: dict[str, Any] = {"data": request.data or {}, "progress": watched}
                    done = await volumes.adopt(ref, request.keyslot, sources, **adopted, **name)
                case "release":
                    done = await volumes.release(ref, progress=watched, **name)
                case _:
                    raise InvalidRequest(f"cannot {request.verb} a key")
        return _changed_key(done)

    async def plan(self, device: model.Device, verb: str, name: str) -> model.Planned:
        """See ``model.Backend``."""
        with permissions():
            planned = await direct.plan(self.volumes, ref_of(device), verb, name)
        differences = [
            model.Difference(one.what, one.name, one.how, one.before, one.after) for one in planned.differences
        ]
        return model.Planned(planned.seqid, new_generation(differences, name))

    async def change_set(
        self, devices: Sequence[model.Device], request: model.KeyRequest, progress: model.Progress
    ) -> model.SetChange:
        """See ``model.Backend``."""
        sets, refs = direct.sets(ahead.take), [ref_of(device) for device in devices]
        async with self._prepared(request) as (sources, pbkdf, deliver):
            watched = self.watched(progress)
            if request.verb == "stage":
                wanted = direct.set_request(
                    request.data, pbkdf, request.name, request.set, _expiry(request), request.keep
                )
                done = await sets.stage(refs, sources, wanted, progress=watched, deliver=deliver)
            else:
                use = sets.abort if request.verb == "abort" else sets.finish
                done = await use(refs, name=request.name, group=request.set, progress=watched)
        members = [
            model.MemberChange(str(one.happened), _changed_key(one.change) if one.change else None, one.error)
            for one in done.members
        ]
        state = None if done.state is None else str(done.state)
        return model.SetChange(done.name, done.group.id, done.group.size, state, members)

    async def set_status(self, devices: Sequence[model.Device], name: str, group: str | None) -> model.SetStatus:
        """See ``model.Backend``."""
        with permissions():
            found = await direct.sets().status([ref_of(device) for device in devices], name=name, group=group)
        members = [
            model.SetMember(one.uuid, str(one.standing), one.generation, one.keyslot, one.why) for one in found.members
        ]
        set_id, size = (found.group.id, found.group.size) if found.group else (None, None)
        return model.SetStatus(
            found.name, set_id, size, str(found.state), sorted(map(str, found.steps)), found.why, members
        )

    async def scrub(self, device: model.Device, progress: model.Progress, if_generation: int | None = None) -> int:
        """See ``model.Backend``."""
        with permissions():
            volumes = self.volumes.at(if_generation)
            return (await volumes.scrub(ref_of(device), progress=self.watched(progress))).bytes

    async def verify(self, device: model.Device, name: str, credential: model.Credential) -> bool:
        """See ``model.Backend``."""
        with permissions():
            return await self.volumes.verify(ref_of(device), _source(credential), name=name)

    async def reconcile(self, device: model.Device, *, dry_run: bool, retire_expired: bool = False) -> model.Reconciled:
        """See ``model.Backend``."""
        with permissions():
            ref = ref_of(device)
            turn = partial(self._turn, ref)
            done = await self.volumes.reconcile(ref, dry_run=dry_run, retire_expired=retire_expired, turn=turn)
        differences = [
            model.Difference(one.what, one.name, one.how, dict(one.before), dict(one.after)) for one in done.differences
        ]
        return model.Reconciled(_findings(done.found), _findings(done.left), differences)

    @asynccontextmanager
    async def _turn(self, ref: DeviceRef) -> AsyncIterator[None]:
        async with self._turns.of(ref), self._places:  # who waits for another node of the volume takes no place
            yield

    async def history(self, device: model.Device | None, since: int, limit: int) -> Sequence[Mapping[str, Any]]:
        """See ``model.Backend``."""
        uuid = "" if device is None else uuid_of(device.name)
        if device is not None and not uuid:
            with permissions():
                uuid = (await self.volumes.look(ref_of(device))).uuid
        return await direct.history(uuid or "", since, limit)

    def interrupt(self, task: asyncio.Task[Any]) -> None:
        """Cancel; the commit ignores it after its point of no return, and so does this when all is done."""
        if not self._done:
            task.cancel()

    async def close(self) -> None:
        """Nothing to let go of."""

    async def _set_of(self, ref: DeviceRef, name: str) -> str | None:
        staged = [key.token for key in (await self.volumes.look(ref)).named(name) if key.token.state == "staged"]
        return staged[0].group.id if len(staged) == 1 and staged[0].group else None

    @asynccontextmanager
    async def _prepared(
        self, request: model.KeyRequest
    ) -> AsyncIterator[tuple[Mapping[str, SecretSource], Pbkdf, Callable[[], Awaitable[None]]]]:
        """The secrets of ``request``, the cost of the new key, and what hands over a generated one."""
        sources: dict[str, SecretSource] = {}
        if request.credential is not None:
            sources[VOLUME_KEY if request.volume_key else UNLOCK] = _source(request.credential)
        with permissions():
            if request.new is None or isinstance(request.new, int):
                if request.new is not None:
                    sources[NEW] = SecretFd(request.new)
                yield sources, request.pbkdf or Pbkdf(), _nothing
                return
            with secrets.memfd() as fd:
                delivery = request.new

                async def deliver() -> None:
                    delivery.deliver(fd)

                sources[NEW] = GenerateInto(fd)
                yield sources, request.pbkdf or PBKDF_FOR_RANDOM_KEYS, deliver

    def watched(self, progress: model.Progress) -> model.Progress:
        """``progress``, with an eye on the end: see ``interrupt``."""

        def entered(step: str) -> None:
            self._done = step == _DONE
            progress(step)

        return entered


async def _nothing() -> None:
    pass


def _source(credential: model.Credential) -> SecretSource:
    if isinstance(credential, int):
        return SecretFd(credential)
    return TokenSource(credential.number, None if credential.pin is None else SecretFd(credential.pin))


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


def _expiry(request: model.KeyRequest) -> timedelta | None:
    """After what time a staged key counts as forgotten."""
    if request.expires is None:
        return direct.Hold().expires_after
    return timedelta(seconds=request.expires) if request.expires else None


def _changed_key(change: Any) -> model.KeyChange:
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
