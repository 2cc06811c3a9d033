# SPDX-License-Identifier: GPL-2.0-or-later
"""One open transaction of the daemon: it belongs to the connection that began it, and keeps what that has shown it."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from enum import StrEnum
from typing import Self

from luksrotd.errors import Busy, InvalidRequest, NotAuthorized
from luksrotd.ports import Caller, SecretFd, SecretKeeper, SecretSource, TokenSource
from luksrotd.records import dataclass
from luksrotd.rotation.draft import parse_token
from luksrotd.rotation.edits import NEW, UNLOCK, VOLUME_KEY, Pbkdf
from luksrotd.rotation.preview import Difference
from luksrotd.rotation.view import DeviceView
from luksrotd.service import memory, planning
from luksrotd.service.draft import OpenTransaction
from luksrotd.service.handover import Secrets
from luksrotd.service.interruption import Interruption
from luksrotd.service.jobs import Job, Kind
from luksrotd.service.registry import Registry
from luksrotd.service.runner import Request, Runner

log = logging.getLogger(__name__)


class State(StrEnum):
    """Where a transaction is in its life."""

    OPEN = "open"
    COMMITTING = "committing"
    ENDED = "ended"


class Ending(StrEnum):
    """Why a transaction ended, as the end of "cannot go on: …"."""

    ABORTED = "the transaction was aborted"
    TIMED_OUT = "the time of the transaction is up"
    OWNER_GONE = "the owner of the transaction has left the bus"
    VOLUME_GONE = "the volume of the transaction has gone"
    COMMIT_ENDED = "the commit of the transaction has ended"
    STOPPING = "the daemon is stopping"


@dataclass(frozen=True, slots=True)
class Terms:
    """Number and owner of a transaction, its time, and when that is up; both in seconds, by the loop's clock."""

    number: int
    owner: Caller
    seconds: float
    deadline: float


@dataclass(frozen=True, slots=True)
class Means:
    """What a transaction works with."""

    registry: Registry
    runner: Runner
    keeper: SecretKeeper


