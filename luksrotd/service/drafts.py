# SPDX-License-Identifier: GPL-2.0-or-later
"""The open transactions of the daemon: how many there may be, whose they are, and what ends them."""

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Protocol

from luksrotd.config import Limits
from luksrotd.errors import Busy, InvalidRequest, StaleGeneration, TooMany
from luksrotd.ports import Caller, Host
from luksrotd.service.draft import OpenTransaction, begin
from luksrotd.service.interruption import Interruption
from luksrotd.service.owned import Ending, Means, OwnedTransaction, State, Terms
from luksrotd.service.registry import Volume

log = logging.getLogger(__name__)

MAX_SECONDS: Final = 3600.0
"""The longest time that a caller can ask for."""


class Observer(Protocol):
    """Learns of all open transactions, on the event loop."""

    def transaction_added(self, transaction: OwnedTransaction) -> None:
        """It is open."""

    def transaction_ended(self, transaction: OwnedTransaction) -> None:
        """It is over, and nothing is left of it."""


class Drafts:
    """Begins transactions, and ends those whose time is up, or whose owner or volume has gone.

    ``gone`` returns when the caller has left the bus, at once if it is not there.
    """

    def __init__(
        self, host: Host, means: Means, gone: Callable[[Caller], Awaitable[None]], limits: Limits | None = None
    ) -> None:
        self._host = host
        self._means = means
        self._gone = gone
        self._limits = limits or Limits()
        self._numbers = itertools.count(1)
        self._open: dict[int, OwnedTransaction] = {}
        self._beginning: Counter[int] = Counter()
        self._observers: list[Observer] = []
        self._closed = False
        means.registry.observe(self)

    @property
    def transactions(self) -> Mapping[int, OwnedTransaction]:
        """Those that have not ended, by number."""
        return dict(self._open)

    def observe(self, observer: Observer) -> None:
        """Have ``observer`` told of every transaction from now on."""
        self._observers.append(observer)

    def unobserve(self, observer: Observer) -> None:
        """Tell it no more."""
        self._observers.remove(observer)

    def configure(self, limits: Limits) -> None:
        """Other limits from now on; what is open stays as it is."""
        self._limits = limits

    async def begin(
        self, uuid: str, owner: Caller, *, seconds: float | None = None, generation: int | None = None
    ) -> OwnedTransaction:
        """A new transaction on the volume as it is now, for ``seconds`` (None: as configured).

        ``generation``: the sequence number that its header must have.  Raises ``InvalidRequest``, ``UnknownDevice``,
        ``NeedsPerson``, ``TooMany``, ``StaleGeneration``, ``Busy`` once closed, ``Cancelled`` if the owner vanishes,
        and what ``service.draft.begin`` raises.
        """
        if seconds is not None and not 0 < seconds <= MAX_SECONDS:
            raise InvalidRequest(f"cannot begin a transaction: its time must be above 0 and at most {MAX_SECONDS:g} s")
        time = self._limits.transaction_seconds if seconds is None else seconds
        self._admit(owner)
        volume = self._means.registry.writable(uuid)
        left = Interruption()
        watch = asyncio.create_task(_wait(self._gone(owner)))
        watch.add_done_callback(lambda _: left.happen("its caller has left the bus"))
        self._beginning[owner.uid] += 1
        try:
            async with left.heeded():
                opened = await begin(self._host, volume.ref)
            self._check(opened, generation)
        except BaseException:
            watch.cancel()
            raise
        finally:
            self._beginning[owner.uid] -= 1
            self._beginning += Counter()  # forgets the users without any
        return self._add(opened, owner, time, watch)

    def close(self) -> None:
        """Drop all that are not committing, and begin no more."""
        self._closed = True
        for transaction in self.transactions.values():
            transaction.leave(Ending.STOPPING)

    # -- what happens ---------------------------------------------------------------------------------------------

    def volume_added(self, volume: Volume) -> None:
        """Nothing: there are none on it yet."""

    def volume_changed(self, volume: Volume, *, fresh: bool) -> None:
        """Nothing: a commit looks for itself."""

    def volume_removed(self, volume: Volume) -> None:
        """Drop those on it."""
        for transaction in self.transactions.values():
            if transaction.volume == volume.uuid:
                transaction.leave(Ending.VOLUME_GONE)

    def _admit(self, owner: Caller) -> None:
        if self._closed:
            raise Busy(f"cannot begin a transaction: {Ending.STOPPING}")
        users = Counter(transaction.terms.owner.uid for transaction in self._open.values()) + self._beginning
        if users.total() >= self._limits.transactions:
            raise TooMany(f"cannot begin a transaction: {self._limits.transactions} are open")
        if owner.uid and users[owner.uid] >= self._limits.transactions_per_user:
            raise TooMany(f"cannot begin a transaction: {self._limits.transactions_per_user} of the user are open")

    def _check(self, opened: OpenTransaction, generation: int | None) -> None:
        """What may have changed while the header was read, and what it says."""
        if self._closed:
            raise Busy(f"cannot begin a transaction: {Ending.STOPPING}")
        self._means.registry.writable(opened.view.uuid)
        if generation not in (None, opened.view.seqid):
            raise StaleGeneration(
                f"cannot begin a transaction: the volume is at sequence number {opened.view.seqid}, not {generation}"
            )

    def _add(
        self, opened: OpenTransaction, owner: Caller, seconds: float, watch: asyncio.Task[None]
    ) -> OwnedTransaction:
        loop = asyncio.get_running_loop()
        terms = Terms(next(self._numbers), owner, seconds, loop.time() + seconds)
        transaction = OwnedTransaction(opened, terms, self._means)
        timer = loop.call_at(terms.deadline, transaction.leave, Ending.TIMED_OUT)
        watch.add_done_callback(lambda _: transaction.leave(Ending.OWNER_GONE))

        def changed() -> None:
            if transaction.state is State.ENDED:
                del self._open[terms.number]
                timer.cancel()
                watch.cancel()
                self._tell("transaction_ended", transaction)

        transaction.subscribe(changed)
        self._open[terms.number] = transaction
        self._tell("transaction_added", transaction)
        return transaction

    def _tell(self, event: str, transaction: OwnedTransaction) -> None:
        for observer in self._observers.copy():
            try:
                getattr(observer, event)(transaction)
            except Exception:  # whoever looks on must not keep a transaction open
                log.exception("an observer of transaction %d failed", transaction.terms.number)


async def _wait(gone: Awaitable[None]) -> None:
    await gone
