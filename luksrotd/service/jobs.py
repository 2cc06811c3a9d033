# SPDX-License-Identifier: GPL-2.0-or-later
"""A job: one operation on one volume or on a set of them, from its start to its only outcome."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final

from luksrotd.errors import Busy, Cancelled, Internal, LuksrotdError, Outcome
from luksrotd.ports import Caller
from luksrotd.rotation.protocol import Phase
from luksrotd.service.handover import Handover
from luksrotd.service.progress import TIMED, Stage, fraction

log = logging.getLogger(__name__)


class Kind(StrEnum):
    """What a job does."""

    ENROLL = "enroll"
    ROTATE = "rotate"
    STAGE = "stage"
    FINISH = "finish"
    ABORT = "abort"
    SET_DATA = "set-data"
    REMOVE = "remove"
    ADOPT = "adopt"
    RELEASE = "release"
    RECREATE = "recreate"
    SCRUB = "scrub"
    TRANSACTION = "transaction"
    RECONCILE = "reconcile"
    VERIFY = "verify"


#: Those that nobody sees: the method that wants it done answers when it is done.
UNSEEN: Final = frozenset({Kind.RECONCILE, Kind.VERIFY})


class State(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    COMMITTING = "committing"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    State.QUEUED: frozenset({State.RUNNING, State.FAILED, State.CANCELLED}),
    State.RUNNING: frozenset({State.COMMITTING, State.FINISHED, State.FAILED, State.CANCELLED}),
    State.COMMITTING: frozenset({State.FINISHED, State.FAILED}),
    State.FINISHED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}
CANCELLABLE: Final = frozenset({State.QUEUED, State.RUNNING})
ENDED: Final = frozenset(state for state, following in TRANSITIONS.items() if not following)

#: Phases that the header does not show yet: the job can still be given up.
_INVISIBLE: Final = frozenset({Phase.NEW_AREA})


class Job:
    """One operation; everything about it is changed by the runner only.

    ``volumes`` are LUKS UUIDs; ``owner`` is None for what the daemon started by itself; ``handover`` gives away the key
    that it generates, if it does.
    """

    def __init__(
        self,
        number: int,
        kind: Kind,
        volumes: tuple[str, ...],
        *,
        key_name: str = "",
        owner: Caller | None = None,
        handover: Handover | None = None,
    ) -> None:
        self.number = number
        self.kind = kind
        self.volumes = volumes
        self.key_name = key_name
        self.owner = owner
        self.handover = handover
        self.result: object = None
        self.error: LuksrotdError | None = None
        self._state = State.QUEUED
        self._step: Stage | Phase = Stage.QUEUED
        self._furthest = 0.0
        self._entries = 0
        self._volumes_begun = 0
        self._cancelling = False
        self._listeners: list[Callable[[], None]] = []
        self._ended = asyncio.Event()

    # -- what everybody may ask -----------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Where it is."""
        return self._state

    @property
    def step(self) -> Stage | Phase:
        """The stage or phase that it entered last."""
        return self._step

    @property
    def progress(self) -> float:
        """From 0 to 1, never falling, though a transaction that was overtaken goes through its stages again."""
        return self._furthest

    @property
    def estimated(self) -> bool:
        """Whether ``progress`` is an estimate by time now."""
        return self._step in TIMED and not self.ended

    @property
    def entries(self) -> int:
        """How many stages and phases it has entered."""
        return self._entries

    @property
    def cancellable(self) -> bool:
        """Whether ``Runner.cancel`` would do anything."""
        return self._state in CANCELLABLE and not self._cancelling

    @property
    def ended(self) -> bool:
        """Whether it has its outcome."""
        return self._state in ENDED

    @property
    def outcome(self) -> Outcome | None:
        """What the volume holds because of it; None until it has ended."""
        if not self.ended:
            return None
        return self.error.outcome if self.error else Outcome.COMMITTED

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called after every change, on the event loop."""
        self._listeners.append(listener)

    def unsubscribe(self, listener: Callable[[], None]) -> None:
        """Have it called no more."""
        self._listeners.remove(listener)

    async def wait(self) -> object:
        """Its result, once it has ended; raises its error."""
        await self._ended.wait()
        if self.error is not None:
            raise self.error
        return self.result

    # -- what happens to it ---------------------------------------------------------------------------------------

    def begin(self) -> None:
        """It starts to run."""
        self._move(State.RUNNING)
        self._notify()

    def entered(self, step: Stage | Phase) -> None:
        """It enters a stage or phase (a ``Progress``)."""
        if self.ended:
            raise Internal("cannot go on: the job has ended")
        if isinstance(step, Phase) and step not in _INVISIBLE and self._state is State.RUNNING:
            self._move(State.COMMITTING)
        self._step = step
        self._entries += 1
        if step is Stage.LOCKING:  # each volume of a set goes through all stages
            self._volumes_begun = min(self._volumes_begun + 1, len(self.volumes))
        self._advance(fraction(step))
        self._notify()

    def estimate(self, part: float) -> None:
        """About ``part`` (0 to 1) of the stage that it is in is done."""
        if not self.ended:
            before = self._furthest
            self._advance(fraction(self._step, part))
            if self._furthest != before:
                self._notify()

    def cancelling(self) -> None:
        """Somebody cancels it; raises ``Busy`` past the point of no return, where it will finish."""
        if self._state is State.COMMITTING:
            raise Busy("cannot cancel: the job is past its point of no return and will finish")
        self._cancelling = True
        self._notify()

    def finish(self, result: object) -> None:
        """It succeeds."""
        self._move(State.FINISHED)
        self.result = result
        self._step = Stage.DONE
        self._furthest = 1.0
        self._end()

    def fail(self, error: LuksrotdError) -> None:
        """It fails, or was cancelled (``Cancelled``) before its point of no return."""
        cancelled = isinstance(error, Cancelled) and self._state in CANCELLABLE
        self._move(State.CANCELLED if cancelled else State.FAILED)
        self.error = error
        self._end()

    def _advance(self, fraction_of_volume: float) -> None:
        volumes_done = max(self._volumes_begun - 1, 0)
        if self._step is not Stage.DONE:
            fraction_of_volume = (volumes_done + fraction_of_volume) / max(len(self.volumes), 1)
        self._furthest = max(self._furthest, fraction_of_volume)

    def _move(self, state: State) -> None:
        if state not in TRANSITIONS[self._state]:
            raise Internal(f"cannot make a {self._state} job {state}")
        self._state = state

    def _end(self) -> None:
        self._ended.set()
        self._notify()

    def _notify(self) -> None:
        for listener in self._listeners.copy():
            try:
                listener()
            except Exception:  # whoever looks on must not stop a commit
                log.exception("a listener of job %d failed", self.number)
