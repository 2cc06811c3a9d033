# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose change of a header it was."""

import pytest

from luksrotd.rotation import ledger
from luksrotd.rotation.ledger import ForeignChange, Ledger

U, V = "u", "v"


@pytest.fixture
def book():
    book = Ledger()
    assert book.saw(U, 5, "a", book.mark()) is None
    return book


def look(book, seqid, digest, uuid=U):
    return book.saw(uuid, seqid, digest, book.mark())


def test_the_first_look_and_one_at_the_same_header_are_no_news(book):
    assert look(book, 5, "a") is None
    assert look(book, 9, "x", V) is None


@pytest.mark.parametrize(("seqid", "direction"), [(6, "newer"), (5, "same"), (4, "older")])
def test_a_change_that_we_did_not_make(book, seqid, direction):
    change = look(book, seqid, "b")
    assert change == ForeignChange(5, seqid)
    assert change.direction == direction
    assert look(book, seqid, "b") is None


@pytest.mark.parametrize("seen", ["b", "c"])
def test_what_we_wrote_is_ours_at_every_step_of_it(book, seen):
    book.writing(U, "b", "c")
    assert look(book, 6, seen) is None


def test_another_volume_is_another_matter(book):
    book.writing(V, "b")
    assert look(book, 6, "b")


def test_what_is_written_while_it_is_looked_at(book):
    mark = book.mark()
    book.writing(U, "b", "c")
    assert book.saw(U, 5, "a", mark) is None  # read before
    mark = book.mark()
    book.writing(U, "d")
    assert book.saw(U, 8, "d", mark) is None  # read afterwards
    assert look(book, 8, "d") is None


def test_a_step_of_ours_that_was_seen_leaves_the_next_ones_ours(book):
    mark = book.mark()
    book.writing(U, "b", "c")
    assert book.saw(U, 6, "b", mark) is None
    assert look(book, 7, "c") is None


def test_a_foreign_change_does_not_make_ours_foreign(book):
    mark = book.mark()
    book.writing(U, "c")
    assert book.saw(U, 6, "b", mark) == ForeignChange(5, 6)
    assert look(book, 7, "c") is None


def test_what_we_wrote_once_comes_back_as_somebody_elses(book):
    book.writing(U, "b")
    assert look(book, 6, "b") is None
    book.writing(U, "c")
    assert look(book, 7, "c") is None
    assert look(book, 6, "b") == ForeignChange(7, 6)


def test_what_we_meant_to_write_before_is_nothing_any_more(book):
    book.writing(U, "b")
    assert look(book, 5, "a") is None
    assert look(book, 6, "b") == ForeignChange(5, 6)


def test_after_a_commit_that_failed_the_header_is_our_doing_once(book):
    book.writing(U, "b")
    book.doubt(U)
    assert look(book, 6, "torn") is None
    assert look(book, 7, "x") == ForeignChange(6, 7)


def test_it_does_not_grow(book, monkeypatch):
    monkeypatch.setattr(ledger, "WRITTEN_MAX", 2)
    monkeypatch.setattr(ledger, "SEEN_MAX", 2)
    book.writing(U, "b", "c", "d")
    assert look(book, 6, "b") == ForeignChange(5, 6)
    look(book, 1, "x", V)
    look(book, 6, "b")
    look(book, 1, "y", "w")  # V was looked at longest ago
    assert look(book, 2, "z", V) is None
    assert look(book, 2, "z", "w") == ForeignChange(1, 2)
