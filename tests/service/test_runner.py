# SPDX-License-Identifier: GPL-2.0-or-later
"""The runner: order, cancelling, draining, forgetting."""

import asyncio
from contextlib import ExitStack

import pytest

from luksrotd.config import Limits
from luksrotd.errors import Busy, Cancelled, Conflict, Internal, Outcome, TooMany
from luksrotd.ports import Caller
from luksrotd.rotation.protocol import Phase
from luksrotd.service.handover import Secrets
from luksrotd.service.jobs import Kind, State
from luksrotd.service.progress import Stage
from luksrotd.service.runner import Request, Runner

pytestmark = pytest.mark.asyncio


class Log:
    """An observer, and where work and resources write what happens."""

    def __init__(self):
        self.lines = []
        self.go = asyncio.Event()

    def job_added(self, job):
        self.lines.append(f"added {job.number}")

    def job_ended(self, job):
        self.lines.append(f"ended {job.number} {job.state}")

    def job_forgotten(self, job):
        self.lines.append(f"forgotten {job.number}")

    def request(self, work=None, volume="a", abandoned=None, uid=0, **options):
        async def held(job):
            self.lines.append(f"runs {job.number}")
            await self.go.wait()
            return job.number

        resources = ExitStack()
        resources.callback(self.lines.append, "closed")
        return Request(
            options.pop("kind", Kind.ROTATE),
            tuple(volume),
            work or held,
            owner=None if uid is None else Caller(f":1.{uid}", uid),
            secrets=Secrets(resources=resources, abandoned=abandoned),
            **options,
        )


@pytest.fixture
def log():
    return Log()


def made(log, **limits):
    runner = Runner(Limits(**limits))
    runner.observe(log)
    return runner


async def test_jobs_of_one_volume_run_one_after_the_other(log):
    runner = made(log)
    jobs = [runner.submit(log.request()) for _ in range(3)]
    assert [job.state for job in jobs] == [State.RUNNING, State.QUEUED, State.QUEUED]
    assert runner.busy("a")
    log.go.set()
    assert [await job.wait() for job in jobs] == [1, 2, 3]
    await asyncio.sleep(0)
    assert not runner.busy("a")
    assert [line for line in log.lines if line.startswith("runs")] == ["runs 1", "runs 2", "runs 3"]


async def test_other_volumes_do_not_wait_until_all_places_are_taken(log):
    runner = made(log, jobs=2)
    jobs = [runner.submit(log.request(volume=volume)) for volume in "aabc"]
    assert [job.state.value for job in jobs] == ["running", "queued", "running", "queued"]
    log.go.set()
    await asyncio.gather(*(job.wait() for job in jobs))


async def test_a_full_queue_refuses_and_closes_the_secrets(log):
    runner = made(log, waiting_per_volume=1)
    runner.submit(log.request())
    runner.submit(log.request())
    with pytest.raises(Busy, match="1 jobs are waiting for the volume"):
        runner.submit(log.request())
    assert log.lines == ["added 1", "added 2", "closed"]
    await runner.drain()


async def test_a_job_that_waits_is_cancelled_at_once(log):
    runner = made(log)
    runner.submit(log.request())
    second = runner.submit(log.request())
    runner.cancel(second)
    assert second.state is State.CANCELLED
    assert "closed" in log.lines
    with pytest.raises(Cancelled):
        await second.wait()
    await runner.drain()


async def test_a_job_is_cancelled_before_its_task_has_begun(log):
    runner = made(log)
    job = runner.submit(log.request())
    runner.cancel(job)
    with pytest.raises(Cancelled):
        await job.wait()
    assert log.lines == ["added 1", "closed", "ended 1 cancelled"]
    runner.cancel(job)  # again: nothing


async def test_a_commit_is_not_cancelled_and_drain_waits_for_it(log):
    runner = made(log)

    async def commit(job):
        job.entered(Phase.HEADER_PRIMARY)
        await log.go.wait()
        return "committed"

    job = runner.submit(log.request(commit))
    await asyncio.sleep(0)
    with pytest.raises(Busy):
        runner.cancel(job)
    draining = asyncio.ensure_future(runner.drain())
    await asyncio.sleep(0)
    assert not draining.done()
    with pytest.raises(Busy, match="stopping"):
        runner.submit(log.request())
    log.go.set()
    await draining
    assert job.result == "committed"


async def test_drain_cancels_what_runs_and_what_waits(log):
    runner = made(log)
    jobs = [runner.submit(log.request(volume=volume)) for volume in "aab"]
    await asyncio.sleep(0)
    await runner.drain()
    assert {job.state for job in jobs} == {State.CANCELLED}
    assert log.lines.count("closed") == 3
    assert "runs 2" not in log.lines


