# SPDX-License-Identifier: GPL-2.0-or-later
"""Sleep and shutdown are delayed while a volume is written, in every verb, and never while keys are derived."""

from contextlib import asynccontextmanager

import pytest

from luksrotd.errors import LuksrotdError
from tests.faults.matrix import VERBS
from tests.support.crashverbs import ORDINARY
from tests.support.daemon_launcher import FaultyDevice
from tests.support.simdisk import Flush, Write
from tests.support.simengine import make_volume
from tests.support.simulation import Simulation


class Watched:
    """Devices and engine of a simulation that note each write, flush and call of the engine among its events."""

    def __init__(self, simulation):
        self.simulation = simulation
        self.events = simulation.inhibitor.events
        opened, session = simulation.devices.open, simulation.engine.session

        def open_device(ref, *, writable=False):
            return FaultyDevice(opened(ref, writable=writable), self)

        @asynccontextmanager
        async def engine_session(shadow, secrets):
            async with session(shadow, secrets) as inner:
                yield WatchedSession(inner, self.events)

        simulation.devices.open = open_device
        simulation.engine.session = engine_session

    def before(self):
        self.events.append("written")

    def after(self):
        """Nothing."""


class WatchedSession:
    def __init__(self, session, events):
        self._session = session
        self._events = events

    def __getattr__(self, name):
        self._events.append("engine")
        return getattr(self._session, name)


def prepared(verb):
    simulation = Simulation(make_volume(ORDINARY))
    VERBS[verb].prepare(simulation)
    simulation.inhibitor.events.clear()
    return simulation, Watched(simulation)


def spans(events):
    """What happened while it was held, and what did while it was not."""
    inside, outside, held = [], [], 0
    for event in events:
        held += event.startswith("taken") - (event == "released")
        assert held in (0, 1)
        (inside if held else outside).append(event)
    assert not held
    return inside, outside


@pytest.mark.parametrize("verb", VERBS)
def test_it_is_held_at_each_write_and_flush_and_at_no_call_of_the_engine(verb):
    simulation, watched = prepared(verb)
    VERBS[verb].operate(simulation)
    inside, outside = spans(watched.events)
    assert "written" in inside
    assert "written" not in outside
    assert "engine" not in inside
    assert all(event in {"written", "taken: changing the LUKS2 header of /dev/sim0"} for event in inside)


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("kind", [Write, Flush])
def test_it_is_let_go_when_the_disk_fails(kind, number):
    simulation, watched = prepared("rotation")
    before = sum(isinstance(operation, kind) for operation in simulation.disk.log)
    faults = simulation.disk.faults.writes if kind is Write else simulation.disk.faults.flushes
    faults[before + number] = 0
    with pytest.raises(LuksrotdError):
        VERBS["rotation"].operate(simulation)
    inside, outside = spans(watched.events)
    assert "written" in inside
    assert "written" not in outside
