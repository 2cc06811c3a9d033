# SPDX-License-Identifier: GPL-2.0-or-later
from dataclasses import replace

import pytest

from luksrotd.errors import ConsistencyError
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import Which
from luksrotd.rotation import keys, reconcile
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import AddKeyslot, DestroyKeyslot
from luksrotd.rotation.fingerprint import fingerprint
from luksrotd.rotation.plan import ShadowResult, plan_commit, plan_heal
from luksrotd.rotation.protocol import ORDER, CommitPlan, Phase
from tests.support import forge
from tests.support.planning import ENROLL, FRESH, KEEP, NEW, OLD, ROTATE, after, noise, planned, shadowed, volume
from tests.support.simengine import HDR_SIZE, make_volume, opened_by

OURS = volume()
HEADERS = 2 * HDR_SIZE
ROTATION = keys.rotate(forge.view_of(OURS), ROTATE)
RESULT = shadowed(OURS, ROTATION)
(BEHIND,) = RESULT.data
OLD_AREA = Extent(36864, 4096)
NEW_AREA = Extent(40960, 4096)


def plan(result: ShadowResult = RESULT, change: Change = ROTATION, image: bytes = OURS) -> CommitPlan:
    return plan_commit(forge.pair_of(image), change, result, noise)


def tampered(offset: int, data: bytes) -> ShadowResult:
    """The shadow with other bytes behind the headers."""
    return replace(RESULT, data={BEHIND: forge.put(RESULT.data[BEHIND], offset - BEHIND.offset, data)})


def in_headers(headers: bytes, edit) -> bytes:
    """Both copies in a shadow's headers, edited."""
    return edit(headers + OURS[HEADERS:])[:HEADERS]


def test_a_rotation_has_all_phases():
    made = plan()
    assert tuple(step.phase for step in made.steps) == ORDER
    assert (made.base, made.committed, made.final) == (OURS[:HEADERS], RESULT.committed, RESULT.final)
    assert (made.seqid_before, made.seqid_after) == (3, 7)
    image = after(OURS, made)
    assert [opened_by(image, secret) for secret in (KEEP, OLD, FRESH)] == [[0], [], [2]]
    assert forge.view_of(image).pending == ()


def test_I4_each_phase_writes_only_where_it_may():
    for step in plan().steps:
        within = {
            Phase.NEW_AREA: NEW_AREA,
            Phase.WIPE_OLD: OLD_AREA,
            Phase.HEADER_PRIMARY: Extent(0, HDR_SIZE),
            Phase.CLEAR_PRIMARY: Extent(0, HDR_SIZE),
            Phase.HEADER_SECONDARY: Extent(HDR_SIZE, HDR_SIZE),
            Phase.CLEAR_SECONDARY: Extent(HDR_SIZE, HDR_SIZE),
        }[step.phase]
        assert all(within.contains(write.extent) for write in step.writes)


def test_the_intent_is_on_disk_before_the_wipe_and_gone_at_the_end():
    made = plan()
    assert forge.view_of(made.committed + OURS[HEADERS:]).pending == (OLD_AREA,)
    assert forge.view_of(made.final + OURS[HEADERS:]).pending == ()


def test_the_new_area_is_key_material_and_noise_behind_it():
    (write,) = next(step for step in plan().steps if step.phase is Phase.NEW_AREA).writes
    # 4000 bytes of material, in whole sectors.
    assert write.data[:4096] == RESULT.data[BEHIND][8192 : 8192 + 4096]
    assert write.extent == NEW_AREA
    wide = in_headers(RESULT.committed, lambda image: forge.edited(image, widened))
    end = in_headers(RESULT.final, lambda image: forge.edited(image, widened))
    (write,) = plan(replace(RESULT, committed=wide, final=end)).steps[0].writes
    assert write.data[4096:] == noise(4096)


def widened(raw):
    raw["keyslots"]["2"]["area"]["size"] = "8192"


def test_an_enrolment_neither_wipes_nor_clears():
    plain = make_volume([KEEP, OLD])
    made = planned(plain, keys.enroll(forge.view_of(plain), ENROLL))
    assert [step.phase for step in made.steps] == [Phase.NEW_AREA, Phase.HEADER_PRIMARY, Phase.HEADER_SECONDARY]
    assert made.committed == made.final


