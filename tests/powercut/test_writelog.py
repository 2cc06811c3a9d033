# SPDX-License-Identifier: GPL-2.0-or-later
"""The log of a disk's writes."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.powercut.writelog import DISCARD, MAGIC, MARK, Request, parse, serialise
from tests.support.simdisk import Write

SECTOR = 512


def entry(sector: int, sectors: int, flags: int, data: bytes = b"") -> bytes:
    return struct.pack("<QQQQ", sector, sectors, flags, 0).ljust(SECTOR, b"\0") + data


def log(count: int, *entries: bytes, magic: int = MAGIC, version: int = 1) -> bytes:
    return struct.pack("<QQQI", magic, version, count, SECTOR).ljust(SECTOR, b"\0") + b"".join(entries)


@given(
    st.lists(
        st.builds(
            lambda sector, count, flush, fua: Request(Write(sector * SECTOR, b"x" * SECTOR * count), flush, fua),
            st.integers(0, 100),
            st.integers(1, 4),
            st.booleans(),
            st.booleans(),
        )
        | st.just(Request(flush=True))
    )
)
def test_what_is_written_is_read(requests: list[Request]) -> None:
    assert parse(serialise(requests)) == requests


def test_discards_and_marks_are_no_writes() -> None:
    written = entry(3, 1, 0, b"x" * SECTOR)
    found = parse(log(4, entry(0, 8, DISCARD), entry(0, 0, MARK), written, entry(0, 0, 0)))
    assert found == [Request(Write(3 * SECTOR, b"x" * SECTOR))]


def test_only_as_many_entries_as_the_super_block_says_count() -> None:
    assert parse(log(1, entry(0, 1, 0, b"x" * SECTOR), entry(1, 1, 0, b"y" * SECTOR)))[0].write is not None
    assert len(parse(log(1, entry(0, 1, 0, b"x" * SECTOR), entry(1, 1, 0, b"y" * SECTOR)))) == 1


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no super block"),
        (log(0, magic=1), "no write log"),
        (log(0, version=2), "no write log"),
        (log(1), "ends before its entry 0 of 1"),
        (log(1, entry(0, 2, 0, b"x" * SECTOR)), "ends in its entry 0 of 1"),
    ],
)
def test_what_is_no_log_is_refused(content: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse(content)
