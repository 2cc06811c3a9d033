# SPDX-License-Identifier: GPL-2.0-or-later
"""``org.luksrotd1.Manager`` (dbus/org.luksrotd1.Manager.xml)."""

import asyncio
import os.path
from collections.abc import Mapping, Sequence
from typing import Any, Final

from dbus_next.signature import Variant

import luksrotd
from luksrotd import names
from luksrotd.bus import history
from luksrotd.bus import options as known
from luksrotd.bus.convert import CREDENTIAL, NEW_SECRET, device_path, job_path, key_name
from luksrotd.bus.errors import name_of
from luksrotd.bus.exposed import exposed
from luksrotd.bus.guard import Guard, Question
from luksrotd.bus.interface import Emits, Interface, readable
from luksrotd.bus.questions import about_set
from luksrotd.bus.results import Described, Row, rows, set_status
from luksrotd.bus.secrets import Keyring
from luksrotd.bus.served import Served
from luksrotd.errors import InvalidRequest, LuksrotdError, UnknownDevice
from luksrotd.ports import Caller
from luksrotd.rotation.edits import NEW, UNLOCK
from luksrotd.service.jobs import Kind
from luksrotd.service.registry import Registry, Volume
from luksrotd.service.threads import in_thread

Map = Mapping[str, Any]
PATH_MAX: Final = 4096
"""Characters of a path, as of the kernel; a long one would cost its square."""
RESOLVE_SECONDS: Final = 5.0
"""How long symlinks may take to be followed, the wait for a thread included."""


