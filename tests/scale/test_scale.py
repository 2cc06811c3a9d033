# SPDX-License-Identifier: GPL-2.0-or-later
"""The model of the timer, the conservation of rotations, and the bounds that docs/scale.md states."""

import configparser
from itertools import pairwise, takewhile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scale.fleet import NEVER, Fleet
from tests.scale.load import expected_rate, load, worst_second
from tests.scale.page import TOP
from tests.scale.simulation import PATIENCE, ROTATION, Loss, Policy, Store, Trace, run
from tests.scale.timer import DAY, HOUR, MINUTE, WEEK, AlwaysOn, Power, Timer, Workdays

SEEDS = st.integers(0, 2**32)
POWERS: st.SearchStrategy[Power] = st.sampled_from([AlwaysOn(), Workdays(), Workdays(suspends=True, battery=30)])
FEW = settings(max_examples=12)


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign] # as configparser's manual keeps case
    parser.read(TOP / "systemd" / name)
    return parser


def test_the_models_timer_is_the_units() -> None:
    timer = unit("luksrotd-rotate@.timer")["Timer"]
    assert timer["OnCalendar"] == "*-*-* 00/6:00:00"
    assert (timer["RandomizedDelaySec"], timer["AccuracySec"], timer["Persistent"]) == ("2h", "10min", "yes")
    assert "FixedRandomDelay" not in timer
    assert Timer() == Timer(interval=6 * HOUR, delay=2 * HOUR, fixed=False, accuracy=10 * MINUTE)


def test_the_models_service_is_the_units() -> None:
    service = unit("luksrotd-rotate@.service")
    text = (TOP / "systemd" / "luksrotd-rotate@.service").read_text(encoding="utf-8")
    assert "Environment=AGE=90d\n" in text
    assert Fleet(1).age == 90 * DAY
    assert "1" in service["Service"]["RestartPreventExitStatus"].split(), "an escrow that fails waits for the timer"
    assert Policy().restarts == 0
    assert service["Unit"]["ConditionACPower"] == "true"
    assert PATIENCE == 600


def asks(power: Power, timer: Timer, seed: int, machine: int, until: int) -> list[int]:
    return list(takewhile(lambda ask: ask < until, power.asks(timer, seed, machine, 0, until)))


@given(SEEDS, st.booleans())
def test_a_server_asks_four_times_a_day(seed: int, fixed: bool) -> None:
    timer = Timer(fixed=fixed)
    found = [ask for ask in asks(AlwaysOn(), timer, seed, 1, WEEK) if ask >= 0]
    assert len(found) in range(27, 30)
    assert all(ask % timer.interval < timer.delay + timer.accuracy for ask in found)
    delays = [ask % timer.interval for ask in found]
    assert (max(delays) - min(delays) < timer.accuracy) == fixed


