# SPDX-License-Identifier: GPL-2.0-or-later
from typing import Any

import pytest

from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import Which
from luksrotd.rotation import reconcile
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import RemoveToken, SetToken
from luksrotd.rotation.leftovers import Rules
from luksrotd.rotation.reconcile import Action, Code
from tests.support import forge
from tests.support.planning import KEEP, OLD, after, planned, volume
from tests.support.simengine import make_volume

PLAIN = make_volume([KEEP, OLD])
OURS = volume()
FREE = Extent(45056, 4096)


def findings(image: bytes, *foreign: str) -> list[tuple[Code, Action]]:
    return [(found.code, found.action) for found in reconcile.diagnose(forge.view_of(image), foreign)]


def repaired(image: bytes, **rules: Any) -> Change | None:
    return reconcile.repair(forge.view_of(image), Rules(**rules))


def intent(*extents: Extent, **members: object) -> bytes:
    return forge.with_token(PLAIN, 1, wipe=forge.intent(*extents), **members)


def test_nothing_is_found_on_a_healthy_volume():
    assert findings(OURS) == []
    assert repaired(OURS) is None
    assert not reconcile.needs_heal(forge.view_of(OURS))


def test_an_ordinary_passphrase_is_no_finding():
    assert findings(PLAIN) == []


@pytest.mark.parametrize("which", Which)
def test_a_copy_that_is_not_valid_is_healed(which):
    image = forge.unsealed(OURS, which)
    assert findings(image) == [(Code.HEADER_COPY_BAD, Action.REPAIR)]
    assert reconcile.needs_heal(forge.view_of(image))


@pytest.mark.parametrize("which", Which)
def test_copies_that_differ_are_healed(which):
    image = forge.newer(OURS, [which])
    assert findings(image) == [(Code.HEADER_COPIES_DIFFER, Action.REPAIR)]
    (found,) = reconcile.diagnose(forge.view_of(image))
    assert "3 and 4" in found.message or "4 and 3" in found.message


def test_a_pending_wipe_is_finished_and_its_intent_cleared():
    image = intent(FREE, **{"x-unknown": 1})
    assert findings(image) == [(Code.WIPE_PENDING, Action.REPAIR)]
    change = repaired(image)
    assert change is not None
    assert (change.edits, change.wipe) == ((), (FREE,))
    (clear,) = change.closing
    assert isinstance(clear, SetToken)
    assert clear.body == {n: v for n, v in forge.json_of(image)["tokens"]["0"].items() if n != "wipe"}
    assert clear.fingerprint_of is None


def test_I7_what_was_repaired_needs_no_repair():
    for image in (intent(FREE), forge.keyslot_removed(OURS, 1), forge.keyslot_removed(intent(FREE), 1)):
        change = repaired(image)
        assert change is not None
        mended = after(image, planned(image, change))
        assert findings(mended) == []
        assert repaired(mended) is None


def test_I4_space_that_another_tool_has_taken_meanwhile_is_left_alone():
    taken = forge.view_of(PLAIN).metadata.keyslots[0].area
    change = repaired(intent(taken, FREE))
    assert change is not None
    assert change.wipe == (FREE,)
    # All of it: the intent is cleared all the same.
    change = repaired(intent(taken))
    assert change is not None
    assert (change.wipe, len(change.closing)) == ((), 1)


def test_I4_an_unaligned_keyslot_in_the_way_keeps_the_blocks_that_it_touches():
    image = forge.edited(
        intent(Extent(36864, 5 * 4096)), lambda raw: raw["keyslots"]["1"]["area"].update(offset="45057", size="4095")
    )
    change = repaired(image)
    assert change is not None
    assert change.wipe == (Extent(36864, 8192), Extent(49152, 8192))
    assert planned(image, change)


