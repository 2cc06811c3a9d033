# SPDX-License-Identifier: GPL-2.0-or-later
"""The volumes that the configuration names, because udev does not show them: image files, and detached headers.

Nothing tells of a file that changes, wherever it lies, so they are looked at from time to time, if there are any.  As
with udev, what waits to be reported is one state per volume.
"""

import asyncio
import logging
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple

from luksrotd.config import ManagedVolume
from luksrotd.errors import LuksrotdError
from luksrotd.ports import DeviceEvent, DeviceRef, WatchEvent
from luksrotd.records import dataclass

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 15.0
LOOK_SECONDS: Final = 5.0
"""How long ``ready`` waits for what it looks at; a dead network file system takes for ever."""

#: The LUKS UUID that is found there, None for what is no LUKS2; blocks, and raises ``LuksrotdError``.
UuidOf = Callable[[DeviceRef], str | None]


class Shown(NamedTuple):
    """A volume as it is reported: its real paths and its LUKS UUID."""

    node: str
    header: str | None
    uuid: str

    def event(self, kind: WatchEvent) -> DeviceEvent:
        """What is told of it."""
        gone = kind is WatchEvent.REMOVED
        return DeviceEvent(kind, self.node, "" if gone else self.uuid, self.header, configured=True)


@dataclass(frozen=True, slots=True)
class Look:
    """What a look has found: nothing to show, and why, or a volume; ``signature`` changes when that may be outdated."""

    signature: tuple[int, ...] = ()
    shown: Shown | None = None
    trouble: str = ""


class ImageWatcher:
    """``ports.Watcher``; ``uuid_of`` reads headers."""

    def __init__(self, uuid_of: UuidOf, *, poll_seconds: float = POLL_SECONDS) -> None:
        self._uuid_of = uuid_of
        self._poll_seconds = poll_seconds
        self._looks: dict[ManagedVolume, Look] = {}
        self._reported: dict[ManagedVolume, Shown] = {}
        self._pending: dict[ManagedVolume, Shown | None] = {}
        self._one_at_a_time = asyncio.Lock()
        self._looking: set[asyncio.Task[None]] = set()
        self._poked = asyncio.Event()
        self._wake = asyncio.Event()
        self._closed = False

    def configure(self, volumes: Iterable[ManagedVolume]) -> None:
        """Follow these, and no others any more."""
        wanted = dict.fromkeys(volumes, Look())
        for volume in self._looks.keys() - wanted.keys():
            self._note(volume, None)
        self._looks = {volume: self._looks.get(volume, look) for volume, look in wanted.items()}
        self.poke()

    async def ready(self) -> None:
        """Look now, so that ``events`` begins with what is there; returns when that is done, or takes too long."""
        task = asyncio.create_task(self._look())
        self._looking.add(task)
        task.add_done_callback(self._looking.discard)
        await asyncio.wait({task}, timeout=LOOK_SECONDS)

    def poke(self) -> None:
        """Look soon."""
        self._poked.set()

    async def events(self) -> AsyncIterator[DeviceEvent]:
        """First one ADDED for each volume that ``ready`` has found, then what happens; ends after ``close``."""
        poller = asyncio.create_task(self._poll())
        try:
            while not self._closed:
                while self._pending and not self._closed:
                    volume = next(iter(self._pending))
                    for event in self._transition(volume, self._pending.pop(volume)):
                        yield event
                await self._wake.wait()
                self._wake.clear()
        finally:
            poller.cancel()

    def close(self) -> None:
        """End ``events``; idempotent."""
        self._closed = True
        self._wake.set()

    async def _poll(self) -> None:
        while True:
            seconds = self._poll_seconds if self._looks else None
            try:
                async with asyncio.timeout(seconds):
                    await self._poked.wait()
            except TimeoutError:
                pass
            self._poked.clear()
            await self._look()

    async def _look(self) -> None:
        async with self._one_at_a_time:
            for volume in list(self._looks):
                before = self._looks.get(volume, Look())
                now = await asyncio.to_thread(look, volume, before, self._uuid_of)
                if volume not in self._looks or now == before:
                    continue
                self._looks[volume] = now
                if now.trouble and now.trouble != before.trouble:
                    log.warning("%s, which the configuration names: %s", volume.path, now.trouble)
                self._note(volume, now.shown)

    def _note(self, volume: ManagedVolume, shown: Shown | None) -> None:
        self._pending.pop(volume, None)  # to the end of the queue
        self._pending[volume] = shown
        self._wake.set()

    def _transition(self, volume: ManagedVolume, now: Shown | None) -> Iterable[DeviceEvent]:
        before = self._reported.pop(volume, None)
        if now is not None:
            self._reported[volume] = now
        if before is not None and before != now:
            yield before.event(WatchEvent.REMOVED)
        if now is not None:
            yield now.event(WatchEvent.CHANGED if before == now else WatchEvent.ADDED)


def look(volume: ManagedVolume, before: Look, uuid_of: UuidOf) -> Look:
    """Look at a volume again; ``before`` itself if nothing seems to have changed.  Blocks; raises nothing."""
    try:
        node = os.path.realpath(volume.path, strict=True)
        header = volume.header and os.path.realpath(volume.header, strict=True)
        data, holder = Path(node).stat(), Path(header or node).stat()
    except (OSError, ValueError) as error:
        return Look(trouble=getattr(error, "strerror", None) or str(error))
    if not (node + (header or "")).isprintable():
        return Look(trouble="its real path is not printable")
    if trouble := _unfit(data, holder, detached=header is not None):
        return Look(trouble=trouble)
    signature = (data.st_dev, data.st_ino, data.st_rdev, *_signature(holder))
    places = (node, header)
    shown = before.shown
    if signature == before.signature and (shown is None or (shown.node, shown.header) == places):
        return before
    try:
        uuid = uuid_of(DeviceRef(node, header))
    except LuksrotdError as error:
        # What was there before keeps its object, which says what is wrong; try again next time.
        return Look((), shown if shown and (shown.node, shown.header) == places else None, error.message)
    except Exception:
        # A header that no code foresaw must not end the looking, at this volume or at all others.
        log.exception("cannot look at %s", node)
        return Look(signature, shown if shown and (shown.node, shown.header) == places else None, "internal error")
    if uuid is None:
        return Look(signature, None, "it holds no LUKS2 volume")
    return Look(signature, Shown(node, header, uuid))


def _unfit(data: os.stat_result, holder: os.stat_result, *, detached: bool) -> str:
    if not detached and stat.S_ISBLK(data.st_mode):
        return "it is a block device, which udev shows"
    if not all(stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode) for status in (data, holder)):
        return "neither a block device nor a regular file"
    return ""


def _signature(status: os.stat_result) -> tuple[int, ...]:
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return (status.st_dev, status.st_ino, status.st_rdev, status.st_size, *times)
