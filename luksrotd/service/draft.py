# SPDX-License-Identifier: GPL-2.0-or-later
"""A transaction that somebody composes: begun on a volume, edited at leisure, looked at, then committed or dropped.

Nothing is locked meanwhile.  The commit insists that the header is still, byte for byte, what it was at the beginning.
"""

from collections.abc import Collection, Mapping

from luksrotd.errors import Conflict, InvalidRequest
from luksrotd.ports import DeviceRef, Host, SecretSource
from luksrotd.rotation import policy
from luksrotd.rotation.change import Change
from luksrotd.rotation.draft import Draft
from luksrotd.rotation.edits import UNLOCK, VOLUME_KEY
from luksrotd.rotation.preview import Difference, preview
from luksrotd.rotation.view import DeviceView
from luksrotd.service import audit
from luksrotd.service.audit import Audit
from luksrotd.service.progress import Progress, ignore
from luksrotd.service.transaction import Committed, Deliver, Transactor, nothing_to_deliver


class OpenTransaction:
    """One transaction on the volume in ``ref``; ``draft`` takes the edits.  It is good for one commit."""

    def __init__(self, host: Host, transactor: Transactor, ref: DeviceRef, view: DeviceView) -> None:
        self.draft = Draft(view)
        self._audit = Audit(host)
        self._transactor = transactor
        self.ref = DeviceRef(ref.path, ref.header, view.uuid)
        self._over = False

    @property
    def view(self) -> DeviceView:
        """The volume as it was when the transaction began."""
        return self.draft.view

    async def check_credential(self, source: SecretSource, *, volume_key: bool = False) -> None:
        """Raise ``WrongCredential`` unless it opens the volume; tried on a shadow."""
        self.check_open()
        if volume_key:
            await self._transactor.check_volume_key(self.ref, source)
        else:
            await self._transactor.opened_by(self.ref, source)

    def plan(self) -> tuple[Difference, ...]:
        """What the commit would do; raises the refusal that it would meet, as far as the header tells."""
        self.check_open()
        return preview(self.view, self.draft.change())

    def ready(self, secrets: Collection[str]) -> Change:
        """All edits as one change; raises the refusal of a commit that has the secrets of those names."""
        self.check_open()
        change = self.draft.change()
        if change.needs_unlock and {UNLOCK, VOLUME_KEY}.isdisjoint(secrets):
            raise InvalidRequest("cannot commit: keyslots come or go, and the volume has not been unlocked for that")
        return change

    async def commit(
        self,
        secrets: Mapping[str, SecretSource],
        progress: Progress = ignore,
        deliver: Deliver = nothing_to_deliver,
    ) -> Committed:
        """Make all edits in one commit, or none.

        ``secrets``: the credential (``rotation.edits.UNLOCK`` or ``VOLUME_KEY``), and one for each added keyslot, by
        the name that it was queued with.  Raises ``Conflict`` if the header is not what it was at the beginning.  A
        refusal of the edits themselves leaves the transaction open.
        """
        change = self.ready(secrets.keys())
        self._over = True

        def decide(seen: DeviceView) -> Change:
            if seen.pair.raw != self.view.pair.raw:
                raise Conflict("cannot commit: another tool has changed the header since the transaction began")
            return change

        with self._audit.change(audit.TRANSACTION, self.ref, edits=len(change.edits)) as account:
            done = await self._transactor.run(
                self.ref, account.following(decide), secrets, account.progress(progress), deliver
            )
            account.done(done.uuid, seqid_before=done.seqid_before, seqid_after=done.seqid_after)
        return done

    def abort(self) -> None:
        """Drop it; nothing has been written.  Idempotent."""
        self._over = True

    def check_open(self) -> None:
        """Raise ``InvalidRequest`` if it has been committed or aborted."""
        if self._over:
            raise InvalidRequest("cannot go on with the transaction: it is over")


async def begin(host: Host, ref: DeviceRef, transactor: Transactor | None = None) -> OpenTransaction:
    """A new transaction on the volume as it is now; raises the refusals that do not depend on the edits."""
    transactor = transactor or Transactor(host)
    async with transactor.opened(ref) as device:
        policy.check_signatures(tuple(await host.probe.foreign(device)))
    seen = await transactor.look(ref)
    policy.check_writable(seen)
    return OpenTransaction(host, transactor, ref, seen)
