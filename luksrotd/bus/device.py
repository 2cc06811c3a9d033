# SPDX-License-Identifier: GPL-2.0-or-later
"""``org.luksrotd1.Device`` (dbus/org.luksrotd1.Device.xml)."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from dbus_next.signature import Variant

from luksrotd import names
from luksrotd.bus import options as known
from luksrotd.bus.convert import CREDENTIAL, NEW_SECRET, job_path, key_name
from luksrotd.bus.exposed import camel_case, exposed
from luksrotd.bus.guard import Guard, Question
from luksrotd.bus.interface import Emits, Interface, emitted, readable
from luksrotd.bus.results import DifferenceRow, Row, difference_row, keys_property, rows
from luksrotd.bus.secrets import Keyring
from luksrotd.bus.served import Served
from luksrotd.bus.transaction import MICROSECONDS, transaction_path
from luksrotd.bus.values import OptionTable
from luksrotd.errors import Conflict
from luksrotd.ports import Caller
from luksrotd.rotation.edits import NEW, UNLOCK
from luksrotd.service.handover import Secrets
from luksrotd.service.jobs import Kind
from luksrotd.service.registry import Volume

_CHANGE = "sa{sv}a{sv}a{sv}"
_CREDENTIAL: Mapping[str, OptionTable] = {"credential": CREDENTIAL}
_BOTH: Mapping[str, OptionTable] = {**_CREDENTIAL, "new_secret": NEW_SECRET}
Map = Mapping[str, Any]


class Device(Interface):
    """A volume; told by ``show`` what it looks like now."""

    def __init__(self, guard: Guard, keyring: Keyring, served: Served, volume: Volume) -> None:
        super().__init__(names.DEVICE_INTERFACE, guard)
        self._keyring = keyring
        self._operations = served.operations
        self._runner = served.runner
        self._drafts = served.drafts
        self._volume = volume
        self._shown = super().values()
        self._entries: bytes | None = None

    async def details(self, method: str, arguments: Sequence[Any]) -> Mapping[str, str]:
        """The volume, and the name of the key where there is one."""
        inputs = self.methods[method].inputs
        return self._about(key_name(arguments[inputs.index("name")]) if "name" in inputs else "")

    def _about(self, key: str) -> Mapping[str, str]:
        about = {"device": self._volume.nodes[0], "uuid": self._volume.uuid}
        return {**about, "key": key} if key else about

    async def questions(self, action: str, method: str, arguments: Sequence[Any]) -> Sequence[Question]:
        """Who has staged keys aborted by a reconcile needs the right to abort them, too."""
        asked = [*await super().questions(action, method, arguments)]
        if known.retires(method, arguments):
            asked += await super().questions(names.ACTION_ABORT, method, arguments)
        return asked

    def is_of_system(self) -> bool:
        """As the property System says."""
        return self._volume.system

    def show(self, volume: Volume | None = None) -> None:
        """Tell the bus which properties changed, now that the volume is like this, or (None) busy or idle."""
        self._volume = volume or self._volume
        before, self._shown, self._entries = self._shown, super().values(), None
        self.changed(*(name for name, value in self._shown.items() if value != before[name]))

    def values(self) -> dict[str, Variant]:
        """As they have been shown last: all that they are made of comes by ``show``."""
        return self._shown

    def entries(self) -> bytes:
        """Made once for each ``show``: many may ask for them, and again and again."""
        if self._entries is None:
            self._entries = super().entries()
        return self._entries

    # -- methods --------------------------------------------------------------------------------------------------

    @exposed(_CHANGE, "o", action=names.ACTION_ENROLL, options=known.KEY, dictionaries=_BOTH, outputs=["job"])
    async def enroll(self, caller: Caller, name: str, credential: Map, new_secret: Map, options: Map) -> str:
        """Give the volume a managed key."""
        return await self._change(Kind.ENROLL, caller, name, {UNLOCK: credential, NEW: new_secret}, options)

    @exposed(_CHANGE, "o", action=names.ACTION_ROTATE, options=known.KEY, dictionaries=_BOTH, outputs=["job"])
    async def rotate(self, caller: Caller, name: str, credential: Map, new_secret: Map, options: Map) -> str:
        """Replace a managed key."""
        return await self._change(Kind.ROTATE, caller, name, {UNLOCK: credential, NEW: new_secret}, options)

    @exposed(_CHANGE, "o", action=names.ACTION_STAGE, options=known.STAGE, dictionaries=_BOTH, outputs=["job"])
    async def stage(self, caller: Caller, name: str, credential: Map, new_secret: Map, options: Map) -> str:
        """Put a new key beside the current one."""
        return await self._change(Kind.STAGE, caller, name, {UNLOCK: credential, NEW: new_secret}, options)

    @exposed("sa{sv}", "o", action=names.ACTION_FINISH, options=known.STAGED, outputs=["job"])
    async def finish(self, caller: Caller, name: str, options: Map) -> str:
        """Make the staged key the only one."""
        return await self._change(Kind.FINISH, caller, name, {}, options)

    @exposed("sa{sv}", "o", action=names.ACTION_ABORT, options=known.STAGED, outputs=["job"])
    async def abort(self, caller: Caller, name: str, options: Map) -> str:
        """Take the staged key back."""
        return await self._change(Kind.ABORT, caller, name, {}, options)

    @exposed("ssa{sv}", "o", action=names.ACTION_SET_DATA, options=known.IF_GENERATION, outputs=["job"])
    async def set_data(self, caller: Caller, name: str, data: str, options: Map) -> str:
        """Write other associated data."""
        return await self._change(Kind.SET_DATA, caller, name, {}, {**options, "data": data})

    @exposed(
        "sa{sv}a{sv}",
        "o",
        action=names.ACTION_REMOVE,
        options=known.IF_GENERATION,
        dictionaries=_CREDENTIAL,
        outputs=["job"],
    )
    async def remove(self, caller: Caller, name: str, credential: Map, options: Map) -> str:
        """Remove a managed key."""
        return await self._change(Kind.REMOVE, caller, name, {UNLOCK: credential}, options)

    @exposed(
        "usa{sv}a{sv}", "o", action=names.ACTION_ADOPT, options=known.ADOPT, dictionaries=_CREDENTIAL, outputs=["job"]
    )
    async def adopt(self, caller: Caller, keyslot: int, name: str, credential: Map, options: Map) -> str:
        """Take a keyslot that is there under management."""
        secrets = {UNLOCK: credential} if credential else {}
        return await self._change(Kind.ADOPT, caller, name, secrets, {**options, "keyslot": keyslot})

    @exposed("sa{sv}", "o", action=names.ACTION_RELEASE, options=known.IF_GENERATION, outputs=["job"])
    async def release(self, caller: Caller, name: str, options: Map) -> str:
        """Manage a key no more."""
        return await self._change(Kind.RELEASE, caller, name, {}, options)

    @exposed(_CHANGE, "o", action=names.ACTION_RECREATE, options=known.RECREATE, dictionaries=_BOTH, outputs=["job"])
    async def recreate(self, caller: Caller, name: str, credential: Map, new_secret: Map, options: Map) -> str:
        """Make token, or token and keyslot, anew."""
        secrets = known.recreation(credential, new_secret, options)
        return await self._change(Kind.RECREATE, caller, name, secrets, options)

    @exposed("a{sv}", "o", action=names.ACTION_SCRUB, options=known.IF_GENERATION, outputs=["job"])
    async def scrub(self, caller: Caller, options: Map) -> str:
        """Overwrite the keyslot space that is not used."""
        return await self._change(Kind.SCRUB, caller, "", {}, options)

    async def _change(self, kind: Kind, caller: Caller, name: str, secrets: Mapping[str, Map], options: Map) -> str:
        """Start a job; its path."""
        name = "" if kind is Kind.SCRUB else key_name(name)
        generated = "generate" in secrets.get(NEW, {})
        wish = known.wanted(name, options, self._operations.config, generated=generated)
        method = camel_case(kind.value.replace("-", "_"))
        about = {"operation": method, **self._about(name)}
        of_system = self.is_of_system()
        opened = self._unless_other(of_system, await self._keyring.open(caller, about, secrets))
        return job_path(self._operations.start(kind, self._volume.uuid, caller, wish, opened).number)

    def _unless_other(self, of_system: bool, opened: Secrets) -> Secrets:
        """The secrets, if the volume is still the one that the caller was authorized for; a person may take minutes."""
        try:
            self.check_exported()
            if self.is_of_system() != of_system:
                raise Conflict("cannot go on: the volume has become one of the system, or of its user")
        except BaseException:
            opened.close()
            raise
        return opened

    @exposed("sa{sv}a{sv}", "b", action=names.ACTION_VERIFY, dictionaries=_CREDENTIAL, outputs=["matches"])
    async def verify_key(self, caller: Caller, name: str, credential: Map, options: Map) -> bool:
        """Whether the credential is the managed key."""
        about = {"operation": "VerifyKey", **self._about(key_name(name))}
        of_system = self.is_of_system()
        secrets = self._unless_other(of_system, await self._keyring.open(caller, about, {UNLOCK: credential}))
        gone = partial(self.guard.callers.gone, caller.name)
        return await self._operations.verify(self._volume.uuid, caller, key_name(name), secrets, gone)

    @exposed("sa{sv}", "s", action=names.ACTION_GET_DATA, outputs=["data"])
    async def get_data(self, caller: Caller, name: str, options: Map) -> str:
        """The associated data of the managed key."""
        data = await self._operations.data(self._volume.uuid, key_name(name))
        return json.dumps(data, ensure_ascii=False)

    @exposed(
        "ssa{sv}",
        "ta(sssa{sv}a{sv})",
        action=names.ACTION_LIST,
        options=known.PLAN,
        outputs=["generation", "differences"],
    )
    async def plan(self, caller: Caller, verb: str, name: str, options: Map) -> tuple[int, list[DifferenceRow]]:
        """What a verb would change."""
        kind, wish = known.planned(verb, name, options, self._operations.config)
        retire_expired = bool(options.get("retire-expired", False))
        found = await self._operations.plan(self._volume.uuid, kind, wish, retire_expired=retire_expired)
        return found.seqid, [difference_row(one) for one in found.differences]

    @exposed("a{sv}", "a(sss)a(sss)", action=names.ACTION_RECONCILE, options=known.RECONCILE, outputs=["found", "left"])
    async def reconcile(self, caller: Caller, options: Map) -> tuple[list[Row], list[Row]]:
        """Finish what a crash interrupted."""
        done = await self._operations.reconcile(self._volume.uuid, caller, **known.reconciliation(options))
        return rows(done.found), rows(done.left)

    @exposed(
        "a{sv}",
        "o",
        action=names.ACTION_TRANSACTION,
        options={"timeout": "t", **known.IF_GENERATION},
        outputs=["transaction"],
    )
    async def begin_transaction(self, caller: Caller, options: Map) -> str:
        """Begin a transaction that the caller composes."""
        seconds = options["timeout"] / MICROSECONDS if "timeout" in options else None
        generation = options.get("if-generation")
        begun = await self._drafts.begin(self._volume.uuid, caller, seconds=seconds, generation=generation)
        return transaction_path(begun.terms.number)

    # -- signals --------------------------------------------------------------------------------------------------

    @emitted("tts", "generation_before", "generation_after", "kind")
    def foreign_change(self, generation_before: int, generation_after: int, kind: str) -> None:
        """Somebody other than luksrotd has changed the header."""

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

    @readable("s")
    def header_digest(self) -> str:
        """SHA-256 of both header copies; '' while the header cannot be read."""
        return self._volume.view.digest if self._volume.view else ""

    @readable("au")
    def keyslots(self) -> list[int]:
        """Numbers of all keyslots."""
        return sorted(self._volume.view.metadata.keyslots) if self._volume.view else []

    @readable("au")
    def ordinary_keyslots(self) -> list[int]:
        """Numbers of those that no token names."""
        return list(self._volume.view.ordinary) if self._volume.view else []

    @readable("a(us)")
    def tokens(self) -> list[tuple[int, str]]:
        """Numbers and types of the tokens."""
        tokens = self._volume.view.metadata.tokens if self._volume.view else {}
        return [(number, token.type) for number, token in sorted(tokens.items())]

    @readable("aa{sv}")
    def keys(self) -> list[dict[str, Variant]]:
        """The managed keys."""
        return keys_property(self._volume.view)

    @readable("a(sss)")
    def problems(self) -> list[Row]:
        """What reconcile would find, and why the header cannot be read."""
        return rows(self._volume.problems)

    @readable("b")
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        return self._runner.busy(self._volume.uuid)
