# SPDX-License-Identifier: GPL-2.0-or-later
"""What is read out of /proc, the line through memory over time, and what is made of times and memory."""

import os

import pytest

from tests.bench import idle, udevtime
from tests.bench.figures import Series
from tests.bench.idle import Found, slope
from tests.bench.procfs import (
    Activity,
    Memory,
    between,
    children_of,
    memory_of,
    parsed_activity,
    parsed_memory,
    threads_of,
)
from tests.support.daemon_process import BACKUP, NEW

ROLLUP = """\
55d0c8a5e000-7ffd0b5f9000 ---p 00000000 00:00 0                          [rollup]
Rss:               33824 kB
Pss:               24530 kB
Pss_Anon:          20484 kB
Locked:                0 kB
"""


def test_memory_is_of_all_mappings() -> None:
    assert parsed_memory(ROLLUP) == Memory(33824 * 1024, 24530 * 1024)
    assert Memory(3, 1) + Memory(4, 2) == Memory(7, 3)


def test_activity_of_a_thread() -> None:
    status = "Name:\tpython 3: x\nState:\tS (sleeping)\nvoluntary_ctxt_switches:\t12\nnonvoluntary_ctxt_switches:\t99\n"
    assert parsed_activity(status, "1500000000 7 30\n") == Activity(12, 1.5)


def test_threads_come_and_go() -> None:
    before = {1: Activity(10, 1), 2: Activity(100, 9)}
    after = {1: Activity(16, 1.5), 3: Activity(2, 0.5)}
    assert between(before, after) == Activity(8, 1)
    assert between(before, after).over(2) == Activity(4, 0.5)


def test_a_process_that_is_there() -> None:
    here = os.getpid()
    alone, twice = memory_of(here), memory_of(here, here)
    assert 0 < alone.pss <= alone.rss < twice.rss
    assert threads_of(here)[here].seconds > 0
    assert here in children_of(os.getppid())


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0, 5), (10, 25), (20, 45)], 2),
        ([(0, 7), (1, 7), (2, 7)], 0),
        ([*((x, 3 * x) for x in range(9)), (9, 1e9)], 3),  # one that lies far off
        ([(0, 1), (0, 99), (2, 1), (4, 1)], 0),
    ],
)
def test_the_slope_of_a_line(points: list[tuple[float, float]], expected: float) -> None:
    assert slope(points) == expected


def test_each_turn_has_another_secret_than_the_one_before() -> None:
    turns = list(idle._turns(12))
    assert [number for number, _ in turns] == [4, 8, 12]
    secrets = [BACKUP, *(secret for _, secret in turns)]  # the first one is enrolled
    assert secrets == [BACKUP, NEW, BACKUP, NEW]


def test_what_is_held_against_udisksd() -> None:
    names = [idle._of(name, count) for count in idle.COUNTS for name in (idle.OURS, idle.THEIRS)]
    memory = {name: Memory(10 << 20, 1) for name in names}
    memory[names[-2]] = Memory(36 << 20, 1)
    memory |= {f"{idle.OURS}, {idle.AFTER}": Memory(35 << 20, 1)}
    quiet, busy = [Activity(0.5, 0.1)] * 3, [Activity(2, 0.1)]
    # It grows in the first half alone.
    growth = [(float(number), float(min(number, 500) * 1000)) for number in range(100, 1100, 100)]
    result = idle._result(
        Found([Series(name, "s", (1.0,)) for name in names], memory, {idle.OURS: quiet, idle.SPARE: busy}, growth)
    )
    assert [finding.value for finding in result.findings] == [26 << 20, 25 << 20, 0, 0.5, 2]
    assert [finding.reached for finding in result.findings] == [False, True, True, True, False]
    assert [ratio.name for ratio in result.ratios] == [
        f"luksrotd, {volumes} / udisksd, {volumes}" for volumes in ("1 volume", "50 volumes", "200 volumes")
    ]


def test_what_udev_took_is_not_ours() -> None:
    result = udevtime._result([(0.2, 0.01), (0.1, 0.03), (0.1, 0.02)], [0.4])
    (finding,) = result.findings
    assert (finding.value, finding.reached) == (0.02, True)
