# SPDX-License-Identifier: GPL-2.0-or-later
"""``org.luksrotd1.Transaction`` (dbus/org.luksrotd1.Transaction.xml)."""

import asyncio
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Final, Protocol

from luksrotd import names
from luksrotd.bus import options as known
from luksrotd.bus.convert import CREDENTIAL, NEW_SECRET, device_path, job_path
from luksrotd.bus.exposed import UNPRIVILEGED, exposed
from luksrotd.bus.guard import Guard
from luksrotd.bus.interface import Emits, Interface, readable
from luksrotd.bus.results import DifferenceRow, difference_row
from luksrotd.bus.secrets import Keyring
from luksrotd.ports import Caller
from luksrotd.rotation.edits import NEW, UNLOCK
from luksrotd.service.operations import Operations
from luksrotd.service.owned import OwnedTransaction, State

_OWN: Final[Mapping[str, Any]] = {
    "action": UNPRIVILEGED,
    "reason": "only for the connection that began it, which was authorized then",
}
MICROSECONDS: Final = 1_000_000
Map = Mapping[str, Any]


class Transaction(Interface):
    """An open transaction."""

    def __init__(self, guard: Guard, keyring: Keyring, operations: Operations, transaction: OwnedTransaction) -> None:
        super().__init__(names.TRANSACTION_INTERFACE, guard)
        self._keyring = keyring
        self._operations = operations
        self._transaction = transaction
        self._one_at_a_time = asyncio.Lock()
        self._shown = self.values()
        transaction.subscribe(self._show)

    def _show(self) -> None:
        if self._transaction.state is State.ENDED:
            return  # InterfacesRemoved says so
        before, self._shown = self._shown, self.values()
        self.changed(*(name for name, value in self._shown.items() if value != before[name]))

    def _about(self, operation: str) -> Mapping[str, str]:
        return {"operation": operation, "uuid": self._transaction.volume, "device": self._transaction.node}

    def turn(self, method: str, caller: Caller) -> AbstractAsyncContextManager[None]:
        """The owner's calls one after the other, as they came: it need not wait for replies.  Abort ends the others."""
        is_owner = caller.is_same(self._transaction.terms.owner)
        return self._one_at_a_time if is_owner and method != "Abort" else nullcontext()

    # -- methods --------------------------------------------------------------------------------------------------

    @exposed("a{sv}a{sv}", "", dictionaries={"credential": CREDENTIAL}, options={"volume-key": "b"}, **_OWN)
    async def unlock(self, caller: Caller, credential: Map, options: Map) -> None:
        """Show what opens the volume."""
        mine = self._transaction.of(caller)
        secrets = await self._keyring.open(caller, self._about("Unlock"), {UNLOCK: credential})
        await mine.unlock(secrets, volume_key=options.get("volume-key", False))

    @exposed(
        "a{sv}a{sv}",
        "u",
        dictionaries={"new_secret": NEW_SECRET},
        options={"keyslot": "u", **known.PBKDF},
        outputs=["keyslot"],
        **_OWN,
    )
    async def add_keyslot(self, caller: Caller, new_secret: Map, options: Map) -> int:
        """Queue a new keyslot."""
        mine = self._transaction.of(caller)
        default = self._operations.config.key_derivation
        pbkdf = known.key_derivation(options, default, generated="generate" in new_secret)
        secrets = await self._keyring.open(caller, self._about("AddKeyslot"), {NEW: new_secret})
        return await mine.add_keyslot(secrets, pbkdf, options.get("keyslot"))

    @exposed("sa{sv}", "u", options={"token": "u"}, outputs=["token"], **_OWN)
    async def set_token(self, caller: Caller, json: str, options: Map) -> int:
        """Queue a token."""
        return self._transaction.of(caller).set_token(json, options.get("token"))

    @exposed("ua{sv}", "", **_OWN)
    async def remove_token(self, caller: Caller, token: int, options: Map) -> None:
        """Queue the removal of a token."""
        self._transaction.of(caller).remove_token(token)

    @exposed("ua{sv}", "", **_OWN)
    async def destroy_keyslot(self, caller: Caller, keyslot: int, options: Map) -> None:
        """Queue the removal of a keyslot."""
        self._transaction.of(caller).destroy_keyslot(keyslot)

    @exposed("a{sv}", "a(sssa{sv}a{sv})", outputs=["differences"], **_OWN)
    async def plan(self, caller: Caller, options: Map) -> list[DifferenceRow]:
        """What Commit would do."""
        return [difference_row(difference) for difference in self._transaction.of(caller).plan()]

    @exposed("a{sv}", "o", outputs=["job"], **_OWN)
    async def commit(self, caller: Caller, options: Map) -> str:
        """Make all edits in one commit."""
        return job_path(self._transaction.of(caller).commit().number)

    @exposed("a{sv}", "", **_OWN)
    async def abort(self, caller: Caller, options: Map) -> None:
        """Drop it, whatever of it is under way."""
        self._transaction.of(caller).abort()

    # -- properties -----------------------------------------------------------------------------------------------

    @readable("o", emits=Emits.CONST)
    def device(self) -> str:
        """Path of the volume."""
        return device_path(self._transaction.volume)

    @readable("t", emits=Emits.CONST)
    def generation(self) -> int:
        """Sequence number of the header that it began with."""
        return self._transaction.view.seqid

    @readable("u", emits=Emits.CONST)
    def owner_uid(self) -> int:
        """User that began it."""
        return self._transaction.terms.owner.uid

    @readable("s", emits=Emits.CONST)
    def owner(self) -> str:
        """Unique name of the connection that began it."""
        return self._transaction.terms.owner.name

    @readable("s")
    def state(self) -> str:
        """Open, or committing."""
        return self._transaction.state.value

    @readable("t", emits=Emits.CONST)
    def timeout(self) -> int:
        """How long it may stay open, in microseconds."""
        return round(self._transaction.terms.seconds * MICROSECONDS)

    @readable("t", emits=Emits.CONST)
    def deadline(self) -> int:
        """When that is over, in microseconds of CLOCK_MONOTONIC, which is the event loop's."""
        return round(self._transaction.terms.deadline * MICROSECONDS)

    @readable("b")
    def unlocked(self) -> bool:
        """Whether a credential has been shown."""
        return self._transaction.unlocked


class Exporting(Protocol):
    """What is needed of ``Bus``."""

    def export(self, path: str, interface: Interface) -> None:
        """Export an interface."""

    def unexport(self, path: str, interface: Interface | str | None = None) -> None:
        """Stop exporting it, or the object."""


class Transactions:
    """Exports open transactions as they begin, and withdraws them as they end (``service.drafts.Observer``)."""

    def __init__(self, bus: Exporting, guard: Guard, keyring: Keyring, operations: Operations) -> None:
        self._bus = bus
        self._guard = guard
        self._keyring = keyring
        self._operations = operations

    def transaction_added(self, transaction: OwnedTransaction) -> None:
        """Export it."""
        path = transaction_path(transaction.terms.number)
        self._bus.export(path, Transaction(self._guard, self._keyring, self._operations, transaction))

    def transaction_ended(self, transaction: OwnedTransaction) -> None:
        """Withdraw it."""
        self._bus.unexport(transaction_path(transaction.terms.number))


def transaction_path(number: int) -> str:
    """The object path of the transaction with that number."""
    return f"{names.TRANSACTION_PATH}/{number}"
