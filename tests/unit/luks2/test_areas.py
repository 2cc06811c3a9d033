# SPDX-License-Identifier: GPL-2.0-or-later
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luksrotd.luks2.areas import Extent, merge, overlapping, subtract

# Small, so that ranges touch, nest and coincide often.
extents = st.builds(Extent, st.integers(0, 40), st.integers(1, 20))


def members(*ranges: Extent) -> set[int]:
    """The bytes of the ranges, one by one: the slow model that the arithmetic is held against."""
    return {byte for extent in ranges for byte in range(extent.offset, extent.end)}


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, 0), (5, -1)])
def test_no_extent_without_bytes_or_before_the_device(offset, size):
    with pytest.raises(ValueError, match=f"offset {offset}, size {size}"):
        Extent(offset, size)


def test_end_is_the_first_byte_behind():
    assert Extent(4096, 512).end == 4608


def test_touching_ranges_share_no_byte():
    assert not Extent(0, 4).overlaps(Extent(4, 4))
    assert not Extent(4, 4).overlaps(Extent(0, 4))
    assert Extent(0, 5).overlaps(Extent(4, 4))


def test_a_range_contains_itself_but_none_that_sticks_out():
    assert Extent(4, 4).contains(Extent(4, 4))
    assert not Extent(4, 4).contains(Extent(3, 4))
    assert not Extent(4, 4).contains(Extent(5, 4))


def test_overlapping_names_the_first_in_the_order_given():
    assert overlapping(Extent(0, 10), [Extent(20, 1), Extent(9, 1), Extent(0, 1)]) == Extent(9, 1)
    assert overlapping(Extent(0, 10), [Extent(10, 1)]) is None
    assert overlapping(Extent(0, 10), []) is None


def test_subtract_leaves_the_gaps_in_order():
    assert subtract(Extent(10, 20), [Extent(15, 2), Extent(0, 12), Extent(12, 1)]) == (Extent(13, 2), Extent(17, 13))
    assert subtract(Extent(10, 20), [Extent(25, 5), Extent(30, 99)]) == (Extent(10, 15),)
    assert subtract(Extent(10, 20), [Extent(0, 99)]) == ()
    assert subtract(Extent(10, 20), []) == (Extent(10, 20),)


def test_merge_joins_what_touches():
    assert merge([Extent(8, 4), Extent(0, 4), Extent(4, 4), Extent(20, 1)]) == (Extent(0, 12), Extent(20, 1))
    assert merge([Extent(0, 10), Extent(2, 2)]) == (Extent(0, 10),)
    assert merge([]) == ()


@given(extents, extents)
def test_overlaps_and_contains_agree_with_the_bytes(one, other):
    assert one.overlaps(other) == other.overlaps(one) == bool(members(one) & members(other))
    assert one.contains(other) == (members(other) <= members(one))


@given(extents, st.lists(extents, max_size=6))
def test_overlapping_agrees_with_the_bytes(extent, others):
    found = overlapping(extent, others)
    sharing = [other for other in others if members(extent) & members(other)]
    assert found == (sharing[0] if sharing else None)


@given(extents, st.lists(extents, max_size=6))
def test_subtract_leaves_just_the_untaken_bytes(extent, taken):
    left = subtract(extent, taken)
    assert members(*left) == members(extent) - members(*taken)
    assert all(one.end < other.offset for one, other in pairwise(left))


@given(st.lists(extents, max_size=8))
def test_merge_keeps_the_bytes_in_the_fewest_ranges(ranges):
    merged = merge(ranges)
    assert members(*merged) == members(*ranges)
    assert all(one.end < other.offset for one, other in pairwise(merged))
