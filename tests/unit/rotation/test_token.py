# SPDX-License-Identifier: GPL-2.0-or-later
import pytest

from luksrotd.errors import FormatError, InvalidRequest
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.metadata import Token
from luksrotd.rotation import token as tokens
from luksrotd.rotation.token import KeyState
from tests.support import forge
from tests.support.planning import NOW

MINIMAL = {"type": "luksrotd", "keyslots": ["3"], "name": "backup", "generation": 1, "data": {}}


def parse(**members: object) -> tokens.BackupToken:
    raw = {name: value for name, value in (MINIMAL | members).items() if value is not ...}
    return tokens.parse(Token(7, "luksrotd", (3,), raw))


def test_what_is_not_there_has_its_default():
    found = parse()
    assert (found.id, found.keyslots, found.state, found.rotated_at) == (7, (3,), KeyState.ACTIVE, "")
    assert (found.wipe, found.fingerprint, found.extra) == ((), None, {})


def test_body_and_parse_are_inverse():
    wipe = (Extent(4096, 8192), Extent(65536, 4096))
    raw = tokens.body("spare", 4, 3, {"a": [1]}, NOW, wipe, {"x-unknown": 1})
    found = tokens.parse(Token(7, "luksrotd", (3,), raw))
    assert (found.name, found.generation, found.data, found.wipe) == ("spare", 4, {"a": [1]}, wipe)
    assert (found.state, found.rotated_at, found.extra) == (KeyState.ACTIVE, "2026-03-04T05:06:07Z", {"x-unknown": 1})
    assert raw["keyslots"] == ["3"]


def test_a_body_without_ranges_has_no_intent():
    assert "wipe" not in tokens.body("backup", 1, 0, {}, NOW)


def test_clearing_the_intent_keeps_everything_else():
    raw = tokens.body("backup", 2, 0, {"a": 1}, NOW, [Extent(4096, 4096)], {"x-unknown": 1})
    assert tokens.without_intent(raw) == {name: value for name, value in raw.items() if name != "wipe"}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"version": 2}, "schema version '2' is not 1"),
        ({"version": True}, "schema version"),
        ({"version": 1.0}, "schema version"),
        ({"version": ["x" * 10_000]}, "schema version"),
        ({"name": ...}, "name"),
        ({"name": 1}, "name"),
        ({"name": "-x"}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"name": "x\n"}, "name"),
        ({"generation": ...}, "generation"),
        ({"generation": 0}, "generation"),
        ({"generation": True}, "generation"),
        ({"generation": 2**31}, "generation"),
        ({"data": ...}, "associated data"),
        ({"data": []}, "associated data"),
        ({"state": "x"}, "state 'x' is unknown"),
        ({"state": []}, "state"),
        ({"state": {}}, "state"),
        ({"state": None}, "state"),
        ({"rotated_at": 1}, "rotated_at"),
        ({"fingerprint": 1}, "fingerprint"),
        ({"wipe": {}}, "not an array"),
        ({"wipe": forge.intent(Extent(4096, 4096)) * 33}, "not an array of at most 32"),
        ({"wipe": [4096]}, "not an object"),
        ({"wipe": [{}]}, "'offset' is missing"),
        ({"wipe": [{"offset": 4096, "size": "4096"}]}, "'offset' is missing"),
        ({"wipe": [{"offset": "4096"}]}, "'size' is missing"),
        ({"wipe": [{"offset": "-4096", "size": "4096"}]}, "'offset' is missing"),
        ({"wipe": [{"offset": "1_000", "size": "4096"}]}, "'offset' is missing"),
        ({"wipe": [{"offset": float("inf"), "size": "1"}]}, "'offset' is missing"),
        ({"wipe": [{"offset": "4096", "size": "0"}]}, "empty"),
        ({"wipe": [{"offset": str(2**64), "size": "1"}]}, "out of range"),
    ],
)
def test_a_malformed_token_is_refused_in_few_words(members, message):
    with pytest.raises(FormatError, match=message) as caught:
        parse(**members)
    assert "token 7" in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("name", ["backup", "A", "9", "a.b_c-d", "x" * 64])
def test_names(name):
    assert tokens.check_name(name) == name


@pytest.mark.parametrize("name", ["", ".x", "a b", "ä", "x" * 65, "x\n"])
def test_names_that_are_none(name):
    with pytest.raises(InvalidRequest):
        tokens.check_name(name)


def nested(levels: int) -> str:
    return '{"x":' * (levels - 1) + "{}" + "}" * (levels - 1)


def test_associated_data():
    assert tokens.parse_data('{"a":[1,2.5,"é",null,true],"n":18446744073709551615}')["a"] == [1, 2.5, "é", None, True]
    assert tokens.parse_data(nested(tokens.DATA_DEPTH_MAX))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"x":NaN}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        (nested(tokens.DATA_DEPTH_MAX + 1), "nested deeper"),
        ('{"x":18446744073709551616}', "64 bits"),
        ('{"x":1e999}', "double"),
        ('{"x":"\\u0000"}', "NUL"),
        ('{"\\ud800":1}', "lone surrogate"),
    ],
)
def test_associated_data_that_json_c_would_not_keep(text, message):
    with pytest.raises(InvalidRequest, match=message):
        tokens.parse_data(text)
