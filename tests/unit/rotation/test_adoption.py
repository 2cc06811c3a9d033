# SPDX-License-Identifier: GPL-2.0-or-later
"""Adopt a keyslot, release it unchanged, make a pair anew from what is left of it."""

from dataclasses import replace

import pytest

from luksrotd.errors import (
    InvalidRequest,
    KeyExists,
    MetadataFull,
    NeedsPerson,
    NeedsReconcile,
    NoFreeKeyslot,
    UnknownKey,
)
from luksrotd.luks2 import layout
from luksrotd.luks2.layout import Which
from luksrotd.rotation import adoption
from luksrotd.rotation.adoption import UNLOCKING_TYPES, AdoptRequest, RecreateRequest
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import PBKDF_FOR_RANDOM_KEYS, AddKeyslot, RemoveToken, SetToken
from luksrotd.rotation.token import GENERATION_MAX
from tests.support import forge
from tests.support.planning import FRESH, KEEP, NOW, OLD, after, planned, staged_volume, volume
from tests.support.simengine import make_volume

PLAIN = make_volume([KEEP, OLD, FRESH])
OURS = volume()
STAGED = staged_volume()
RECOVERY = {"type": "systemd-recovery", "keyslots": ["1"], "x": {"y": [1]}}
ADOPT = AdoptRequest(1, {"ref": "vault/1"}, NOW)
RECREATE = RecreateRequest({"ref": "vault/5"}, NOW, PBKDF_FOR_RANDOM_KEYS)
STALE = {"fingerprint": "sha256:x"}


def with_foreign(image: bytes, number: int = 4, **members: object) -> bytes:
    """With the token of another tool on keyslot 1."""
    return forge.edited(image, lambda raw: raw["tokens"].update({str(number): {**RECOVERY, **members}}))


def crowded(image: bytes) -> bytes:
    """With no token number left."""

    def fill(raw):
        for number in range(layout.TOKENS_MAX):
            raw["tokens"].setdefault(str(number), {"type": "x", "keyslots": []})

    return forge.edited(image, fill)


def adopt(image: bytes, **request: object) -> Change:
    return adoption.adopt(forge.view_of(image), replace(ADOPT, **request))


def release(image: bytes) -> Change:
    return adoption.release(forge.view_of(image), "backup")


def recreate(image: bytes, **request: object) -> Change:
    return adoption.recreate(forge.view_of(image), replace(RECREATE, **request))


def only_token(change: Change) -> SetToken:
    (write,) = change.edits
    assert isinstance(write, SetToken)
    assert (change.closing, change.wipe, change.survivors) == ((), (), None)
    return write


# ---- adopt


def test_an_ordinary_keyslot_gets_our_token():
    write = only_token(adopt(PLAIN))
    assert (write.token, write.fingerprint_of) == (0, 1)
    assert write.body == {
        "type": "luksrotd",
        "keyslots": ["1"],
        "version": 1,
        "name": "backup",
        "generation": 1,
        "state": "active",
        "rotated_at": "2026-03-04T05:06:07Z",
        "data": {"ref": "vault/1"},
        "adopted": {},
    }


def test_the_token_of_another_tool_is_kept_in_ours():
    write = only_token(adopt(with_foreign(PLAIN)))
    assert (write.token, write.body["adopted"]) == (4, RECOVERY)


def test_where_a_token_is_replaced_no_number_is_needed():
    assert only_token(adopt(crowded(with_foreign(PLAIN)))).token == 4
    with pytest.raises(NoFreeKeyslot):
        adopt(crowded(PLAIN))


@pytest.mark.parametrize("image", [PLAIN, with_foreign(PLAIN)])
def test_I5_adopted_and_released_it_is_what_it_was(image):
    managed = after(image, planned(image, adopt(image)))
    assert forge.view_of(managed).keys[0].complete
    released = after(managed, planned(managed, release(managed)))
    assert forge.json_of(released) == forge.json_of(image)


def unbound(raw):
    raw["digests"]["0"]["keyslots"] = ["0", "2"]
    raw["digests"]["1"] = {**raw["digests"]["0"], "keyslots": ["1"], "segments": []}


def of_another_type(raw):
    raw["keyslots"]["1"] = {
        "type": "x",
        "key_size": 1,
        "area": {"type": "x", "offset": "61440", "size": "1"},
    }


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (forge.keyslot_removed(PLAIN, 1), InvalidRequest, "cannot adopt keyslot 1: there is none"),
        (forge.edited(PLAIN, unbound), InvalidRequest, "does not open the volume by a passphrase"),
        (forge.edited(PLAIN, of_another_type), InvalidRequest, "does not open the volume by a passphrase"),
        (OURS, KeyExists, "one of that name already"),
        (forge.with_token(PLAIN, 1, name="spare"), KeyExists, "token 0 manages it already"),
        (with_foreign(PLAIN, keyslots=["0", "1"]), NeedsPerson, "do not belong to each other alone"),
        (with_foreign(with_foreign(PLAIN), 5), NeedsPerson, "do not belong to each other alone"),
        (forge.with_token(PLAIN, 0, version=7), NeedsPerson, "schema version '7'"),
        (forge.newer(PLAIN, [Which.SECONDARY]), NeedsReconcile, "copies differ"),
        *(
            (with_foreign(PLAIN, type=kind), NeedsPerson, "unlocks it, and has to stay")
            for kind in sorted(UNLOCKING_TYPES)
        ),
    ],
)
def test_what_cannot_be_adopted(image, error, message):
    with pytest.raises(error, match=message):
        adopt(image)


