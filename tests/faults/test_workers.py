# SPDX-License-Identifier: GPL-2.0-or-later
"""Every verb, and a worker that fails, dies or hangs at each of its calls in turn: nothing has happened."""

import pytest

from luksrotd.errors import EngineCrashed, EngineError, EngineTimeout, LuksrotdError, NoFreeArea, Outcome
from luksrotd.luks2.pair import parse_pair
from luksrotd.rotation.view import view
from tests.faults.matrix import VERBS, leaks, row
from tests.support.simengine import opened_by
from tests.support.simulation import MAIN, Simulation

FAILURES = (EngineCrashed, EngineError, EngineTimeout, NoFreeArea)


def calls(name):
    """The calls that the verb makes of its workers."""
    simulation = Simulation(row(name).scenario.before)
    row(name).operate(simulation)
    return simulation.engine.calls


def failing(simulation, number, failure):
    """Let the call of that number fail; it is not made again."""
    engine, seen = simulation.engine, []

    def on_call(call):
        seen.append(call)
        if len(seen) == number + 1:
            raise failure(f"cannot {call}: simulated")
        assert len(seen) <= number, f"{call} after the worker had failed"

    engine.on_call = on_call


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", VERBS)
def test_a_worker_that_fails_at_any_call(name, failure):
    this = row(name)
    for number, call in enumerate(calls(name)):
        simulation = Simulation(this.scenario.before)
        failing(simulation, number, failure)
        with pytest.raises(LuksrotdError) as caught:
            this.operate(simulation)
        assert type(caught.value) is failure, call
        assert caught.value.outcome is Outcome.UNCHANGED, call
        assert leaks(simulation) == [], call
        assert not simulation.disk.dirty, call
        assert this.judge.violations(simulation.disk.content) == [], call
        mended = simulation.pair.winner.metadata.raw == this.mended.winner.metadata.raw
        assert mended or simulation.pair.raw == this.scenario.before[: len(this.mended.raw)] or "reconcile" in name, (
            call
        )


@pytest.mark.parametrize("name", VERBS)
def test_it_works_again_afterwards(name):
    this = row(name)
    simulation = Simulation(this.scenario.before)
    on_call = simulation.engine.on_call
    failing(simulation, len(calls(name)) - 1, EngineCrashed)
    with pytest.raises(EngineCrashed):
        this.operate(simulation)
    simulation.engine.on_call = on_call
    this.operate(simulation)
    assert simulation.reconcile().left == ()
    assert standing(simulation.disk.content) == standing(this.scenario.after)
    assert opened_by(simulation.disk.content, MAIN) == opened_by(this.scenario.after, MAIN)


def standing(image):
    """The keys that are managed, without what is random."""
    keys = view(parse_pair(image)).keys
    return [(key.token.name, key.token.generation, key.token.state, key.token.keyslots, key.complete) for key in keys]
