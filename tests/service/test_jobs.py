# SPDX-License-Identifier: GPL-2.0-or-later
"""The life of a job."""

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from luksrotd.errors import Busy, Cancelled, Conflict, Internal, Outcome
from luksrotd.rotation.protocol import Phase
from luksrotd.service.jobs import CANCELLABLE, ENDED, TRANSITIONS, Job, Kind, State
from luksrotd.service.progress import Stage, fraction

STEPS = (*Stage, *Phase)


def a_job() -> Job:
    return Job(1, Kind.ROTATE, ("uuid",), key_name="backup")


def test_the_table_has_every_state_and_ends():
    assert set(TRANSITIONS) == set(State)
    assert {State.FINISHED, State.FAILED, State.CANCELLED} == ENDED
    for state in CANCELLABLE:
        assert State.CANCELLED in TRANSITIONS[state]
    assert State.CANCELLED not in TRANSITIONS[State.COMMITTING]


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.NEW_AREA])
def test_every_visible_phase_is_past_the_point_of_no_return(phase):
    job = a_job()
    job.begin()
    job.entered(Phase.NEW_AREA)
    assert (job.state, job.cancellable) == (State.RUNNING, True)
    job.entered(phase)
    assert (job.state, job.cancellable) == (State.COMMITTING, False)
    with pytest.raises(Busy):
        job.cancelling()


def test_progress_never_falls():
    job = a_job()
    job.begin()
    job.entered(Stage.DELIVERING)
    far = job.progress
    job.entered(Stage.READING)
    assert (job.progress, job.step) == (far, Stage.READING)


def test_an_estimate_moves_progress_within_the_stage_and_never_back():
    job, seen = a_job(), []
    job.begin()
    job.entered(Stage.DERIVING)
    start = job.progress
    assert job.estimated
    job.subscribe(lambda: seen.append(job.progress))
    for part in (0.5, 0.2, 0.5, 0.9):
        job.estimate(part)
    assert len(seen) == 2, "nothing is told that has not changed"
    assert start < seen[0] < seen[1] < fraction(Stage.VERIFYING)
    job.entered(Stage.READING)
    assert (job.progress, job.estimated) == (seen[1], False)


def test_a_set_goes_through_the_stages_of_each_volume():
    job, seen = Job(1, Kind.STAGE, ("a", "b")), []
    job.begin()
    for _ in job.volumes:
        for step in STEPS[1:]:
            if step is not Stage.DONE:
                job.entered(step)
                seen.append(job.progress)
    assert seen == sorted(set(seen)), "it moves with each stage of each volume"
    half = len(seen) // 2
    assert seen[half - 1] < 0.5 <= seen[half] < 0.6
    job.entered(Stage.LOCKING)  # of what is undone
    job.entered(Stage.DONE)
    assert job.progress == 1


def test_a_job_that_ended_is_not_estimated():
    job = a_job()
    job.begin()
    job.entered(Stage.DERIVING)
    job.fail(Conflict("cannot"))
    far = job.progress
    job.estimate(0.9)
    assert (job.progress, job.estimated) == (far, False)


def test_who_gives_up_past_the_point_of_no_return_has_failed():
    job = a_job()
    job.begin()
    job.entered(Phase.HEADER_PRIMARY)
    job.fail(Cancelled("cannot", outcome=Outcome.UNKNOWN))
    assert (job.state, job.outcome) == (State.FAILED, Outcome.UNKNOWN)


@pytest.mark.asyncio
async def test_everybody_who_waits_learns_of_the_end():
    job = a_job()
    waiting = [asyncio.ensure_future(job.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    job.begin()
    job.finish("result")
    assert await asyncio.gather(*waiting) == ["result"] * 3


@pytest.mark.asyncio
async def test_waiting_for_a_job_that_failed_raises_its_error():
    job = a_job()
    job.begin()
    job.fail(Conflict("cannot: conflict", outcome=Outcome.UNKNOWN))
    with pytest.raises(Conflict):
        await job.wait()
    assert (job.state, job.outcome) == (State.FAILED, Outcome.UNKNOWN)


def test_a_listener_that_fails_harms_nobody(caplog):
    job, seen = a_job(), []
    job.subscribe(lambda: 1 / 0)
    job.subscribe(lambda: seen.append(job.state))
    job.begin()
    job.finish(None)
    assert seen == [State.RUNNING, State.FINISHED]
    assert "a listener of job 1 failed" in caplog.text


class Life(RuleBasedStateMachine):
    """Anything may be tried at any time: it is one of the transitions of the table, or nothing changes."""

    @initialize()
    def born(self):
        self.job = a_job()
        self.history = [State.QUEUED]
        self.ends = 0
        self.far = 0.0
        self.job.subscribe(self.listen)

    def listen(self):
        if self.job.state is not self.history[-1]:
            self.history.append(self.job.state)
            self.ends += self.job.ended

    def attempt(self, call, *arguments):
        before = self.job.state, self.job.step, self.job.result, self.job.error
        try:
            call(*arguments)
        except (Internal, Busy):
            assert (self.job.state, self.job.step, self.job.result, self.job.error) == before

    @rule()
    def begin(self):
        self.attempt(self.job.begin)

    @rule(step=st.sampled_from(STEPS))
    def enter(self, step):
        self.attempt(self.job.entered, step)

    @rule(part=st.floats(0, 1))
    def estimate(self, part):
        self.attempt(self.job.estimate, part)

    @rule()
    def finish(self):
        self.attempt(self.job.finish, "result")

    @rule(kind=st.sampled_from([Conflict, Cancelled]))
    def fail(self, kind):
        self.attempt(self.job.fail, kind("cannot"))

    @precondition(lambda self: not self.job.ended)
    @rule()
    def cancel(self):
        self.attempt(self.job.cancelling)
        assert not self.job.cancellable

    @invariant()
    def only_transitions_of_the_table(self):
        for before, after in zip(self.history, self.history[1:], strict=False):
            assert after in TRANSITIONS[before]

    @invariant()
    def one_outcome(self):
        assert self.ends == int(self.job.ended) == int(self.job.outcome is not None)
        assert self.job.ended == (self.job.error is not None or self.job.state is State.FINISHED)
        committed = State.COMMITTING in self.history
        assert (self.job.state is State.CANCELLED) == (isinstance(self.job.error, Cancelled) and not committed)

    @invariant()
    def progress_never_falls(self):
        assert self.far <= self.job.progress <= 1
        self.far = self.job.progress


Life.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestLife = Life.TestCase