def test_ranges_of_several_tokens_are_wiped_once():
    image = forge.with_token(intent(FREE), 0, 1, name="spare", wipe=forge.intent(Extent(45056, 8192)))
    change = repaired(image)
    assert change is not None
    assert change.wipe == (Extent(45056, 8192),)


@pytest.mark.parametrize(
    "extent",
    [
        Extent(0, 4096),  # the primary header
        Extent(16384, 4096),  # the secondary
        Extent(28672, 8192),  # begins in it
        Extent(32768 + 7 * 4096, 8192),  # ends in the data
        Extent(1 << 40, 4096),
        Extent(4096, 1 << 60),
        Extent(45056, 512),
        Extent(45057, 4096),
    ],
)
def test_I4_an_intent_that_we_cannot_have_written_is_for_a_person(extent):
    image = intent(extent, FREE)
    assert findings(image) == [(Code.WIPE_INTENT_BAD, Action.PERSON)]
    assert repaired(image) is None


def test_a_bad_intent_does_not_hold_up_a_good_one():
    image = forge.with_token(intent(Extent(0, 4096)), 0, 1, name="spare", wipe=forge.intent(FREE))
    change = repaired(image)
    assert change is not None
    assert change.wipe == (FREE,)
    assert [edit.token for edit in change.closing if isinstance(edit, SetToken)] == [1]


def test_a_token_whose_keyslot_an_admin_has_removed_goes_too():
    image = forge.keyslot_removed(OURS, 1)
    assert findings(image) == [(Code.TOKEN_WITHOUT_KEYSLOT, Action.REPAIR)]
    assert repaired(image) == Change(closing=(RemoveToken(0),))
    assert repaired(image, orphans=False) is None


def test_an_orphan_with_an_intent_is_wiped_even_where_it_stays():
    image = forge.keyslot_removed(intent(FREE), 1)
    change = repaired(image, orphans=False)
    assert change is not None
    assert change.wipe == (FREE,)
    assert isinstance(change.closing[0], SetToken)


def test_an_orphan_with_a_bad_intent_is_for_a_person():
    image = forge.keyslot_removed(intent(Extent(0, 4096)), 1)
    assert findings(image) == [(Code.WIPE_INTENT_BAD, Action.PERSON)]
    assert repaired(image) is None


@pytest.mark.parametrize(
    ("image", "code"),
    [
        (forge.with_token(PLAIN, 1, version=9), Code.TOKEN_UNREADABLE),
        (forge.with_token(PLAIN, 1, state=[]), Code.TOKEN_UNREADABLE),
        (forge.with_token(PLAIN, 1, keyslots=["0", "1"]), Code.TOKEN_AMBIGUOUS),
        (
            forge.edited(OURS, lambda raw: raw["tokens"].update({"9": {"type": "x", "keyslots": ["1"]}})),
            Code.TOKEN_AMBIGUOUS,
        ),
        (forge.with_token(OURS, 0, 1), Code.NAME_AMBIGUOUS),
        (forge.with_token(PLAIN, 1, fingerprint="sha256:x"), Code.KEYSLOT_CHANGED),
    ],
)
def test_I5_what_we_must_not_decide_is_for_a_person(image, code):
    assert findings(image) == [(code, Action.PERSON)]
    assert repaired(image) is None


def test_a_foreign_signature_is_for_a_person():
    assert findings(OURS, "ext4") == [(Code.FOREIGN_SIGNATURE, Action.PERSON)]


def test_nothing_is_mended_under_requirements():
    image = forge.edited(intent(FREE), lambda raw: raw["config"].update(requirements={"mandatory": ["x"]}))
    image = forge.unsealed(image, Which.SECONDARY)
    assert findings(image) == [
        (Code.HEADER_COPY_BAD, Action.PERSON),
        (Code.WIPE_PENDING, Action.PERSON),
        (Code.REQUIREMENTS, Action.PERSON),
    ]
    assert repaired(image) is None
    assert not reconcile.needs_heal(forge.view_of(image))
