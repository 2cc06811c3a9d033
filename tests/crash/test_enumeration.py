# SPDX-License-Identifier: GPL-2.0-or-later
"""Every crash state of every operation, on simulated volumes with small areas."""

import inspect

import pytest

from luksrotd.luks2.pair import parse_pair
from luksrotd.service.volume import Volumes
from tests.support.crashjudge import Judge, Scenario, judge_all
from tests.support.crashverbs import VERBS, simulated

#: Of the use cases those that only read.
READING = {"look", "findings", "examine", "plan", "verify", "data"}


#: On small sectors; the others on large ones, which give fewer states.  The campaign (table.py) has all on both.
FINE = (
    "rotation",
    "enrolment",
    "finish",
    "removal",
    "transaction: keyslots and tokens exchanged",
    "rotation that heals first",
)


@pytest.mark.parametrize("name", VERBS)
def test_no_crash_state_violates_an_invariant(name, report):
    scenario = simulated(name, sector=512 if name in FINE else 4096)
    judge = Judge(scenario, depth=2)
    assert judge_all(judge, scenario.enumeration()) == []
    assert judge.states > len(scenario.epochs) > 0
    where = f"{scenario.sector}-byte sectors"
    report(f"simulated {name}, {where}: {judge.states} crash states (depth 2: crashes in reconcile too), 0 violations")


def test_every_use_case_that_writes_is_examined():
    use_cases = {name for name, _ in inspect.getmembers(Volumes, inspect.iscoroutinefunction) if name[0] != "_"}
    assert use_cases - READING <= {verb.use_case for verb in VERBS.values()}


def test_the_epochs_are_the_phases_in_their_order():
    scenario = simulated("rotation")
    hdr_size = parse_pair(scenario.before).hdr_size
    old = parse_pair(scenario.before).winner.metadata.keyslots[2].area
    places = [[write.offset for write in epoch] for epoch in scenario.epochs]
    assert len(places) == 6
    assert places[1:] == [[0], [hdr_size], [old.offset], [0], [hdr_size]]


@pytest.mark.parametrize(("name", "areas"), [("transaction: keyslots and tokens exchanged", 2), ("enrolment", 1)])
def test_all_that_is_added_is_on_the_device_before_the_first_header_names_it(name, areas):
    """One epoch for all new areas: so many edits cost no more flushes than one."""
    scenario = simulated(name)
    headers = 2 * parse_pair(scenario.before).hdr_size
    assert [write.offset >= headers for write in scenario.epochs[0]] == [True] * areas
    assert [write.offset for epoch in scenario.epochs[1:3] for write in epoch] == [0, headers // 2]


#: Bytes of a sector, a header copy and a volume key: a few combinations, tests/crash/table.py has the others.
GEOMETRIES = [(4096, 16384, 1), (512, 65536, 32), (4096, 65536, 64)]


@pytest.mark.parametrize(("sector", "hdr_size", "key_size"), GEOMETRIES)
def test_other_geometries(sector, hdr_size, key_size, report):
    scenario = simulated("rotation", sector=sector, hdr_size=hdr_size, key_size=key_size)
    judge = Judge(scenario, depth=2)
    assert judge_all(judge, scenario.enumeration()) == []
    where = f"{sector}-byte sectors, headers of {hdr_size // 1024} KiB, a key of {8 * key_size} bit"
    report(f"simulated rotation, {where}: {judge.states} crash states (depth 2), 0 violations")


def test_states_that_reconcile_cannot_tell_apart_need_not_be_reconciled_each():
    """What the short way finds is what the long way finds, for a right protocol and for a wrong one."""
    scenario = simulated("rotation")
    short, long = Judge(scenario), Judge(scenario, thorough=True)
    assert judge_all(short, scenario.enumeration()) == judge_all(long, scenario.enumeration()) == []
    assert short.states == long.states
    assert short.reconciled < long.reconciled
    wrong = Scenario(**{name: getattr(scenario, name) for name in scenario.__slots__} | {"epochs": scenario.epochs[:4]})
    found = [{*judge_all(Judge(wrong, thorough=thorough), wrong.enumeration())} for thorough in (False, True)]
    assert found[0] == found[1] != set()
