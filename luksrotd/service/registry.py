# SPDX-License-Identifier: GPL-2.0-or-later
"""The volumes of the machine, by LUKS UUID, as they come, change and go."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from luksrotd.errors import BusyError, LuksrotdError, NeedsPerson, UnknownDevice
from luksrotd.ports import DeviceEvent, DeviceRef, Traits, Watcher, WatchEvent
from luksrotd.rotation.reconcile import Action
from luksrotd.rotation.view import DeviceView
from luksrotd.service.volume import Volumes

if TYPE_CHECKING:
    from luksrotd.service.reconciling import Examined

log = logging.getLogger(__name__)

PARALLEL: Final = 4
"""Volumes that are examined at once."""
RETRY_SECONDS: Final = 30.0
"""After which a volume is examined again that another tool had locked."""
SETTLE_SECONDS: Final = 5.0
"""How long ``settle`` waits; a healthy device takes milliseconds."""
UUID: Final = re.compile(r"[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}")
"""What cryptsetup accepts; a header could hold anything."""


class Problem(NamedTuple):
    """What is not as it should be: a stable code, ``repair`` or ``person``, and a message."""

    code: str
    action: str
    message: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a volume shows itself: a device node or image file, the detached header if it has one, and what it is."""

    node: str
    header: str | None = None
    traits: Traits = field(default_factory=Traits)


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume in at least one place; ``view`` is None while it cannot be read, and ``problems`` say why."""

    uuid: str
    places: tuple[Place, ...]
    view: DeviceView | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def ref(self) -> DeviceRef:
        """The device that is used, with the UUID that it must show."""
        return DeviceRef(self.places[0].node, self.places[0].header, self.uuid)

    @property
    def nodes(self) -> tuple[str, ...]:
        """All device nodes and image files that show the UUID."""
        return tuple(place.node for place in self.places)

    @property
    def where(self) -> tuple[tuple[str, str | None], ...]:
        """All places by node and header: what is written to."""
        return tuple((place.node, place.header) for place in self.places)

    @property
    def links(self) -> tuple[str, ...]:
        """Other names of the nodes."""
        return tuple(sorted({link for place in self.places for link in place.traits.links}))

    @property
    def header(self) -> str:
        """Where the detached header is; '' if it is not detached."""
        return self.places[0].header or ""

    @property
    def system(self) -> bool:
        """Whether it belongs to the machine, and not to who has plugged it in."""
        return not all(place.traits.removable for place in self.places)

    @property
    def ambiguous(self) -> bool:
        """Whether several devices show the UUID: copies, or one below the other.  Nobody knows which one to write."""
        return len(self.places) > 1

    @property
    def repairable(self) -> bool:
        """Whether reconcile would mend something."""
        return not self.ambiguous and any(problem.action == Action.REPAIR for problem in self.problems)


class Observer(Protocol):
    """Learns what becomes of the volumes, on the event loop."""

    def volume_added(self, volume: Volume) -> None:
        """It is there and was examined."""

    def volume_changed(self, volume: Volume, *, fresh: bool) -> None:
        """It was examined again; ``fresh``: because a device came or went (so also after ``volume_added``)."""

    def volume_removed(self, volume: Volume) -> None:
        """No device shows it any more."""


class Registry:
    """Follows a watcher with ``run``."""

    def __init__(
        self, volumes: Volumes, watcher: Watcher, *, parallel: int = PARALLEL, retry_seconds: float = RETRY_SECONDS
    ) -> None:
        self._use = volumes
        self._watcher = watcher
        self._retry_seconds = retry_seconds
        self._places = asyncio.Semaphore(parallel)
        self._observers: list[Observer] = []
        self._volumes: dict[str, Volume] = {}
        self._announced: set[str] = set()
        self._dirty: dict[str, bool] = {}
        self._active: dict[str, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None
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
        if volume.ambiguous:
            raise NeedsPerson(f"cannot write: {_ambiguity(volume)}")
        return volume

    def refresh(self, uuid: str, *, fresh: bool = False) -> None:
        """Examine the volume soon; any number of calls meanwhile are one."""
        if uuid not in self._volumes or self._group is None:
            return
        self._dirty[uuid] = fresh or self._dirty.get(uuid, False)
        if uuid not in self._active:
            self._active[uuid] = self._group.create_task(self._refresh(uuid))

    async def settle(self, uuid: str) -> None:
        """Examine the volume, and return when that is done, or takes too long."""
        self.refresh(uuid)
        if uuid in self._active:
            await asyncio.wait({self._active[uuid]}, timeout=SETTLE_SECONDS)

    async def scanned(self) -> None:
        """Wait until the volumes that were there at the start have been examined."""
        await self._scanned.wait()
        if self._active:
            await asyncio.wait(list(self._active.values()))

    async def run(self) -> None:
        """Follow the watcher until it is closed; raises what it raises."""
        events = self._watcher.events()
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                while True:
                    coming = group.create_task(_next(events))
                    if not self._scanned.is_set():
                        # What is there at the start comes without waiting; the first wait is the end of it.
                        done, _ = await asyncio.wait({coming}, timeout=0)
                        if not done:
                            self._scanned.set()
                    event = await coming
                    if event is None:
                        break
                    self._take(event)
            finally:
                self._scanned.set()
                self._group = None  # jobs may outlive this, and examine nothing any more

    # -- what happens ---------------------------------------------------------------------------------------------

    def _take(self, event: DeviceEvent) -> None:
        before = next((volume for volume in self._volumes.values() if event.node in volume.nodes), None)
        if before is not None and (event.kind is WatchEvent.REMOVED or before.uuid != event.uuid):
            self._detach(before, event.node)
        if event.kind is WatchEvent.REMOVED:
            return
        if not UUID.fullmatch(event.uuid):
            log.warning("%s is left alone: its LUKS UUID is malformed", event.node)
            return
        volume = self._volumes.get(event.uuid) or Volume(event.uuid, ())
        place = Place(event.node, event.header, event.traits)
        came = event.node not in volume.nodes
        if came:
            places = (*volume.places, place)
        else:
            places = tuple(place if other.node == event.node else other for other in volume.places)
        self._volumes[event.uuid] = replace(volume, places=places)
        self.refresh(event.uuid, fresh=came)

    def _detach(self, volume: Volume, node: str) -> None:
        rest = tuple(place for place in volume.places if place.node != node)
        self._volumes[volume.uuid] = replace(volume, places=rest)
        if rest:
            self.refresh(volume.uuid, fresh=True)
            return
        del self._volumes[volume.uuid]
        self._dirty.pop(volume.uuid, None)
        if volume.uuid in self._announced:
            self._announced.discard(volume.uuid)
            for observer in self._observers:
                observer.volume_removed(volume)

    async def _refresh(self, uuid: str) -> None:
        try:
            while (fresh := self._dirty.pop(uuid, None)) is not None:
                volume = self._volumes[uuid]
                async with self._places:
                    examined = await self._examine(volume)
                now = self._volumes.get(uuid)
                if now is None or now.where != volume.where:
                    # It changed under our eyes.  If it is still there, its own event has made it dirty again.
                    if uuid in self._dirty:
                        self._dirty[uuid] |= fresh
                    continue
                self._set(replace(examined, places=now.places), fresh=fresh)
        finally:
            del self._active[uuid]

    async def _examine(self, volume: Volume) -> Volume:
        problems: list[Problem] = []
        if volume.ambiguous:
            problems.append(Problem("uuid-ambiguous", Action.PERSON, _ambiguity(volume)))
        try:
            seen: Examined = await self._use.examine(volume.ref)
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
        return replace(volume, view=seen.view, problems=tuple(problems))

    def _set(self, volume: Volume, *, fresh: bool) -> None:
        self._volumes[volume.uuid] = volume
        if volume.uuid not in self._announced:
            self._announced.add(volume.uuid)
            for observer in self._observers:
                observer.volume_added(volume)
        for observer in self._observers:
            observer.volume_changed(volume, fresh=fresh)


async def _next(events: AsyncIterator[DeviceEvent]) -> DeviceEvent | None:
    with suppress(StopAsyncIteration):
        return await events.__anext__()
    return None


def _ambiguity(volume: Volume) -> str:
    return f"{' and '.join(volume.nodes)} show one UUID, {volume.uuid}"


def _problem(error: LuksrotdError) -> Problem:
    code = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", error.code).lower()
    return Problem(code, Action.PERSON, error.message)
