# SPDX-License-Identifier: GPL-2.0-or-later
"""The questions of docs/scale.md, put to the simulation; the answers are plain data, as in docs/scale/numbers.json."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any, Final

from tests.scale.fleet import Fleet
from tests.scale.load import expected_rate, load, worst_second
from tests.scale.simulation import Loss, Policy, Store, Trace, run
from tests.scale.timer import DAY, HOUR, MINUTE, WEEK, Power, Timer, Workdays

Answer = dict[str, Any]

MACHINES: Final = 100_000
AGE: Final = 90 * DAY
#: By how much AGE is less, at most, where each machine has one of its own.
SPREAD: Final = 30 * DAY
DESKTOPS: Final = Workdays()
LAPTOPS: Final = Workdays(suspends=True, battery=30)
SERVERS: Final = Fleet(1).power
POWERS: Final[Mapping[str, Power]] = {"servers": SERVERS, "desktops": DESKTOPS, "laptops": LAPTOPS}
TIMERS: Final[Mapping[str, Timer]] = {
    "as shipped: 6 h, 2 h": Timer(),
    "6 h, no delay": Timer(delay=0),
    "6 h, 5 h 30": Timer(delay=5 * HOUR + 30 * MINUTE),
    "24 h, 23 h": Timer(interval=DAY, delay=23 * HOUR),
}
OUTAGES: Final = {"1 hour": HOUR, "1 day": DAY, "1 week": WEEK}
#: When an outage or a restore is, so that it is nothing special for a fleet that has come to rest: on a Monday, 0:00.
THEN: Final = 4 * WEEK


def steady(machines: int) -> Answer:
    """The second year of a fleet whose keys were made evenly over 90 days."""
    answer: Answer = {}
    for name, power in POWERS.items():
        for spread in (0, SPREAD):
            trace = run(Fleet(machines, power=power, spread=spread), 2 * 365 * DAY)
            year = [time for time in trace.requests if time >= 364 * DAY]
            span = (364 * DAY, 2 * 364 * DAY)
            rate = expected_rate(machines, AGE - spread, Timer().interval, Timer().spread)
            answer[f"{name}, AGE of its own" if spread else name] = {
                **_loads(year, *span),
                "bound": worst_second(rate, 364 * DAY),
                "late_hours": _hours(max(_over(trace, AGE))),
                "mondays": sum(time // DAY % 7 == 0 for time in year) / len(year),
                "per_hour_of_week": _per_hour_of_week(year, *span),
            }
    return answer


def rollout(machines: int) -> Answer:
    """The timer is switched on everywhere at once."""
    fleets = {
        "all keys are overdue": Fleet(machines, enrolled=1),
        "all enrolled within an hour": Fleet(machines, enrolled=HOUR, oldest=0),
        "all enrolled within a week": Fleet(machines, enrolled=WEEK, oldest=0),
        "enrolled within an hour, AGE of its own": Fleet(machines, enrolled=HOUR, spread=SPREAD, oldest=0),
        "enrolled within 90 days": Fleet(machines, enrolled=AGE, oldest=0),
    }
    answer: Answer = {}
    for name, fleet in fleets.items():
        trace = run(fleet, 375 * DAY)
        days = Counter(time // DAY for time in trace.requests)
        waves = [(max(90 * wave - 45, 0) * DAY, (90 * wave + 45) * DAY) for wave in range(4)]
        answer[name] = {
            "waves": [_loads(trace.requests, *wave) for wave in waves],
            "per_day": [days[day] for day in range(375)],
        }
    return answer


def holiday(machines: int) -> Answer:
    """Desktops, laptops: an ordinary Monday morning, and the one after two weeks in which nobody came."""
    answer: Answer = {}
    for name, power in (("desktops", DESKTOPS), ("laptops", LAPTOPS)):
        for weeks in (0, 2):
            days = range((THEN - weeks * WEEK) // DAY, THEN // DAY)
            trace = run(Fleet(machines, power=replace(power, holidays=days)), THEN + DAY)
            answer[f"{name}, {weeks} weeks"] = _loads(trace.requests, THEN, THEN + DAY)
    return answer


def outages(machines: int) -> Answer:
    """The store answers nobody for a while, then everybody."""
    answer: Answer = {}
    for length, seconds in OUTAGES.items():
        answer[f"servers, {length}"] = _outage(Fleet(machines), seconds)
    for length in ("1 day", "1 week"):
        answer[f"desktops, {length}"] = _outage(Fleet(machines, power=DESKTOPS), OUTAGES[length])
    wave = Fleet(machines, oldest=AGE - THEN, enrolled=1)
    answer["servers, all due at once, 1 day"] = _outage(wave, DAY)
    return answer


def retries(machines: int) -> Answer:
    """An outage of a day, by what the timer says, and whether a failure is tried again before the timer does."""
    answer: Answer = {name: _outage(Fleet(machines, timer=timer), DAY) for name, timer in TIMERS.items()}
    answer["as shipped, and 5 times after 10 min"] = _outage(Fleet(machines), DAY, Policy(restarts=5))
    for name, timer in TIMERS.items():
        wave = run(Fleet(machines, enrolled=1, timer=timer), DAY)
        answer[name]["wave"] = _loads(wave.requests, 0, DAY)
        answer[name]["wave_bound"] = worst_second(machines / timer.spread, timer.spread)
    return answer


def small_store(machines: int) -> Answer:
    """All keys are overdue, and the store takes only so many requests per second."""
    answer: Answer = {}
    for capacity in (20, 10, 5, 2, 1):
        trace = run(Fleet(machines, enrolled=1), 30 * DAY, Store(capacity=capacity))
        done = sorted(trace.rotated)[:machines]
        answer[str(capacity)] = {"failed": len(trace.failed), "done": len(done), "hours": _hours(done[-1])}
    return answer


def short_days(machines: int) -> Answer:
    """Machines that are on for a short while on workdays: how many have rotated four weeks after they were due."""
    answer: Answer = {}
    for minutes in (30, 60, 90, 120, 180):
        power = Workdays(coming=2 * HOUR, hours=minutes * MINUTE)
        for fixed in (True, False):
            trace = run(Fleet(machines, enrolled=1, power=power, timer=Timer(fixed=fixed)), 4 * WEEK)
            answer[f"{minutes} min, {'fixed' if fixed else 'new each time'}"] = len(set(trace.machines)) / machines
    return answer


def losses(machines: int) -> Answer:
    """The store goes back to a backup: machines whose key in force nobody has, by how old the backup is."""
    policies = {
        "at once": (Policy(), None),
        "read back at once": (Policy(grace=0, read_back=True), None),
        "1 day, read back": (Policy(grace=DAY, read_back=True), None),
        "7 days, read back": (Policy(grace=WEEK, read_back=True), None),
        "7 days, noticed after 1 day": (Policy(grace=WEEK), DAY),
    }
    answer: Answer = {}
    for name, (policy, known) in policies.items():
        answer[name] = {}
        for age in (HOUR, 6 * HOUR, DAY, 3 * DAY, WEEK, 10 * DAY, 2 * WEEK):
            loss = Loss(THEN - age, THEN, known=None if known is None else THEN + known)
            trace = run(Fleet(machines), THEN + 9 * DAY, Store(loss=loss), policy)
            answer[name][str(age // HOUR)] = {
                "lost": trace.lost(loss),
                "replaced": trace.replaced,
                "bound": round(machines * _window(policy, age, known) / AGE),
            }
    return answer


def wave_lost(machines: int) -> Answer:
    """The same for a fleet that rotates all at once, and a store that goes back by three hours an hour after that."""
    loss = Loss(0, 3 * HOUR)
    answer: Answer = {}
    for name, policy in {"at once": Policy(), "1 day, read back": Policy(grace=DAY, read_back=True)}.items():
        trace = run(Fleet(machines, enrolled=1), 9 * DAY, Store(loss=loss), policy)
        answer[name] = {"lost": trace.lost(loss), "replaced": trace.replaced}
    return answer


def never_kept(machines: int) -> Answer:
    """A store that acknowledges, and keeps nothing, for a week, until somebody notices."""
    loss = Loss(THEN - WEEK, THEN, restored=False, known=THEN)
    policies = {
        "at once": Policy(),
        "1 day, read back": Policy(grace=DAY, read_back=True),
        "1 day": Policy(grace=DAY),
        "7 days": Policy(grace=WEEK),
    }
    traces = {name: run(Fleet(machines), THEN + 9 * DAY, Store(loss=loss), policy) for name, policy in policies.items()}
    return {name: {"lost": trace.lost(loss), "requests": len(trace.requests)} for name, trace in traces.items()}


def storage(machines: int) -> Answer:
    """Entries per year, and those of a machine whose credential opens nothing."""
    healthy = run(Fleet(machines), 365 * DAY)
    broken = run(Fleet(100, broken=100, enrolled=1), 365 * DAY)
    return {"entries": len(healthy.requests), "broken": len(broken.requests) / 100, "two_steps": _two_steps(machines)}


SCENARIOS: Final[Mapping[str, Callable[[int], Answer]]] = {
    "steady": steady,
    "rollout": rollout,
    "holiday": holiday,
    "outages": outages,
    "retries": retries,
    "small_store": small_store,
    "short_days": short_days,
    "losses": losses,
    "wave_lost": wave_lost,
    "never_kept": never_kept,
    "storage": storage,
}


def _two_steps(machines: int) -> Answer:
    """What two steps cost: requests of a year, and volumes with two keys at its end."""
    trace = run(Fleet(machines), 365 * DAY, policy=Policy(grace=DAY, read_back=True))
    return {"requests": len(trace.requests), "staged": len(trace.staged)}


def _window(policy: Policy, age: int, known: int | None) -> int:
    """How many seconds' worth of rotations may be lost, with a backup of this ``age``."""
    if policy.grace is None:
        return age
    return min(age, max(0, age - policy.grace + (known or 0)))


