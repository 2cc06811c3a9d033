# SPDX-License-Identifier: GPL-2.0-or-later
"""The schedule: every decision, and what holds for any history."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luksrotd.config import Limits
from luksrotd.errors import Busy, TooMany
from luksrotd.service.schedule import ROOT, Entry, Turns, refusal, startable, turns_after

LIMITS = Limits(jobs=2, memory_kib=100, waiting=3, waiting_per_volume=2, jobs_per_user=4)
ANN, BEN = 1000, 1001


def entries(text: str, owner: int | None = ROOT) -> list[Entry]:
    """``"0a 1bc:60"``: job 0 on volume a, job 1 on the volumes b and c, which needs 60 KiB."""
    return [entry(word, owner) for word in text.split()]


def entry(word: str, owner: int | None = ROOT) -> Entry:
    name, _, memory = word.partition(":")
    number = name.rstrip("abcdefghxyz")
    return Entry(int(number), frozenset(name[len(number) :]), owner, int(memory or 0))


def started(
    running: list[Entry], queued: list[Entry], limits: Limits = LIMITS, turns: Turns | None = None
) -> list[int]:
    return [entry.number for entry in startable(running, queued, limits, turns)]


def text_of(running: list[Entry], queued: list[Entry], new: Entry, kind: type) -> str:
    found = refusal(running, queued, new, LIMITS)
    assert type(found) is kind
    return str(found)


# -- who starts --------------------------------------------------------------------------------------------------


def test_jobs_start_in_the_order_of_arrival_one_for_each_volume():
    assert started([], entries("0a 1a 2b 3c")) == [0, 2]
    assert started(entries("9a"), entries("0a 1b 2c")) == [1]
    assert started(entries("9a"), entries("0a")) == []


def test_no_more_run_than_there_are_places_also_if_there_were_more_before():
    assert started(entries("8x 9y"), entries("0a")) == []
    assert started(entries("7x 8y 9z"), entries("0a")) == []


def test_a_set_waits_for_all_of_its_volumes_and_is_not_overtaken():
    assert started(entries("9a"), entries("0ab 1b 2c")) == [2]
    assert started([], entries("0ab 1b 2c")) == [0, 2]


def test_no_more_memory_is_given_away_than_there_is():
    assert started([], entries("0a:60 1b:40")) == [0, 1]
    assert started([], entries("0a:60 1b:41")) == [0]
    assert started(entries("9x:60"), entries("0a:41")) == []
    assert started([], entries("0a:60 1b:41"), Limits(jobs=2)) == [0, 1]


def test_who_waits_for_memory_is_not_overtaken():
    assert started(entries("9x:60"), entries("0a:41 1b:10")) == []


def test_who_needs_more_than_all_of_the_memory_runs_alone():
    assert started([], entries("0a:101 1b:0")) == [0]
    assert started(entries("9x:101"), entries("0a:0")) == []
    assert started(entries("9x:1"), entries("0a:101")) == []


def test_users_take_turns():
    queued = entries("0a 1b 2c", ANN) + entries("3d", BEN)
    assert started([], queued) == [0, 3]
    assert started(entries("9x", ANN), queued) == [3]
    assert started(entries("9x", BEN), queued) == [0]


def test_users_take_turns_where_one_job_runs_at_a_time():
    limits, turns, order = Limits(jobs=1), dict[int | None, tuple[int, int]](), []
    queued = entries("0a 1b 2c", ANN) + entries("3d 4e", BEN) + entries("5f", ROOT)
    while queued:
        (entry,) = startable([], queued, limits, turns)
        turns = turns_after(turns, entry, queued)
        queued.remove(entry)
        order.append(entry.number)
    assert order == [0, 3, 5, 1, 4, 2]


def test_who_comes_later_does_not_go_before_one_whose_turn_it_is():
    limits = Limits(jobs=1)
    queued = entries("1b", ANN) + entries("6d", BEN)
    assert started([], queued, limits, {ANN: (5, 1)}) == [1], "it came after the start of Ann's last one"
    assert started([], queued, limits, {ANN: (6, 1)}) == [6], "it came before"


def test_a_turn_that_does_not_matter_any_more_is_forgotten():
    queued = entries("5a", ANN) + entries("8b", BEN)
    before = {ROOT: (4, 1), BEN: (5, 3), ANN: (2, 1)}
    after = turns_after(before, queued[0], queued)
    assert after == {BEN: (5, 3), ANN: (8, 1)}
    assert turns_after(after, queued[1], queued) == {BEN: (8, 2), ANN: (8, 1)}


def test_the_turn_counts_what_can_run_not_what_waits_for_a_volume():
    assert started(entries("8x", BEN), entries("0x 1a", ANN) + entries("2b", ROOT)) == [1]


def test_the_daemon_goes_first_but_not_on_a_volume():
    queued = entries("0a 1b", ANN) + entries("2c 3d", None)
    assert started([], queued) == [2, 3]
    assert started([], entries("0a", ANN) + entries("1a", None)) == [0]


def test_one_user_leaves_a_place_to_the_others():
    limits = Limits(jobs=3)
    assert started([], entries("0a 1b 2c", ANN), limits) == [0, 1]
    assert started(entries("8x 9y", ANN), entries("0a", ANN) + entries("1b", BEN), limits) == [1]
    for owner in (ROOT, None):
        assert started([], entries("0a 1b 2c", owner), limits) == [0, 1, 2]
    assert started([], entries("0a", ANN), Limits(jobs=1)) == [0]


def test_who_waits_for_a_person_has_its_volumes_and_nothing_else():
    waiting = [replace(one, idle=True) for one in entries("7x:100 8y:100 9z:100", ANN)]
    assert started(waiting, entries("0a:60 1b:40 2x", BEN), Limits(jobs=3, memory_kib=100)) == [0, 1]
    assert started(waiting, entries("0x")) == []


# -- who is not taken --------------------------------------------------------------------------------------------


def test_who_can_start_at_once_is_always_taken():
    assert refusal(entries("9x"), entries("0x 1x 2x"), entry("3a"), LIMITS) is None
    assert refusal([], [], entry("3a:500", ANN), LIMITS) is None


def test_too_many_for_one_volume_are_busy():
    queued = entries("1a") + entries("2a", BEN)
    assert text_of(entries("0a"), queued, entry("3a"), Busy) == "cannot start a job: 2 jobs are waiting for the volume"
    assert refusal(entries("0a"), entries("1b"), entry("2a"), LIMITS) is None


def test_any_volume_of_a_set_can_be_too_full():
    assert text_of(entries("0a"), entries("1a 2a"), entry("3ba"), Busy)


def test_too_many_at_all_are_busy():
    text = text_of(entries("0a 1b"), entries("2a 3b 4c"), entry("5d"), Busy)
    assert text == "cannot start a job: 3 jobs are waiting"


def test_a_user_may_have_so_many_under_way_and_root_is_not_bounded():
    running, queued = entries("0a 1b", ANN), entries("2c 3d", ANN)
    assert text_of(running, queued, entry("4e", ANN), TooMany) == "cannot start a job: 4 of the user's are under way"
    assert refusal(running, queued, entry("4e", BEN), LIMITS) is None
    assert refusal(entries("0a 1b"), entries("2c 3d"), entry("4e", ROOT), LIMITS) is None


def test_too_many_of_the_user_are_told_even_if_it_could_start():
    limits = Limits(jobs=8, jobs_per_user=1)
    assert isinstance(refusal(entries("0a", ANN), [], entry("1b", ANN), limits), TooMany)


def test_a_user_takes_no_more_than_half_of_the_places_of_a_volume():
    text = text_of(entries("0a", ANN), entries("1a", ANN), entry("2a", ANN), TooMany)
    assert text == "cannot start a job: 1 of the user's are waiting for the volume"
    assert refusal(entries("0a", ANN), entries("1a", ANN), entry("2a", BEN), LIMITS) is None
    assert refusal(entries("0a"), entries("1a"), entry("2a", ROOT), LIMITS) is None
    one = Limits(jobs=2, waiting_per_volume=1)
    assert refusal(entries("0a", ANN), [], entry("1a", ANN), one) is None


def test_the_daemon_takes_nobodys_place_and_waits_once_for_a_volume():
    full = entries("2a 3a 4b")
    assert refusal(entries("0a 1b"), full, entry("5a", None), LIMITS) is None
    assert "one of the daemon's own" in text_of(entries("0a"), entries("1a", None), entry("2a", None), Busy)
    assert refusal(entries("0a", None), [], entry("1a", None), LIMITS) is None
    assert refusal(entries("0a 1b"), entries("2a 3b", None) + entries("4c 5d"), entry("6e"), LIMITS) is None


# -- what holds for any history ----------------------------------------------------------------------------------

JOBS = st.tuples(
    st.frozensets(st.sampled_from("abcd"), min_size=1, max_size=2),
    st.sampled_from([None, ROOT, ANN, BEN]),
    st.sampled_from([0, 30, 60, 100, 500]),
)


class World:
    """Jobs that arrive, start as the schedule says, and end when the test wants."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self.running: list[Entry] = []
        self.queued: list[Entry] = []
        self.turns: Turns = {}
        self.taken: list[Entry] = []
        self.started: list[Entry] = []
        self.number = 0

    def arrive(self, volumes: frozenset[str], owner: int | None, memory: int) -> Entry | None:
        new = Entry(self.number, volumes, owner, memory)
        if refusal(self.running, self.queued, new, self.limits, self.turns) is not None:
            assert self.queued or owner in (ANN, BEN)
            return None
        self.number += 1
        self.taken.append(new)
        self.queued.append(new)
        self.settle()
        return new

    def idle(self, at: int) -> None:
        at %= len(self.running)
        self.running[at] = replace(self.running[at], idle=True)
        self.settle()

    def end(self, at: int) -> None:
        del self.running[at % len(self.running)]
        self.settle()

    def settle(self) -> None:
        queued = self.queued.copy()
        for entry in startable(self.running, queued, self.limits, self.turns):
            self.turns = turns_after(self.turns, entry, queued)
            self.queued.remove(entry)
            self.running.append(entry)
            self.started.append(entry)
        assert not startable(self.running, self.queued, self.limits, self.turns)
        self.check()

    def check(self) -> None:
        """The bounds."""
        limits = self.limits
        at_work = [entry for entry in self.running if not entry.idle]
        assert len(at_work) <= limits.jobs
        volumes = [volume for entry in self.running for volume in entry.volumes]
        assert len(volumes) == len(set(volumes))
        used = sum(entry.memory_kib for entry in at_work)
        assert used <= limits.memory_kib or max(entry.memory_kib for entry in at_work) == used
        waiting = [entry for entry in self.queued if entry.owner is not None]
        assert len(waiting) <= limits.waiting
        for volume in set().union(*(entry.volumes for entry in waiting)):
            assert sum(volume in entry.volumes for entry in waiting) <= limits.waiting_per_volume
        for owner in (ANN, BEN):
            assert sum(e.owner == owner for e in (*self.running, *self.queued)) <= limits.jobs_per_user


