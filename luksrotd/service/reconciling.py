# SPDX-License-Identifier: GPL-2.0-or-later
"""Look at a volume, and finish what a crash, or another tool, has left (docs/spec/reconcile.md)."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext

from luksrotd.ports import DeviceRef, HeaderDevice, Host
from luksrotd.records import dataclass
from luksrotd.rotation import reconcile
from luksrotd.rotation.leftovers import Rules
from luksrotd.rotation.preview import Difference
from luksrotd.rotation.reconcile import Action, Finding
from luksrotd.rotation.view import DeviceView
from luksrotd.service import audit
from luksrotd.service.audit import Audit
from luksrotd.service.cancellation import heed_cancellation, to_the_end
from luksrotd.service.glances import Glances
from luksrotd.service.suspects import Suspects
from luksrotd.service.transaction import Mended, Transactor

#: What has to be entered before a volume is worked on.
Turn = Callable[[], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True)
class Reconciled:
    """The result of a reconcile: what was found, and what is left now (the same for a dry run).

    ``differences``: exactly what was changed, or would be by a run that is not dry.
    """

    uuid: str
    found: tuple[Finding, ...]
    left: tuple[Finding, ...]
    seqid: int
    differences: tuple[Difference, ...] = ()

    @property
    def repaired(self) -> tuple[Finding, ...]:
        """What was found and is gone."""
        return tuple(finding for finding in self.found if finding not in self.left)

    @property
    def needs_person(self) -> bool:
        """Whether something is left that reconcile must not decide."""
        return any(finding.action is Action.PERSON for finding in self.left)


@dataclass(frozen=True, slots=True)
class Examined:
    """A volume as it is, and what reconcile would find."""

    view: DeviceView
    findings: tuple[Finding, ...]


class Reconciler:
    """The use cases on the ports of ``host``."""

    def __init__(self, host: Host, transactor: Transactor) -> None:
        self._host = host
        self._transactor = transactor
        self._audit = Audit(host)
        self._suspects = Suspects(host, transactor)
        self._glances = Glances(host, self._suspects)

    async def examine(self, ref: DeviceRef, *, remember: bool = False) -> Examined:
        """The volume as it is now, and what reconcile would find.

        ``remember``: if that is nothing, keep its inventory, as a reconcile would.
        """
        async with self._transactor.opened(ref) as device:
            seen = await self._transactor.look_at(ref, device)
            foreign = await self._host.probe.foreign(device)
        findings = reconcile.diagnose(seen, foreign, Rules(now=self._host.clock.now()))
        notes = self._suspects.reconciled(seen, clean=not findings) if remember else self._suspects.notes(seen)
        return Examined(seen, (*findings, *await notes))

    async def reconcile(
        self, ref: DeviceRef, *, dry_run: bool = False, retire_expired: bool = False, turn: Turn = nullcontext
    ) -> Reconciled:
        """Finish what a crash interrupted; with ``dry_run`` only say what would be done.  Needs no secret.

        ``retire_expired``: abort staged keys that have expired, too.  ``turn``: see ``Turn``; a volume that is in order
        does not wait for it.
        """
        rules = Rules(now=self._host.clock.now(), retire_expired=retire_expired)
        if clean := await self._glances.clean(ref, rules):
            return Reconciled(clean.uuid, (), (), clean.seqid)
        async with turn():
            return await self._thorough(ref, rules, dry_run=dry_run)

    async def _thorough(self, ref: DeviceRef, rules: Rules, *, dry_run: bool) -> Reconciled:
        async with self._transactor.opened(ref) as device:
            seen = await self._transactor.look_at(ref, device)
            foreign = await self._host.probe.foreign(device)
            found = reconcile.diagnose(seen, foreign, rules)
            done = Mended(seen, reconcile.differences(seen, rules) if dry_run else ())
            if not dry_run and any(finding.action is Action.REPAIR for finding in found):
                done = await self._mend(ref, device, seen, rules)
        left = reconcile.diagnose(done.view, foreign, rules)
        # A cancel that comes now must not hide what has been mended, nor keep it out of the record.
        notes = await to_the_end(self._suspects.reconciled(done.view, clean=not (dry_run or left)))
        if done.view is seen:
            heed_cancellation()
        result = Reconciled(seen.uuid, (*found, *notes), (*left, *notes), done.view.seqid, done.differences)
        if result.repaired and not dry_run:
            self._audit.reconciled(ref, seen, done.view, result.repaired)
        if not dry_run:
            self._audit.found(ref, done.view, result.left)
        return result

    async def _mend(self, ref: DeviceRef, device: HeaderDevice, seen: DeviceView, rules: Rules) -> Mended:
        with self._audit.attempt(audit.RECONCILE, ref) as account:
            account.view = seen
            async with self._host.locks.job(device):
                return await self._transactor.mend(ref, device, rules)
