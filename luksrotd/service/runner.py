# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs jobs as the schedule says, and keeps those that ended for a while."""

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import field, replace
from typing import Any, Final, Protocol

from luksrotd.config import Limits
from luksrotd.errors import Busy, Cancelled, Internal, LuksrotdError, Outcome
from luksrotd.ports import Caller
from luksrotd.records import dataclass
from luksrotd.service import schedule
from luksrotd.service.actor import acting
from luksrotd.service.estimate import Estimator, Timers
from luksrotd.service.handover import Secrets
from luksrotd.service.jobs import UNSEEN, Job, Kind, State
from luksrotd.service.progress import Stage
from luksrotd.service.schedule import Entry

log = logging.getLogger(__name__)

KEEP_SECONDS: Final = 300.0
KEEP_JOBS: Final = 64
STOPPING: Final = "the daemon is stopping"


@dataclass(frozen=True, slots=True)
class Request:
    """What to run, on which volumes (LUKS UUIDs), with how much memory for key derivation.

    ``work`` gets the job, reports to ``job.entered``, and returns its result.

    The secrets are closed when the job ends, however it does.  When ``secrets.abandoned`` returns before, it is
    cancelled.
    """

    kind: Kind
    volumes: tuple[str, ...]
    work: Callable[[Job], Awaitable[object]]
    key_name: str = ""
    owner: Caller | None = None
    secrets: Secrets = field(default_factory=Secrets)
    memory_kib: int = 0


class Observer(Protocol):
    """Learns of all jobs, on the event loop."""

    def job_added(self, job: Job) -> None:
        """It is queued, or about to run."""

    def job_ended(self, job: Job) -> None:
        """It has its outcome, and another one may have its place."""

    def job_forgotten(self, job: Job) -> None:
        """It ended long ago."""


