# SPDX-License-Identifier: GPL-2.0-or-later
"""Stage, finish, abort: two keys in between, one at either end."""

from dataclasses import replace
from datetime import timedelta

import pytest

from luksrotd.errors import (
    InvalidRequest,
    MetadataFull,
    NeedsPerson,
    NeedsReconcile,
    NoFreeArea,
    NoFreeKeyslot,
    UnknownKey,
)
from luksrotd.luks2 import layout
from luksrotd.luks2.areas import Extent
from luksrotd.rotation import staging
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import AddKeyslot, DestroyKeyslot, RemoveToken, SetToken
from luksrotd.rotation.staging import StageRequest
from luksrotd.rotation.token import GENERATION_MAX, GROUP_MAX, Group
from tests.support import forge
from tests.support.planning import FRESH, KEEP, NOW, OLD, ROTATE, planned, staged_volume, volume
from tests.support.simengine import make_volume

OURS = volume()
STAGED = staged_volume()
THREE = make_volume([KEEP, OLD, FRESH])
STAGE = StageRequest(ROTATE, NOW + timedelta(days=30), Group("rack-4", 3))


def stage(image: bytes, **rotation: object) -> Change:
    return staging.stage(forge.view_of(image), replace(STAGE, rotation=replace(ROTATE, **rotation)))


def finish(image: bytes, generation: int | None = None) -> Change:
    return staging.finish(forge.view_of(image), "backup", generation)


def abort(image: bytes, generation: int | None = None) -> Change:
    return staging.abort(forge.view_of(image), "backup", generation)


def changed(image: bytes, number: int, **members: object) -> bytes:
    """With other members in a token."""
    return forge.edited(image, lambda raw: raw["tokens"][str(number)].update(members))


def raw(number: int) -> dict[str, object]:
    token: dict[str, object] = forge.json_of(STAGED)["tokens"][str(number)]
    return token


# ---- stage


def test_the_new_pair_is_born_beside_the_old_one():
    change = stage(OURS)
    add, write = change.edits
    assert add == AddKeyslot(2, pbkdf=ROTATE.pbkdf)
    assert isinstance(write, SetToken)
    assert (write.token, write.fingerprint_of) == (1, 2)
    assert write.body == {
        "type": "luksrotd",
        "keyslots": ["2"],
        "version": 1,
        "name": "backup",
        "generation": 2,
        "state": "staged",
        "rotated_at": "2026-03-04T05:06:07Z",
        "data": {"ref": "vault/2"},
        "expires_at": "2026-04-03T05:06:07Z",
        "group": {"id": "rack-4", "size": 3},
    }
    assert (change.closing, change.destroyed, change.survivors) == ((), (), None)


def test_a_staged_key_need_not_expire_nor_belong_to_a_set():
    write = staging.stage(forge.view_of(OURS), StageRequest(replace(ROTATE, data=None))).edits[1]
    assert isinstance(write, SetToken)
    assert not write.body.keys() & {"expires_at", "group"}
    assert write.body["data"] == {"ref": "vault/1"}


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (make_volume([KEEP, OLD]), UnknownKey, "cannot find"),
        (STAGED, NeedsPerson, "cannot stage key 'backup': a new generation of it is staged"),
        (changed(OURS, 0, state="staged"), UnknownKey, "it is only staged"),
        (changed(OURS, 0, fingerprint="sha256:x"), NeedsPerson, "cannot stage key 'backup': another tool"),
        (changed(OURS, 0, generation=GENERATION_MAX), NeedsPerson, "is the last one"),
        (changed(OURS, 0, wipe=forge.intent(Extent(45056, 4096))), NeedsReconcile, "not been wiped"),
        (forge.with_token(make_volume([KEEP, OLD], areas=2), 1), NoFreeArea, "remove a keyslot first"),
        (
            forge.with_token(make_volume([b"%d" % number for number in range(32)], areas=40), 1),
            NoFreeKeyslot,
            "all 32 are taken",
        ),
        (
            forge.edited(
                OURS,
                lambda raw: raw["tokens"].update(
                    {str(number): {"type": "x", "keyslots": []} for number in range(1, layout.TOKENS_MAX)}
                ),
            ),
            NoFreeKeyslot,
            "all 32 are taken",
        ),
    ],
)
def test_what_cannot_be_staged(image, error, message):
    with pytest.raises(error, match=message):
        stage(image)


def test_stage_refuses_another_generation_and_data_that_do_not_fit():
    with pytest.raises(InvalidRequest, match="cannot stage generation 4: the key is at 1"):
        stage(OURS, only_generation=4)
    with pytest.raises(MetadataFull):
        stage(OURS, data={"x": "y" * 11_000})


