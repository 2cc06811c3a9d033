# SPDX-License-Identifier: GPL-2.0-or-later
"""What a change will do, said beforehand."""

from luksrotd.luks2.areas import Extent
from luksrotd.rotation import keys, staging
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import RemoveToken, SetToken
from luksrotd.rotation.preview import Difference, keyslot_summary, preview
from tests.support import forge
from tests.support.planning import ENROLL, OLD, ROTATE, staged_volume, volume
from tests.support.simengine import make_volume

OURS = forge.view_of(volume())
AREA = OURS.metadata.keyslots[1].area
SLOT = {"type": "luks2", "pbkdf": "pbkdf2", "offset": AREA.offset, "size": AREA.size}
BEFORE = OURS.metadata.tokens[0].raw


def test_a_rotation():
    change = keys.rotate(OURS, ROTATE)
    (close,) = change.closing
    assert isinstance(close, SetToken)
    assert preview(OURS, change) == (
        Difference("keyslot", "2", "add", {}, {"pbkdf": "pbkdf2"}),
        Difference("keyslot", "1", "remove", SLOT, {}),
        Difference("token", "0", "change", BEFORE, close.body),
        Difference("area", str(AREA.offset), "wipe", {"size": AREA.size}, {}),
    )


def test_a_token_that_is_born_and_one_that_goes():
    plain = forge.view_of(make_volume([OLD, b"x"]))
    added = keys.enroll(plain, ENROLL)
    write = added.edits[1]
    assert isinstance(write, SetToken)
    assert Difference("token", "0", "add", {}, write.body) in preview(plain, added)
    removed = keys.remove(OURS, "backup")
    assert Difference("token", "0", "remove", BEFORE, {}) in preview(OURS, removed)


def test_a_wipe_record_that_comes_and_goes_is_no_difference():
    view = forge.view_of(make_volume([OLD, b"x"]))
    record = SetToken(0, {"type": "luksrotd-wipe", "keyslots": []})
    assert preview(view, Change((record,), (RemoveToken(0),))) == ()


def test_what_stays_as_it_is_is_no_difference():
    staged = forge.view_of(staged_volume())
    found = preview(staged, staging.abort(staged, "backup"))
    assert [(each.what, each.name, each.how) for each in found] == [
        ("keyslot", "2", "remove"),
        ("token", "1", "remove"),
        ("area", "40960", "wipe"),
    ]


def test_ranges_that_a_repair_wipes():
    change = Change(wipe=(Extent(61440, 4096), Extent(53248, 4096)))
    assert [(each.name, each.before) for each in preview(OURS, change)] == [
        ("53248", {"size": 4096}),
        ("61440", {"size": 4096}),
    ]


def test_a_keyslot_of_a_type_that_we_do_not_know():
    def add(raw):
        raw["keyslots"]["7"] = {"type": "x", "key_size": 1, "area": {"type": "x", "offset": "61440", "size": "1"}}

    seen = forge.view_of(forge.edited(volume(), add))
    assert keyslot_summary(seen, 7) == {"type": "x", "pbkdf": "", "offset": 61440, "size": 1}