@given(SEEDS, st.booleans())
def test_a_desktop_asks_after_it_came_on_and_never_when_it_is_off(seed: int, suspends: bool) -> None:
    power = Workdays(suspends=suspends)
    found = asks(power, Timer(), seed, 1, 2 * WEEK)
    assert found == sorted(found)
    assert {ask // DAY % 7 for ask in found} == set(range(5))
    first = {ask // DAY: ask % DAY for ask in reversed(found)}
    latest = power.on + power.coming + (MINUTE if suspends else Timer().delay + Timer().accuracy)
    assert all(power.on <= ask < latest for ask in first.values())
    assert all(ask % DAY < power.on + power.coming + power.hours + 15 * MINUTE for ask in found)


def test_nobody_asks_on_holidays() -> None:
    found = asks(Workdays(holidays=range(7, 14)), Timer(), 1, 1, 3 * WEEK)
    assert {ask // WEEK for ask in found} == {0, 2}


def test_on_a_battery_nothing_is_asked() -> None:
    assert Fleet(1, power=Workdays(battery=100)).next_ask(0, 0) == NEVER
    some, all_ = asks(Workdays(battery=50), Timer(), 1, 1, 20 * WEEK), asks(Workdays(), Timer(), 1, 1, 20 * WEEK)
    assert set(some) < set(all_)
    assert 0.3 < len(some) / len(all_) < 0.7


def test_what_is_on_for_less_than_a_fixed_delay_never_rotates() -> None:
    """Why the unit has no FixedRandomDelay=."""
    power = Workdays(hours=30 * MINUTE)
    found = {
        fixed: len({*run(Fleet(200, power=power, enrolled=1, timer=Timer(fixed=fixed)), 6 * WEEK).machines})
        for fixed in (True, False)
    }
    assert found[True] < 100
    assert found[False] > 195


@pytest.mark.parametrize("timer", [{"delay": 6 * HOUR}, {"interval": 7 * HOUR}])
def test_a_timer_that_systemd_would_see_otherwise_is_refused(timer: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must fit"):
        Timer(**timer)


def test_a_day_on_which_the_calendar_misses_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="before midnight"):
        Workdays(on=5 * HOUR)


@FEW
@given(SEEDS, POWERS, st.sampled_from([0, 30 * DAY]))
def test_each_machine_rotates_once_per_period(seed: int, power: Power, spread: int) -> None:
    """At the first ask at which its key is due, and at no other."""
    fleet = Fleet(60, seed=seed, power=power, spread=spread)
    trace = run(fleet, 400 * DAY)
    times: dict[int, list[int]] = {machine: [] for machine in range(fleet.machines)}
    for machine, now in zip(trace.machines, trace.rotated, strict=True):
        times[machine].append(now)
    for machine, found in times.items():
        before = fleet.made(machine)
        for now in found:
            assert now == fleet.next_ask(machine, before + fleet.limit(machine))
            before = now + ROTATION
        assert fleet.next_ask(machine, before + fleet.limit(machine)) >= 400 * DAY, "none is missing"
    assert len(trace.requests) == len(trace.rotated)


@FEW
@given(SEEDS, POWERS, st.integers(0, 20), st.integers(1, 24 * 14))
def test_none_is_lost_after_an_outage(seed: int, power: Power, day: int, hours: int) -> None:
    begin, end = day * DAY, day * DAY + hours * HOUR
    fleet = Fleet(60, seed=seed, power=power, enrolled=20 * DAY)
    trace = run(fleet, end + 30 * DAY, Store(outages=((begin, end),)))
    assert set(trace.machines) == {
        machine for machine in range(60) if fleet.next_ask(machine, fleet.made(machine) + fleet.age) < end + 30 * DAY
    }
    assert len(trace.machines) == len(set(trace.machines)), "and none rotates twice"
    assert all(begin <= time < end for time in trace.failed)
    assert not [time for time in trace.rotated if begin <= time < end]
    for machine, now in trace.waited.items():
        assert now == fleet.next_ask(machine, end), "at the first ask after it"


@FEW
@given(SEEDS, st.integers(0, 24 * 7))
def test_the_peak_after_an_outage_is_bounded_by_the_formula(seed: int, hours: int) -> None:
    fleet = Fleet(2000, seed=seed)
    trace = run(fleet, (10 + 9) * DAY, Store(outages=((10 * DAY, 10 * DAY + hours * HOUR),)))
    rate = expected_rate(fleet.machines, fleet.age, fleet.timer.interval, fleet.timer.spread, hours * HOUR)
    after = load(trace.requests, 10 * DAY + hours * HOUR, 19 * DAY)
    assert after.max <= worst_second(rate, 9 * DAY, chance=1e-7)


@FEW
@given(SEEDS, st.sampled_from([0, HOUR, 2 * HOUR, 5 * HOUR]), POWERS)
def test_the_peak_of_a_wave_is_bounded_by_the_formula(seed: int, delay: int, power: Power) -> None:
    fleet = Fleet(2000, seed=seed, timer=Timer(delay=delay), enrolled=1)
    trace = run(fleet, DAY)
    assert len(trace.requests) == 2000
    assert load(trace.requests, 0, DAY).max <= worst_second(2000 / fleet.timer.spread, 6 * HOUR, chance=1e-7)
    assert max(trace.requests) < delay + fleet.timer.accuracy


@FEW
@given(SEEDS)
def test_the_same_seed_gives_the_same(seed: int) -> None:
    assert run(Fleet(50, seed=seed), 200 * DAY) == run(Fleet(50, seed=seed), 200 * DAY)
    assert run(Fleet(50, seed=seed), 200 * DAY) != run(Fleet(50, seed=seed + 1), 200 * DAY)


def test_an_age_of_its_own_takes_a_wave_apart() -> None:
    wave, spread = (
        load(run(Fleet(2000, oldest=0, enrolled=1, spread=one), 91 * DAY).requests, 0, 91 * DAY, HOUR).max
        for one in (0, 30 * DAY)
    )
    assert wave > 800
    assert spread < 40


def test_a_store_that_is_too_small_is_caught_up_with() -> None:
    fleet = Fleet(2000, enrolled=1)
    trace = run(fleet, 10 * DAY, Store(capacity=0.05))
    assert trace.failed
    assert sorted(trace.machines) == list(range(2000))
    assert len(trace.requests) == 2000 + len(trace.failed)


@FEW
@given(SEEDS, st.integers(1, 9))
def test_restarts_come_between_asks(seed: int, restarts: int) -> None:
    fleet = Fleet(20, seed=seed, enrolled=1, timer=Timer(interval=DAY, delay=HOUR))
    trace = run(fleet, DAY, Store(outages=((0, DAY),)), Policy(restarts=restarts, restart=5 * MINUTE))
    assert len(trace.failed) == 20 * (1 + restarts)
    plain = run(fleet, DAY, Store(outages=((0, DAY),)))
    for first in plain.failed:
        assert {first + one * 5 * MINUTE for one in range(restarts + 1)} <= set(trace.failed)


def test_a_machine_whose_credential_opens_nothing_fills_the_store() -> None:
    trace = run(Fleet(3, broken=1, enrolled=1), 10 * DAY)
    assert (len(trace.requests), sorted(trace.machines)) == (40 + 2, [1, 2])


BACKUPS = st.integers(0, 10 * 24).map(lambda hours: hours * HOUR)
GRACES = st.integers(0, 10 * 24).map(lambda hours: hours * HOUR)
THEN = 14 * DAY


def lossy(seed: int, loss: Loss, policy: Policy) -> Trace:
    """A small fleet that rotates all the time, long enough for every staged key to be finished."""
    trace = run(Fleet(150, seed=seed, oldest=90 * DAY, enrolled=14 * DAY), THEN + 24 * DAY, Store(loss=loss), policy)
    assert not trace.staged
    assert len(set(trace.machines)) == 150
    return trace


@FEW
@given(SEEDS, BACKUPS)
def test_at_once_a_restore_loses_what_was_rotated_since_the_backup(seed: int, backup: int) -> None:
    loss = Loss(THEN - backup, THEN)
    trace = lossy(seed, loss, Policy())
    assert trace.lost(loss) == sum(THEN - backup <= now < THEN for now in trace.rotated)


@settings(max_examples=40)
@given(SEEDS, BACKUPS, GRACES)
def test_staged_and_read_back_a_restore_loses_at_most_what_is_older_than_the_grace(
    seed: int, backup: int, grace: int
) -> None:
    loss = Loss(THEN - backup, THEN)
    trace = lossy(seed, loss, Policy(grace=grace, read_back=True))
    at_once = run(Fleet(150, seed=seed, oldest=90 * DAY, enrolled=14 * DAY), THEN).rotated
    assert trace.lost(loss) <= sum(THEN - backup <= now < THEN - grace for now in at_once)
    if grace >= backup:
        assert trace.lost(loss) == 0, "G >= B"


@settings(max_examples=40)
@given(SEEDS, BACKUPS, GRACES, st.integers(0, 48).map(lambda hours: hours * HOUR))
def test_staged_without_a_look_it_takes_the_time_until_somebody_notices_more(
    seed: int, backup: int, grace: int, noticed: int
) -> None:
    loss = Loss(THEN - backup, THEN, known=THEN + noticed)
    trace = lossy(seed, loss, Policy(grace=grace))
    at_once = run(Fleet(150, seed=seed, oldest=90 * DAY, enrolled=14 * DAY), THEN).rotated
    assert trace.lost(loss) <= sum(THEN - backup <= now < THEN - grace + noticed for now in at_once)
    if grace >= backup + noticed:
        assert trace.lost(loss) == 0, "G >= B + D"


@FEW
@given(SEEDS, GRACES)
def test_a_store_that_keeps_nothing_is_found_out_by_reading_back(seed: int, grace: int) -> None:
    loss = Loss(0, THEN, restored=False)
    assert lossy(seed, loss, Policy(grace=grace, read_back=True)).lost(loss) == 0
    assert lossy(seed, loss, Policy()).lost(loss) > 0


def test_load_counts_the_seconds_without_any() -> None:
    found = load([5, 5, 6, 99, 100], 0, 100)
    assert (found.mean, found.p99, found.max, found.at) == (0.04, 1, 2, 5)
    assert load([], 0, 10).max == 0
    assert load([0, 59, 60], 0, 120, MINUTE).max == 2
    assert load(range(100), 0, 100).p99 == 1


def test_the_worst_second_is_that_of_a_poisson_distribution() -> None:
    assert worst_second(0.0) == 0
    assert worst_second(1.0, chance=0.27) == 1  # P(X > 1) = 0.264
    assert worst_second(1.0, chance=0.26) == 2
    assert worst_second(13.9, 7200) in range(35, 39)
    assert all(one <= other for one, other in pairwise(worst_second(rate / 10, 7200) for rate in range(200)))
    with pytest.raises(ValueError, match="too small"):
        worst_second(501)