class Runner:
    """Runs jobs within ``limits``; where these say nothing about memory, it does not matter.

    An ended job that somebody may ask about is kept for ``keep_seconds``, and no more than ``keep_jobs`` of them: of
    too many, one of the user with the most of them goes.  ``timers`` move the progress; None for the event loop.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        keep_seconds: float = KEEP_SECONDS,
        keep_jobs: int = KEEP_JOBS,
        timers: Timers | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._keep_seconds = keep_seconds
        self._keep_jobs = keep_jobs
        self._estimator = Estimator(timers)
        self._numbers = itertools.count(1)
        self._observers: list[Observer] = []
        self._queued: dict[int, _Work] = {}
        self._running: dict[int, _Work] = {}
        self._ended: dict[int, tuple[Job, asyncio.TimerHandle]] = {}
        self._turns: schedule.Turns = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False

    @property
    def jobs(self) -> Mapping[int, Job]:
        """All jobs that are known, by number."""
        live = {number: work.job for number, work in (self._running | self._queued).items()}
        return live | {number: job for number, (job, _) in self._ended.items()}

    def observe(self, observer: Observer) -> None:
        """Have ``observer`` told of every job from now on."""
        self._observers.append(observer)

    def unobserve(self, observer: Observer) -> None:
        """Tell it no more."""
        self._observers.remove(observer)

    def busy(self, volume: str) -> bool:
        """Whether a job of the volume runs or waits."""
        return any(volume in work.job.volumes for work in (*self._running.values(), *self._queued.values()))

    def configure(self, limits: Limits) -> None:
        """Go by other limits from now on; what runs or waits already stays."""
        self._limits = limits
        self._start_what_may()

    def submit(self, request: Request) -> Job:
        """Start or queue a job; from now on its secrets belong to it.

        Raises ``Busy`` and ``TooMany``, then they are closed.
        """
        number = next(self._numbers)
        refused = self._refusal(_entry(number, request))
        if refused is not None:
            request.secrets.close()
            raise refused
        job = Job(
            number,
            request.kind,
            request.volumes,
            key_name=request.key_name,
            owner=request.owner,
            handover=request.secrets.handover,
        )
        work = _Work(job, request)
        self._queued[job.number] = work
        self._idle.clear()
        self._estimator.follow(job, request.memory_kib)
        job.subscribe(lambda: self._on_change(job))
        self._tell("job_added", job)
        if request.secrets.abandoned:
            work.watch = asyncio.create_task(self._watch(work, request.secrets.abandoned))
        self._start_what_may()
        return job

    def cancel(self, job: Job, reason: str = "it was cancelled") -> None:
        """Stop a job before its point of no return; nothing if it has ended.  Raises ``Busy`` past that point."""
        if job.ended:
            return
        job.cancelling()
        work = self._running.get(job.number)
        if work is not None and work.task is not None:
            work.reason = reason
            work.task.cancel()
        elif job.number in self._queued:
            self._end(self._queued[job.number], Cancelled(f"cannot go on: {reason}"))

    async def drain(self) -> None:
        """Cancel what can be cancelled, finish what cannot, take nothing new, and return when nothing is left.

        A job on several volumes finishes the one that it commits to.
        """
        self._stopping = True
        for work in (*self._queued.values(), *self._running.values()):
            if work.job.state is not State.COMMITTING:
                self.cancel(work.job, STOPPING)
            elif len(work.job.volumes) > 1 and work.task is not None:
                work.reason = STOPPING
                work.task.cancel()
        await self._idle.wait()

    def _refusal(self, new: Entry) -> LuksrotdError | None:
        if self._stopping:
            return Busy(f"cannot start a job: {STOPPING}")
        return schedule.refusal(_entries(self._running), _entries(self._queued), new, self._limits, self._turns)

    def _start_what_may(self) -> None:
        if self._stopping:
            return
        running, queued = _entries(self._running), _entries(self._queued)
        for entry in schedule.startable(running, queued, self._limits, self._turns):
            self._turns = schedule.turns_after(self._turns, entry, queued)
            self._start(self._queued[entry.number])

    def _on_change(self, job: Job) -> None:
        if _is_idle(job) and job.number in self._running:
            self._start_what_may()  # it leaves its place to others until its owner has stored the key

    def _start(self, work: "_Work") -> None:
        self._running[work.job.number] = self._queued.pop(work.job.number)
        work.job.begin()
        work.task = asyncio.ensure_future(_run(work))
        work.task.add_done_callback(lambda task: self._done(work, task))

    def _done(self, work: "_Work", task: asyncio.Future[object]) -> None:
        """Every end of a task comes by here, also that of one that was cancelled before it had begun."""
        committing = work.job.state is State.COMMITTING
        if task.cancelled() and (not committing or self._stopping):
            outcome = Outcome.UNKNOWN if committing else Outcome.UNCHANGED
            self._end(work, Cancelled(f"cannot go on: {work.reason}", outcome=outcome))
            return
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None or isinstance(error, LuksrotdError):
            self._end(work, error)
            return
        log.error("job %d failed", work.job.number, exc_info=error)
        outcome = Outcome.UNKNOWN if committing else Outcome.UNCHANGED
        self._end(work, Internal("cannot finish the job: internal error", outcome=outcome))

    def _end(self, work: "_Work", error: LuksrotdError | None) -> None:
        job = work.job
        work.request.secrets.close()
        if work.watch is not None:
            work.watch.cancel()
        self._running.pop(job.number, None)
        self._queued.pop(job.number, None)
        timer = asyncio.get_running_loop().call_later(self._keep_seconds, self._forget, job.number)
        self._ended[job.number] = (job, timer)
        if error is not None:
            notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            log.warning("job %d (%s of %s) ended: %s%s", job.number, job.kind, ", ".join(job.volumes), error, notes)
            job.fail(error)
        else:
            job.finish(work.task.result() if work.task else None)
        self._start_what_may()
        self._tell("job_ended", job)
        if job.kind in UNSEEN:
            self._forget(job.number)
        while len(self._ended) > self._keep_jobs:
            self._forget(self._superfluous())
        if not self._running and not self._queued:
            self._idle.set()

    def _superfluous(self) -> int:
        """The oldest of the owner with the most of those that ended: nobody can push out another's."""
        kept = Counter(_uid(job.owner) for job, _ in self._ended.values())
        most = max(kept.values())
        return next(number for number, (job, _) in self._ended.items() if kept[_uid(job.owner)] == most)

    def _forget(self, number: int) -> None:
        job, timer = self._ended.pop(number)
        timer.cancel()
        self._tell("job_forgotten", job)

    async def _watch(self, work: "_Work", abandoned: Callable[[], Awaitable[None]]) -> None:
        await abandoned()
        if work.job.cancellable:
            self.cancel(work.job, "its caller is gone")

    def _tell(self, event: str, job: Job) -> None:
        for observer in self._observers.copy():
            try:
                getattr(observer, event)(job)
            except Exception:  # whoever looks on must not stop a job
                log.exception("an observer of job %d failed", job.number)


@dataclass(slots=True, eq=False)
class _Work:
    job: Job
    request: Request
    task: asyncio.Future[Any] | None = None
    watch: asyncio.Task[None] | None = None
    reason: str = "it was cancelled"


async def _run(work: _Work) -> object:
    with acting(work.job.owner, work.job.number):
        return await work.request.work(work.job)


def _entries(works: Mapping[int, _Work]) -> list[Entry]:
    return [replace(_entry(number, work.request), idle=_is_idle(work.job)) for number, work in works.items()]


def _is_idle(job: Job) -> bool:
    """Whether all keys are derived; those of a set are not before its last volume, which nobody can tell."""
    return job.step is Stage.DELIVERING and len(job.volumes) == 1


def _entry(number: int, request: Request) -> Entry:
    return Entry(number, frozenset(request.volumes), _uid(request.owner), request.memory_kib)


def _uid(owner: Caller | None) -> int | None:
    return None if owner is None else owner.uid