def _outage(fleet: Fleet, seconds: int, policy: Policy | None = None) -> Answer:
    end = THEN + seconds
    trace = run(fleet, end + 8 * DAY, Store(outages=((THEN, end),)), policy)
    after = [time for time in trace.requests if time >= end]
    # Where all are due at once, all that there are.
    pause = seconds if fleet.enrolled > 1 else fleet.age
    rate = expected_rate(fleet.machines, fleet.age, fleet.timer.interval, fleet.timer.spread, pause)
    counted = Counter((time - THEN) // (15 * MINUTE) for time in trace.requests if time >= THEN - DAY)
    return {
        "failed": len(trace.failed),
        "late": len(trace.waited),
        "peak": _loads(after, end, end + 2 * DAY),
        "bound": worst_second(rate, fleet.timer.spread),
        "rate": rate,
        "caught_up_hours": _hours(max(trace.waited.values(), default=end) - end),
        "oldest_hours": _hours(max(_over(trace, fleet.age, THEN))),
        "per_quarter_hour": [counted[slot] for slot in range(-96, (seconds + 2 * DAY) // (15 * MINUTE))],
    }


def _over(trace: Trace, age: int, since: int = 0) -> list[int]:
    """By how much keys were older than they may become when they were rotated, from ``since`` on."""
    return [one - age for time, one in zip(trace.rotated, trace.ages, strict=True) if time >= since]


def _loads(times: Iterable[int], begin: int, end: int) -> Answer:
    times = list(times)
    return {"second": asdict(load(times, begin, end)), "minute": asdict(load(times, begin, end, MINUTE))}


def _per_hour_of_week(times: Iterable[int], begin: int, end: int) -> list[float]:
    """The mean of each of the 168 hours, Monday first."""
    counts = Counter(time % WEEK // HOUR for time in times if begin <= time < end)
    return [round(counts[hour] / ((end - begin) // WEEK), 1) for hour in range(168)]


def _hours(seconds: int) -> float:
    return round(seconds / HOUR, 1)