def test_a_repair_begins_with_the_wipe():
    image = forge.with_token(make_volume([KEEP, OLD]), 1, wipe=forge.intent(NEW_AREA))
    change = reconcile.repair(forge.view_of(image))
    assert change is not None
    made = planned(image, change)
    assert [step.phase for step in made.steps] == [Phase.WIPE_OLD, Phase.CLEAR_PRIMARY, Phase.CLEAR_SECONDARY]
    assert made.base == made.committed


def test_several_keyslots_can_come_and_go_at_once():
    image = make_volume([KEEP, OLD, b"older"])
    change = Change(
        (AddKeyslot(3), AddKeyslot(4, pbkdf=replace(AddKeyslot(4).pbkdf)), DestroyKeyslot(1), DestroyKeyslot(2))
    )
    change = replace(
        change, edits=tuple(replace(e, pbkdf=ENROLL.pbkdf) if isinstance(e, AddKeyslot) else e for e in change.edits)
    )
    image = after(image, planned(image, change))
    assert [opened_by(image, secret) for secret in (KEEP, OLD, b"older", FRESH)] == [[0], [], [], [3, 4]]


# ---- what is refused


@pytest.mark.parametrize("which", Which)
def test_copies_that_differ_are_not_built_upon(which):
    with pytest.raises(ConsistencyError, match="two header copies differ"):
        plan(image=forge.newer(OURS, [which]))


@pytest.mark.parametrize("part", ["committed", "final"])
def test_a_shadow_without_two_good_copies_is_refused(part):
    headers = getattr(RESULT, part)
    for bad in (
        bytes(HEADERS),
        b"",
        b"LUKS\xba\xbe\0\1".ljust(HEADERS, b"\0"),
        in_headers(headers, lambda image: forge.unsealed(image, Which.PRIMARY)),
        in_headers(headers, lambda image: forge.newer(image, [Which.SECONDARY])),
    ):
        with pytest.raises(ConsistencyError, match="cannot use the shadow"):
            plan(replace(RESULT, **{part: bad}))


def test_I2_each_copy_is_compared_with_its_own_past():
    salted = in_headers(RESULT.committed, lambda image: forge.with_fields(image, [Which.SECONDARY], salt=b"x" * 64))
    with pytest.raises(ConsistencyError, match="salt of the secondary header"):
        plan(replace(RESULT, committed=salted))


def test_I3_a_difference_between_the_two_stages_is_refused():
    odd = in_headers(
        RESULT.final, lambda image: forge.edited(image, lambda raw: raw["tokens"]["0"].update(generation=9))
    )
    with pytest.raises(ConsistencyError, match="tokens 0"):
        plan(replace(RESULT, final=odd))


def moved(offset: int, size: int = 4096):
    def edit(raw):
        raw["keyslots"]["2"]["area"] |= {"offset": str(offset), "size": str(size)}
        raw["tokens"]["0"]["fingerprint"] = fingerprint(raw["keyslots"]["2"])

    return edit


def with_new_area(offset: int, size: int = 4096) -> ShadowResult:
    return replace(
        RESULT,
        committed=in_headers(RESULT.committed, lambda image: forge.edited(image, moved(offset, size))),
        final=in_headers(RESULT.final, lambda image: forge.edited(image, moved(offset, size))),
    )


@pytest.mark.parametrize("offset", [OLD_AREA.offset, OLD_AREA.offset + 512])
def test_I4_a_new_area_over_one_that_is_still_referenced_is_refused(offset):
    # What destroy-before-add would lead to.
    with pytest.raises(ConsistencyError, match=f"at {offset}: that space is not free"):
        plan(with_new_area(offset))


def test_an_unaligned_new_area_is_refused():
    with pytest.raises(ConsistencyError, match="not aligned"):
        plan(replace(with_new_area(40961, 4095), data={}))


