# SPDX-License-Identifier: GPL-2.0-or-later
import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luksrotd.errors import FormatError
from luksrotd.rotation import inventory
from luksrotd.rotation.inventory import Entry, Inventory
from tests.support import forge
from tests.support.simengine import make_volume

FIRST = datetime(2026, 1, 1, tzinfo=UTC)
LATER = FIRST + timedelta(days=9)
TWO = make_volume([b"one", b"two"])
THREE = make_volume([b"one", b"two", b"three"])


def take(image: bytes, now: datetime = FIRST, before: Inventory | None = None) -> Inventory:
    return inventory.take(forge.view_of(image), now, before)


def suspects(image: bytes, before: Inventory | None) -> list[int]:
    seen = forge.view_of(image)
    return [entry.keyslot for entry in inventory.suspects(seen, inventory.take(seen, LATER, before))]


def foreign(image: bytes, keyslot: int, kind: str = "x-other") -> bytes:
    return forge.edited(image, lambda raw: raw["tokens"].update({"8": {"type": kind, "keyslots": [str(keyslot)]}}))


def unclaimed(image: bytes) -> bytes:
    return forge.edited(image, lambda raw: raw["tokens"].pop("8"))


def test_the_first_time_everything_is_known():
    found = take(THREE)
    assert [(entry.keyslot, entry.first_seen, entry.known) for entry in found.entries] == [
        (number, FIRST, True) for number in range(3)
    ]
    assert suspects(THREE, None) == []


def test_a_keyslot_that_comes_without_a_token_is_a_suspect():
    assert suspects(THREE, take(TWO)) == [2]
    assert suspects(TWO, take(TWO)) == []


def test_one_that_comes_with_a_token_is_none_until_it_loses_the_token():
    claimed = foreign(THREE, 2)
    assert suspects(claimed, take(TWO)) == []
    before = take(claimed, LATER, take(TWO))
    assert suspects(claimed, before) == []
    assert suspects(THREE, before) == [2]
    (entry,) = inventory.suspects(forge.view_of(THREE), take(THREE, LATER, before))
    assert (entry.claimed, entry.first_seen) == ("x-other", LATER)


def test_one_that_had_a_token_the_first_time_is_a_suspect_when_it_loses_it():
    assert suspects(unclaimed(foreign(TWO, 1)), take(foreign(TWO, 1))) == [1]


def test_an_ordinary_one_that_was_adopted_and_released_is_known():
    before = take(foreign(TWO, 1), LATER, take(TWO))
    assert suspects(TWO, before) == []


def test_another_passphrase_in_a_keyslot_makes_it_another_one():
    salted = forge.edited(TWO, lambda raw: raw["keyslots"]["1"]["kdf"].update(salt="b3RoZXI="))
    assert suspects(salted, take(TWO)) == [1]


def test_a_keyslot_without_a_salt_is_one_too():
    bare = forge.edited(TWO, lambda raw: raw["keyslots"]["1"].pop("kdf") and raw["keyslots"]["1"].update(type="x"))
    assert suspects(bare, take(TWO)) == [1]


def test_suspects_stay_until_they_are_accepted_or_gone_and_keep_their_time():
    before = take(THREE, FIRST, take(TWO))
    for days in (1, 2):
        before = take(THREE, FIRST + timedelta(days=days), before)
        assert suspects(THREE, before) == [2]
        assert {entry.first_seen for entry in before.entries} == {FIRST}
    known = inventory.accepted(before, 2)
    assert suspects(THREE, known) == []
    assert suspects(THREE, take(THREE, LATER, known)) == []
    assert [entry.keyslot for entry in take(TWO, LATER, before).entries] == [0, 1]


def test_accepting_what_is_not_there_changes_nothing():
    assert inventory.accepted(take(TWO), 7) == take(TWO)


def test_it_survives_being_written():
    before = take(foreign(THREE, 2), FIRST, take(TWO))
    assert inventory.parse(inventory.serialise(before)) == before


def test_the_type_of_a_token_cannot_fill_it():
    found = take(foreign(TWO, 1, "x" * 500))
    assert found.entries[1].claimed == "x" * 64


ENTRY = {"keyslot": 0, "salt": "sha256:x", "first_seen": "2026-01-01T00:00:00Z", "claimed": None, "known": True}


def document(*entries: object, **members: object) -> bytes:
    return json.dumps({"version": 1, "keyslots": list(entries)} | members).encode()


def test_what_is_right_is_read():
    assert inventory.parse(document(ENTRY)) == Inventory((Entry(0, "sha256:x", FIRST, None, known=True),))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe\xff",
        b"[" * 100000,
        b" " * (inventory.SIZE_MAX + 1) + document(ENTRY),
        document(ENTRY, version=2),
        document(ENTRY, keyslots=None),
        document(ENTRY, ENTRY),
        document("x"),
        document(None),
        document({}),
        *(
            document(ENTRY | {member: value})
            for member, value in (
                ("keyslot", -1),
                ("keyslot", True),
                ("keyslot", "0"),
                ("salt", None),
                ("first_seen", "yesterday"),
                ("first_seen", 7),
                ("claimed", 7),
                ("known", 1),
            )
        ),
    ],
    ids=range(20),
)
def test_anything_else_is_not_ours(text):
    with pytest.raises(FormatError, match="cannot read the inventory"):
        inventory.parse(text)


@given(st.binary(max_size=200))
def test_no_bytes_do_harm(text):
    with pytest.raises(FormatError):
        inventory.parse(text)
