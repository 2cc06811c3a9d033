# SPDX-License-Identifier: GPL-2.0-or-later
from dataclasses import replace

import pytest

from luksrotd.errors import (
    ForeignSignature,
    InvalidRequest,
    KeyExists,
    LastKeyslot,
    MetadataFull,
    NeedsPerson,
    NeedsReconcile,
    NoFreeArea,
    NoFreeKeyslot,
    RequirementsPresent,
    StaleGeneration,
    UnknownKey,
)
from luksrotd.luks2 import layout
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import Which
from luksrotd.rotation import keys, policy
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import PBKDF_FOR_RANDOM_KEYS, AddKeyslot, DestroyKeyslot, SetToken
from luksrotd.rotation.token import GENERATION_MAX
from tests.support import forge
from tests.support.planning import ENROLL, KEEP, OLD, ROTATE, volume
from tests.support.simengine import make_volume

PLAIN = make_volume([KEEP, OLD])
OURS = volume()


def enroll(image: bytes, **request: object) -> Change:
    return keys.enroll(forge.view_of(image), replace(ENROLL, **request))


def rotate(image: bytes, **request: object) -> Change:
    return keys.rotate(forge.view_of(image), replace(ROTATE, **request))


def crowded(kind: str, members: dict[str, object], count: int) -> bytes:
    """The volume with tokens that leave no number free."""
    return forge.edited(PLAIN, lambda raw: raw.update({kind: {str(number): members for number in range(count)}}))


# ---- enrol


def test_I3_keyslot_and_token_are_born_in_one_commit():
    change = enroll(PLAIN)
    add, write = change.edits
    assert add == AddKeyslot(2, pbkdf=PBKDF_FOR_RANDOM_KEYS)
    assert isinstance(write, SetToken)
    assert (write.token, write.fingerprint_of, write.body["keyslots"], write.body["generation"]) == (0, 2, ["2"], 1)
    assert (change.closing, change.wipe, change.destroyed) == ((), (), ())


def test_enrol_a_second_key_beside_the_first():
    change = enroll(OURS, name="spare")
    assert [edit.body["name"] for edit in change.edits if isinstance(edit, SetToken)] == ["spare"]


def test_a_name_is_taken_once():
    with pytest.raises(KeyExists):
        enroll(OURS)


def test_a_bad_name_is_refused():
    with pytest.raises(InvalidRequest):
        enroll(PLAIN, name="a b")


def test_a_token_that_we_cannot_read_may_be_a_key_of_that_name():
    with pytest.raises(NeedsPerson, match="schema version '9'"):
        enroll(forge.with_token(PLAIN, 1, version=9))


def test_no_token_number_is_left():
    with pytest.raises(NoFreeKeyslot, match="token"):
        enroll(crowded("tokens", {"type": "x", "keyslots": []}, layout.TOKENS_MAX))


def test_no_keyslot_number_is_left():
    with pytest.raises(NoFreeKeyslot, match="keyslot"):
        enroll(make_volume([b"%d" % number for number in range(32)], areas=40))


def test_no_area_is_left():
    with pytest.raises(NoFreeArea, match="1 times 4096 bytes in a row"):
        enroll(make_volume([KEEP, OLD], areas=2))


def test_the_gaps_are_too_small():
    # One byte in the middle of the free space: 3 areas would fit into its parts, one as long as both does not.
    image = forge.edited(
        make_volume([KEEP, OLD], areas=3), lambda raw: raw["keyslots"]["1"]["area"].update(offset="36865")
    )
    with pytest.raises(NoFreeArea):
        enroll(image)


def test_a_volume_that_nothing_opens():
    image = forge.edited(PLAIN, lambda raw: (raw["keyslots"].clear(), raw["digests"]["0"].update(keyslots=[])))
    with pytest.raises(NoFreeArea, match="key size is unknown"):
        enroll(image)


def test_a_metadata_area_too_full_for_the_token():
    with pytest.raises(MetadataFull, match="does not fit"):
        enroll(PLAIN, data={"x": "y" * 11_000})


# ---- rotate


def test_the_new_keyslot_is_added_before_the_old_one_is_destroyed():
    change = rotate(OURS)
    add, write, destroy = change.edits
    assert (add, destroy) == (AddKeyslot(2, pbkdf=PBKDF_FOR_RANDOM_KEYS), DestroyKeyslot(1))
    old = forge.view_of(OURS).metadata.keyslots[1].area
    assert isinstance(write, SetToken)
    assert (write.token, write.fingerprint_of, write.body["generation"]) == (0, 2, 2)
    assert write.body["wipe"] == forge.intent(old)
    (clear,) = change.closing
    assert isinstance(clear, SetToken)
    assert clear.body == {name: value for name, value in write.body.items() if name != "wipe"}
    assert clear.fingerprint_of == 2


