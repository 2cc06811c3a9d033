# SPDX-License-Identifier: GPL-2.0-or-later
"""Every crash state of every operation, on simulated volumes with small areas; and that the judge can see."""

import functools

import pytest

from luksrotd.luks2.pair import parse_pair
from tests.support.crash import merged, moved, swapped
from tests.support.crashjudge import Judge, Scenario, judge_all, record
from tests.support.simengine import make_volume
from tests.support.simulation import MAIN, NEW, OLD, Simulation


@functools.cache
def enrolled() -> bytes:
    simulation = Simulation(make_volume([MAIN, b"another passphrase"]))
    simulation.enroll(MAIN, OLD, ref="vault/1")
    return simulation.disk.content


@functools.cache
def rotation() -> Scenario:
    return record(enrolled(), lambda simulation: simulation.rotate(MAIN, NEW, ref="vault/2"))


@functools.cache
def enrolment() -> Scenario:
    return record(make_volume([MAIN]), lambda simulation: simulation.enroll(MAIN, OLD, ref="vault/1"))


def interrupted() -> bytes:
    """The volume as a rotation leaves it that was cut in the middle of the wipe."""
    enumeration = rotation().enumeration()
    states = [crash.image(enumeration.starts[3], 512) for crash in enumeration.crashes([3])]
    return states[len(states) // 2]


def torn(image: bytes) -> bytes:
    """The same volume with its primary header torn."""
    content = bytearray(image)
    content[4096:4608] = bytes(512)
    return bytes(content)


SCENARIOS = {
    "rotation": rotation,
    "rotation unlocked by the old key": lambda: record(enrolled(), lambda s: s.rotate(OLD, NEW)),
    "enrolment": enrolment,
    "reconcile of a pending wipe": lambda: record(interrupted(), Simulation.reconcile),
    "reconcile of a torn header": lambda: record(torn(interrupted()), Simulation.reconcile),
    "rotation that heals first": lambda: record(torn(enrolled()), lambda s: s.rotate(MAIN, NEW)),
    "rotation that wipes first": lambda: record(interrupted(), lambda s: s.rotate(MAIN, b"third key")),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_crash_state_violates_an_invariant(name, report):
    scenario = SCENARIOS[name]()
    judge = Judge(scenario, depth=2)
    assert judge_all(judge, scenario.enumeration()) == []
    report(f"simulated {name}: {judge.states} crash states (depth 2: crashes in reconcile too), 0 violations")


def test_the_epochs_are_the_phases_in_their_order():
    hdr_size = parse_pair(rotation().before).hdr_size
    old = parse_pair(rotation().before).winner.metadata.keyslots[2].area
    places = [[write.offset for write in epoch] for epoch in rotation().epochs]
    assert len(places) == 6
    assert places[1:] == [[0], [hdr_size], [old.offset], [0], [hdr_size]]


#: Every wrong order and every dropped flush.  Exchanging HEADER_PRIMARY with HEADER_SECONDARY, or the two CLEAR
#: phases, is not in it: libcryptsetup takes the newer copy whichever it is, so those orders are as safe.
MUTANTS = {
    "flush after NEW_AREA dropped": lambda epochs: merged(epochs, 0),
    "flush after HEADER_PRIMARY dropped": lambda epochs: merged(epochs, 1),
    "flush after HEADER_SECONDARY dropped": lambda epochs: merged(epochs, 2),
    "flush after WIPE_OLD dropped": lambda epochs: merged(epochs, 3),
    "flush after CLEAR_PRIMARY dropped": lambda epochs: merged(epochs, 4),
    "HEADER_PRIMARY before NEW_AREA": lambda epochs: swapped(epochs, 0),
    "WIPE_OLD before HEADER_SECONDARY": lambda epochs: swapped(epochs, 2),
    "CLEAR_PRIMARY before WIPE_OLD": lambda epochs: swapped(epochs, 3),
    "WIPE_OLD first": lambda epochs: moved(epochs, 3, 0),
    "WIPE_OLD last": lambda epochs: moved(epochs, 3, 5),
    "NEW_AREA after both headers": lambda epochs: moved(epochs, 0, 2),
    "WIPE_OLD forgotten": lambda epochs: [*epochs[:3], *epochs[4:]],
    "the intent never cleared": lambda epochs: epochs[:4],
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_protocol_mutant_is_caught(name):
    scenario = rotation()
    mutant = scenario.enumeration(MUTANTS[name](scenario.epochs))
    assert judge_all(Judge(scenario), mutant) != []


def test_a_last_flush_that_is_missing_is_caught():
    """Without it, success may be reported of a device that a power cut still takes back."""
    scenario = rotation()
    judge = Judge(scenario)
    enumeration = scenario.enumeration()
    last = len(scenario.epochs) - 1
    after_success = [crash.image(enumeration.starts[last], 512) for crash in enumeration.crashes([last])]
    assert any(judge.finished(image) for image in after_success if image != enumeration.final)


def test_sectors_of_4096_bytes(report):
    scenario = record(enrolled(), lambda simulation: simulation.rotate(MAIN, NEW), sector_size=4096)
    judge = Judge(scenario, depth=2, sector=4096)
    assert judge_all(judge, scenario.enumeration(sector=4096)) == []
    report(f"simulated rotation, 4096-byte sectors: {judge.states} crash states (depth 2), 0 violations")
