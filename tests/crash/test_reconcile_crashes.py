# SPDX-License-Identifier: GPL-2.0-or-later
"""Crashes inside reconcile, and inside rotations that begin with one, for everything that it mends (depth 2)."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import Which
from luksrotd.rotation import token as tokens
from tests.support import forge
from tests.support.crash import merged, moved, swapped
from tests.support.crashjudge import Judge, Scenario, judge_all, record
from tests.support.simengine import make_volume
from tests.support.simulation import MAIN, NEW, OLD, Simulation

FREE = Extent(32768 + 5 * 4096, 4096)


def keys(*members: dict[str, Any]) -> bytes:
    """Keyslot 0 of an administrator, and tokens of ours on keyslot 1 and 2."""
    image = make_volume([MAIN, OLD, NEW])
    for number, rest in enumerate(members):
        rest = {"keyslot": number + 1, "generation": number + 1} | rest
        image = forge.with_token(image, rest.pop("keyslot"), number, **rest)
    return image


def recorded(image: bytes) -> bytes:
    return forge.edited(image, lambda raw: raw["tokens"].update({"5": tokens.record([FREE])}))


def torn(image: bytes) -> bytes:
    return forge.unsealed(image, Which.PRIMARY)


def without_fingerprint(image: bytes, number: int) -> bytes:
    return forge.edited(image, lambda raw: raw["tokens"][str(number)].pop("fingerprint"))


UNSETTLED = without_fingerprint(keys({}, {"retires": ["0"]}), 1)
BEFORE: dict[str, Callable[[], bytes]] = {
    "two pairs": lambda: keys({}, {}),
    "two pairs, torn": lambda: torn(keys({}, {})),
    "two pairs, the newer not settled": lambda: UNSETTLED,
    "not settled": lambda: without_fingerprint(forge.keyslot_removed(keys({"retires": []}), 2), 0),
    "not born": lambda: forge.keyslot_removed(keys({}, {"keyslot": None, "retires": ["0"]}), 2),
    "retired": lambda: keys({"state": "retired"}, {}),
    "retired, without a successor": lambda: forge.keyslot_removed(keys({"state": "retired"}), 2),
    "a wipe record": lambda: recorded(forge.keyslot_removed(keys({}), 2)),
    "two pairs and a wipe record": lambda: recorded(keys({}, {})),
    "two pairs, both with a wipe intent": lambda: keys(
        {"wipe": forge.intent(FREE)}, {"wipe": forge.intent(Extent(FREE.end, 4096))}
    ),
    "two pairs, and another key without its keyslot": lambda: keys({}, {}, {"keyslot": None, "name": "spare"}),
}


@functools.cache
def scenario(name: str) -> Scenario:
    return record(BEFORE[name](), Simulation.reconcile, unclean=True)


@pytest.mark.parametrize("name", BEFORE)
def test_no_crash_inside_reconcile_violates_an_invariant(name, report):
    judge = Judge(scenario(name), depth=2)
    assert judge_all(judge, scenario(name).enumeration()) == []
    report(f"simulated reconcile of {name}: {judge.states} crash states (depth 2), 0 violations")


@pytest.mark.parametrize("name", ["two pairs", "two pairs, the newer not settled", "a wipe record"])
def test_a_rotation_finishes_it_first(name):
    simulation = Simulation(BEFORE[name]())
    generation = max(token.get("generation", 0) for token in forge.json_of(BEFORE[name]())["tokens"].values())
    assert simulation.rotate(MAIN, b"third key").generation == generation + 1
    assert simulation.reconcile().found == ()


#: Wrong orders of the transaction that retires a pair: primary, secondary, wipe, clear, clear.
MUTANTS = {
    "the wipe before the secondary header": lambda epochs: swapped(epochs, 1),
    "the wipe first": lambda epochs: moved(epochs, 2, 0),
    "no flush between the headers": lambda epochs: merged(epochs, 0),
    "no flush before the wipe": lambda epochs: merged(epochs, 1),
    "the wipe forgotten": lambda epochs: [*epochs[:2], *epochs[3:]],
    "the intent cleared before the wipe": lambda epochs: swapped(epochs, 2),
}


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("before", ["two pairs", "retired, without a successor"])
def test_every_mutant_is_caught(name, before):
    one = scenario(before)
    assert len(one.epochs) == 5
    assert judge_all(Judge(one), one.enumeration(MUTANTS[name](one.epochs))) != []


def test_a_reconcile_that_does_nothing_is_caught():
    """What a volume in disorder is excused for, a reconciled one is not."""
    judge = Judge(scenario("two pairs"))
    assert judge._instant(scenario("two pairs").before) == []
    assert judge._instant(scenario("two pairs").before, mended=True) != []