class Manager(Interface):
    """The root object."""

    def __init__(self, guard: Guard, keyring: Keyring, served: Served) -> None:
        super().__init__(names.MANAGER_INTERFACE, guard)
        self._keyring = keyring
        self._operations = served.operations
        self._sets = served.sets
        self._registry = served.registry
        self._chronicle = served.chronicle

    async def details(self, method: str, arguments: Sequence[Any]) -> Mapping[str, str]:
        """Of a set its volumes, and the name of the key."""
        if "devices" not in self.methods[method].inputs:
            return {}
        return _about(self._volumes(arguments[0]), key_name(arguments[1]))

    async def questions(self, action: str, method: str, arguments: Sequence[Any]) -> Sequence[Question]:
        """Of a verb on a set one for each of its volumes; of a reconcile that aborts staged keys, of all volumes."""
        if action in names.VOLUME_ACTIONS:
            return about_set(action, method, self._volumes(arguments[0]), key_name(arguments[1]))
        also = about_set(names.ACTION_ABORT, method, self._retired(method, arguments), "")
        return [*await super().questions(action, method, arguments), *also]

    def _retired(self, method: str, arguments: Sequence[Any]) -> list[Volume]:
        """The volumes whose staged keys a call may abort beside what it is for."""
        return list(self._registry.volumes.values()) if known.retires(method, arguments) else []

    @exposed("a{sv}", "ao", action=names.ACTION_LIST, outputs=["devices"])
    async def get_devices(self, caller: Caller, options: Map) -> list[str]:
        """All volumes that are there."""
        return [device_path(uuid) for uuid in sorted(self._registry.volumes)]

    @exposed("sa{sv}", "o", action=names.ACTION_LIST, outputs=["object"])
    async def get_device(self, caller: Caller, device: str, options: Map) -> str:
        """One volume, by its UUID or a path that leads to its device."""
        if len(device) > PATH_MAX:
            raise UnknownDevice("cannot find the device: no path is so long")
        return device_path((await _found(self._registry, device)).uuid)

    @exposed("a{sv}", "aa{sv}", action=names.ACTION_HISTORY, options=history.OPTIONS, outputs=["entries"])
    async def get_history(self, caller: Caller, options: Mapping[str, Any]) -> list[dict[str, Variant]]:
        """What has been done, as the journal has it."""
        return history.records(await self._chronicle.read(history.query(options)))

    @exposed("a{sv}", "a(oa(sss)a(sss)s)", action=names.ACTION_RECONCILE, options=known.RECONCILE, outputs=["results"])
    async def reconcile(self, caller: Caller, options: Map) -> list[tuple[str, list[Row], list[Row], str]]:
        """Finish on all volumes what a crash interrupted."""
        done = await self._operations.reconcile_all(caller, **known.reconciliation(options))
        return [
            (device_path(uuid), [], [], name_of(one))
            if isinstance(one, LuksrotdError)
            else (device_path(uuid), rows(one.found), rows(one.left), "")
            for uuid, one in done.items()
        ]

    # -- sets of volumes ------------------------------------------------------------------------------------------

    @exposed(
        "aosa{sv}a{sv}a{sv}",
        "o",
        action=names.ACTION_STAGE,
        options=known.STAGE_SET,
        dictionaries={"credential": CREDENTIAL, "new_secret": NEW_SECRET},
        outputs=["job"],
    )
    async def stage(
        self, caller: Caller, devices: list[str], name: str, credential: Map, new_secret: Map, options: Map
    ) -> str:
        """Put the same new key beside the current one of each volume."""
        return await self._change(Kind.STAGE, caller, devices, name, {UNLOCK: credential, NEW: new_secret}, options)

    @exposed("aosa{sv}", "o", action=names.ACTION_FINISH, options=known.GROUP, outputs=["job"])
    async def finish(self, caller: Caller, devices: list[str], name: str, options: Map) -> str:
        """Make the staged key of a set the only one."""
        return await self._change(Kind.FINISH, caller, devices, name, {}, options)

    @exposed("aosa{sv}", "o", action=names.ACTION_ABORT, options=known.GROUP, outputs=["job"])
    async def abort(self, caller: Caller, devices: list[str], name: str, options: Map) -> str:
        """Take the staged key of a set back."""
        return await self._change(Kind.ABORT, caller, devices, name, {}, options)

    @exposed(
        "aosa{sv}",
        "a{sv}aa{sv}",
        action=names.ACTION_LIST,
        options=known.GROUP,
        outputs=["status", "members"],
    )
    async def get_set_status(
        self, caller: Caller, devices: list[str], name: str, options: Map
    ) -> tuple[Described, list[Described]]:
        """Where a rotation in two steps of a set stands."""
        uuids = [volume.uuid for volume in self._volumes(devices)]
        return set_status(await self._sets.status(uuids, key_name(name), known.group_id(options)))

    async def _change(
        self,
        kind: Kind,
        caller: Caller,
        devices: list[str],
        name: str,
        secrets: Mapping[str, Map],
        options: Map,
    ) -> str:
        """Start a job on a set; its path."""
        volumes = self._volumes(devices)
        generated = "generate" in secrets.get(NEW, {})
        wish = known.wanted(key_name(name), options, self._operations.config, generated=generated)
        about = {"operation": kind.value.capitalize(), **_about(volumes, wish.name)}
        opened = await self._keyring.open(caller, about, secrets)
        return job_path(self._sets.start(kind, [volume.uuid for volume in volumes], caller, wish, opened).number)

    def _volumes(self, paths: Sequence[str]) -> list[Volume]:
        """The volumes at these object paths; raises ``InvalidRequest`` and ``UnknownDevice``."""
        if not paths:
            raise InvalidRequest("cannot work on a set of no volumes: name at least one")
        if len(set(paths)) != len(paths):
            raise InvalidRequest("cannot work on a set that has a volume twice")
        known_paths = {device_path(uuid): volume for uuid, volume in self._registry.volumes.items()}
        for path in paths:
            if path not in known_paths:
                raise UnknownDevice(f"cannot find the volume {path}")
        return [known_paths[path] for path in paths]

    # -- properties -----------------------------------------------------------------------------------------------

    @readable("s", emits=Emits.CONST)
    def version(self) -> str:
        """The daemon's version."""
        return luksrotd.__version__


async def _found(registry: Registry, device: str) -> Volume:
    """The volume with that UUID or node, or what the path leads to; raises ``UnknownDevice``."""
    try:
        return registry.find(device)
    except UnknownDevice:
        if not device.startswith("/"):
            raise
    return registry.find(await _resolved(device))


async def _resolved(path: str) -> str:
    """A path without symlinks; raises ``UnknownDevice`` for one that leads nowhere, or takes too long.

    It is a caller's, so it may lie on a file system that is dead or hostile.
    """
    resolving = asyncio.ensure_future(in_thread(lambda: os.path.realpath(path), about="paths of callers"))
    done, _ = await asyncio.wait({resolving}, timeout=RESOLVE_SECONDS)
    if not done:
        resolving.cancel()
        raise UnknownDevice("cannot find the device: its path takes too long to follow")
    try:
        return resolving.result()
    except (OSError, ValueError, RecursionError) as error:
        raise UnknownDevice("cannot find the device: its path leads nowhere") from error


def _about(volumes: Sequence[Volume], key: str) -> Mapping[str, str]:
    """For polkit."""
    return {
        "device": " ".join(volume.nodes[0] for volume in volumes),
        "uuid": " ".join(volume.uuid for volume in volumes),
        "key": key,
    }
