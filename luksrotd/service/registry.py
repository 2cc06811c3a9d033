# SPDX-License-Identifier: GPL-2.0-or-later
"""The volumes of the machine, by LUKS UUID, as they come, change and go."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Final, Protocol

from luksrotd.config import DeviceRules
from luksrotd.errors import BusyError, LuksrotdError, NeedsPerson, UnknownDevice
from luksrotd.ports import DeviceEvent, Watcher
from luksrotd.rotation.ledger import ForeignChange
from luksrotd.rotation.reconcile import Action
from luksrotd.service.agenda import Agenda
from luksrotd.service.jobs import Job
from luksrotd.service.presence import Presence
from luksrotd.service.runner import Runner
from luksrotd.service.shown import Problem, Volume
from luksrotd.service.turns import Turns
from luksrotd.service.volume import Volumes

if TYPE_CHECKING:
    from luksrotd.service.reconciling import Examined

__all__ = ["Observer", "Problem", "Registry", "Volume"]

log = logging.getLogger(__name__)

PARALLEL: Final = 4
"""Volumes that are examined at once."""
TURN_SECONDS: Final = 2.0
"""After which the next one is examined, too: disks that have died must not keep the others away."""
RETRY_SECONDS: Final = 30.0
"""After which a volume is examined again that another tool had locked."""
PAUSE_SECONDS: Final = 0.25
"""Between examinations of a volume that only has events; one that comes, or a job, is not kept waiting."""
SETTLE_SECONDS: Final = 5.0
"""How long ``settle`` waits; a healthy device takes milliseconds."""


class Observer(Protocol):
    """Learns what becomes of the volumes, on the event loop."""

    def volume_added(self, volume: Volume) -> None:
        """It is there and was examined."""

    def volume_changed(self, volume: Volume, *, fresh: bool) -> None:
        """It was examined again; ``fresh``: because a device came or went (so also after ``volume_added``)."""

    def volume_removed(self, volume: Volume) -> None:
        """No device shows it any more."""


class Registry:
    """Follows its watchers with ``run``."""

    def __init__(
        self,
        volumes: Volumes,
        *watchers: Watcher,
        turns: Turns | None = None,
        retry_seconds: float = RETRY_SECONDS,
        pause_seconds: float = PAUSE_SECONDS,
    ) -> None:
        self._use = volumes
        self._watchers = watchers
        self._retry_seconds = retry_seconds
        self._turns = turns or Turns(PARALLEL, TURN_SECONDS)
        self._observers: list[Observer] = []
        self._runner: Runner | None = None
        self._presence = Presence(self._busy)
        self._volumes: dict[str, Volume] = {}
        self._comings: dict[str, int] = {}
        self._count = count()
        self._announced: set[str] = set()
        self._agenda = Agenda(self._refresh, pause_seconds)
        self._scanning = set(watchers)
        self._scanned = asyncio.Event()

    @property
    def volumes(self) -> Mapping[str, Volume]:
        """All volumes that were examined, by UUID."""
        return {uuid: volume for uuid, volume in self._volumes.items() if uuid in self._announced}

    def observe(self, observer: Observer) -> None:
        """Have ``observer`` told of every volume from now on."""
        self._observers.append(observer)

    def unobserve(self, observer: Observer) -> None:
        """Tell it no more."""
        self._observers.remove(observer)

    def heed(self, runner: Runner) -> None:
        """Let a volume that is no longer managed stay as long as the runner has a job for it."""
        self._runner = runner
        runner.observe(self)

    def configure(self, rules: DeviceRules) -> None:
        """Manage what the rules admit, from now on: other volumes disappear as if unplugged, and some may come.

        One that is busy disappears when its last job has ended; jobs of it that have not begun are refused.
        """
        for uuid in self._presence.configure(rules):
            self._update(uuid)

    def get(self, uuid: str) -> Volume:
        """The volume; raises ``UnknownDevice``."""
        if uuid not in self._announced:
            raise UnknownDevice(f"cannot find the volume {uuid}")
        return self._volumes[uuid]

    def find(self, device: str) -> Volume:
        """The volume with that UUID or device node; raises ``UnknownDevice``."""
        for volume in self.volumes.values():
            if device.lower() == volume.uuid.lower() or device in volume.nodes:
                return volume
        raise UnknownDevice("cannot find the device: no LUKS2 volume has that UUID or node")

    def writable(self, uuid: str) -> Volume:
        """The volume, if it may be written; raises ``UnknownDevice`` and ``NeedsPerson``."""
        volume = self.get(uuid)
        if self._presence.leaving(uuid):
            raise UnknownDevice(f"cannot write: the configuration does not admit {volume.nodes[0]} any more")
        if volume.ambiguous:
            raise NeedsPerson(f"cannot write: {volume.ambiguity}")
        return volume

    def refresh(self, uuid: str, *, fresh: bool = False) -> None:
        """Examine the volume soon; any number of calls meanwhile are one."""
        if uuid in self._volumes:
            self._agenda.add(uuid, fresh=fresh, urgent=True)

    async def settle(self, uuid: str) -> None:
        """Examine the volume, and return when that is done, or takes too long."""
        self.refresh(uuid)
        await self._agenda.done(uuid, SETTLE_SECONDS)

    async def scanned(self) -> None:
        """Wait until the volumes that were there at the start have been examined."""
        await self._scanned.wait()
        await self._agenda.idle()

    async def run(self) -> None:
        """Follow the watchers until all are closed; raises what they raise."""
        async with asyncio.TaskGroup() as group:
            self._agenda.begin(group)
            try:
                await asyncio.wait([group.create_task(self._follow(group, watcher)) for watcher in self._watchers])
            finally:
                self._scanned.set()
                self._agenda.end()  # jobs may outlive this, and examine nothing any more

    # -- what happens to jobs -------------------------------------------------------------------------------------

    def job_added(self, job: Job) -> None:
        """Nothing: it keeps its volumes."""

    def job_ended(self, job: Job) -> None:
        """It was all that kept some volumes, maybe."""
        for uuid in job.volumes:
            self._presence.release(uuid)
            self._update(uuid)

    def job_forgotten(self, job: Job) -> None:
        """Nothing is left of it."""

    # -- what happens to volumes ----------------------------------------------------------------------------------

    async def _follow(self, group: asyncio.TaskGroup, watcher: Watcher) -> None:
        events = watcher.events()
        while True:
            coming = group.create_task(_next(events))
            if watcher in self._scanning:
                # What is there at the start comes without waiting; the first wait is the end of it.
                done, _ = await asyncio.wait({coming}, timeout=0)
                if not done:
                    self._has_scanned(watcher)
            event = await coming
            if event is None:
                self._has_scanned(watcher)
                return
            for uuid in self._presence.take(event):
                self._update(uuid, changed=True)

    def _has_scanned(self, watcher: Watcher) -> None:
        self._scanning.discard(watcher)
        if not self._scanning:
            self._scanned.set()

    def _update(self, uuid: str, *, changed: bool = False) -> None:
        """Take over where the volume is now; look at it if that is news, or if it may have ``changed``."""
        places = self._presence.places(uuid)
        before = self._volumes.get(uuid)
        if not places:
            if before is not None:
                self._remove(before)
            return
        if before is None:
            self._comings[uuid] = next(self._count)
        volume = before or Volume(uuid, ())
        now = self._volumes[uuid] = replace(volume, places=places)
        moved = now.keys != volume.keys
        if moved or changed:
            self._agenda.add(uuid, fresh=moved, urgent=moved)

    def _remove(self, volume: Volume) -> None:
        del self._volumes[volume.uuid]
        del self._comings[volume.uuid]
        self._agenda.forget(volume.uuid)
        if volume.uuid in self._announced:
            self._announced.discard(volume.uuid)
            self._tell(lambda observer: observer.volume_removed(volume))

    def _busy(self, uuid: str) -> bool:
        return self._runner is not None and self._runner.busy(uuid)

    async def _refresh(self, uuid: str, fresh: bool) -> None:
        volume, coming = self._volumes[uuid], self._comings[uuid]
        async with self._turns.one():
            mark = self._use.ledger.mark()
            examined = await self._examine(volume, fresh=fresh)
        now = self._volumes.get(uuid)
        if now is None or self._comings[uuid] != coming or now.keys != volume.keys:
            # It changed under our eyes.  If it is still there, its own event will have it examined again.
            self._agenda.inherit(uuid, fresh=fresh)
            return
        # After Busy the view is the one of before, and nothing has been read.
        foreign = self._foreign(examined, mark) if examined.view is not volume.view else None
        self._set(replace(examined, places=now.places, foreign=foreign), fresh=fresh)

    async def _examine(self, volume: Volume, *, fresh: bool) -> Volume:
        problems: list[Problem] = []
        if volume.ambiguous:
            problems.append(Problem("uuid-ambiguous", Action.PERSON, volume.ambiguity))
        try:
            seen: Examined = await self._use.examine(volume.ref, remember=fresh and not volume.ambiguous)
        except LuksrotdError as error:
            if isinstance(error, BusyError):
                asyncio.get_running_loop().call_later(self._retry_seconds, self.refresh, volume.uuid)
            view = volume.view if isinstance(error, BusyError) else None
            return replace(volume, view=view, problems=(*problems, _problem(error)))
        except Exception:
            # A header that no code foresaw must not take the daemon, and so all other volumes, down.
            log.exception("cannot examine %s", volume.nodes[0])
            unforeseen = Problem("internal", Action.PERSON, "cannot read the header: internal error")
            return replace(volume, view=None, problems=(*problems, unforeseen))
        problems += [Problem(finding.code, finding.action, finding.message) for finding in seen.findings]
        return replace(volume, view=seen.view.summary, problems=tuple(problems))

    def _foreign(self, volume: Volume, mark: int) -> ForeignChange | None:
        seen = volume.view
        if seen is None:
            return None
        change = self._use.ledger.saw(volume.uuid, seen.seqid, seen.digest, mark)
        if change is not None:
            about = (volume.uuid, volume.nodes[0], change.before, change.after)
            self._use.audit.foreign_change(*about, change.direction.value)
        return change

    def _set(self, volume: Volume, *, fresh: bool) -> None:
        self._volumes[volume.uuid] = volume
        if volume.uuid not in self._announced:
            self._announced.add(volume.uuid)
            self._tell(lambda observer: observer.volume_added(volume))
        self._tell(lambda observer: observer.volume_changed(volume, fresh=fresh))

    def _tell(self, event: Callable[[Observer], None]) -> None:
        for observer in tuple(self._observers):
            try:
                event(observer)
            except Exception:  # whoever looks on must not end the rest
                log.exception("an observer of the volumes failed")


async def _next(events: AsyncIterator[DeviceEvent]) -> DeviceEvent | None:
    with suppress(StopAsyncIteration):
        return await events.__anext__()
    return None


def _problem(error: LuksrotdError) -> Problem:
    code = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", error.code).lower()
    return Problem(code, Action.PERSON, error.message)
