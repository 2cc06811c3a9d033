# SPDX-License-Identifier: GPL-2.0-or-later
"""The model can see: bugs that are planted are found by it, within few sequences."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from luksrotd.errors import LuksrotdError, Outcome
from luksrotd.rotation import reconcile
from luksrotd.rotation.edits import RemoveToken
from luksrotd.rotation.protocol import ORDER
from luksrotd.rotation.protocol import Phase as Step
from luksrotd.service import commit
from tests.model.machine import Volume

FEW = settings(
    max_examples=300,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)


def found():
    """Whether the model finds anything."""
    with pytest.raises((AssertionError, LuksrotdError)):
        run_state_machine_as_test(Volume, settings=FEW)


def reordered(monkeypatch, order):
    """Commits whose phases come in another order, or not at all."""

    def run(plan, device, entered):
        commit._settle(plan, device)
        steps = {step.phase: step for step in plan.steps}
        for phase in order:
            if phase in steps:
                entered(phase)
                commit._write(steps[phase], device)

    monkeypatch.setattr(commit, "run", run)


def test_a_wipe_before_the_headers(monkeypatch):
    reordered(monkeypatch, [Step.NEW_AREA, Step.WIPE_OLD, *(phase for phase in ORDER[1:] if phase != Step.WIPE_OLD)])
    found()


def test_a_header_before_its_area(monkeypatch):
    reordered(monkeypatch, [*ORDER[1:3], Step.NEW_AREA, *ORDER[3:]])
    found()


def test_a_wipe_that_is_forgotten(monkeypatch):
    reordered(monkeypatch, [phase for phase in ORDER if phase != Step.WIPE_OLD])
    found()


def test_flushes_that_are_left_out(monkeypatch):
    def write(step, device):
        for each in step.writes:
            device.write(each.offset, each.data)
        if step.phase in (Step.HEADER_SECONDARY, Step.CLEAR_SECONDARY):
            device.flush()

    monkeypatch.setattr(commit, "_write", write)
    found()


def test_an_outcome_that_is_always_the_same(monkeypatch):
    monkeypatch.setattr(commit, "_truth", lambda plan, device: Outcome.UNCHANGED)
    found()


def test_a_reconcile_that_drops_a_foreign_token(monkeypatch):
    original = reconcile.repair

    def repair(view, *arguments):
        change = original(view, *arguments)
        foreign = [token.id for token in view.metadata.tokens.values() if token.type in ("stranger", "note")]
        if change is None or not foreign:
            return change
        return replace(change, closing=(*change.closing, RemoveToken(foreign[0])))

    monkeypatch.setattr(reconcile, "repair", repair)
    found()
