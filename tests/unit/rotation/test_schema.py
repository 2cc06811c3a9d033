# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/spec/token.schema.json says of tokens what the code says."""

import json
from dataclasses import replace

import pytest

from luksrotd.errors import FormatError
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.metadata import Token
from luksrotd.rotation import token as tokens
from luksrotd.rotation.token import BackupToken, Group, KeyState
from tests.support import forge
from tests.support.schema import TOKEN_SCHEMA, Schema

SCHEMA = Schema.of_tokens()
FULL = BackupToken(
    id=7,
    keyslots=(31,),
    name="spare.key-1_x",
    generation=tokens.GENERATION_MAX,
    state=KeyState.STAGED,
    rotated_at="2026-03-04T05:06:07Z",
    data={"any": ["thing"]},
    wipe=(Extent(0, 4096), Extent(2**63, 4096)),
    fingerprint="sha256:" + "0a" * 32,
    expires_at="2026-04-03T05:06:07Z",
    retires=(0, 31),
    group=Group("rack-4", tokens.GROUP_MAX),
    adopted={"type": "systemd-recovery", "keyslots": ["3"]},
    extra={"x-unknown": 1},
)
KEY = tokens.body(FULL)
RECORD = tokens.record(FULL.wipe)


@pytest.mark.parametrize(
    "token",
    [
        FULL,
        *(replace(FULL, state=state) for state in KeyState),
        replace(FULL, keyslots=(), retires=(), adopted={}, wipe=(), fingerprint=None, expires_at="", group=None),
    ],
)
def test_what_we_write_is_as_the_schema_says(token):
    assert SCHEMA.faults(json.loads(json.dumps(tokens.body(token)))) == []


def test_so_is_a_wipe_record():
    assert SCHEMA.faults(RECORD) == []
    assert SCHEMA.faults(tokens.record([Extent(4096, 4096)] * tokens.WIPE_MAX)) == []


@pytest.mark.parametrize("member", ["name", "generation", "data"])
def test_what_must_be_there(member):
    without = {name: value for name, value in KEY.items() if name != member}
    assert SCHEMA.faults(without) != []


@pytest.mark.parametrize("member", sorted(set(KEY) - {"type", "keyslots", "name", "generation", "data"}))
def test_what_need_not_be_there(member):
    without = {name: value for name, value in KEY.items() if name != member}
    assert SCHEMA.faults(without) == []


#: Refused by the code and by the schema.
WRONG = [
    {"version": 2},
    {"version": True},
    {"name": "-x"},
    {"name": "x" * 65},
    {"name": 1},
    {"generation": 0},
    {"generation": tokens.GENERATION_MAX + 1},
    {"generation": True},
    {"generation": "1"},
    {"state": "x"},
    {"state": None},
    {"rotated_at": 1},
    {"data": []},
    {"fingerprint": 1},
    {"expires_at": 1},
    {"group": "rack-4"},
    {"group": {"id": "rack-4"}},
    {"group": {"id": "a b", "size": 1}},
    {"group": {"id": "rack-4", "size": 0}},
    {"group": {"id": "rack-4", "size": tokens.GROUP_MAX + 1}},
    {"retires": "0"},
    {"retires": [0]},
    {"retires": ["32"]},
    {"retires": ["00"]},
    {"adopted": []},
    {"wipe": {}},
    {"wipe": [4096]},
    {"wipe": [{"offset": "4096"}]},
    {"wipe": [{"offset": 4096, "size": "4096"}]},
    {"wipe": [{"offset": "-1", "size": "4096"}]},
    {"wipe": [{"offset": "4096", "size": "0"}]},
    {"wipe": forge.intent(Extent(4096, 4096)) * (tokens.WIPE_MAX + 1)},
]


@pytest.mark.parametrize("members", WRONG)
def test_what_the_code_refuses_the_schema_refuses(members):
    raw = KEY | members
    with pytest.raises(FormatError):
        tokens.parse(Token(7, "luksrotd", (3,), raw))
    assert SCHEMA.faults(raw) != []


@pytest.mark.parametrize(
    "members",
    [
        {"keyslots": ["0", "1"]},
        {"keyslots": [1]},
        {"keyslots": ["01"]},
        {"fingerprint": "sha256:x"},
        {"rotated_at": "today"},
        {"expires_at": "2026-04-03T05:06:07+01:00"},
        {"type": "luksrotd-wipe"},
        {"type": "x"},
    ],
)
def test_what_the_code_reads_and_never_writes(members):
    assert SCHEMA.faults(KEY | members) != []


@pytest.mark.parametrize(
    "members", [{"keyslots": ["1"]}, {"wipe": []}, {"version": 2}, {"wipe": [{"offset": "0", "size": "0"}]}]
)
def test_wipe_records_that_are_none(members):
    assert SCHEMA.faults(RECORD | members) != []
    record = RECORD | members
    with pytest.raises(FormatError):
        tokens.parse_record(Token(7, "luksrotd-wipe", tuple(map(int, record["keyslots"])), record))


def test_the_schema_knows_every_member():
    key = json.loads(TOKEN_SCHEMA.read_text())["$defs"]["key"]
    assert set(key["properties"]) == set(tokens.MEMBERS)