def test_bytes_that_nobody_asked_for_are_refused():
    keep = forge.view_of(OURS).metadata.keyslots[0].area
    for offset in (keep.offset, keep.end - 1, NEW_AREA.end, BEHIND.end - 1):
        with pytest.raises(ConsistencyError, match="changed bytes of the shadow"):
            plan(tampered(offset, b"\x5a"))


def test_bytes_of_the_retired_area_may_be_anything():
    assert plan(tampered(OLD_AREA.offset, b"\x5a" * 4096))


def test_a_shadow_in_many_parts_is_put_together():
    whole = RESULT.data[BEHIND]
    parts = {Extent(BEHIND.offset + at, 512): whole[at : at + 512] for at in range(0, len(whole), 512)}
    assert plan(replace(RESULT, data=parts)) == plan()


# ---- wiping


def wiping(*extents: Extent, image: bytes = OURS) -> CommitPlan:
    return planned(image, Change(wipe=extents))


@pytest.mark.parametrize(
    ("extent", "message"),
    [
        (Extent(0, 4096), "in use"),
        (Extent(28672, 4096), "in use"),
        (Extent(28672, 8192), "in use"),
        (Extent(32768, 4096), "in use"),
        (Extent(36864, 8192), "in use"),
        (Extent(61440, 8192), "in use"),
        (Extent(1 << 50, 4096), "in use"),
        (Extent(40960, 512), "not aligned"),
        (Extent(40961, 4096), "not aligned"),
    ],
)
def test_I4_only_free_keyslot_space_is_wiped(extent, message):
    with pytest.raises(ConsistencyError, match=message):
        wiping(extent)


def test_free_keyslot_space_can_be_wiped():
    (step,) = wiping(NEW_AREA, Extent(49152, 8192)).steps
    assert [write.extent for write in step.writes] == [NEW_AREA, Extent(49152, 8192)]


def test_I4_an_area_that_is_only_given_up_at_the_end_is_not_wiped_before():
    change = Change(closing=(DestroyKeyslot(1),), wipe=(OLD_AREA,))
    with pytest.raises(ConsistencyError, match="in use"):
        planned(OURS, change)


def test_I4_a_wipe_beside_the_retired_areas_takes_nothing_that_was_referenced():
    image = make_volume([KEEP, OLD])
    # Keyslot 1 goes, and only it: a range that reaches from it into free space is not what was retired.
    change = Change((DestroyKeyslot(1),), wipe=(Extent(36864, 8192),))
    with pytest.raises(ConsistencyError, match="a keyslot still has them"):
        planned(image, change)


# ---- healing


@pytest.mark.parametrize("which", Which)
@pytest.mark.parametrize("damage", [forge.unsealed, forge.erased])
def test_healing_writes_the_losing_copy_and_nothing_else(which, damage):
    image = damage(OURS, which)
    healed = OURS[:HEADERS]
    made = plan_heal(forge.pair_of(image), healed)
    (step,) = made.steps
    assert step.phase is {Which.PRIMARY: Phase.HEADER_PRIMARY, Which.SECONDARY: Phase.HEADER_SECONDARY}[which]
    assert after(image, made) == OURS
    start = forge.offset_of(OURS, which)
    assert all(Extent(start, HDR_SIZE).contains(write.extent) for write in made.writes)


def test_healing_is_refused_where_there_is_nothing_to_heal():
    with pytest.raises(ConsistencyError, match="copies agree"):
        plan_heal(forge.pair_of(OURS), OURS[:HEADERS])


def test_healing_is_refused_where_libcryptsetup_chose_the_other_copy():
    image = forge.newer(OURS, [Which.SECONDARY])
    with pytest.raises(ConsistencyError, match="prefers the other copy"):
        plan_heal(forge.pair_of(image), OURS[:HEADERS])


def test_healing_is_refused_where_the_copies_differ_still():
    image = forge.newer(OURS, [Which.SECONDARY])
    with pytest.raises(ConsistencyError, match="two header copies differ"):
        plan_heal(forge.pair_of(image), image[:HEADERS])


def test_the_secret_of_the_worker_has_the_name_that_the_edit_gives_it():
    assert ROTATION.added[0].secret == NEW
