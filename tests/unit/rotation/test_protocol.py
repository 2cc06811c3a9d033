# SPDX-License-Identifier: GPL-2.0-or-later
import pytest

from luksrotd.errors import ConsistencyError, Outcome
from luksrotd.luks2.areas import Extent
from luksrotd.rotation.protocol import BLOCK, ORDER, CommitPlan, Phase, Step, Write, header_writes

A, B, C = b"a" * BLOCK, b"b" * BLOCK, b"c" * BLOCK


def plan(*phases: Phase, base: bytes = A, committed: bytes = B, final: bytes = C) -> CommitPlan:
    return CommitPlan(tuple(Step(phase, (Write(0, A),)) for phase in phases), base, committed, final, 1, 2)


def test_the_order_of_the_phases_is_the_specification():
    assert [str(phase) for phase in ORDER] == [
        "new-area",
        "header-primary",
        "header-secondary",
        "wipe-old",
        "clear-primary",
        "clear-secondary",
    ]


@pytest.mark.parametrize(
    "phases",
    [
        (Phase.HEADER_PRIMARY, Phase.NEW_AREA),
        (Phase.WIPE_OLD, Phase.HEADER_SECONDARY),
        (Phase.HEADER_SECONDARY, Phase.HEADER_PRIMARY),
        (Phase.WIPE_OLD, Phase.WIPE_OLD),
    ],
)
def test_phases_out_of_order_are_refused(phases):
    with pytest.raises(ConsistencyError, match="out of order"):
        plan(*phases)


def test_the_point_of_no_return_is_the_first_step_that_a_reader_sees():
    assert plan(*ORDER).point_of_no_return is Phase.HEADER_PRIMARY
    assert plan(Phase.WIPE_OLD, Phase.CLEAR_PRIMARY).point_of_no_return is Phase.WIPE_OLD
    assert plan(Phase.NEW_AREA).point_of_no_return is None


def test_I1_the_medium_is_checked_before_the_old_key_dies():
    assert [phase for phase in ORDER if plan(*ORDER).before_wipe(phase)] == [Phase.WIPE_OLD]


def test_writes_are_in_the_order_of_the_steps():
    first, second = Write(0, A), Write(BLOCK, B)
    steps = (Step(Phase.NEW_AREA, (first,)), Step(Phase.WIPE_OLD, (second,)))
    assert list(CommitPlan(steps, A, B, C, 1, 2).writes) == [first, second]
    assert second.extent == Extent(BLOCK, BLOCK)


def test_the_outcome_is_what_the_device_holds():
    outcomes = [plan(*ORDER).outcome(headers) for headers in (A, B, C, b"?")]
    assert outcomes == [Outcome.UNCHANGED, Outcome.WIPE_PENDING, Outcome.COMMITTED, Outcome.UNKNOWN]


def test_without_a_wipe_the_commit_is_final():
    assert plan(*ORDER, final=B).outcome(B) is Outcome.COMMITTED


def test_where_only_the_closing_is_to_be_written_it_is_a_wipe_that_pends_or_nothing():
    closing = (Phase.CLEAR_PRIMARY, Phase.CLEAR_SECONDARY)
    assert plan(Phase.WIPE_OLD, *closing, base=B).outcome(B) is Outcome.WIPE_PENDING
    assert plan(*closing, base=B).outcome(B) is Outcome.UNCHANGED


def test_only_changed_blocks_are_written_and_neighbours_together():
    before, after = A + A + A + A, B + A + B + C
    assert header_writes(before, after, 3 * BLOCK) == (Write(3 * BLOCK, B), Write(5 * BLOCK, B + C))
    assert header_writes(after, after, 0) == ()
