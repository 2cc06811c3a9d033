# SPDX-License-Identifier: GPL-2.0-or-later
"""What the options of the verbs mean, and what results look like on the bus."""

from datetime import timedelta

import pytest
from dbus_next.signature import Variant

from luksrotd.bus import options as known
from luksrotd.bus.convert import key_name
from luksrotd.bus.results import difference_row, keys_property, result_property, set_status
from luksrotd.config import Config, KeyDerivation, Staged
from luksrotd.errors import DeviceError, InvalidRequest, Outcome
from luksrotd.ports import DeviceRef
from luksrotd.rotation import sets
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import NEW, PBKDF_FOR_RANDOM_KEYS, UNLOCK, VOLUME_KEY, Pbkdf
from luksrotd.rotation.preview import Difference
from luksrotd.rotation.sets import SetState
from luksrotd.rotation.token import Group
from luksrotd.service.jobs import Kind
from luksrotd.service.scrub import Scrubbed
from luksrotd.service.setwork import Happened, MemberResult, SetResult
from luksrotd.service.transaction import Committed
from luksrotd.service.volume import KeyChange
from tests.support import forge
from tests.support.simengine import UUID, make_volume

PATH = "/org/luksrotd1/device/" + UUID.replace("-", "_")


def wanted(options=None, config=None, **more):
    return known.wanted("backup", options or {}, config or Config(), **more)


# -- key derivation ----------------------------------------------------------------------------------------------

CONFIGURED = KeyDerivation("argon2i", iterations=7, memory_kib=65536, parallel=2)


@pytest.mark.parametrize(
    ("options", "configured", "expected"),
    [
        ({}, KeyDerivation(), Pbkdf()),
        ({}, KeyDerivation(memory_kib=65536), Pbkdf(memory_kib=65536)),
        ({}, CONFIGURED, Pbkdf("argon2i", None, 7, 65536, 2)),
        ({}, KeyDerivation("pbkdf2", iterations=2000), Pbkdf("pbkdf2", iterations=2000)),
        ({"pbkdf-memory": 1024}, CONFIGURED, Pbkdf("argon2i", None, 7, 1024, 2)),
        ({"pbkdf": "argon2i", "pbkdf-parallel": 1}, CONFIGURED, Pbkdf("argon2i", None, 7, 65536, 1)),
        # What is configured is for another function.
        ({"pbkdf": "argon2id"}, CONFIGURED, Pbkdf("argon2id")),
        ({"pbkdf": "pbkdf2", "pbkdf-force-iterations": 1000}, CONFIGURED, Pbkdf("pbkdf2", iterations=1000)),
        ({"pbkdf": "pbkdf2"}, KeyDerivation(memory_kib=65536), Pbkdf("pbkdf2")),
    ],
)
def test_what_the_caller_does_not_say_is_as_configured(options, configured, expected):
    assert known.key_derivation(options, configured) == expected
    assert wanted(options, Config(key_derivation=configured)).pbkdf == expected


def test_a_generated_key_needs_no_slow_derivation_unless_the_caller_wants_one():
    config = Config(key_derivation=CONFIGURED)
    assert wanted({}, config, generated=True).pbkdf == PBKDF_FOR_RANDOM_KEYS
    assert wanted({"pbkdf": "argon2id"}, config, generated=True).pbkdf == Pbkdf("argon2id")


@pytest.mark.parametrize("options", [{"pbkdf": "md5"}, {"pbkdf-memory": 1}, {"pbkdf": "pbkdf2", "pbkdf-parallel": 1}])
def test_a_derivation_that_there_is_not(options):
    with pytest.raises(InvalidRequest):
        wanted(options)


# -- the others --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "configured", "expected"),
    [
        ({}, Staged(), timedelta(days=30)),
        ({}, Staged(expires_seconds=60), timedelta(seconds=60)),
        ({}, Staged(expires_seconds=None), None),
        ({"expires": 5}, Staged(), timedelta(seconds=5)),
        ({"expires": 0}, Staged(), None),
        ({"expires": known.EXPIRES_MAX}, Staged(), timedelta(days=36500)),
    ],
)
def test_when_a_staged_key_expires(options, configured, expected):
    assert wanted(options, Config(staged=configured)).expires_after == expected


