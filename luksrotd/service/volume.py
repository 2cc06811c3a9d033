# SPDX-License-Identifier: GPL-2.0-or-later
"""The use cases on one volume: each is a decision of ``rotation`` that the transactor carries out."""

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final, Self

from luksrotd.errors import NeedsPerson
from luksrotd.names import DEFAULT_KEY_NAME, TOKEN_TYPE
from luksrotd.ports import DeviceRef, Host, SecretSource
from luksrotd.rotation import adoption, keys, policy, staging
from luksrotd.rotation.adoption import AdoptRequest, RecreateRequest
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import NEW, UNLOCK, Pbkdf, SetToken
from luksrotd.rotation.keys import EnrollRequest, RotateRequest
from luksrotd.rotation.reconcile import Finding
from luksrotd.rotation.staging import StageRequest
from luksrotd.rotation.token import Group
from luksrotd.rotation.view import DeviceView
from luksrotd.service import audit, scrub
from luksrotd.service.audit import Audit, Verb
from luksrotd.service.progress import Progress, ignore
from luksrotd.service.reconciling import Examined, Reconciled, Reconciler, Turn
from luksrotd.service.scrub import Scrubbed
from luksrotd.service.suspects import Suspects
from luksrotd.service.transaction import Decide, Deliver, Transactor, nothing_to_deliver

Sources = Mapping[str, SecretSource]


@dataclass(frozen=True, slots=True)
class Hold:
    """How a staged key waits: after which time it is reported as forgotten, and the set of volumes it belongs to."""

    expires_after: timedelta | None = timedelta(days=30)
    group: Group | None = None


DEFAULT_HOLD: Final = Hold()


@dataclass(frozen=True, slots=True)
class KeyChange:
    """What became of a key: its name, generation and keyslot now, the sequence numbers before and after.

    Generation 0 and no keyslot: it is not managed any more.
    """

    uuid: str
    name: str
    generation: int
    keyslot: int | None
    seqid_before: int
    seqid_after: int


