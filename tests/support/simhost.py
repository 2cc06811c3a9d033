# SPDX-License-Identifier: GPL-2.0-or-later
"""The small ports, simulated: clock, entropy, signature probe, journal, watcher."""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from luksrotd.errors import DeviceError, StateError
from luksrotd.names import MessageId
from luksrotd.ports import DeviceEvent, HeaderDevice, Query, Traits, WatchEvent
from luksrotd.rotation.inventory import Inventory

UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")


class SimClock:
    """``ports.Clock`` that stands still until it is moved."""

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        if start.tzinfo is not UTC:
            raise ValueError("not in UTC")
        self._now = start

    def now(self) -> datetime:
        """The simulated time, in UTC."""
        return self._now

    def advance(self, by: timedelta) -> None:
        """Move it on."""
        self._now += by


class SimEntropy:
    """``ports.Entropy`` that gives the same bytes for the same seed, and never the same twice."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self.calls = 0

    def random(self, length: int) -> bytes:
        """The next ``length`` bytes."""
        self.calls += 1
        return hashlib.shake_256(f"{self._seed}/{self.calls}".encode()).digest(length)


class SimProbe:
    """``ports.SignatureProbe``: what was planted, by path.  ``broken``: every probe fails."""

    def __init__(self, **planted: tuple[str, ...]) -> None:
        self.planted: dict[str, tuple[str, ...]] = dict(planted)
        self.broken = False

    async def foreign(self, device: HeaderDevice) -> tuple[str, ...]:
        """Types planted for the device's path."""
        if self.broken:
            raise DeviceError(f"cannot probe {device.path}: simulated")
        return self.planted.get(device.path, ())

    async def all_clear(self, devices: Sequence[HeaderDevice]) -> bool:
        """Whether nothing is planted for any of them."""
        return not self.broken and not any(self.planted.get(device.path) for device in devices)


@dataclass(frozen=True, slots=True)
class Entry:
    """A journal entry, its time in microseconds since the epoch, and who wrote it."""

    message: str
    fields: dict[str, str | int]
    time: int = 0
    uid: int = 0


class SimJournal:
    """``ports.Journal`` that keeps its entries; each is a millisecond after the one before."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def record(self, message: str, **fields: str | int) -> None:
        """Keep one entry."""
        self.write(0, message, fields)

    def write(self, uid: int, message: str, fields: dict[str, str | int]) -> None:
        """Keep one entry of a user."""
        self.entries.append(Entry(message, fields, 1_700_000_000_000_000 + 1000 * len(self.entries), uid))

    def text(self) -> str:
        """All of it, to look for what must not be in there."""
        return "\n".join(f"{entry.message} {entry.fields}" for entry in self.entries)


class SimHistory:
    """``ports.History`` of a simulated journal; ``broken``: why it cannot be read."""

    def __init__(self, journal: SimJournal) -> None:
        self._journal = journal
        self.broken = ""

    def entries(self, query: Query) -> list[dict[str, str]]:
        """See ``ports.History.entries``."""
        if self.broken:
            raise StateError(f"cannot read the journal: {self.broken}")
        found = [
            {"time": str(entry.time), "message": entry.message} | {name: str(is_) for name, is_ in entry.fields.items()}
            for entry in self._journal.entries
            if entry.uid == 0
            and entry.fields.get("message_id") in set(MessageId)
            and query.uuid in ("", entry.fields.get("uuid"))
            and query.since <= entry.time
            and (query.until is None or entry.time < query.until)
        ]
        return found[max(0, len(found) - query.limit) :]


class SimInhibitor:
    """``ports.Inhibitor`` that notes what happens to it, and whatever else is put into ``events``."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.now = 0

    @asynccontextmanager
    async def held(self, why: str) -> AsyncIterator[None]:
        """Take it, and let it go in the end."""
        self.now += 1
        self.events.append(f"taken: {why}")
        try:
            yield
        finally:
            self.now -= 1
            self.events.append("released")


class SimInventories:
    """``ports.Inventories`` in memory; ``broken``: why nothing can be read or written."""

    def __init__(self) -> None:
        self.kept: dict[str, Inventory] = {}
        self.broken = ""

    def load(self, uuid: str) -> Inventory | None:
        """The one that was saved last."""
        self._check(uuid, "read")
        return self.kept.get(uuid.lower())

    def save(self, uuid: str, inventory: Inventory) -> None:
        """Keep it."""
        self._check(uuid, "write")
        self.kept[uuid.lower()] = inventory

    def _check(self, uuid: str, verb: str) -> None:
        if self.broken:
            raise StateError(f"cannot {verb} the inventory: {self.broken}")
        if not UUID.fullmatch(uuid.lower()):
            raise StateError("cannot keep an inventory of the volume: its LUKS UUID is malformed")


class SimWatcher:
    """``ports.Watcher`` over volumes that the test puts in and takes out, and a queue."""

    def __init__(self) -> None:
        self.present: dict[str, str] = {}
        self.traits: dict[str, Traits] = {}
        self.headers: dict[str, str] = {}
        self.configured: set[str] = set()
        self._queue: asyncio.Queue[DeviceEvent | None] = asyncio.Queue()
        self._started = False

    def put(
        self,
        node: str,
        uuid: str,
        traits: Traits | None = None,
        *,
        header: str | None = None,
        configured: bool = False,
    ) -> None:
        """A LUKS2 volume appears on ``node``, or the one that is there changes; all the rest stays until it is said."""
        kind = WatchEvent.CHANGED if self.present.get(node) == uuid else WatchEvent.ADDED
        if node in self.present and kind is WatchEvent.ADDED:
            self._push(DeviceEvent(WatchEvent.REMOVED, node, header=self.headers.get(node)))
        self.present[node] = uuid
        if traits is not None:
            self.traits[node] = traits
        if header is not None:
            self.headers[node] = header
        if configured:
            self.configured.add(node)
        self._push(self._event(kind, node))

    def remove(self, node: str) -> None:
        """The volume on ``node`` goes: unplugged, wiped or reformatted."""
        if self.present.pop(node, None) is not None:
            self._push(DeviceEvent(WatchEvent.REMOVED, node, header=self.headers.get(node)))

    async def events(self) -> AsyncIterator[DeviceEvent]:
        """What is there, then what happens; ends after ``close``."""
        self._started = True
        for node in list(self.present):
            self._push(self._event(WatchEvent.ADDED, node))
        while (event := await self._queue.get()) is not None:
            yield event
            self._queue.task_done()  # whoever follows has come back for the next one

    async def drained(self) -> None:
        """Wait until whoever follows has dealt with everything."""
        await self._queue.join()

    def close(self) -> None:
        """End ``events``."""
        self._queue.put_nowait(None)

    def _event(self, kind: WatchEvent, node: str) -> DeviceEvent:
        traits = self.traits.get(node, Traits())
        return DeviceEvent(kind, node, self.present[node], self.headers.get(node), traits, node in self.configured)

    def _push(self, event: DeviceEvent) -> None:
        if self._started:  # before that it is part of what is there
            self._queue.put_nowait(event)