class OwnedTransaction:
    """``service.draft.OpenTransaction`` with an owner, secrets, and one of the ends in ``Ending``.

    Nobody but its owner's connection gets at the edits, by ``of``.  They raise ``InvalidRequest`` once it is committing
    or has ended.  Every descriptor that it was given is closed when it ends.
    """

    def __init__(self, opened: OpenTransaction, terms: Terms, means: Means) -> None:
        self.terms = terms
        self._opened = opened
        self._means = means
        self._state = State.OPEN
        self._listeners: list[Callable[[], None]] = []
        self._over = Interruption()
        self._sources: dict[str, SecretSource] = {}
        self._credential = ExitStack()
        self._resources = ExitStack()
        self._generating = Secrets()
        self._unlocking = False
        self._trial: Job | None = None

    # -- what everybody may ask -----------------------------------------------------------------------------------

    @property
    def volume(self) -> str:
        """LUKS UUID of its volume."""
        return self._opened.view.uuid

    @property
    def view(self) -> DeviceView:
        """The volume as it was when it began."""
        return self._opened.view

    @property
    def node(self) -> str:
        """Where the volume was when it began."""
        return self._opened.ref.path

    @property
    def state(self) -> State:
        """Where it is."""
        return self._state

    @property
    def unlocked(self) -> bool:
        """Whether a credential has been shown."""
        return not {UNLOCK, VOLUME_KEY}.isdisjoint(self._sources)

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called after every change of the state or of ``unlocked``."""
        self._listeners.append(listener)

    def of(self, caller: Caller) -> Self:
        """The transaction, for its owner; raises ``NotAuthorized`` for every other connection."""
        if not caller.is_same(self.terms.owner):
            raise NotAuthorized("cannot use the transaction: another connection has begun it")
        return self

    # -- for its owner --------------------------------------------------------------------------------------------

    async def unlock(self, secrets: Secrets, *, volume_key: bool = False) -> None:
        """Show a credential (``rotation.edits.UNLOCK`` in ``secrets``, which belong to this from now on).

        It is tried at once, as a job that waits its turn.  Raises ``WrongCredential``, ``SecretRejected`` (another one
        can be shown then), ``Busy`` and ``TooMany``; ``Cancelled`` when the transaction ends meanwhile.
        """
        with ExitStack() as unused:
            unused.callback(secrets.close)
            self._check_open()
            if self._unlocking:
                raise Busy("cannot unlock: another credential is being tried")
            self._unlocking = True
            unused.callback(self._tried)
            source = await self._kept(secrets, UNLOCK)
            name = VOLUME_KEY if volume_key else UNLOCK

            async def work(_: Job) -> object:
                await self._opened.check_credential(source, volume_key=volume_key)
                self._over.check()
                self._take_credential(name, source, secrets.resources.pop_all())
                return None

            # Its secrets stay open until the job has ended, whatever becomes of who waits for it.
            cost = memory.needed_kib(self.view)
            request = Request(Kind.VERIFY, (self.volume,), work, "", self.terms.owner, secrets, memory_kib=cost)
            self._trial = trial = self._means.runner.submit(request)
            unused.pop_all()
            trial.subscribe(self._tried)
            await trial.wait()

    async def add_keyslot(self, secrets: Secrets, pbkdf: Pbkdf, keyslot: int | None = None) -> int:
        """Queue a keyslot for the secret ``rotation.edits.NEW`` in ``secrets``, which belong to this now; its number.

        Raises ``InvalidRequest``, ``NoFreeKeyslot``, ``SecretRejected``, and ``Cancelled`` as ``unlock``.
        """
        with ExitStack() as unused:
            unused.callback(secrets.close)
            self._check_open()
            source = await self._kept(secrets, NEW)
            self._check_open()
            if secrets.handover is not None and self._generating.handover is not None:
                raise InvalidRequest("cannot add a keyslot: one key of the transaction is generated already")
            name = f"{NEW}-{len(self._opened.draft.secrets)}"
            number = self._opened.draft.add_keyslot(name, pbkdf, keyslot)
            self._sources[name] = source
            if secrets.handover is not None:
                self._generating = secrets
            self._resources.push(unused.pop_all())
            return number

    def set_token(self, text: str, token: int | None = None) -> int:
        """Queue a token, given as JSON; its number.  Raises ``InvalidRequest`` and ``NoFreeKeyslot``."""
        self._check_open()
        return self._opened.draft.set_token(parse_token(text, self.view.metadata.config.json_size), token)

    def remove_token(self, token: int) -> None:
        """Queue the removal of a token, or take a queued one back; raises ``InvalidRequest``."""
        self._check_open()
        self._opened.draft.remove_token(token)

    def destroy_keyslot(self, keyslot: int) -> None:
        """Queue the removal of a keyslot; raises ``InvalidRequest``."""
        self._check_open()
        self._opened.draft.destroy_keyslot(keyslot)

    def plan(self) -> tuple[Difference, ...]:
        """What the commit would do; raises the refusal that it would meet, as far as the header tells.

        Without associated data: there is a right of its own to read that.
        """
        self._check_open()
        return planning.public(self._opened.plan())

    def commit(self) -> Job:
        """Start the commit of all edits, or of none; the end of the job is the end of the transaction.

        What is raised leaves it open: the refusal of the edits, ``NeedsPerson``, ``Busy`` and ``TooMany``.
        """
        self._check_open()
        if self._unlocking:
            raise Busy("cannot commit: the credential is still being tried")
        self._means.registry.writable(self.volume)
        change = self._opened.ready(self._sources.keys())
        derived = (edit.pbkdf for edit in change.added)
        cost = memory.needed_kib(self.view, *derived) if change.needs_unlock else memory.WORKER_KIB
        # Without the resources: a commit that the runner refuses must find its secrets the next time.
        lent = replace(self._generating, sources=dict(self._sources), resources=ExitStack())

        async def work(job: Job) -> object:
            self._means.registry.writable(self.volume)
            done = await self._opened.commit(lent.sources, job.entered, lent.deliver)
            await self._means.registry.settle(self.volume)  # who learns that it is done shall find it so
            return done

        request = Request(Kind.TRANSACTION, (self.volume,), work, "", self.terms.owner, lent, memory_kib=cost)
        job = self._means.runner.submit(request)
        self._move(State.COMMITTING)
        job.subscribe(lambda: self._end(Ending.COMMIT_ENDED) if job.ended else None)
        return job

    def abort(self) -> None:
        """Drop it."""
        self._check_open()
        self._end(Ending.ABORTED)

    # -- for who looks after it -----------------------------------------------------------------------------------

    def leave(self, ending: Ending) -> None:
        """Drop it for that reason, unless it is committing: then it ends with its commit.  Idempotent."""
        if self._state is State.OPEN:
            self._end(ending)

    def _end(self, ending: Ending) -> None:
        if self._state is State.ENDED:
            return
        self._opened.abort()
        self._over.happen(ending)
        if self._trial is not None:
            self._means.runner.cancel(self._trial, ending)
        self._sources.clear()
        self._credential.close()
        self._resources.close()
        log.info("transaction %d of uid %d is over: %s", self.terms.number, self.terms.owner.uid, ending)
        self._move(State.ENDED)

    def _move(self, state: State) -> None:
        self._state = state
        self._notify()

    def _notify(self) -> None:
        for listener in self._listeners:
            try:
                listener()
            except Exception:  # whoever looks on must not keep a descriptor open
                log.exception("a listener of transaction %d failed", self.terms.number)

    def _check_open(self) -> None:
        self._over.check()
        if self._state is State.COMMITTING:
            raise InvalidRequest("cannot change the transaction: it is being committed")

    # -- secrets --------------------------------------------------------------------------------------------------

    async def _kept(self, secrets: Secrets, name: str) -> SecretSource:
        """The source of that name, so that it can be read at the commit, too, and whatever the other side does."""
        source = secrets.sources[name]
        async with self._over.heeded():
            match source:
                case SecretFd():
                    return await self._means.keeper.keep(source, secrets.resources)
                case TokenSource(pin=SecretFd() as pin):
                    return replace(source, pin=await self._means.keeper.keep(pin, secrets.resources))
        return source

    def _take_credential(self, name: str, source: SecretSource, resources: ExitStack) -> None:
        for other in (UNLOCK, VOLUME_KEY):
            self._sources.pop(other, None)
        self._credential.close()
        self._credential = resources
        self._sources[name] = source
        self._notify()

    def _tried(self) -> None:
        if self._trial is None or self._trial.ended:
            self._unlocking, self._trial = False, None
