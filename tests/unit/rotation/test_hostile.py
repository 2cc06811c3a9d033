# SPDX-License-Identifier: GPL-2.0-or-later
"""What fuzzing (tests/fuzz) has found in the decisions, one test each."""

from dataclasses import replace

import pytest

from luksrotd.errors import MESSAGE_MAX, ConsistencyError, EngineError, InvalidRequest
from luksrotd.luks2 import jsontext
from luksrotd.luks2.metadata import Token
from luksrotd.rotation import token as tokens
from luksrotd.rotation import wire
from luksrotd.rotation.draft import Draft
from luksrotd.rotation.edits import AddKeyslot, Pbkdf, RemoveToken, SetToken, from_wire, to_wire
from luksrotd.rotation.keys import rotate
from luksrotd.rotation.plan import plan_commit
from luksrotd.rotation.preview import preview
from luksrotd.rotation.reconcile import diagnose
from tests.support import forge
from tests.support.planning import ROTATE, noise, shadowed, volume

COST = {"type": "argon2id", "hash": None, "iterations": 4, "memory_kib": None, "parallel": None}


def test_an_empty_fingerprint_is_not_dropped_when_a_token_is_written_again():
    raw = {"type": "luksrotd", "keyslots": ["1"], "name": "backup", "generation": 1, "data": {}, "fingerprint": ""}
    found = tokens.parse(Token(0, "luksrotd", (1,), raw))
    assert tokens.body(found)["fingerprint"] == ""


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
        (None, "priority", 2),
        ("af", "x", 1),
        ("af", "priority", 2),
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


def test_a_keyslot_of_an_unknown_type_may_have_anything_as_its_kdf():
    image = forge.edited(volume(), lambda raw: raw["keyslots"]["0"].update(type="x", kdf="y"))
    seen = forge.view_of(image)
    draft = Draft(seen)
    draft.destroy_keyslot(0)
    removed = next(one for one in preview(seen, draft.change()) if one.what == "keyslot")
    assert (removed.name, removed.before["pbkdf"]) == ("0", "")


@pytest.mark.parametrize("flag", ["\x1b[2J\n", "x" * 6000])
def test_a_requirement_cannot_make_a_finding_long_or_harmful(flag):
    image = forge.edited(volume(), lambda raw: raw["config"].update(requirements={"mandatory": [flag]}))
    messages = [finding.message for finding in diagnose(forge.view_of(image))]
    assert messages
    assert all(len(message) <= MESSAGE_MAX and message.isprintable() for message in messages)


def test_a_line_of_many_small_values_is_refused_before_they_are_made():
    """A worker may have fallen to the header that it parses: what it says must not cost the daemon its memory."""
    most = jsontext.VALUES_MAX
    assert wire.result_of(b'{"ok":true,"result":[%s0]}' % (b"0," * (most - 10)))
    with pytest.raises(EngineError, match="too many values"):
        wire.decode(b'{"ok":true,"result":[%s0]}' % (b"0," * most))
    with pytest.raises(InvalidRequest, match="too many values"):
        wire.encode({"body": [0] * most})