@given(st.lists(st.tuples(JOBS, st.sampled_from(["", "end", "idle"]), st.integers(0, 3)), max_size=60))
def test_any_history_is_bounded_and_in_order_and_ends(history):
    """Every job that was taken runs once, and those of a volume in the order in which they came."""
    world = World()
    for job, then, which in history:
        world.arrive(*job)
        if then and world.running:
            getattr(world, then)(which)
    while world.running:
        world.end(0)
    assert sorted(world.started, key=lambda entry: entry.number) == world.taken
    for volume in "abcd":
        mine = [entry.number for entry in world.started if volume in entry.volumes]
        assert mine == sorted(mine)


@settings(max_examples=60, deadline=None)
@given(st.data(), JOBS, st.integers(0, 12))
def test_nobody_starves(data, mine, before):
    """Whatever the others send, and in whatever order jobs end, as long as each ends: everybody's turn comes.

    The daemon's own go first, so they do not come for ever here.
    """
    limits = Limits(jobs=2, memory_kib=100, waiting=6, waiting_per_volume=3, jobs_per_user=6)
    world, ages = World(limits), dict[int, int]()
    others = st.tuples(
        st.sampled_from([frozenset(volumes) for volumes in ("a", "b", "c", "d", "ab", "cd")]),
        st.sampled_from([ROOT, ANN, BEN]),
        st.sampled_from([0, 30, 60]),
    )
    for _ in range(before):
        world.arrive(*data.draw(others))
    me = world.arrive(*mine)
    for _ in range(40):
        if me is None or me not in world.queued:
            return
        for _ in range(4):
            world.arrive(*data.draw(others))
        ages = {entry.number: ages.get(entry.number, 0) + 1 for entry in world.running}
        oldest = max(range(len(world.running)), key=lambda at: ages[world.running[at].number])
        due = ages[world.running[oldest].number] > limits.jobs
        world.end(oldest if due else data.draw(st.integers(0, limits.jobs - 1)))
    pytest.fail("its turn did not come")
