# SPDX-License-Identifier: GPL-2.0-or-later
"""The verbs of a volume, all in one form: what is wanted of one, and the use case that does it."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

from luksrotd.names import DEFAULT_KEY_NAME
from luksrotd.ports import DeviceRef
from luksrotd.rotation.edits import NEW, Pbkdf
from luksrotd.rotation.protocol import Phase
from luksrotd.rotation.view import Summary
from luksrotd.service.handover import Secrets
from luksrotd.service.jobs import Kind
from luksrotd.service.memory import WORKER_KIB, needed_kib
from luksrotd.service.progress import Progress, Stage
from luksrotd.service.volume import DEFAULT_HOLD, Hold, Volumes


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is wanted of a verb; each heeds what is about it.

    ``data`` of ``None`` keeps the associated data, or is none.  ``keyslot``: the one to be adopted.
    ``key_generation``: only if that generation of the key is staged.  ``expires_after``: when a staged key counts as
    forgotten (``None``: never).  ``only_at``: only if the header is at that sequence number.  ``group``: the id of the
    set of volumes that it is staged for.  ``keep``: as of ``setwork.SetRequest``.
    """

    name: str = DEFAULT_KEY_NAME
    data: Mapping[str, Any] | None = None
    pbkdf: Pbkdf = field(default_factory=Pbkdf)
    keyslot: int = 0
    key_generation: int | None = None
    expires_after: timedelta | None = DEFAULT_HOLD.expires_after
    only_at: int | None = None
    group: str | None = None
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A verb on one volume, with its secrets, and who follows it."""

    ref: DeviceRef
    wanted: Wanted
    secrets: Secrets
    progress: Progress


async def carry_out(kind: Kind, volumes: Volumes, call: Call) -> object:
    """The result of the verb; raises what its use case raises."""
    return await _VERBS[kind](volumes.at(call.wanted.only_at), call)


def memory_kib(view: Summary | None, pbkdf: Pbkdf, secrets: Secrets) -> int:
    """What a job with these secrets needs on the volume; ``pbkdf`` is that of the new keyslot, if there is one."""
    if not secrets.sources:
        return WORKER_KIB
    return needed_kib(view, pbkdf) if NEW in secrets.sources else needed_kib(view)


async def _enroll(volumes: Volumes, call: Call) -> object:
    return await volumes.enroll(
        call.ref,
        call.secrets.sources,
        data=call.wanted.data or {},
        pbkdf=call.wanted.pbkdf,
        name=call.wanted.name,
        progress=call.progress,
        deliver=call.secrets.deliver,
    )


async def _rotate(volumes: Volumes, call: Call) -> object:
    return await volumes.rotate(
        call.ref,
        call.secrets.sources,
        data=call.wanted.data,
        pbkdf=call.wanted.pbkdf,
        name=call.wanted.name,
        progress=call.progress,
        deliver=call.secrets.deliver,
    )


async def _stage(volumes: Volumes, call: Call) -> object:
    return await volumes.stage(
        call.ref,
        call.secrets.sources,
        data=call.wanted.data,
        pbkdf=call.wanted.pbkdf,
        name=call.wanted.name,
        hold=Hold(call.wanted.expires_after),
        progress=call.progress,
        deliver=call.secrets.deliver,
    )


async def _finish(volumes: Volumes, call: Call) -> object:
    return await volumes.finish(
        call.ref,
        name=call.wanted.name,
        generation=call.wanted.key_generation,
        group=call.wanted.group,
        progress=call.progress,
    )


async def _abort(volumes: Volumes, call: Call) -> object:
    return await volumes.abort(
        call.ref,
        name=call.wanted.name,
        generation=call.wanted.key_generation,
        group=call.wanted.group,
        progress=call.progress,
    )


async def _set_data(volumes: Volumes, call: Call) -> object:
    return await volumes.set_data(call.ref, call.wanted.data or {}, name=call.wanted.name, progress=call.progress)


async def _remove(volumes: Volumes, call: Call) -> object:
    return await volumes.remove(call.ref, call.secrets.sources, name=call.wanted.name, progress=call.progress)


async def _adopt(volumes: Volumes, call: Call) -> object:
    wanted = call.wanted
    return await volumes.adopt(
        call.ref,
        wanted.keyslot,
        call.secrets.sources,
        data=wanted.data or {},
        name=wanted.name,
        progress=call.progress,
    )


async def _release(volumes: Volumes, call: Call) -> object:
    return await volumes.release(call.ref, name=call.wanted.name, progress=call.progress)


async def _recreate(volumes: Volumes, call: Call) -> object:
    return await volumes.recreate(
        call.ref,
        call.secrets.sources,
        data=call.wanted.data,
        pbkdf=call.wanted.pbkdf,
        name=call.wanted.name,
        progress=call.progress,
        deliver=call.secrets.deliver,
    )


async def _scrub(volumes: Volumes, call: Call) -> object:
    return await volumes.scrub(call.ref, progress=before_commits(call.progress))


def before_commits(progress: Progress) -> Progress:
    """For a job of several commits that can be stopped between them: none of them is its point of no return."""

    def entered(step: Stage | Phase) -> None:
        if isinstance(step, Stage):
            progress(step)

    return entered


_VERBS: Final[Mapping[Kind, Callable[[Volumes, Call], Awaitable[object]]]] = {
    Kind.ENROLL: _enroll,
    Kind.ROTATE: _rotate,
    Kind.STAGE: _stage,
    Kind.FINISH: _finish,
    Kind.ABORT: _abort,
    Kind.SET_DATA: _set_data,
    Kind.REMOVE: _remove,
    Kind.ADOPT: _adopt,
    Kind.RELEASE: _release,
    Kind.RECREATE: _recreate,
    Kind.SCRUB: _scrub,
}
