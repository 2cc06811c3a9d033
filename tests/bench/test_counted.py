# SPDX-License-Identifier: GPL-2.0-or-later
"""What is read out of a recording, or out of what the kernel tells of locks."""

import os

from tests.bench.counted import Counts, bound_of, counts_of
from tests.bench.lock import holds
from tests.support.realvolume import recorded

DEVICE = os.makedev(0, 0x18)
OWNER, OTHER = "00000000641aa34a", "000000007db09e12"


def test_a_rotation_is_counted_and_bounded_by_what_must_change() -> None:
    operation = recorded("rotation")
    counts = counts_of([*operation.epochs, []])
    assert counts == Counts(operation.bytes, 6, 6)
    areas = 2 * 258048
    assert areas + 4 * 2 * 512 <= bound_of(operation.before, operation.epochs) < counts.bytes


def line(when: float, owner: str, kind: str, result: int = 0, *, pid: int = 9, device: str = "0x0:0x18") -> str:
    return (
        f"          python-9 [001] ..... {when:.6f}: flock_lock_inode: fl=000000004acbe579 dev={device} ino=0x2f "
        f"fl_blocker=0000000000000000 fl_owner={owner} fl_pid={pid} fl_flags=FL_FLOCK|FL_SLEEP fl_type=F_{kind} "
        f"fl_start=0 fl_end=9223372036854775807 ret={result}"
    )


def test_a_lock_is_held_from_where_it_was_given_to_where_it_is_let_go() -> None:
    lines = [
        "# tracer: nop",
        line(100.0, OWNER, "RDLCK"),
        line(100.1, OWNER, "UNLCK"),
        line(101.0, OWNER, "WRLCK", -11),
        line(102.0, OWNER, "WRLCK", 1),  # waits
        line(102.1, OTHER, "UNLCK", pid=8),
        line(102.5, OWNER, "WRLCK"),
        line(102.6, OTHER, "WRLCK", pid=8, device="0xfe:0x0"),
        line(102.7, OTHER, "UNLCK", pid=8),
        line(103.0, OWNER, "UNLCK"),
        line(104.0, OTHER, "WRLCK"),
        line(104.25, OTHER, "RDLCK"),
        line(105.0, OTHER, "WRLCK", pid=8),
        line(106.0, OTHER, "UNLCK", pid=8),
        line(107.0, OWNER, "WRLCK", device="0xfe:0x0"),
        line(108.0, OWNER, "UNLCK", device="0xfe:0x0"),
    ]
    assert list(holds(lines, DEVICE, 9)) == [(102.5, 103.0), (104.0, 104.25)]
