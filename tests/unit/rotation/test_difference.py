# SPDX-License-Identifier: GPL-2.0-or-later
"""I3, I5: a header may differ from the one before by what was asked for, and by nothing else."""

from dataclasses import replace

import pytest

from luksrotd.errors import ConsistencyError
from luksrotd.luks2.layout import Which
from luksrotd.luks2.pair import HeaderCopy
from luksrotd.rotation import keys
from luksrotd.rotation.difference import check_difference
from luksrotd.rotation.edits import AddKeyslot, DestroyKeyslot, Edit, Pbkdf, RemoveToken, SetToken
from tests.support import forge
from tests.support.planning import ENROLL, ROTATE, shadowed, volume

BEFORE = forge.edited(volume(), lambda raw: raw["tokens"].update({"9": {"type": "x", "keyslots": ["0"], "more": [1]}}))
CHANGE = keys.rotate(forge.view_of(BEFORE), ROTATE)
RESULT = shadowed(BEFORE, CHANGE)
AFTER = RESULT.committed + BEFORE[len(RESULT.committed) :]


def winner(image: bytes) -> HeaderCopy:
    return forge.pair_of(image).winner


def check(after: bytes, edits: tuple[Edit, ...] = CHANGE.edits, before: bytes = BEFORE) -> None:
    check_difference(winner(before), winner(after), edits)


def edit(path: str, value: object):
    *parents, last = path.split("/")

    def change(raw):
        for parent in parents:
            raw = raw[parent]
        raw[last] = value

    return change


def test_the_edits_that_were_asked_for_explain_the_difference():
    check(AFTER)


def test_the_order_of_references_does_not_matter():
    check(forge.edited(AFTER, lambda raw: raw["digests"]["0"]["keyslots"].reverse()))


def test_a_digest_of_nothing_may_go_as_libcryptsetup_drops_it():
    empty = forge.edited(
        BEFORE, lambda raw: raw["digests"].update({"1": raw["digests"]["0"] | {"keyslots": [], "segments": []}})
    )
    check(AFTER, before=empty)


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        ("keyslots/0/priority", 2, "keyslots 0"),
        ("keyslots/0/kdf/salt", "AAAA", "keyslots 0"),
        ("keyslots/0/area/encryption", "null", "keyslots 0"),
        ("keyslots/0/x-unknown", 1, "keyslots 0"),
        ("tokens/9/more", [2], "tokens 9"),
        ("tokens/9/keyslots", [], "tokens 9"),
        ("tokens/8", {"type": "x", "keyslots": []}, "tokens 8"),
        ("tokens/0/generation", 3, "tokens 0"),
        ("tokens/0/keyslots", ["0"], "tokens 0"),
        ("tokens/0/fingerprint", "sha256:x", "tokens 0"),
        ("digests/0/digest", "AAAA", "digests 0"),
        ("segments/0/encryption", "null", "segments 0"),
        ("segments/0/iv_tweak", "1", "segments 0"),
        ("config/flags", ["allow-discards"], "config flags"),
        ("config/requirements", {"mandatory": ["x"]}, "config requirements"),
        ("x-unknown", 1, "x-unknown"),
    ],
)
def test_I5_anything_else_is_refused_and_named(path, value, place):
    with pytest.raises(ConsistencyError, match=f"cannot explain.*{place}"):
        check(forge.edited(AFTER, edit(path, value)))


def test_I5_what_is_missing_is_noticed_too():
    with pytest.raises(ConsistencyError, match="tokens 9"):
        check(forge.edited(AFTER, lambda raw: raw["tokens"].pop("9")))
    with pytest.raises(ConsistencyError, match="x-unknown"):
        check(AFTER, before=forge.edited(BEFORE, edit("x-unknown", 1)))


def test_messages_do_not_repeat_hostile_text_at_length():
    many = {str(number): {"type": "x" * 50, "keyslots": []} for number in range(10, 100)}
    with pytest.raises(ConsistencyError) as caught:
        check(forge.edited(AFTER, lambda raw: raw["tokens"].update(many)))
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("uuid", b"x"),
        ("label", b"x"),
        ("subsystem", b"x"),
        ("csum_alg", b"sha512"),
        ("salt", b"x"),
    ],
)
def test_I5_the_binary_header_stays(field, value):
    with pytest.raises(ConsistencyError, match=f"the {field} of the primary header"):
        check(forge.with_fields(AFTER, [Which.PRIMARY], **{field: value}))


@pytest.mark.parametrize("offset", [264, 447, 512, 4095])
def test_nothing_hides_in_the_padding_of_the_binary_header(offset):
    image = forge.sealed(forge.put(AFTER, offset, b"x"), Which.PRIMARY)
    with pytest.raises(ConsistencyError, match="padding"):
        check(image)


@pytest.mark.parametrize("seqid", [0, 2, 3])
def test_I9_the_sequence_number_rises(seqid):
    with pytest.raises(ConsistencyError, match="did not rise"):
        check(forge.with_fields(AFTER, seqid=seqid))


