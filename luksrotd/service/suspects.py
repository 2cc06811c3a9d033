# SPDX-License-Identifier: GPL-2.0-or-later
"""Keyslots that have come without a token: shown as suspects, accepted or removed on request, never by themselves."""

from collections.abc import Mapping
from datetime import datetime

from luksrotd.errors import InvalidRequest, StateError
from luksrotd.ports import DeviceRef, Host, SecretSource
from luksrotd.records import dataclass
from luksrotd.rotation import inventory
from luksrotd.rotation import token as tokens
from luksrotd.rotation.change import Change
from luksrotd.rotation.draft import Draft
from luksrotd.rotation.inventory import Entry, Inventory
from luksrotd.rotation.reconcile import Action, Code, Finding
from luksrotd.rotation.view import DeviceView
from luksrotd.service import audit
from luksrotd.service.audit import Audit
from luksrotd.service.progress import Progress, ignore
from luksrotd.service.threads import in_thread
from luksrotd.service.transaction import Committed, Transactor


@dataclass(frozen=True, slots=True)
class Suspect:
    """A keyslot without a token: since when it is known (UTC), and the type of the token that named it, if one did."""

    keyslot: int
    first_seen: datetime
    claimed: str | None


class Suspects:
    """The use cases around inventories, on the ports of ``host``."""

    def __init__(self, host: Host, transactor: Transactor | None = None) -> None:
        self._host = host
        self._audit = Audit(host)
        self._transactor = transactor or Transactor(host)

    async def list(self, ref: DeviceRef) -> tuple[Suspect, ...]:
        """What has come since the last clean reconcile, or was never accepted; raises ``StateError``."""
        seen = await self._transactor.look(ref)
        before = await in_thread(lambda: self._host.inventories.load(seen.uuid))
        now = inventory.take(seen, self._host.clock.now(), before)
        return tuple(Suspect(one.keyslot, one.first_seen, one.claimed) for one in inventory.suspects(seen, now))

    async def accept(self, ref: DeviceRef, keyslot: int) -> None:
        """Let the keyslot be known from now on; raises ``InvalidRequest`` and ``StateError``."""
        with self._audit.change(audit.ACCEPT, ref, keyslot=keyslot) as account:
            seen = account.view = await self._transactor.look(ref)
            _check_ordinary(seen, keyslot, "accept")
            before = await in_thread(lambda: self._host.inventories.load(seen.uuid))
            now = inventory.accepted(inventory.take(seen, self._host.clock.now(), before), keyslot)
            await in_thread(lambda: self._host.inventories.save(seen.uuid, now))
            account.done(seen.uuid, seqid_after=seen.seqid)

    async def remove(
        self, ref: DeviceRef, keyslot: int, secrets: Mapping[str, SecretSource], *, progress: Progress = ignore
    ) -> Committed:
        """Remove a keyslot without a token, and wipe its area.

        The secret named ``unlock`` must open another keyslot, which stays.  Raises ``InvalidRequest`` for a keyslot
        that a token names, and ``LastKeyslot``.
        """

        def decide(seen: DeviceView) -> Change:
            _check_ordinary(seen, keyslot, "remove")
            draft = Draft(seen)
            draft.destroy_keyslot(keyslot)
            return draft.change()

        with self._audit.change(audit.REMOVE_KEYSLOT, ref, keyslot=keyslot) as account:
            done = await self._transactor.run(ref, account.following(decide), secrets, account.progress(progress))
            account.done(done.uuid, seqid_before=done.seqid_before, seqid_after=done.seqid_after)
        return done

    def settled(self, seen: DeviceView) -> bool:
        """Whether there is an inventory that says the same as the volume, without suspects; blocks."""
        try:
            before = self._host.inventories.load(seen.uuid)
        except StateError:
            return False
        now = inventory.take(seen, self._host.clock.now(), before)
        return now == before and not inventory.suspects(seen, now)

    async def notes(self, seen: DeviceView) -> tuple[Finding, ...]:
        """What a look at the inventory adds to the findings of a volume; a failure is left out."""
        try:
            before = await in_thread(lambda: self._host.inventories.load(seen.uuid))
        except StateError:
            return ()
        return _findings(seen, inventory.take(seen, self._host.clock.now(), before))

    async def reconciled(self, seen: DeviceView, *, clean: bool) -> tuple[Finding, ...]:
        """The same for a reconcile, which says what failed; if the volume is ``clean``, remember what is there now."""
        trouble = []
        before: Inventory | None = None
        try:
            before = await in_thread(lambda: self._host.inventories.load(seen.uuid))
        except StateError as error:
            trouble.append(error.message)
        now = inventory.take(seen, self._host.clock.now(), before)
        if clean and now != before:
            try:
                await in_thread(lambda: self._host.inventories.save(seen.uuid, now))
            except StateError as error:
                trouble.append(error.message)
        unavailable = (Finding(Code.INVENTORY_UNAVAILABLE, Action.NOTE, message) for message in trouble)
        return (*_findings(seen, now), *unavailable)


def _findings(seen: DeviceView, now: Inventory) -> tuple[Finding, ...]:
    return tuple(_finding(entry) for entry in inventory.suspects(seen, now))


def _finding(entry: Entry) -> Finding:
    since = tokens.utc(entry.first_seen)
    if entry.claimed is None:
        what = "has no token, and was not there when the volume was last seen in order"
    else:
        what = f"has no token any more; one of type {entry.claimed} named it"
    message = f"keyslot {entry.keyslot} {what} (first seen {since}); see luksrotctl suspects"
    return Finding(Code.KEYSLOT_SUSPECT, Action.NOTE, message, keyslots=(entry.keyslot,), since=since)


def _check_ordinary(seen: DeviceView, keyslot: int, verb: str) -> None:
    if keyslot not in seen.metadata.keyslots:
        raise InvalidRequest(f"cannot {verb} keyslot {keyslot}: there is none of that number")
    if keyslot not in seen.ordinary:
        raise InvalidRequest(f"cannot {verb} keyslot {keyslot}: a token names it")
