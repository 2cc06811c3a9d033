# SPDX-License-Identifier: GPL-2.0-or-later
"""A transaction that somebody composes: begun on a volume, edited at leisure, looked at, then committed or dropped.

Nothing is locked meanwhile.  The commit insists that the header is still, byte for byte, what it was at the beginning.
"""

from collections.abc import Mapping

from luksrotd.errors import Conflict, InvalidRequest
from luksrotd.ports import DeviceRef, Host, SecretSource
from luksrotd.rotation.change import Change
from luksrotd.rotation.draft import Draft
from luksrotd.rotation.preview import Difference, preview
from luksrotd.rotation.view import DeviceView
from luksrotd.service.progress import Progress, ignore
from luksrotd.service.transaction import Committed, Deliver, Transactor, nothing_to_deliver


class OpenTransaction:
    """One transaction; ``draft`` takes the edits.  It is good for one commit."""

    def __init__(self, host: Host, transactor: Transactor, ref: DeviceRef, view: DeviceView) -> None:
        self.draft = Draft(view)
        self._host = host
        self._transactor = transactor
        self._ref = DeviceRef(ref.path, ref.header, view.uuid)
        self._over = False

    @property
    def view(self) -> DeviceView:
        """The volume as it was when the transaction began."""
        return self.draft.view

    def plan(self) -> tuple[Difference, ...]:
        """What the commit would do; raises the refusal that it would meet, as far as the header tells."""
        return preview(self.view, self.draft.change())

    async def commit(
        self,
        secrets: Mapping[str, SecretSource],
        progress: Progress = ignore,
        deliver: Deliver = nothing_to_deliver,
    ) -> Committed:
        """Make all edits in one commit, or none.

        ``secrets``: the credential (``rotation.edits.UNLOCK`` or ``VOLUME_KEY``), and one for each added keyslot, by
        the name that it was queued with.  Raises ``Conflict`` if the header is not what it was at the beginning.
        """
        self._close()
        change = self.draft.change()

        def decide(seen: DeviceView) -> Change:
            if seen.pair.raw != self.view.pair.raw:
                raise Conflict("cannot commit: another tool has changed the header since the transaction began")
            return change

        done = await self._transactor.run(self._ref, decide, secrets, progress, deliver)
        self._host.journal.record(
            "transaction committed",
            uuid=done.uuid,
            edits=len(change.edits),
            seqid_before=done.seqid_before,
            seqid_after=done.seqid_after,
        )
        return done

    def abort(self) -> None:
        """Drop it; nothing has been written.  Idempotent."""
        self._over = True

    def _close(self) -> None:
        if self._over:
            raise InvalidRequest("cannot commit: the transaction is over")
        self._over = True


async def begin(host: Host, ref: DeviceRef, transactor: Transactor | None = None) -> OpenTransaction:
    """A new transaction on the volume as it is now."""
    transactor = transactor or Transactor(host)
    return OpenTransaction(host, transactor, ref, await transactor.look(ref))