class Volumes:
    """The use cases on the ports of ``host``."""

    def __init__(self, host: Host, transactor: Transactor | None = None) -> None:
        self._host = host
        self._transactor = transactor or Transactor(host)
        #: The record of what is done, and of what is noticed.
        self.audit = Audit(host)
        self._reconciler = Reconciler(host, self._transactor)
        self._only_at: int | None = None
        #: Whose change of a header it was.
        self.ledger = host.ledger
        #: Keyslots without a token, and what is known of them.
        self.suspects = Suspects(host, self._transactor)

    def at(self, seqid: int | None) -> Self:
        """The same use cases for one who has seen the header at that sequence number (``None``: at any).

        If it is at another one when a change is decided on, that is ``StaleGeneration``, and nothing is changed.
        """
        bound = copy.copy(self)
        bound._only_at = seqid
        return bound

    async def look(self, ref: DeviceRef) -> DeviceView:
        """The volume as it is now."""
        return await self._transactor.look(ref)

    async def findings(self, ref: DeviceRef) -> tuple[Finding, ...]:
        """What reconcile would find."""
        return (await self.examine(ref)).findings

    async def examine(self, ref: DeviceRef, *, remember: bool = False) -> Examined:
        """The volume as it is now, and what reconcile would find.

        ``remember``: if that is nothing, keep its inventory, as a reconcile would.
        """
        return await self._reconciler.examine(ref, remember=remember)

    async def enroll(
        self,
        ref: DeviceRef,
        secrets: Sources,
        *,
        data: Mapping[str, Any],
        pbkdf: Pbkdf,
        name: str = DEFAULT_KEY_NAME,
        progress: Progress = ignore,
        deliver: Deliver = nothing_to_deliver,
    ) -> KeyChange:
        """Give the volume a managed key: keyslot and token born in one commit."""
        request = EnrollRequest(data, self._now(), pbkdf, name)
        run = Run(audit.ENROLL, secrets, progress, deliver)
        return await self._change(ref, name, lambda seen: keys.enroll(seen, request), run)

    async def rotate(
        self,
        ref: DeviceRef,
        secrets: Sources,
        *,
        data: Mapping[str, Any] | None,
        pbkdf: Pbkdf,
        name: str = DEFAULT_KEY_NAME,
        progress: Progress = ignore,
        deliver: Deliver = nothing_to_deliver,
    ) -> KeyChange:
        """Replace a managed key: new keyslot, token and the wipe of the old area in one transaction."""
        request = RotateRequest(data, self._now(), pbkdf, name)
        run = Run(audit.ROTATE, secrets, progress, deliver)
        return await self._change(ref, name, lambda seen: keys.rotate(seen, request), run)

    async def stage(
        self,
        ref: DeviceRef,
        secrets: Sources,
        *,
        data: Mapping[str, Any] | None,
        pbkdf: Pbkdf,
        name: str = DEFAULT_KEY_NAME,
        hold: Hold = DEFAULT_HOLD,
        progress: Progress = ignore,
        deliver: Deliver = nothing_to_deliver,
    ) -> KeyChange:
        """Put a new generation of a managed key beside the current one; both open the volume until ``finish``."""
        now = self._now()
        expires = None if hold.expires_after is None else now + hold.expires_after
        request = StageRequest(RotateRequest(data, now, pbkdf, name), expires, hold.group)
        run = Run(audit.STAGE, secrets, progress, deliver, hold.group.id if hold.group else None)
        return await self._change(ref, name, lambda seen: staging.stage(seen, request), run)

    async def finish(
        self,
        ref: DeviceRef,
        *,
        name: str = DEFAULT_KEY_NAME,
        generation: int | None = None,
        group: str | None = None,
        progress: Progress = ignore,
    ) -> KeyChange:
        """The staged generation becomes the only one; needs no secret."""
        run = Run(audit.FINISH, {}, progress, group=group)
        return await self._change(ref, name, lambda seen: staging.finish(seen, name, generation, group), run)

    async def abort(
        self,
        ref: DeviceRef,
        *,
        name: str = DEFAULT_KEY_NAME,
        generation: int | None = None,
        group: str | None = None,
        progress: Progress = ignore,
    ) -> KeyChange:
        """The staged generation goes; needs no secret."""
        run = Run(audit.ABORT, {}, progress, group=group)
        return await self._change(ref, name, lambda seen: staging.abort(seen, name, generation, group), run)

    async def remove(
        self, ref: DeviceRef, secrets: Sources, *, name: str = DEFAULT_KEY_NAME, progress: Progress = ignore
    ) -> KeyChange:
        """Keyslot and token of a managed key go; the credential must open another keyslot."""
        run = Run(audit.REMOVE, secrets, progress)
        return await self._change(ref, name, lambda seen: keys.remove(seen, name), run)

    async def set_data(
        self, ref: DeviceRef, data: Mapping[str, Any], *, name: str = DEFAULT_KEY_NAME, progress: Progress = ignore
    ) -> KeyChange:
        """Other associated data for the same key."""
        run = Run(audit.SET_DATA, {}, progress)
        return await self._change(ref, name, lambda seen: keys.set_data(seen, name, data), run)

    async def adopt(
        self,
        ref: DeviceRef,
        keyslot: int,
        secrets: Sources | None = None,
        *,
        data: Mapping[str, Any],
        name: str = DEFAULT_KEY_NAME,
        progress: Progress = ignore,
    ) -> KeyChange:
        """Manage a keyslot that is there; the token that names it is kept for ``release``.

        A credential, if one is given, must open that keyslot; it is tried in the same transaction.
        """
        request = AdoptRequest(keyslot, data, self._now(), name)
        proof = frozenset({keyslot}) if secrets else None
        run = Run(audit.ADOPT, secrets or {}, progress)
        return await self._change(ref, name, lambda seen: replace(adoption.adopt(seen, request), survivors=proof), run)

    async def release(self, ref: DeviceRef, *, name: str = DEFAULT_KEY_NAME, progress: Progress = ignore) -> KeyChange:
        """Manage a key no more; its keyslot stays."""
        run = Run(audit.RELEASE, {}, progress)
        return await self._change(ref, name, lambda seen: adoption.release(seen, name), run)

    async def recreate(
        self,
        ref: DeviceRef,
        secrets: Sources,
        *,
        data: Mapping[str, Any] | None,
        pbkdf: Pbkdf,
        name: str = DEFAULT_KEY_NAME,
        progress: Progress = ignore,
        deliver: Deliver = nothing_to_deliver,
    ) -> KeyChange:
        """Make the token, or token and keyslot, anew.

        With a secret named ``new``: a new keyslot for it, the volume unlocked by any credential or the volume key.
        Without: the credential is the managed key itself, and the token is made for the keyslot that it opens.
        """
        keyslot = None if NEW in secrets else await self._transactor.opened_by(ref, secrets[UNLOCK])
        request = RecreateRequest(data, self._now(), pbkdf, name, keyslot)
        run = Run(audit.RECREATE, secrets, progress, deliver)
        # It must still open it when the token is written.
        proof = None if keyslot is None else frozenset({keyslot})
        return await self._change(
            ref, name, lambda seen: replace(adoption.recreate(seen, request), survivors=proof), run
        )

    async def plan(self, ref: DeviceRef, decide: Callable[[DeviceView, datetime], Change]) -> tuple[DeviceView, Change]:
        """The volume as it is now, and what ``decide`` wants of it; nothing is changed.

        Raises what a transaction would raise before it needs a secret.
        """
        async with self._transactor.opened(ref) as device:
            policy.check_signatures(tuple(await self._host.probe.foreign(device)))
        seen = await self.look(ref)
        change = decide(seen, self._now())
        policy.check_retirement(seen, change)
        return seen, change

    async def verify(self, ref: DeviceRef, secret: SecretSource, *, name: str = DEFAULT_KEY_NAME) -> bool:
        """Whether the secret is that of the managed key ``name``; nothing is changed."""
        return await self._transactor.opens(ref, lambda seen: _keyslot(seen, name), secret)

    async def data(self, ref: DeviceRef, *, name: str = DEFAULT_KEY_NAME) -> Mapping[str, Any]:
        """The associated data of the managed key ``name``."""
        return policy.managed(await self.look(ref), name).token.data

    async def reconcile(
        self, ref: DeviceRef, *, dry_run: bool = False, retire_expired: bool = False, turn: Turn = nullcontext
    ) -> Reconciled:
        """Finish what a crash interrupted; with ``dry_run`` only say what would be done.  Needs no secret.

        ``retire_expired``: abort staged keys that have expired, too.  ``turn``: entered before a volume is worked on;
        one that is in order does not wait for it.
        """
        return await self._reconciler.reconcile(ref, dry_run=dry_run, retire_expired=retire_expired, turn=turn)

    async def scrub(self, ref: DeviceRef, *, progress: Progress = ignore) -> Scrubbed:
        """Overwrite all keyslot space that no header copy references; the header stays as it is."""
        with self.audit.change(audit.SCRUB, ref) as account:
            done = await scrub.run(self._transactor, ref, account.progress(progress), only_at=self._only_at)
            account.done(done.uuid, bytes=done.bytes, seqid_before=done.seqid, seqid_after=done.seqid)
        return done

    def _now(self) -> datetime:
        return self._host.clock.now()

    async def _change(self, ref: DeviceRef, name: str, decide: Decide, run: "Run") -> KeyChange:
        def unless_stale(seen: DeviceView) -> Change:
            policy.check_sequence(seen, self._only_at)
            return decide(seen)

        with self.audit.change(run.verb, ref, name, group=run.group) as account:
            done = await self._transactor.run(
                ref, account.following(unless_stale), run.secrets, account.progress(run.progress), run.deliver
            )
            generation, keyslot = _what_is_left(done.change, name)
            account.done(
                done.uuid,
                generation=generation,
                keyslot=-1 if keyslot is None else keyslot,
                seqid_before=done.seqid_before,
                seqid_after=done.seqid_after,
            )
        return KeyChange(done.uuid, name, generation, keyslot, done.seqid_before, done.seqid_after)


@dataclass(frozen=True, slots=True)
class Run:
    """How a change is carried out: what it is, its secrets, who follows it, who gets a new secret, for which set."""

    verb: Verb
    secrets: Sources
    progress: Progress = ignore
    deliver: Deliver = nothing_to_deliver
    group: str | None = None


def _what_is_left(change: Change, name: str) -> tuple[int, int | None]:
    """Generation and keyslot of the key as the change writes its token last; 0 and ``None`` if it is none of ours."""
    for edit in reversed((*change.edits, *change.closing)):
        if isinstance(edit, SetToken) and edit.body["type"] == TOKEN_TYPE and edit.body["name"] == name:
            return edit.body["generation"], int(edit.body["keyslots"][0])
    return 0, None


def _keyslot(seen: DeviceView, name: str) -> int:
    key = policy.managed(seen, name)
    if key.keyslot is None:
        raise NeedsPerson(f"cannot verify key {name!r}: its token names {len(key.token.keyslots)} keyslots, not one")
    return key.keyslot.id
