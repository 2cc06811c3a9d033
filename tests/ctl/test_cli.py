# SPDX-License-Identifier: GPL-2.0-or-later
"""The parser of one verb, which is made without the others."""

import os

import pytest

from luksrotd.ctl import arguments, cli, verbs
from luksrotd.errors import InvalidRequest
from tests.ctl.test_interface import VERBS, verbs_of


@pytest.mark.parametrize("verb", verbs.NAMES)
def test_it_is_as_in_the_parser_of_all(verb):
    alone = dict(verbs_of(cli.build_parser(verb)))
    assert set(alone) == set(verbs.NAMES)
    assert alone[verb].format_help() == VERBS[verb].format_help()


@pytest.mark.parametrize("verb", ["", "stage", "header", "nonsense"])
def test_for_all_else_there_are_all(verb):
    assert set(dict(verbs_of(cli.build_parser(verb)))) == set(VERBS)


@pytest.mark.parametrize(
    ("words", "verb"),
    [
        (["--direct", "--json", "rotate", "--help"], "rotate"),
        (["list", "show"], "list"),
        (["--help", "rotate"], "--help"),
        (["--version"], "--version"),
        (["--json"], ""),
        ([], ""),
    ],
)
def test_the_verb_is_the_first_word_behind_the_options_of_all_verbs(words, verb):
    assert cli._verb(words) == verb


def test_a_wrong_verb_is_told_which_there_are():
    with pytest.raises(InvalidRequest, match=r"rotate.*header"):
        cli.parse(["rotated"])


@pytest.mark.parametrize(("columns", "width"), [("60", 58), ("200", 198), ("wide", 78), ("0", 78), (None, 78)])
def test_help_is_as_wide_as_the_terminal(columns, width, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert width_of_help() == width


@pytest.mark.parametrize(("columns", "width"), [(100, 98), (0, 78)])
def test_a_serial_console_may_say_that_it_has_no_columns(columns, width, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((columns, 0)))
    assert width_of_help() == width


def width_of_help():
    arguments._width.cache_clear()
    try:
        return arguments._formatter("luksrotctl")._width
    finally:
        arguments._width.cache_clear()
