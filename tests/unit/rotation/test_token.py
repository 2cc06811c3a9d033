# SPDX-License-Identifier: GPL-2.0-or-later
import json
from dataclasses import replace

import pytest

from luksrotd.errors import FormatError, InvalidRequest
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.metadata import Token
from luksrotd.rotation import token as tokens
from luksrotd.rotation.token import BackupToken, KeyState
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


FULL = BackupToken(
    id=7,
    keyslots=(3,),
    name="spare",
    generation=4,
    state=KeyState.STAGED,
    rotated_at="2026-03-04T05:06:07Z",
    data={"a": [1]},
    wipe=(Extent(4096, 8192), Extent(65536, 4096)),
    fingerprint="sha256:" + "0" * 64,
    expires_at="2026-04-03T05:06:07Z",
    retires=(0, 31),
    group=tokens.Group("rack-4", 3),
    adopted={"type": "systemd-recovery", "keyslots": ["3"]},
    extra={"x-unknown": 1},
)
FIRST = BackupToken(7, (3,), "backup", 1, KeyState.ACTIVE, "2026-03-04T05:06:07Z", {})


@pytest.mark.parametrize("token", [FULL, FIRST, replace(FULL, retires=(), adopted={}), replace(FIRST, keyslots=())])
def test_body_and_parse_are_inverse(token):
    raw = tokens.body(token)
    assert tokens.parse(Token(7, "luksrotd", token.keyslots, raw)) == token
    assert json.loads(json.dumps(raw)) == raw


def test_a_body_leaves_out_what_has_its_default():
    assert tokens.body(FIRST).keys() == {
        "type", "keyslots", "version", "name", "generation", "state", "rotated_at", "data",
    }  # fmt: skip
    assert tokens.body(FULL).keys() == {*tokens.MEMBERS, "x-unknown"}


def test_the_intent_is_set_and_cleared_and_everything_else_is_kept():
    raw = tokens.body(FULL)
    cleared = tokens.with_intent(raw, ())
    assert cleared == {name: value for name, value in raw.items() if name != "wipe"}
    assert tokens.with_intent(cleared, FULL.wipe) == raw
    assert tokens.with_intent(raw, FULL.wipe[:1])["wipe"] == forge.intent(FULL.wipe[0])


def test_a_time_is_read_as_it_was_written():
    assert tokens.moment(tokens.utc(NOW)) == NOW
    assert tokens.moment("") is tokens.moment("2026-03-04") is None
    assert tokens.moment("2026-02-30T12:00:00Z") is tokens.moment("2026-3-4T12:00:00Z") is None


# ---- the wipe record


def record(keyslots: tuple[int, ...] = (), **members: object) -> tokens.WipeRecord:
    return tokens.parse_record(Token(5, "luksrotd-wipe", keyslots, tokens.record(FULL.wipe) | members))


def test_a_wipe_record_is_read_as_it_was_written():
    assert record() == tokens.WipeRecord(5, FULL.wipe)
    assert tokens.record(FULL.wipe).keys() == {"type", "keyslots", "version", "wipe"}


@pytest.mark.parametrize(
    ("keyslots", "members", "message"),
    [
        ((1,), {}, "names a keyslot"),
        ((), {"wipe": []}, "names no range"),
        ((), {"version": 2}, "schema version '2'"),
        ((), {"wipe": [1]}, "not an object"),
    ],
)
def test_a_malformed_wipe_record_is_refused(keyslots, members, message):
    with pytest.raises(FormatError, match=message) as caught:
        record(keyslots, **members)
    assert "token 5" in caught.value.message


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
        ({"expires_at": 1}, "expires_at"),
        ({"group": []}, "group"),
        ({"retires": "0"}, "retires is not"),
        ({"retires": [0]}, "retires is not"),
        ({"retires": ["00"]}, "retires is not"),
        ({"retires": ["32"]}, "retires is not"),
        ({"adopted": []}, "adopted"),
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