def test_I9_the_sequence_number_may_jump():
    check(forge.with_fields(AFTER, seqid=1000))


def test_without_edits_the_copy_stays_as_it_is():
    check(BEFORE, ())
    for image in (forge.newer(BEFORE, list(Which)), forge.with_text(BEFORE, forge.text_of(BEFORE) + b" ")):
        with pytest.raises(ConsistencyError, match="should have stayed"):
            check(image, ())


# ---- the added keyslot


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("type", "x", "type, key size"),
        ("key_size", 2, "type, key size"),
        ("priority", 0, "type, key size"),
        ("kdf/iterations", 999, "key derivation"),
        ("kdf/hash", "sha1", "key derivation"),
    ],
)
def test_the_new_keyslot_is_of_the_kind_that_was_asked_for(path, value, what):
    with pytest.raises(ConsistencyError, match=f"{what}.* of keyslot 2"):
        check(forge.edited(AFTER, edit(f"keyslots/2/{path}", value)))


def test_the_cost_of_argon2_is_what_was_asked_for():
    cost = Pbkdf("argon2id", iterations=5, memory_kib=64)
    argon2 = {"type": "argon2id", "time": 5, "memory": 64, "cpus": 1, "salt": "AAAA"}
    edits = (AddKeyslot(2, pbkdf=cost), *CHANGE.edits[1:])

    def derived(**members: object) -> bytes:
        image = forge.edited(AFTER, edit("keyslots/2/kdf", argon2 | members))
        print_ = forge.token(image, 2)["fingerprint"]
        return forge.edited(image, edit("tokens/0/fingerprint", print_))

    check(derived(), edits)
    check(derived(memory=32), edits)  # libcryptsetup lowers it to half of the machine's memory
    for members in ({"time": 4}, {"memory": 65}):
        with pytest.raises(ConsistencyError, match="key derivation"):
            check(derived(**members), edits)


def test_a_keyslot_that_was_not_added_is_noticed():
    with pytest.raises(ConsistencyError, match="keyslot 3, which should have been added"):
        check(AFTER, (AddKeyslot(3), *CHANGE.edits))
    with pytest.raises(ConsistencyError, match="keyslot 0, which should have been added"):
        check(AFTER, (AddKeyslot(0), *CHANGE.edits))


def test_I5_the_new_keyslot_is_of_a_digest_that_was_there_and_has_the_data():
    def elsewhere(segments):
        def change(raw):
            raw["digests"]["0"]["keyslots"].remove("2")
            raw["digests"]["1"] = raw["digests"]["0"] | {"keyslots": ["2"], "segments": segments}

        return change

    for segments in ([], ["0"]):
        with pytest.raises(ConsistencyError, match="digest of keyslot 2"):
            check(forge.edited(AFTER, elsewhere(segments)))


def test_a_token_of_a_keyslot_that_is_not_there_is_refused():
    with pytest.raises(ConsistencyError, match="bound to a keyslot that is not there"):
        check(AFTER, (SetToken(0, {"type": "x", "keyslots": []}, 7), *CHANGE.edits))


# ---- the other edits


def test_each_kind_of_edit_explains_what_it_does():
    image = forge.newer(forge.keyslot_removed(BEFORE, 1), list(Which))
    check(image, (DestroyKeyslot(1),))
    image = forge.newer(forge.edited(BEFORE, lambda raw: raw["tokens"].pop("9")), list(Which))
    check(image, (RemoveToken(9),))
    check(image, (RemoveToken(9), RemoveToken(7)))
    token = {"type": "y", "keyslots": ["0"]}
    image = forge.newer(forge.edited(BEFORE, edit("tokens/3", token)), list(Which))
    check(image, (SetToken(3, token),))


def test_I3_a_destroyed_keyslot_is_gone_from_digests_and_tokens():
    image = forge.newer(forge.keyslot_removed(BEFORE, 1), list(Which))
    with pytest.raises(ConsistencyError, match="tokens 0"):
        check(forge.edited(image, edit("tokens/0/keyslots", ["0"])), (DestroyKeyslot(1),))


def test_a_keyslot_that_was_not_there_cannot_have_been_destroyed():
    with pytest.raises(ConsistencyError, match="keyslot 7, which was not there"):
        check(AFTER, (*CHANGE.edits, DestroyKeyslot(7)))


def test_enrolling_is_explained_as_well():
    change = keys.enroll(forge.view_of(BEFORE), replace(ENROLL, name="spare"))
    result = shadowed(BEFORE, change)
    check(result.committed + BEFORE[len(result.committed) :], change.edits)


def test_a_token_may_be_written_without_a_fingerprint():
    body = {"type": "luksrotd", "keyslots": [], "name": "x", "generation": 1, "data": {}}

    def written(raw):
        raw["tokens"]["7"] = body
        del raw["tokens"]["9"]

    after = forge.newer(forge.edited(BEFORE, written), list(Which))
    check(after, (SetToken(7, body), RemoveToken(9)))
