# SPDX-License-Identifier: GPL-2.0-or-later
"""Progress by time, while keys are derived and at no other time."""

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luksrotd.errors import Cancelled
from luksrotd.rotation.protocol import Phase
from luksrotd.service.estimate import FIRST_GUESS, LEAST_SECONDS, TICK_SECONDS, Durations, Estimator
from luksrotd.service.jobs import Job, Kind
from luksrotd.service.progress import TIMED, Stage, estimated_part, fraction
from luksrotd.service.runner import Request, Runner
from tests.support.faketimers import FakeTimers

DERIVING, VERIFYING = Stage.DERIVING, Stage.VERIFYING


@pytest.fixture
def timers():
    return FakeTimers()


@pytest.fixture
def estimator(timers):
    return Estimator(timers)


def followed(estimator, *, kind=Kind.ROTATE, volumes=("a",), cost=1):
    job = Job(1, kind, volumes)
    estimator.follow(job, cost)
    job.begin()
    return job


def taught(estimator, timers, seconds, **of):
    """A job whose derivation has taken so long."""
    job = followed(estimator, **of)
    job.entered(DERIVING)
    timers.pass_time(seconds)
    job.entered(VERIFYING)
    job.finish(None)


# -- how far -----------------------------------------------------------------------------------------------------


@given(st.floats(0, 1e9), st.floats(0, 1e9), st.floats(LEAST_SECONDS, 1e6))
def test_a_part_never_falls_and_never_gets_there(one, other, expected):
    first, second = sorted((one, other))
    assert 0 <= estimated_part(first, expected) <= estimated_part(second, expected) < 1


def test_half_of_the_time_is_about_half_of_the_way():
    assert estimated_part(0, 2) == 0
    assert 0.4 < estimated_part(1, 2) < 0.5
    assert 0.85 < estimated_part(2, 2) < 0.95
    assert estimated_part(2, 2) < estimated_part(3, 2) < estimated_part(20, 2)


def test_a_stage_ends_where_the_next_one_begins():
    steps = [step for step in (*Stage, *Phase) if step is not Stage.DONE] + [Stage.DONE]
    assert fraction(steps[0]) == 0
    assert fraction(Stage.DONE, 0.5) == fraction(Stage.DONE) == 1
    for step, following in pairwise(steps):
        assert fraction(step) < fraction(step, 0.5) < fraction(step, 1.0) == pytest.approx(fraction(following))
    assert sum(fraction(stage, 1) - fraction(stage) for stage in TIMED) > 0.5, "that is what takes the time"


# -- when --------------------------------------------------------------------------------------------------------


def test_it_moves_a_few_times_a_second_and_never_into_the_next_stage(estimator, timers):
    job = followed(estimator)
    job.entered(DERIVING)
    seen = [job.progress]
    job.subscribe(lambda: seen.append(job.progress))
    timers.pass_time(FIRST_GUESS[DERIVING] * 2)
    assert len(seen) == 1 + FIRST_GUESS[DERIVING] * 2 / TICK_SECONDS
    assert seen == sorted(set(seen))
    assert fraction(DERIVING) == seen[0] < seen[-1] < fraction(VERIFYING)
    timers.pass_time(1e5)
    assert job.progress < fraction(VERIFYING)


def test_a_timer_is_there_only_while_keys_are_derived(estimator, timers):
    job = followed(estimator)
    for step in (Stage.LOCKING, Stage.READING, DERIVING, VERIFYING, Stage.DELIVERING, *Phase):
        job.entered(step)
        assert len(timers.pending) == int(step in TIMED), step
        assert job.estimated == (step in TIMED)
    job.finish(None)
    assert not timers.pending
    assert not timers.fired


@pytest.mark.parametrize("end", [lambda job: job.finish(None), lambda job: job.fail(Cancelled("cannot"))])
def test_the_timer_ends_with_the_job(estimator, timers, end):
    job = followed(estimator)
    job.entered(DERIVING)
    timers.pass_time(1)
    assert timers.pending
    end(job)
    assert not timers.pending


def test_a_derivation_that_begins_again_is_estimated_again(estimator, timers):
    job = followed(estimator)
    job.entered(DERIVING)
    timers.pass_time(1)
    far = job.progress
    job.entered(Stage.READING)
    job.entered(DERIVING)
    timers.pass_time(TICK_SECONDS)
    assert (job.progress, len(timers.pending)) == (far, 1)
    timers.pass_time(1)
    assert job.progress > far


# -- how long ----------------------------------------------------------------------------------------------------


def after(estimator, timers, seconds, **of):
    """The progress of another job after ``seconds`` of derivation, in parts of the stage."""
    job = followed(estimator, **of)
    job.entered(DERIVING)
    timers.pass_time(seconds)
    part = (job.progress - fraction(DERIVING)) / (fraction(VERIFYING) - fraction(DERIVING))
    job.fail(Cancelled("cannot"))
    return part


def test_it_takes_as_long_as_the_last_time_on_the_same_volume(estimator, timers):
    taught(estimator, timers, 40)
    taught(estimator, timers, 1, volumes=("b",))
    assert after(estimator, timers, 20) == pytest.approx(estimated_part(20, 40))


def test_else_as_long_as_the_last_of_that_kind_and_cost(estimator, timers):
    taught(estimator, timers, 40)
    assert after(estimator, timers, 20, volumes=("b",)) == pytest.approx(estimated_part(20, 40))
    assert after(estimator, timers, 2, volumes=("b",), cost=2) == pytest.approx(estimated_part(2, 4))
    assert after(estimator, timers, 2, volumes=("b",), kind=Kind.ENROLL) == pytest.approx(estimated_part(2, 4))


def test_what_was_given_up_teaches_nothing(estimator, timers):
    after(estimator, timers, 100)
    assert after(estimator, timers, 2) == pytest.approx(estimated_part(2, FIRST_GUESS[DERIVING]))


def test_durations_are_forgotten_and_never_nothing():
    durations = Durations(remembered=2)
    durations.learn(("a", "b"), 0)
    durations.learn(("a", "c"), 3)
    assert [durations.expect((key,), 7) for key in "abc"] == [3, 7, 3]
    durations.learn(("a",), 0)
    assert durations.expect(("a",), 7) == LEAST_SECONDS


@pytest.mark.asyncio
async def test_a_runner_has_timers_only_while_a_job_derives(timers):
    runner, go = Runner(timers=timers), asyncio.Event()

    async def work(job):
        job.entered(Stage.DERIVING)
        await go.wait()
        job.entered(Stage.DELIVERING)

    assert not timers.pending
    jobs = [runner.submit(Request(Kind.ROTATE, ("a",), work)) for _ in range(1)]
    assert not timers.pending, "it has not begun"
    await asyncio.sleep(0)
    assert len(timers.pending) == 1
    before = jobs[0].progress
    timers.pass_time(1)
    assert jobs[0].progress > before
    go.set()
    await jobs[0].wait()
    assert not timers.pending
    await runner.drain()
