# SPDX-License-Identifier: GPL-2.0-or-later
"""What fuzzing (tests/fuzz) has found in the decisions, one test each."""

from dataclasses import replace

import pytest

from luksrotd.errors import ConsistencyError, InvalidRequest
from luksrotd.luks2.metadata import Token
from luksrotd.rotation import token as tokens
from luksrotd.rotation.edits import AddKeyslot, Pbkdf, RemoveToken, SetToken, from_wire, to_wire
from luksrotd.rotation.keys import rotate
from luksrotd.rotation.plan import plan_commit
from tests.support import forge
from tests.support.planning import ROTATE, noise, shadowed, volume

COST = {"type": "argon2id", "hash": None, "iterations": 4, "memory_kib": None, "parallel": None}


@pytest.mark.parametrize("member", ["fingerprint", "group"])
def test_an_empty_text_in_a_token_is_not_dropped_when_it_is_written_again(member):
    raw = {"type": "luksrotd", "keyslots": ["1"], "name": "backup", "generation": 1, "data": {}, member: ""}
    found = tokens.parse(Token(0, "luksrotd", (1,), raw))
    assert tokens.body(found)[member] == ""


@pytest.mark.parametrize(
    ("edit", "change"),
    [
        (AddKeyslot(3), {"keyslot": "3"}),
        (AddKeyslot(3), {"keyslot": 3.5}),
        (AddKeyslot(1), {"keyslot": True}),
        (AddKeyslot(3), {"secret": None}),
        (AddKeyslot(3), {"pbkdf": {**COST, "iterations": 4.5}}),
        (AddKeyslot(3), {"pbkdf": {**COST, "hash": 1}}),
        (SetToken(3, {}), {"fingerprint_of": "3"}),
        (SetToken(3, {}), {"body": [["type", "x"]]}),
        (RemoveToken(3), {"more": 1}),
    ],
)
def test_an_edit_that_to_wire_cannot_have_written_is_refused(edit, change):
    with pytest.raises(InvalidRequest, match="cannot read an edit"):
        from_wire(to_wire(edit) | change)


def test_the_cost_that_the_others_start_from_is_read():
    assert from_wire(to_wire(AddKeyslot(3)) | {"pbkdf": COST}) == AddKeyslot(3, pbkdf=Pbkdf(iterations=4))


@pytest.mark.parametrize(
    ("part", "member", "value"),
    [
        (None, "x", 1),
        ("af", "x", 1),
        ("area", "x", 1),
        ("af", "stripes", 1),
        ("area", "encryption", "cipher_null-ecb"),
    ],
)
def test_a_new_keyslot_that_is_none_of_ours_is_not_explained(part, member, value):
    image = volume()
    change = rotate(forge.view_of(image), ROTATE)
    shadow = shadowed(image, change)
    number = str(change.added[0].keyslot)

    def edit(raw):
        keyslot = raw["keyslots"][number]
        (keyslot if part is None else keyslot[part])[member] = value

    mad = replace(shadow, committed=forge.edited(shadow.committed, edit), final=forge.edited(shadow.final, edit))
    assert plan_commit(forge.pair_of(image), change, shadow, noise)
    with pytest.raises(ConsistencyError, match=f"keyslot {number}"):
        plan_commit(forge.pair_of(image), change, mad, noise)