@pytest.mark.parametrize("error", [Conflict("cannot: x", outcome=Outcome.WIPE_PENDING), ZeroDivisionError("x")])
async def test_whatever_work_raises_is_the_outcome_and_the_next_one_runs(log, error):
    runner = made(log)

    async def fail(job):
        raise error

    first, second = runner.submit(log.request(fail)), runner.submit(log.request())
    log.go.set()
    assert await second.wait() == 2
    assert first.state is State.FAILED
    assert type(first.error) is (Conflict if isinstance(error, Conflict) else Internal)
    assert first.outcome is (Outcome.WIPE_PENDING if isinstance(error, Conflict) else Outcome.UNCHANGED)
    assert log.lines.count("closed") == 2


async def test_a_bug_during_the_commit_leaves_the_outcome_unknown(log):
    runner = made(log)

    async def fail(job):
        job.entered(Phase.HEADER_PRIMARY)
        raise ZeroDivisionError

    job = runner.submit(log.request(fail))
    with pytest.raises(Internal):
        await job.wait()
    assert job.outcome is Outcome.UNKNOWN


async def test_a_job_whose_caller_has_gone_is_cancelled_running_or_not(log):
    runner, gone = made(log), asyncio.Event()

    async def abandoned():
        await gone.wait()

    jobs = [runner.submit(log.request(abandoned=abandoned)) for _ in range(2)]
    await asyncio.sleep(0)
    gone.set()
    for job in jobs:
        with pytest.raises(Cancelled, match="its caller is gone"):
            await job.wait()


async def test_the_caller_may_go_once_the_job_commits(log):
    runner, gone = made(log), asyncio.Event()

    async def commit(job):
        job.entered(Phase.HEADER_PRIMARY)
        gone.set()
        await log.go.wait()

    async def abandoned():
        await gone.wait()

    job = runner.submit(log.request(commit, abandoned=abandoned))
    for _ in range(5):
        await asyncio.sleep(0)
    log.go.set()
    await job.wait()


async def test_a_set_finishes_the_volume_that_it_is_at_and_stops_there(log):
    runner, at_second = made(log), asyncio.Event()

    async def work(job):
        job.entered(Phase.HEADER_PRIMARY)
        try:
            at_second.set()
            await log.go.wait()
        except asyncio.CancelledError:
            return "finished on one, not begun on the other"

    job = runner.submit(log.request(work, volume="ab"))
    await at_second.wait()
    await runner.drain()
    assert (job.state, job.result) == (State.FINISHED, "finished on one, not begun on the other")


async def test_a_set_that_cannot_say_what_it_did_leaves_the_outcome_unknown(log):
    runner, begun = made(log), asyncio.Event()

    async def work(job):
        job.entered(Phase.HEADER_PRIMARY)
        begun.set()
        await log.go.wait()

    job = runner.submit(log.request(work, volume="ab"))
    await begun.wait()
    await runner.drain()
    assert (job.state, job.outcome) == (State.FAILED, Outcome.UNKNOWN)
    assert isinstance(job.error, Cancelled)


async def test_nothing_starts_while_it_drains(log):
    runner, states = made(log), []
    jobs = [runner.submit(log.request(volume=volumes)) for volumes in ("a", "ab", "b")]
    jobs[2].subscribe(lambda: states.append(jobs[2].state))
    await runner.drain()
    runner.configure(Limits())
    assert {job.state for job in jobs} == {State.CANCELLED}
    assert set(states) == {State.QUEUED, State.CANCELLED}, "though its volume is free when the set is cancelled"


# -- admission ---------------------------------------------------------------------------------------------------


async def test_memory_admits(log):
    runner = made(log, memory_kib=100)
    jobs = [runner.submit(log.request(volume=volume, memory_kib=60)) for volume in "ab"]
    assert [job.state for job in jobs] == [State.RUNNING, State.QUEUED]
    log.go.set()
    assert await jobs[1].wait() == 2


async def test_more_memory_admits_more(log):
    runner = made(log, memory_kib=100)
    jobs = [runner.submit(log.request(volume=volume, memory_kib=60)) for volume in "abc"]
    runner.configure(Limits(memory_kib=120))
    assert [job.state.value for job in jobs] == ["running", "running", "queued"]
    runner.configure(Limits(memory_kib=180))
    assert [job.state.value for job in jobs] == ["running"] * 3
    log.go.set()
    await asyncio.gather(*(job.wait() for job in jobs))


async def test_other_limits_take_effect_at_once_and_end_nothing(log):
    runner = made(log, jobs=1)
    jobs = [runner.submit(log.request(volume=volume)) for volume in "abc"]
    runner.configure(Limits(jobs=2))
    assert [job.state.value for job in jobs] == ["running", "running", "queued"]
    runner.configure(Limits(jobs=1, waiting=1))
    assert [job.state.value for job in jobs] == ["running", "running", "queued"]
    with pytest.raises(Busy):
        runner.submit(log.request(volume="d"))
    await runner.drain()


