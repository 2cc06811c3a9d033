# SPDX-License-Identifier: GPL-2.0-or-later
"""A device that fails in the middle of a commit: nothing is retried, the outcome is true, reconcile brings it clean."""

import pytest

from luksrotd.errors import DeviceError, Outcome
from luksrotd.rotation.view import view
from tests.support.simengine import make_volume, opened_by
from tests.support.simulation import MAIN, NEW, OLD, Simulation

STEPS = range(6)


@pytest.fixture
def enrolled():
    simulation = Simulation(make_volume([MAIN]))
    simulation.enroll(MAIN, OLD)
    return Simulation(simulation.disk.content)


def truth(simulation, before):
    """The outcome that the device shows, to readers of the page cache and of the medium."""
    headers = len(before.pair.raw)
    seen = simulation.disk.medium()[:headers]
    if seen != simulation.disk.content[:headers]:
        return Outcome.UNKNOWN
    if seen == before.pair.raw:
        return Outcome.UNCHANGED
    if simulation.pair.agree:
        return Outcome.WIPE_PENDING if view(simulation.pair).pending else Outcome.COMMITTED
    return Outcome.UNKNOWN


def fail_and_recover(simulation):
    before = Simulation(simulation.disk.content)
    with pytest.raises(DeviceError) as caught:
        simulation.rotate(MAIN, NEW)
    told = caught.value.outcome
    assert told is truth(simulation, before)
    written = len(simulation.disk.log)
    simulation.disk.power_cut()
    assert opened_by(simulation.disk.content, MAIN) == [0]
    assert simulation.reconcile().left == ()
    alive = [secret for secret in (OLD, NEW) if opened_by(simulation.disk.content, secret)]
    assert len(alive) == 1
    assert alive == [OLD] or told is not Outcome.UNCHANGED
    assert view(simulation.pair).keys[0].token.generation == (1 if alive == [OLD] else 2)
    return written


@pytest.mark.parametrize("arrived", [0, 512], ids=["error", "short"])
@pytest.mark.parametrize("number", STEPS)
def test_a_write_that_fails(enrolled, number, arrived):
    enrolled.disk.faults.writes = {number: arrived}
    fail_and_recover(enrolled)


@pytest.mark.parametrize("landed", [0, None], ids=["lost", "landed"])
@pytest.mark.parametrize("number", STEPS)
def test_a_flush_that_fails(enrolled, number, landed):
    enrolled.disk.faults.flushes = {number: landed}
    fail_and_recover(enrolled)


@pytest.mark.parametrize("number", STEPS)
def test_nothing_is_written_behind_a_failed_flush(enrolled, number):
    enrolled.disk.faults.flushes = {number: 0}
    assert fail_and_recover(enrolled) == 2 * number + 1


@pytest.mark.parametrize("number", STEPS)
def test_a_device_that_is_pulled(enrolled, number):
    def pull(operation):
        nonlocal number
        number -= 1
        if number < 0:
            enrolled.disk.faults.gone = True

    enrolled.disk.observer = pull
    with pytest.raises(DeviceError) as caught:
        enrolled.rotate(MAIN, NEW)
    assert caught.value.outcome in (Outcome.UNKNOWN, Outcome.UNCHANGED)
    enrolled.disk.observer = None
    enrolled.disk.power_cut()
    assert enrolled.reconcile().left == ()
    assert opened_by(enrolled.disk.content, MAIN) == [0]
    assert enrolled.devices.leaked == enrolled.shadows.leaked == ()
