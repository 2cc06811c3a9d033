# SPDX-License-Identifier: GPL-2.0-or-later
"""Where volumes show themselves, as watchers tell it, and which of that is looked at, as the configuration says."""

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from luksrotd.config import DeviceRules
from luksrotd.ports import DeviceEvent, WatchEvent
from luksrotd.service.shown import Key, Place

log = logging.getLogger(__name__)

UUID: Final = re.compile(r"[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}")
"""What cryptsetup accepts; a header could hold anything."""
BY_ID: Final = "/dev/disk/by-id/"
"""Of all links only these are held against rules: by-label and others say what anybody has written on the device."""


@dataclass(slots=True)
class _Shown:
    uuid: str
    place: Place
    configured: bool
    admitted: bool = False
    unwanted: bool = False


class Presence:
    """All places, by volume.  ``held`` says whether a volume must not be let go of now, because of its jobs."""

    def __init__(self, held: Callable[[str], bool]) -> None:
        self._held = held
        self._rules = DeviceRules()
        self._shown: dict[Key, _Shown] = {}

    def places(self, uuid: str) -> tuple[Place, ...]:
        """Those of a volume that are admitted, in the order in which they came.

        A device that holds a detached header of another place is a part of that one.
        """
        found = [shown.place for shown in self._shown.values() if shown.uuid == uuid and shown.admitted]
        headers = {place.header for place in found}
        return tuple(place for place in found if place.header is not None or place.node not in headers)

    def leaving(self, uuid: str) -> bool:
        """Whether a place of the volume is only admitted as long as it is held."""
        return any(shown.uuid == uuid and shown.unwanted for shown in self._shown.values())

    def take(self, event: DeviceEvent) -> Iterator[str]:
        """Note what a watcher tells; the UUIDs of the volumes that it is about."""
        key = event.node, event.header
        before = self._shown.get(key)
        if before is not None and (event.kind is WatchEvent.REMOVED or before.uuid != event.uuid):
            del self._shown[key]
            yield before.uuid
            before = None
        if event.kind is WatchEvent.REMOVED:
            return
        if not UUID.fullmatch(event.uuid):
            log.warning("%s is left alone: its LUKS UUID is malformed", event.node)
            return
        place = Place(event.node, event.header, event.traits)
        now = _Shown(event.uuid, place, event.configured, before is not None and before.admitted)
        self._shown[key] = now
        self._judge(now)
        yield event.uuid

    def configure(self, rules: DeviceRules) -> set[str]:
        """Judge everything by these rules; the UUIDs of all volumes that are there."""
        self._rules = rules
        for shown in self._shown.values():
            self._judge(shown)
        return {shown.uuid for shown in self._shown.values()}

    def release(self, uuid: str) -> None:
        """The volume is not held any more: judge it anew."""
        for shown in self._shown.values():
            if shown.uuid == uuid:
                self._judge(shown)

    def _judge(self, shown: _Shown) -> None:
        links = [link for link in shown.place.traits.links if link.startswith(BY_ID)]
        wanted = shown.configured or self._rules.admit(shown.uuid, links, shown.place.traits.bus)
        if wanted or not self._held(shown.uuid):
            shown.admitted = wanted
        shown.unwanted = shown.admitted and not wanted