@pytest.mark.parametrize("group", [Group("a b", 3), Group("rack-4", 0), Group("rack-4", GROUP_MAX + 1)])
def test_sets_that_cannot_be(group):
    with pytest.raises(InvalidRequest, match="set"):
        staging.stage(forge.view_of(OURS), replace(STAGE, group=group))


# ---- finish


def test_finish_makes_the_staged_key_the_only_one_in_one_commit():
    change = finish(STAGED, 2)
    active = {name: value for name, value in raw(1).items() if name != "expires_at"} | {"state": "active"}
    old = forge.view_of(STAGED).metadata.keyslots[1].area
    assert change.edits == (
        RemoveToken(0),
        SetToken(1, {**active, "wipe": forge.intent(old)}),
        DestroyKeyslot(1),
    )
    assert change.closing == (SetToken(1, active),)
    assert not change.needs_unlock


def test_finish_where_the_old_key_has_gone_already():
    without_token = forge.edited(STAGED, lambda raw: raw["tokens"].pop("0"))
    change = finish(without_token)
    assert [type(edit) for edit in change.edits] == [SetToken]
    assert change.closing == ()
    change = finish(forge.keyslot_removed(STAGED, 1))
    assert [type(edit) for edit in change.edits] == [RemoveToken, SetToken]
    assert change.closing == ()


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (OURS, InvalidRequest, "cannot finish the rotation of key 'backup': no new generation of it is staged"),
        (make_volume([KEEP]), UnknownKey, "cannot find"),
        (forge.keyslot_removed(STAGED, 2), NeedsPerson, "the staged keyslot is gone"),
        (
            changed(STAGED, 1, fingerprint="sha256:x"),
            NeedsPerson,
            "cannot finish the rotation of key 'backup': another",
        ),
        (
            changed(STAGED, 0, fingerprint="sha256:x"),
            NeedsPerson,
            "remove the old keyslot with cryptsetup luksKillSlot",
        ),
        (changed(STAGED, 1, generation=1), NeedsPerson, "not newer than the active one"),
        (changed(STAGED, 1, wipe=forge.intent(Extent(45056, 4096))), NeedsReconcile, "not been wiped"),
    ],
)
def test_what_cannot_be_finished(image, error, message):
    with pytest.raises(error, match=message):
        finish(image)


def test_a_staged_key_is_named_by_its_generation():
    for verb in (finish, abort):
        assert verb(STAGED, 2)
        with pytest.raises(InvalidRequest, match="generation 3 of key 'backup': generation 2 is staged"):
            verb(STAGED, 3)


@pytest.mark.parametrize("verb", [staging.finish, staging.abort])
def test_a_key_that_was_staged_on_a_set_goes_with_the_set(verb):
    of_a_set = forge.view_of(changed(STAGED, 1, group={"id": "rack-4", "size": 3}))
    assert verb(of_a_set, "backup", group="rack-4")
    for group in (None, "rack-5"):
        with pytest.raises(NeedsPerson, match="was staged on set rack-4 of 3 volumes"):
            verb(of_a_set, "backup", group=group)
    with pytest.raises(InvalidRequest, match="was not staged on a set"):
        verb(forge.view_of(STAGED), "backup", group="rack-4")


# ---- abort


def test_abort_leaves_the_active_key_as_it_was():
    change = abort(STAGED)
    area = forge.view_of(STAGED).metadata.keyslots[2].area
    assert change.edits == (
        RemoveToken(1),
        SetToken(0, {**raw(0), "wipe": forge.intent(area)}),
        DestroyKeyslot(2),
    )
    assert change.closing == (SetToken(0, raw(0)),)
    assert not change.needs_unlock


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (OURS, InvalidRequest, "cannot abort the rotation of key 'backup': no new generation of it is staged"),
        (forge.with_token(THREE, 2, state="staged"), NeedsPerson, "no active key to fall back to"),
        (changed(STAGED, 0, fingerprint="sha256:x"), NeedsPerson, "no active key to fall back to"),
        (forge.keyslot_removed(STAGED, 1), NeedsPerson, "no active key to fall back to"),
        (forge.keyslot_removed(STAGED, 2), NeedsPerson, "the staged keyslot is gone"),
    ],
)
def test_I1_what_cannot_be_aborted(image, error, message):
    with pytest.raises(error, match=message):
        abort(image)


@pytest.mark.parametrize("verb", [finish, abort])
def test_a_full_metadata_area_has_room_for_the_intent(verb):
    limit = forge.view_of(STAGED).metadata.config.json_size
    room = limit - 1 - len(forge.text_of(changed(STAGED, 0, data={"x": ""})))
    full = changed(STAGED, 0, data={"x": "y" * room})
    assert len(forge.text_of(full)) == limit - 1
    planned(full, verb(full))