def test_what_is_too_long():
    for options in ({"expires": known.EXPIRES_MAX + 1}, {"expires": 2**64 - 1}, {"data": " " * known.DATA_MAX + "{}"}):
        with pytest.raises(InvalidRequest):
            wanted(options)
    assert wanted({"data": '{"a": 1}'}).data == {"a": 1}


def test_the_numbers_and_names():
    options = {"key-generation": 3, "if-generation": 2**63, "keyslot": 7, "group": "x", "keep": True}
    found = wanted(options)
    assert (found.key_generation, found.only_at, found.keyslot, found.group, found.keep) == (3, 2**63, 7, "x", True)
    for group in ("x" * 65, "a b", "\n"):
        with pytest.raises(InvalidRequest):
            wanted({"group": group})
    for name in ("x" * 65, "a b", "ä", "-"):
        with pytest.raises(InvalidRequest):
            key_name(name)
    assert (key_name(""), key_name("a.b-c_9")) == ("backup", "a.b-c_9")
    found = wanted({"group": ""})
    assert (found.key_generation, found.only_at, found.group, found.data, found.keep) == (None, None, None, None, False)


@pytest.mark.parametrize(
    ("verb", "name", "options"),
    [
        ("recreate", "", {}),
        ("scrub", "", {}),
        ("", "", {}),
        ("ENROLL", "", {}),
        ("set-data", "", {}),
        ("adopt", "", {"data": "{}"}),
        ("finish", "", {"data": "{}"}),
        ("rotate", "", {"keyslot": 1}),
        ("reconcile", "backup", {}),
        ("reconcile", "", {"pbkdf": "argon2i"}),
        ("enroll", "", {"data": "["}),
    ],
)
def test_what_cannot_be_planned(verb, name, options):
    with pytest.raises(InvalidRequest):
        known.planned(verb, name, options, Config())


def test_what_can_be_planned():
    assert {kind.value for kind in known.PLANNED} == {
        "enroll", "rotate", "stage", "finish", "abort", "set-data", "remove", "adopt", "release", "reconcile",
    }  # fmt: skip
    kind, found = known.planned("adopt", "", {"keyslot": 4}, Config())
    assert (kind, found.keyslot, found.name) == (Kind.ADOPT, 4, "backup")


def test_the_secrets_of_a_recreation():
    key, new = {"keyfile": "/a"}, {"generate": True}
    assert known.recreation(key, {}, {}) == {UNLOCK: key}
    assert known.recreation(key, new, {"volume-key": False, "pbkdf": "argon2id"}) == {UNLOCK: key, NEW: new}
    assert known.recreation(key, new, {"volume-key": True}) == {VOLUME_KEY: key, NEW: new}
    with pytest.raises(InvalidRequest):
        known.recreation({"token": 3}, new, {"volume-key": True})
    assert known.recreation({"token": 3}, new, {}) == {UNLOCK: {"token": 3}, NEW: new}
    for options in ({"volume-key": True}, {"pbkdf": "argon2id"}, {"pbkdf-memory": 64}):
        with pytest.raises(InvalidRequest):
            known.recreation(key, {}, options)


# -- results -----------------------------------------------------------------------------------------------------