def nested(levels: int) -> dict[str, object]:
    return {"x": nested(levels - 1)} if levels > 1 else {}


def test_what_would_not_fit_as_a_part_of_our_token():
    with pytest.raises(MetadataFull):
        adopt(PLAIN, data={"x": "y" * 12_000})
    with pytest.raises(InvalidRequest, match="associated data"):
        adopt(PLAIN, data={"x": float("nan")})
    deep = with_foreign(PLAIN, x=nested(28))
    assert adopt(deep)
    planned(deep, adopt(deep))
    deeper = with_foreign(PLAIN, x=nested(29))
    with pytest.raises(InvalidRequest, match="token 4: it is nested deeper than 30 levels"):
        adopt(deeper)


# ---- release


def test_a_key_that_was_enrolled_leaves_an_ordinary_keyslot():
    assert release(OURS).edits == (RemoveToken(0),)


def test_after_a_rotation_the_old_token_names_the_new_keyslot():
    image = forge.with_token(PLAIN, 2, 4, adopted=RECOVERY)
    assert only_token(release(image)) == SetToken(4, {**RECOVERY, "keyslots": ["2"]})


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (PLAIN, UnknownKey, "cannot find"),
        (STAGED, NeedsPerson, "cannot release key 'backup': a new generation"),
        (forge.with_token(PLAIN, 1, state="staged"), NeedsPerson, "finish or abort that first"),
        (forge.with_token(PLAIN, 1, **STALE), NeedsPerson, "cannot release key 'backup': another tool"),
        (forge.with_token(PLAIN, None), NeedsPerson, "names 0 keyslots"),
    ],
)
def test_what_cannot_be_released(image, error, message):
    with pytest.raises(error, match=message):
        release(image)


# ---- recreate


def test_the_token_is_lost_and_the_key_has_been_seen_to_open_a_keyslot():
    write = only_token(recreate(PLAIN, keyslot=1))
    assert (write.token, write.fingerprint_of, write.body["generation"], write.body["keyslots"]) == (0, 1, 1, ["1"])
    assert write.body["data"] == {"ref": "vault/5"}


def test_both_are_lost():
    change = recreate(PLAIN)
    add, write = change.edits
    assert isinstance(write, SetToken)
    assert add == AddKeyslot(3, pbkdf=PBKDF_FOR_RANDOM_KEYS)
    assert (write.token, write.body["generation"], write.body["keyslots"]) == (0, 1, ["3"])


def test_the_keyslot_is_lost_and_the_token_says_what_it_was():
    image = forge.with_token(PLAIN, None, 3, generation=6, data={"ref": "old"}, adopted=RECOVERY, **{"x-unknown": 1})
    for request, data in (({"data": None}, {"ref": "old"}), ({}, {"ref": "vault/5"})):
        add, write = recreate(image, **request).edits
        assert isinstance(write, SetToken)
        assert add == AddKeyslot(3, pbkdf=PBKDF_FOR_RANDOM_KEYS)
        assert (write.token, write.body["generation"], write.body["data"]) == (3, 7, data)
        assert (write.body["adopted"], write.body["x-unknown"]) == (RECOVERY, 1)


def test_the_keyslot_was_changed_and_the_key_has_been_seen_to_open_it():
    image = forge.with_token(PLAIN, 1, **STALE)
    write = only_token(recreate(image, keyslot=1, data=None))
    assert (write.body["generation"], write.fingerprint_of) == (2, 1)
    assert forge.view_of(after(image, planned(image, recreate(image, keyslot=1)))).keys[0].complete


@pytest.mark.parametrize(
    ("image", "request_", "error", "message"),
    [
        (PLAIN, {"data": None}, InvalidRequest, "its associated data is lost; give it"),
        (PLAIN, {"name": "a b"}, InvalidRequest, "cannot use this key name"),
        (PLAIN, {"keyslot": 5}, UnknownKey, "no keyslot 5 opens the volume"),
        (PLAIN, {"data": {"x": "y" * 12_000}}, MetadataFull, "does not fit"),
        (OURS, {}, KeyExists, "nothing of it is lost; rotate it"),
        (OURS, {"keyslot": 1}, KeyExists, "nothing of it is lost; rotate it"),
        (OURS, {"keyslot": 0}, NeedsPerson, "its token names keyslot 1; remove that first"),
        (STAGED, {}, NeedsPerson, "2 tokens have that name"),
        (forge.with_token(PLAIN, 1, **STALE), {}, NeedsPerson, "its token names keyslot 1; remove that first"),
        (forge.with_token(PLAIN, 1, version=7), {}, NeedsPerson, "schema version '7'"),
        (forge.with_token(PLAIN, None, generation=GENERATION_MAX), {}, NeedsPerson, "is the last one"),
        (with_foreign(PLAIN), {"keyslot": 1}, NeedsPerson, r"belongs to token 4 \(systemd-recovery\)"),
        (forge.with_token(PLAIN, 1, name="spare"), {"keyslot": 1}, NeedsPerson, r"belongs to token 0 \(luksrotd\)"),
        (crowded(PLAIN), {}, NoFreeKeyslot, "all 32 are taken"),
        (forge.newer(PLAIN, [Which.SECONDARY]), {}, NeedsReconcile, "copies differ"),
    ],
)
def test_what_cannot_be_recreated(image, request_, error, message):
    with pytest.raises(error, match=message):
        recreate(image, **request_)