async def test_a_user_has_a_limit_and_root_gets_in(log):
    runner = made(log, jobs=1, jobs_per_user=2)
    for volume in "ab":
        runner.submit(log.request(volume=volume, uid=1000))
    with pytest.raises(TooMany, match="2 of the user's are under way"):
        runner.submit(log.request(volume="c", uid=1000))
    assert log.lines == ["added 1", "added 2", "closed"]
    runner.submit(log.request(volume="c", uid=1001))
    runner.submit(log.request(volume="d", uid=0))
    await runner.drain()


async def test_users_take_turns_and_the_daemon_goes_first(log):
    runner = made(log, jobs=1, waiting_per_volume=9)
    jobs = [runner.submit(log.request(volume=volume, uid=1000)) for volume in "abc"]
    jobs += [runner.submit(log.request(volume=volume, uid=uid)) for volume, uid in (("d", 1001), ("e", None))]
    log.go.set()
    await asyncio.gather(*(job.wait() for job in jobs))
    assert [line for line in log.lines if line.startswith("runs")] == [f"runs {number}" for number in (1, 5, 2, 4, 3)]


async def test_who_waits_for_a_person_is_in_nobodys_way(log):
    """A generated key waits for minutes until its owner has stored it."""
    runner, stored = made(log, jobs=1, memory_kib=100), asyncio.Event()

    async def generate(job):
        job.entered(Stage.DELIVERING)
        await stored.wait()

    waiting = runner.submit(log.request(generate, volume="a", memory_kib=100))
    jobs = [runner.submit(log.request(volume=volume, memory_kib=100)) for volume in "ab"]
    log.go.set()
    assert await jobs[1].wait() == 3
    assert (waiting.state, jobs[0].state) == (State.RUNNING, State.QUEUED), "it has its volume still"
    stored.set()
    assert await jobs[0].wait() == 2


async def test_a_set_keeps_its_memory_for_the_volumes_to_come(log):
    """It comes by the delivery once for each of them, and derives keys in between."""
    runner, derives = made(log, memory_kib=100), asyncio.Event()

    async def stage(job):
        job.entered(Stage.DELIVERING)
        await asyncio.sleep(0)
        job.entered(Stage.DERIVING)
        derives.set()
        await log.go.wait()

    staging = runner.submit(log.request(stage, volume="ab", memory_kib=100))
    other = runner.submit(log.request(volume="c", memory_kib=100))
    await derives.wait()
    assert other.state is State.QUEUED
    log.go.set()
    assert await other.wait() == 2
    assert staging.state is State.FINISHED


# -- afterwards --------------------------------------------------------------------------------------------------


async def test_nobody_pushes_out_the_results_of_another(log):
    runner = Runner(keep_jobs=3)
    runner.observe(log)
    log.go.set()
    for uid in (1000, 0, 1001, 1001, 1001, 1001):
        await runner.submit(log.request(uid=uid)).wait()
    await asyncio.sleep(0)
    assert list(runner.jobs) == [1, 2, 6]


@pytest.mark.parametrize("kind", [Kind.VERIFY, Kind.RECONCILE])
async def test_what_nobody_sees_is_not_kept(log, kind):
    runner = made(log)
    log.go.set()
    await runner.submit(log.request(kind=kind)).wait()
    await asyncio.sleep(0)
    assert not runner.jobs
    assert log.lines[-2:] == ["ended 1 finished", "forgotten 1"]


async def test_ended_jobs_are_kept_for_a_while_and_not_too_many(log):
    runner = Runner(keep_jobs=2)
    runner.observe(log)
    log.go.set()
    for _ in range(4):
        await runner.submit(log.request()).wait()
    await asyncio.sleep(0)
    assert list(runner.jobs) == [3, 4]
    assert [line for line in log.lines if line.startswith("forgotten")] == ["forgotten 1", "forgotten 2"]


async def test_an_ended_job_is_forgotten_in_time(log):
    runner = Runner(keep_seconds=0)
    forgotten = asyncio.Event()
    log.job_forgotten = lambda job: forgotten.set()
    runner.observe(log)
    log.go.set()
    await runner.submit(log.request()).wait()
    await forgotten.wait()
    assert not runner.jobs


async def test_an_observer_that_fails_stops_no_job(log):
    runner = Runner()

    class Bad:
        def __getattr__(self, name):
            raise ZeroDivisionError

    runner.observe(Bad())
    log.go.set()
    assert await runner.submit(log.request()).wait() == 1
