# SPDX-License-Identifier: GPL-2.0-or-later
"""What is read out of a recording or out of the lines of strace."""

from tests.bench.counted import Counts, bound_of, counts_of
from tests.bench.lock import holds
from tests.support.realvolume import recorded

LOCK = "/run/cryptsetup/L_7:5"


def test_a_rotation_is_counted_and_bounded_by_what_must_change() -> None:
    operation = recorded("rotation")
    counts = counts_of([*operation.epochs, []])
    assert counts == Counts(operation.bytes, 6, 6)
    areas = 2 * 258048
    assert areas + 4 * 2 * 512 <= bound_of(operation.before, operation.epochs) < counts.bytes


def test_a_lock_is_held_from_where_it_was_given_to_where_it_is_let_go() -> None:
    lines = [
        f"9 100.000000 flock(5<{LOCK}>, LOCK_SH|LOCK_NB) = 0 <0.000010>",
        f"9 100.100000 close(5<{LOCK}>) = 0 <0.000010>",
        f"9 101.000000 flock(5<{LOCK}>, LOCK_EX|LOCK_NB) = -1 EAGAIN (Resource temporarily unavailable) <0.000010>",
        f"9 102.000000 flock(5<{LOCK}>, LOCK_EX <unfinished ...>",
        "8 102.100000 close(7</dev/null>) = 0 <0.000010>",
        "9 102.500000 <... flock resumed>) = 0 <0.500000>",
        f"9 103.000000 flock(5<{LOCK}>, LOCK_UN) = 0 <0.000010>",
        f"9 104.000000 flock(5<{LOCK}>, LOCK_EX|LOCK_NB) = 0 <0.250000>",
        f"9 104.500000 close(5<{LOCK}>(deleted)) = 0 <0.000010>",
    ]
    assert list(holds(lines, LOCK)) == [(102.5, 103.0), (104.25, 104.5)]
