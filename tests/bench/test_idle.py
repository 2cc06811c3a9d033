# SPDX-License-Identifier: GPL-2.0-or-later
"""What is read out of /proc, and the line through memory over time."""

import os

import pytest

from tests.bench.idle import slope
from tests.bench.procfs import Activity, Memory, activity_of, children_of, memory_of, parsed_activity, parsed_memory

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


def test_activity_is_of_all_threads() -> None:
    status = "Name:\tpython 3: x\nState:\tS (sleeping)\nvoluntary_ctxt_switches:\t{}\nnonvoluntary_ctxt_switches:\t99\n"
    threads = [(status.format(12), "1500000000 7 30\n"), (status.format(5), "250000000 1 2\n")]
    found = parsed_activity(threads)
    assert found == Activity(17, 1.75)
    assert (found - Activity(7, 0.75)).over(2) == Activity(5, 0.5)


def test_a_process_that_is_there() -> None:
    here = os.getpid()
    alone, twice = memory_of(here), memory_of(here, here)
    assert 0 < alone.pss <= alone.rss < twice.rss
    assert activity_of(here).seconds > 0
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
