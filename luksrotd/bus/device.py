# SPDX-License-Identifier: GPL-2.0-or-later
"""``org.luksrotd1.Device`` (dbus/org.luksrotd1.Device.xml)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dbus_next.signature import Variant

from luksrotd import names
from luksrotd.bus.convert import (
    CREDENTIAL,
    KEY_OPTIONS,
    NEW_SECRET,
    job_path,
    key_name,
    key_options,
    keys_property,
)
from luksrotd.bus.exposed import exposed
from luksrotd.bus.guard import Guard
from luksrotd.bus.interface import Emits, Interface, readable
from luksrotd.bus.secrets import Keyring
from luksrotd.ports import Caller
from luksrotd.rotation.edits import NEW, UNLOCK
from luksrotd.rotation.reconcile import Finding
from luksrotd.service.operations import Operations
from luksrotd.service.registry import Problem, Volume
from luksrotd.service.runner import Runner

_TO_CHANGE_A_KEY: Mapping[str, Any] = {
    "dictionaries": {"credential": CREDENTIAL, "new_secret": NEW_SECRET},
    "options": KEY_OPTIONS,
    "outputs": ["job"],
}
Described = Mapping[str, Any]
Row = tuple[str, str, str]


class Device(Interface):
    """A volume; told by ``show`` what it looks like now."""

    def __init__(self, guard: Guard, keyring: Keyring, operations: Operations, runner: Runner, volume: Volume) -> None:
        super().__init__(names.DEVICE_INTERFACE, guard)
        self._keyring = keyring
        self._operations = operations
        self._runner = runner
        self._volume = volume
        self._shown = self.values()

    async def details(self, method: str, arguments: Sequence[Any]) -> Mapping[str, str]:
        """The volume, and the name of the key where there is one."""
        about = {"device": self._volume.nodes[0], "uuid": self._volume.uuid}
        return about if method == "Reconcile" else {**about, "key": key_name(arguments[0])}

    def is_of_system(self) -> bool:
        """As the property System says."""
        return self._volume.system

    def show(self, volume: Volume | None = None) -> None:
        """Tell the bus which properties changed, now that the volume is like this, or (None) busy or idle."""
        self._volume = volume or self._volume
        before, self._shown = self._shown, self.values()
        self.changed(*(name for name, value in self._shown.items() if value != before[name]))

    # -- methods --------------------------------------------------------------------------------------------------

    @exposed("sa{sv}a{sv}a{sv}", "o", action=names.ACTION_ENROLL, **_TO_CHANGE_A_KEY)
    async def enroll(
        self, caller: Caller, name: str, credential: Described, new_secret: Described, options: Described
    ) -> str:
        """Give the volume a managed key."""
        wanted = key_options(name, options, generated="generate" in new_secret)
        details = {"operation": "Enroll", **await self.details("Enroll", [name])}
        secrets = await self._keyring.open(caller, details, {UNLOCK: credential, NEW: new_secret})
        return job_path(self._operations.enroll(self._volume.uuid, caller, wanted, secrets).number)

    @exposed("sa{sv}a{sv}a{sv}", "o", action=names.ACTION_ROTATE, **_TO_CHANGE_A_KEY)
    async def rotate(
        self, caller: Caller, name: str, credential: Described, new_secret: Described, options: Described
    ) -> str:
        """Replace a managed key."""
        wanted = key_options(name, options, generated="generate" in new_secret)
        details = {"operation": "Rotate", **await self.details("Rotate", [name])}
        secrets = await self._keyring.open(caller, details, {UNLOCK: credential, NEW: new_secret})
        return job_path(self._operations.rotate(self._volume.uuid, caller, wanted, secrets).number)

    @exposed(
        "sa{sv}a{sv}", "b", action=names.ACTION_VERIFY, dictionaries={"credential": CREDENTIAL}, outputs=["matches"]
    )
    async def verify_key(self, caller: Caller, name: str, credential: Described, options: Described) -> bool:
        """Whether the credential is the managed key."""
        details = {"operation": "VerifyKey", **await self.details("VerifyKey", [name])}
        secrets = await self._keyring.open(caller, details, {UNLOCK: credential})
        return await self._operations.verify(self._volume.uuid, caller, key_name(name), secrets)

    @exposed("sa{sv}", "s", action=names.ACTION_GET_DATA, outputs=["data"])
    async def get_data(self, caller: Caller, name: str, options: Described) -> str:
        """The associated data of the managed key."""
        data = await self._operations.data(self._volume.uuid, key_name(name))
        return json.dumps(data, ensure_ascii=False)

    @exposed(
        "a{sv}",
        "a(sss)a(sss)",
        action=names.ACTION_RECONCILE,
        options={"dry-run": "b"},
        outputs=["found", "left"],
    )
    async def reconcile(self, caller: Caller, options: Described) -> tuple[list[Row], list[Row]]:
        """Finish what a crash interrupted."""
        dry_run = bool(options.get("dry-run", False))
        done = await self._operations.reconcile(self._volume.uuid, caller, dry_run=dry_run)
        return _rows(done.found), _rows(done.left)

    # -- properties -----------------------------------------------------------------------------------------------

    @readable("s", name="UUID", emits=Emits.CONST)
    def uuid(self) -> str:
        """LUKS UUID."""
        return self._volume.uuid

    @readable("s")
    def node(self) -> str:
        """Device node that is used."""
        return self._volume.nodes[0]

    @readable("as")
    def nodes(self) -> list[str]:
        """All device nodes that show the UUID."""
        return list(self._volume.nodes)

    @readable("as")
    def links(self) -> list[str]:
        """Other names of the nodes."""
        return list(self._volume.links)

    @readable("s")
    def header(self) -> str:
        """Where the detached header is; '' if it is not detached."""
        return self._volume.header

    @readable("b")
    def system(self) -> bool:
        """Whether it belongs to the machine, and not to who has plugged it in."""
        return self._volume.system

    @readable("s")
    def label(self) -> str:
        """LUKS label."""
        return self._volume.view.label if self._volume.view else ""

    @readable("t")
    def generation(self) -> int:
        """LUKS sequence number; 0 while the header cannot be read."""
        return self._volume.view.seqid if self._volume.view else 0

    @readable("au")
    def keyslots(self) -> list[int]:
        """Numbers of all keyslots."""
        return sorted(self._volume.view.metadata.keyslots) if self._volume.view else []

    @readable("au")
    def ordinary_keyslots(self) -> list[int]:
        """Numbers of those that no token names."""
        return list(self._volume.view.ordinary) if self._volume.view else []

    @readable("a{us}")
    def tokens(self) -> dict[int, str]:
        """Types of the tokens by number."""
        tokens = self._volume.view.metadata.tokens if self._volume.view else {}
        return {number: token.type for number, token in tokens.items()}

    @readable("a{ua{sv}}")
    def keys(self) -> dict[int, dict[str, Variant]]:
        """The managed keys by token number."""
        return keys_property(self._volume.view)

    @readable("a(sss)")
    def problems(self) -> list[Row]:
        """What reconcile would find, and why the header cannot be read."""
        return _rows(self._volume.problems)

    @readable("b")
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        return self._runner.busy(self._volume.uuid)


def _rows(items: Iterable[Finding | Problem]) -> list[Row]:
    return [(str(item.code), str(item.action), item.message) for item in items]
