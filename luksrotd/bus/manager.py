# SPDX-License-Identifier: GPL-2.0-or-later
"""``org.luksrotd1.Manager`` (dbus/org.luksrotd1.Manager.xml)."""

import asyncio
import os.path
from collections.abc import Mapping
from typing import Any

from dbus_next.signature import Variant

import luksrotd
from luksrotd import names
from luksrotd.bus import history
from luksrotd.bus.convert import device_path
from luksrotd.bus.exposed import exposed
from luksrotd.bus.guard import Guard
from luksrotd.bus.interface import Emits, Interface, readable
from luksrotd.ports import Caller
from luksrotd.service.history import Chronicle
from luksrotd.service.registry import Registry


class Manager(Interface):
    """The root object."""

    def __init__(self, guard: Guard, registry: Registry, chronicle: Chronicle) -> None:
        super().__init__(names.MANAGER_INTERFACE, guard)
        self._registry = registry
        self._chronicle = chronicle

    @exposed("a{sv}", "ao", action=names.ACTION_LIST, outputs=["devices"])
    async def get_devices(self, caller: Caller, options: Mapping[str, Any]) -> list[str]:
        """All volumes that are there."""
        return [device_path(uuid) for uuid in sorted(self._registry.volumes)]

    @exposed("sa{sv}", "o", action=names.ACTION_LIST, outputs=["object"])
    async def get_device(self, caller: Caller, device: str, options: Mapping[str, Any]) -> str:
        """One volume, by its UUID or a path that leads to its device."""
        if device.startswith("/") and "\0" not in device:
            device = await asyncio.to_thread(os.path.realpath, device)  # may hang, on a dead network file system
        return device_path(self._registry.find(device).uuid)

    @exposed("a{sv}", "aa{sv}", action=names.ACTION_HISTORY, options=history.OPTIONS, outputs=["entries"])
    async def get_history(self, caller: Caller, options: Mapping[str, Any]) -> list[dict[str, Variant]]:
        """What has been done, as the journal has it."""
        return history.records(await self._chronicle.read(history.query(options)))

    @readable("s", emits=Emits.CONST)
    def version(self) -> str:
        """The daemon's version."""
        return luksrotd.__version__
