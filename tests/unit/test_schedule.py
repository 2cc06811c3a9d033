# SPDX-License-Identifier: GPL-2.0-or-later
"""The schedule: every decision, and what holds for any history."""

from hypothesis import given
from hypothesis import strategies as st

from luksrotd.service.schedule import Entry, Limits, Queue, Refuse, Start, admit, startable

LIMITS = Limits(parallel=2, waiting_per_volume=2, waiting=3)


NEW = {volume: Entry(99, frozenset(volume)) for volume in "abcd"}


def entries(text: str) -> list[Entry]:
    """``"0a 1b"``: job 0 on volume a, job 1 on volume b."""
    return [Entry(int(word[:-1]), frozenset(word[-1])) for word in text.split()]


def test_an_idle_volume_starts_while_there_is_a_place():
    assert admit([], [], NEW["a"], LIMITS) == Start()
    assert admit(entries("0b"), [], NEW["a"], LIMITS) == Start()


def test_without_a_place_it_waits_behind_nobody():
    assert admit(entries("0b 1c"), [], NEW["a"], LIMITS) == Queue(None)


def test_a_second_job_of_a_volume_waits_behind_the_last_one():
    assert admit(entries("0a"), [], NEW["a"], LIMITS) == Queue(0)
    assert admit(entries("0a"), entries("1a"), NEW["a"], LIMITS) == Queue(1)


def test_it_never_overtakes_one_of_its_volume_that_waits():
    assert admit(entries("0b"), entries("1a"), NEW["a"], LIMITS) == Queue(1)


def test_too_many_waiting_for_one_volume_are_refused():
    assert admit(entries("0a"), entries("1a 2a"), NEW["a"], LIMITS) == Refuse("2 jobs are waiting for the volume")


def test_too_many_waiting_at_all_are_refused():
    assert admit(entries("0a 1b"), entries("2a 3b 4c"), NEW["d"], LIMITS) == Refuse("3 jobs are waiting")


def test_who_waits_starts_in_order_one_per_volume():
    assert startable([], entries("0a 1a 2b 3c"), LIMITS) == tuple(entries("0a 2b"))
    assert startable(entries("9a"), entries("0a 1b 2c"), LIMITS) == tuple(entries("1b"))
    assert startable(entries("8x 9y"), entries("0a"), LIMITS) == ()
    assert startable(entries("9a"), entries("0a"), LIMITS) == ()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40))
def test_any_history_is_fair_bounded_and_ends(history):
    """Jobs arrive (and sometimes the oldest running one ends): bounds hold, order holds, nobody starves."""
    running, queued, started, accepted = [], [], [], []

    def settle() -> None:
        for entry in startable(running, queued, LIMITS):
            queued.remove(entry)
            running.append(entry)
            started.append(entry)

    for number, (volume, ends) in enumerate(history):
        entry = Entry(number, frozenset(volume))
        match admit(running, queued, entry, LIMITS):
            case Start():
                running.append(entry)
                started.append(entry)
                accepted.append(entry)
            case Queue():
                queued.append(entry)
                accepted.append(entry)
            case Refuse():
                assert queued
        assert len(running) <= LIMITS.parallel
        assert len(queued) <= LIMITS.waiting
        assert len({entry.volumes for entry in running}) == len(running)
        assert not startable(running, queued, LIMITS), "admit would have started it"
        if ends and running:
            running.pop(0)
            settle()
    while running:
        running.pop(0)
        settle()
    assert sorted(started, key=lambda entry: entry.number) == accepted
    for volume in "abc":
        mine = [entry.number for entry in started if volume in entry.volumes]
        assert mine == sorted(mine)
