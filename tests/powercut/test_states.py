# SPDX-License-Identifier: GPL-2.0-or-later
"""Which states a recorded disk has after a power cut."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.powercut.states import SECTOR, TEARS, Part, Timeline, epochs_of, without_flushes
from tests.powercut.writelog import Request
from tests.support.simdisk import Write

HEADERS = Part("headers", 0, 32 * SECTOR, fragile=True)
STATE = Part("state", 32 * SECTOR, 32 * SECTOR)
ELSEWHERE = 80 * SECTOR
BASE = bytes(128 * SECTOR)
FLUSH = Request(flush=True)


def write(sector: int, *letters: bytes) -> Request:
    return Request(Write(sector * SECTOR, b"".join(letter * SECTOR for letter in letters)))


def timeline(*requests: Request) -> Timeline:
    parts = [HEADERS, STATE]
    return Timeline(BASE, epochs_of(requests, parts), parts)


def state(line: Timeline, name: str) -> bytes:
    """The first letters of the changed sectors; "." for one that is as it was."""
    image = line.image(line.cut(name))
    return bytes(image.read(n * SECTOR, 1)[0] or ord(".") for n in range(4))


def test_an_epoch_ends_with_a_flush_that_has_something_to_cover() -> None:
    line = timeline(FLUSH, write(0, b"a"), FLUSH, FLUSH, write(1, b"b"), write(40, b"c"))
    assert [len(epoch.writes) for epoch in line.epochs] == [1, 2]


def test_a_request_that_flushes_and_writes_flushes_first() -> None:
    line = timeline(write(0, b"a"), Request(Write(SECTOR, b"b" * SECTOR), flush=True))
    assert [[w.offset for w in epoch.writes] for epoch in line.epochs] == [[0], [SECTOR]]


def test_what_an_earlier_epoch_wrote_is_there() -> None:
    line = timeline(write(0, b"a"), FLUSH, write(1, b"b"), FLUSH)
    assert state(line, "e1.first0") == b"a..."
    assert state(line, "e0.first0") == b"...."


def test_prefixes_drops_and_single_survivors() -> None:
    line = timeline(write(0, b"a"), write(1, b"b"), write(2, b"c"))
    names = ("first0", "first1", "first3", "without0", "without1", "without2", "only0", "only2")
    found = [state(line, f"e0.{name}") for name in names]
    assert found == [b"....", b"a...", b"abc.", b".bc.", b"a.c.", b"ab..", b"a...", b"..c."]


def test_a_write_is_torn_with_those_before_it_there() -> None:
    line = timeline(write(0, b"a"), write(1, b"b", b"c"))
    assert state(line, "e0.torn1.head512") == b"ab.."
    assert state(line, "e0.torn1.tail512") == b"a.c."
    assert state(line, "e0.torn1.half") == b"ab.."
    assert state(line, "e0.torn1.odd") == b"a.c."


def test_a_torn_header_has_garbage_and_a_file_system_never() -> None:
    requests = [write(0, b"a"), write(33, b"b", b"b")]
    line = timeline(*requests)
    written = {bytes(SECTOR), b"a" * SECTOR, b"b" * SECTOR}
    headers, other = set(), set()
    for name in itertools.islice(line.names(1), 500):
        image = line.image(line.cut(name))
        headers.add(image.read(0, SECTOR))
        other |= {image.read(n * SECTOR, SECTOR) for n in (33, 34)}
    assert headers - written
    assert other <= written


def test_what_has_fua_and_came_before_what_is_there_is_there() -> None:
    durable = Request(Write(0, b"a" * SECTOR), fua=True)
    line = timeline(durable, write(1, b"b"), write(2, b"c"))
    assert state(line, "e0.only2") == b"a.c."
    assert state(line, "e0.without0") == b"abc."
    assert state(line, "e0.first0") == b"...."


def test_a_write_where_nobody_looks_makes_no_state() -> None:
    aside = Request(Write(ELSEWHERE, b"x" * SECTOR))
    quiet, busy = timeline(write(0, b"a"), FLUSH), timeline(aside, write(0, b"a"), aside, FLUSH, aside)
    found = [{state(line, name) for name in itertools.islice(line.names(1), 50)} for line in (quiet, busy)]
    assert found[0] == found[1]
    assert [len(epoch.others) for epoch in busy.epochs] == [2, 1]


def test_a_disk_that_ignores_flushes_has_one_epoch() -> None:
    line = timeline(write(0, b"a"), FLUSH, write(1, b"b"), FLUSH)
    ignoring = Timeline(BASE, without_flushes(line.epochs), line.parts)
    assert state(ignoring, "e0.only1") == b".b.."
    assert len([e for e in ignoring.epochs if e.writes]) == 1


def test_states_are_searched_around_headers() -> None:
    far = [request for n in range(20) for request in (write(40, bytes([65 + n])), FLUSH)]
    line = timeline(*far, write(0, b"a", b"a"), FLUSH)
    names = list(itertools.islice(line.names(1), 300))
    assert "e10.first1" in names
    assert not [name for name in names if name.startswith(("e3.", "e10.without", "e10.random"))]
    assert [name for name in names if name.startswith("e20.random")]
    assert {f"e20.torn0.{tear}" for tear in TEARS} <= set(names)


def test_a_disk_without_a_choice_has_no_random_states() -> None:
    line = timeline(write(40, b"a"), FLUSH)
    assert list(line.names(1)) == ["e0.first1"]


@pytest.mark.parametrize(
    "name", ["", "e0", "e9.first0", "e0.first9", "e0.only3", "e0.without3", "e0.torn9.half", "e0.torn0.x", "e0.random1"]
)
def test_a_name_that_no_state_has_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"state|writes|torn"):
        timeline(write(0, b"a"), write(1, b"b"), write(2, b"c")).cut(name)


requests = st.lists(
    st.one_of(
        st.just(FLUSH),
        st.builds(
            lambda sector, count, letter, fua: Request(
                Write(sector * SECTOR, bytes([letter]) * SECTOR * count), fua=fua
            ),
            st.integers(0, 60),
            st.integers(1, 20),
            st.integers(1, 255),
            st.booleans(),
        ),
    ),
    max_size=12,
)


@given(requests, st.integers(0, 1000))
def test_a_state_is_made_again_from_its_name(log: list[Request], seed: int) -> None:
    first, second = timeline(*log), timeline(*log)
    for name in itertools.islice(first.names(seed), 60):
        assert first.image(first.cut(name)).key == second.image(second.cut(name)).key


@given(requests, st.integers(0, 1000))
def test_each_sector_is_of_its_epoch_or_garbage_in_a_header(log: list[Request], seed: int) -> None:
    line = timeline(*log)
    for name in itertools.islice(line.names(seed), 60):
        cut = line.cut(name)
        image, start = line.image(cut), line.starts[cut.epoch]
        for number in range(64):
            known = [w.data[:1] for w in line.epochs[cut.epoch].writes if w.offset <= number * SECTOR < w.end]
            found = image.read(number * SECTOR, SECTOR)
            allowed = [start.read(number * SECTOR, SECTOR), *(letter * SECTOR for letter in known)]
            fragile = number * SECTOR < HEADERS.size + 20 * SECTOR  # a write may begin in one part and end in another
            assert found in allowed or (known and fragile)