def test_associated_data_is_kept_or_replaced_and_unknown_members_survive():
    image = forge.with_token(PLAIN, 1, data={"ref": "kept"}, **{"x-unknown": [1]})
    kept, replaced = rotate(image, data=None).edits[1], rotate(image, data={"n": 1}).edits[1]
    assert isinstance(kept, SetToken)
    assert isinstance(replaced, SetToken)
    assert (kept.body["data"], kept.body["x-unknown"]) == ({"ref": "kept"}, [1])
    assert replaced.body["data"] == {"n": 1}


def test_rotate_refuses_another_generation_than_the_one_named():
    assert rotate(OURS, only_generation=1)
    with pytest.raises(InvalidRequest, match="the key is at 1"):
        rotate(OURS, only_generation=2)


def test_rotate_refuses_a_key_that_is_not_there():
    with pytest.raises(UnknownKey):
        rotate(PLAIN)


def test_rotate_does_not_choose_between_two_keys():
    with pytest.raises(NeedsPerson, match="two keys named 'backup' have generation 1"):
        rotate(forge.with_token(OURS, 0, 1))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (forge.with_token(PLAIN, None), "names 0 keyslots"),
        (forge.with_token(PLAIN, 1, keyslots=["0", "1"]), "names 2 keyslots"),
        (forge.with_token(PLAIN, 1, fingerprint="sha256:x"), "another tool has changed its keyslot"),
        (forge.with_token(OURS, 1, 1, name="spare"), "another token names its keyslot too"),
        (forge.with_token(PLAIN, 1, generation=GENERATION_MAX), "is the last one"),
    ],
)
def test_I5_rotate_destroys_no_keyslot_that_is_not_provably_ours(image, message):
    with pytest.raises(NeedsPerson, match=message):
        rotate(image)


def test_rotate_counts_the_token_that_it_replaces_as_room():
    full = forge.with_token(PLAIN, 1, data={"x": "y" * 9_000})
    assert rotate(full, data={"x": "z" * 9_000})
    with pytest.raises(MetadataFull):
        rotate(full, data={"x": "z" * 11_000})


# ---- for both


@pytest.mark.parametrize("ask", [enroll, rotate])
def test_requirements_are_respected(ask):
    image = forge.edited(OURS, lambda raw: raw["config"].update(requirements={"mandatory": ["x"]}))
    with pytest.raises(RequirementsPresent, match="requires x"):
        ask(image)


@pytest.mark.parametrize("ask", [enroll, rotate])
def test_copies_that_differ_are_healed_first(ask):
    with pytest.raises(NeedsReconcile, match="copies differ"):
        ask(forge.newer(OURS, [Which.SECONDARY]))


@pytest.mark.parametrize("ask", [enroll, rotate])
def test_a_pending_wipe_is_finished_first(ask):
    image = forge.with_token(PLAIN, 1, wipe=forge.intent(Extent(45056, 4096)))
    with pytest.raises(NeedsReconcile, match="not been wiped"):
        ask(image)


def test_a_caller_who_has_seen_another_header_is_refused():
    seen = forge.view_of(PLAIN)
    for seqid in (None, seen.seqid):
        policy.check_sequence(seen, seqid)
    for seqid in (seen.seqid - 1, seen.seqid + 1, 0):
        with pytest.raises(StaleGeneration, match=f"sequence number {seen.seqid}, not {seqid}"):
            policy.check_sequence(seen, seqid)


def test_foreign_signatures_are_named():
    policy.check_signatures(())
    with pytest.raises(ForeignSignature, match="ext4, LVM2_member"):
        policy.check_signatures(("ext4", "LVM2_member"))


def test_I5_the_last_way_in_is_not_removed():
    seen = forge.view_of(PLAIN)
    policy.check_retirement(seen, Change((DestroyKeyslot(0),)))
    policy.check_retirement(seen, Change())
    policy.check_retirement(seen, Change((AddKeyslot(2), DestroyKeyslot(0), DestroyKeyslot(1))))
    with pytest.raises(LastKeyslot):
        policy.check_retirement(seen, Change((DestroyKeyslot(0), DestroyKeyslot(1))))


def test_I5_a_keyslot_that_does_not_open_the_volume_is_no_way_in():
    def unbind(raw):
        raw["digests"]["0"]["keyslots"] = ["0"]
        raw["digests"]["1"] = dict(raw["digests"]["0"], keyslots=["1"], segments=[])

    with pytest.raises(LastKeyslot):
        policy.check_retirement(forge.view_of(forge.edited(PLAIN, unbind)), Change((DestroyKeyslot(0),)))


def test_nothing_is_read_from_a_copy_that_may_not_be_in_force():
    image = forge.newer(volume(), [Which.PRIMARY])
    image = forge.with_text(image, b"{}", [Which.PRIMARY])
    with pytest.raises(NeedsReconcile, match="which header copy is in force"):
        policy.managed(forge.view_of(image), "backup")


@pytest.mark.parametrize("data", [{"x": 2**64}, {"x": "\0"}, {"x": float("inf")}])
def test_data_that_would_not_come_back_as_it_is_are_refused(data):
    with pytest.raises(InvalidRequest, match="associated data"):
        enroll(PLAIN, data=data)
    with pytest.raises(InvalidRequest, match="associated data"):
        rotate(OURS, data=data)
