# SPDX-License-Identifier: GPL-2.0-or-later
"""Removing a key and changing its data; enrolling and rotating are in test_policy.py."""

from dataclasses import replace

import pytest

from luksrotd.errors import InvalidRequest, LastKeyslot, MetadataFull, NeedsPerson, UnknownKey
from luksrotd.rotation import keys
from luksrotd.rotation.edits import DestroyKeyslot, RemoveToken, SetToken
from tests.support import forge
from tests.support.planning import KEEP, OLD, ROTATE, staged_volume, volume
from tests.support.simengine import make_volume

OURS = volume()
STAGED = staged_volume()
PLAIN = make_volume([KEEP, OLD])


# ---- remove


def test_I6_a_removed_key_leaves_a_wipe_record_until_its_area_is_wiped():
    change = keys.remove(forge.view_of(OURS), "backup")
    area = forge.view_of(OURS).metadata.keyslots[1].area
    record = {"type": "luksrotd-wipe", "keyslots": [], "version": 1, "wipe": forge.intent(area)}
    assert change.edits == (SetToken(0, record), DestroyKeyslot(1))
    assert change.closing == (RemoveToken(0),)
    assert change.survivors == {0}


def test_of_a_key_that_has_lost_its_keyslot_only_the_token_goes():
    change = keys.remove(forge.view_of(forge.with_token(PLAIN, None, 4)), "backup")
    assert (change.edits, change.closing, change.needs_unlock) == ((RemoveToken(4),), (), False)


def test_I5_the_last_way_in_is_not_removed():
    with pytest.raises(LastKeyslot):
        keys.remove(forge.view_of(forge.with_token(make_volume([OLD]), 0)), "backup")


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (PLAIN, UnknownKey, "cannot find a managed key"),
        (STAGED, NeedsPerson, "finish or abort that first"),
        (forge.with_token(PLAIN, 1, state="staged"), NeedsPerson, "finish or abort that first"),
        (forge.with_token(PLAIN, 1, fingerprint="sha256:x"), NeedsPerson, "another tool has changed its keyslot"),
        (forge.with_token(PLAIN, 1, keyslots=["0", "1"]), NeedsPerson, "names 2 keyslots"),
        (forge.with_token(PLAIN, 1, state="retired"), UnknownKey, "cannot find a managed key"),
    ],
)
def test_I5_remove_takes_away_only_what_is_provably_ours(image, error, message):
    with pytest.raises(error, match=message):
        keys.remove(forge.view_of(image), "backup")


# ---- associated data


def test_other_data_and_nothing_else():
    image = forge.with_token(PLAIN, 1, 3, data={"ref": "vault/1"}, **{"x-unknown": [1]})
    (write,) = keys.set_data(forge.view_of(image), "backup", {"ref": "vault/9"}).edits
    assert write == SetToken(3, {**forge.json_of(image)["tokens"]["3"], "data": {"ref": "vault/9"}})


def test_other_data_for_the_active_key_beside_a_staged_one():
    (write,) = keys.set_data(forge.view_of(STAGED), "backup", {}).edits
    assert isinstance(write, SetToken)
    assert (write.token, write.body["generation"]) == (0, 1)


@pytest.mark.parametrize(
    ("image", "data", "error"),
    [
        (PLAIN, {}, UnknownKey),
        (forge.with_token(PLAIN, 1, state="staged"), {}, UnknownKey),
        (OURS, {"x": "\0"}, InvalidRequest),
        (OURS, {"x": "y" * 11_500}, MetadataFull),
        (forge.with_token(OURS, 0, 1), {}, NeedsPerson),
    ],
)
def test_data_that_cannot_be_written(image, data, error):
    with pytest.raises(error, match="cannot"):
        keys.set_data(forge.view_of(image), "backup", data)


# ---- rotate, beside what test_policy.py has


def test_a_key_with_a_staged_successor_is_not_rotated():
    with pytest.raises(NeedsPerson, match="cannot rotate key 'backup': a new generation of it is staged"):
        keys.rotate(forge.view_of(STAGED), ROTATE)


def test_nothing_of_a_staged_or_stepwise_past_is_carried_on():
    image = forge.with_token(
        PLAIN, 1, expires_at="2026-01-02T03:04:05Z", group={"id": "g", "size": 1}, retires=["9"], adopted={"type": "x"}
    )
    (clear,) = keys.rotate(forge.view_of(image), replace(ROTATE, data=None)).closing
    assert isinstance(clear, SetToken)
    assert not clear.body.keys() & {"expires_at", "group", "retires"}
    assert clear.body["adopted"] == {"type": "x"}