def plain(value):
    """Values with their signatures."""
    if isinstance(value, Variant):
        return value.signature, plain(value.value)
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def test_results():
    change = KeyChange(UUID, "backup", 0, None, 7, 9)
    changed = {"generation": ("u", 0), "keyslot": ("i", -1), "seqid-before": ("t", 7), "seqid-after": ("t", 9)}
    assert plain(result_property(change)) == {"name": ("s", "backup"), **changed}
    assert plain(result_property(Scrubbed(4096, UUID, 7))) == {"bytes": ("t", 4096)}
    assert plain(result_property(Committed(UUID, Change(), 7, 9))) == {
        "seqid-before": ("t", 7),
        "seqid-after": ("t", 9),
    }
    assert result_property(None) == {}
    ref = DeviceRef("/dev/x", uuid=UUID)
    error = DeviceError("cannot write", outcome=Outcome.UNKNOWN)
    members = (MemberResult(ref, Happened.UNDONE, change), MemberResult(ref, Happened.FAILED, error=error))
    described = plain(result_property(SetResult("backup", Group("g", 2), None, members)))
    signature, shown = described.pop("members")
    assert described == {
        "name": ("s", "backup"),
        "group": ("s", "g"),
        "group-size": ("u", 2),
        "state": ("s", ""),
    }
    assert signature == "aa{sv}"
    none = {"error": ("s", ""), "message": ("s", ""), "outcome": ("s", "")}
    failed = {
        "error": ("s", "org.luksrotd1.Error.DeviceFailed"),
        "message": ("s", "cannot write"),
        "outcome": ("s", "unknown-reconcile-needed"),
    }
    device = {"device": ("o", PATH)}
    assert shown == [
        {**device, "happened": ("s", "undone"), **none, **changed},
        {**device, "happened": ("s", "failed"), **failed},
    ]
    described = plain(result_property(SetResult("backup", Group("g", 2), SetState.STAGED, ())))
    assert described["state"] == ("s", "staged")


def test_keys():
    assert keys_property(None) == []
    image = forge.with_token(make_volume([b"a", b"b"]), 0, 3, adopted={}, wipe=[])
    group = {"id": "g", "size": 4}
    expires = "2026-01-01T00:00:00Z"
    image = forge.with_token(image, 1, 4, name="other", state="staged", expires_at=expires, group=group)
    shown = plain(keys_property(forge.view_of(image)))
    common = {"generation": ("u", 1), "rotated-at": ("s", "2026-01-02T03:04:05Z")}
    common |= {"wipe-pending": ("b", False), "changed": ("b", False)}
    assert shown == [
        {
            "token": ("u", 3),
            **common,
            "name": ("s", "backup"),
            "state": ("s", "active"),
            "keyslot": ("i", 0),
            "expires-at": ("s", ""),
            "group": ("s", ""),
            "group-size": ("u", 0),
            "adopted": ("b", True),
        },
        {
            "token": ("u", 4),
            **common,
            "name": ("s", "other"),
            "state": ("s", "staged"),
            "keyslot": ("i", 1),
            "expires-at": ("s", expires),
            "group": ("s", "g"),
            "group-size": ("u", 4),
            "adopted": ("b", False),
        },
    ]


def test_where_a_set_stands():
    volumes = [make_volume([b"a"], uuid=UUID), make_volume([b"a"], uuid="11111111-2222-4333-8444-555555555555")]
    staged = forge.with_token(volumes[0], 0, state="active")
    found = sets.status([forge.view_of(staged), forge.view_of(volumes[1])], "backup")
    status, members = plain(set_status(found))
    assert status["state"] == ("s", "mixed")
    assert (status["group"], status["group-size"], status["steps"]) == (("s", ""), ("u", 0), ("as", []))
    assert "no managed key" in status["why"][1]
    assert members[0] == {
        "device": ("o", PATH),
        "uuid": ("s", UUID),
        "standing": ("s", "old"),
        "generation": ("u", 1),
        "keyslot": ("i", 0),
        "why": ("s", ""),
    }
    assert (members[1]["standing"], members[1]["keyslot"]) == (("s", "other"), ("i", -1))
    status, _ = plain(set_status(sets.status([forge.view_of(staged)], "backup")))
    assert status["steps"] == ("as", ["stage"])


def test_differences():
    row = difference_row(Difference("token", "3", "change", {}, {"n": 1, "m": -1, "b": True, "s": "x", "l": [1, 2]}))
    assert plain(row) == [
        "token", "3", "change", {},
        {"n": ("t", 1), "m": ("x", -1), "b": ("b", True), "s": ("s", "x"), "l": ("at", [1, 2])},
    ]  # fmt: skip
    # What drafts have beside that: any JSON.
    row = difference_row(Difference("token", "3", "add", {}, {"o": {"x": [1]}, "l": [1, -1], "n": 2**64}))
    assert plain(row[4]) == {"o": ("s", '{"x": [1]}'), "l": ("s", "[1, -1]"), "n": ("s", str(2**64))}
