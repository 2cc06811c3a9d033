# SPDX-License-Identifier: GPL-2.0-or-later
"""From a backup and a volume to a change, or a refusal."""

import base64
from dataclasses import replace

import pytest

from luksrotd.errors import (
    BackupMismatch,
    ConsistencyError,
    FormatError,
    LastKeyslot,
    NeedsPerson,
    NeedsReconcile,
    NoFreeArea,
    NoFreeKeyslot,
    RequirementsPresent,
)
from luksrotd.luks2 import layout
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import Which
from luksrotd.luks2.metadata import serialise
from luksrotd.rotation import restore
from luksrotd.rotation.change import Change, Start
from luksrotd.rotation.edits import RemoveToken, SetToken
from luksrotd.rotation.plan import plan_commit, plan_revival
from luksrotd.rotation.preview import preview, restored
from luksrotd.rotation.protocol import CommitPlan, Phase
from luksrotd.rotation.restore import Backup
from tests.support import forge
from tests.support.planning import KEEP, OLD, after, noise, planned, shadowed, volume
from tests.support.simengine import HDR_SIZE, KEY_SIZE, make_volume, opened_by

BACKUP = volume()
HEADERS = 2 * HDR_SIZE
SLOT = layout.keyslot_area_size(KEY_SIZE)
#: Of the same volume: all keyslots anew, in the same places.
OTHER = forge.newer(make_volume([KEEP, b"other", b"third"], seed=5), forge.BOTH, 6)


def backup_of(image: bytes) -> Backup:
    seen = forge.view_of(image)
    areas = {area: image[area.offset : area.end] for area in seen.pair.referenced}
    return restore.read_backup(restore.backup_image(seen, areas))


def prepared(image: bytes, backup: bytes = BACKUP, *, prove: bool = False) -> Change:
    seen = forge.view_of(image)
    areas = {area: image[area.offset : area.end] for area in seen.pair.referenced}
    return restore.prepare(seen, areas, backup_of(backup), prove=prove)


def done(image: bytes, backup: bytes = BACKUP) -> bytes:
    return after(image, planned(image, prepared(image, backup)))


def area(number: int) -> Extent:
    return Extent(HEADERS + number * SLOT, SLOT)


def wiped_record(change: Change) -> object:
    (record,) = change.edits
    assert isinstance(record, SetToken)
    return record.body["wipe"]


# ---- backups


def test_a_backup_is_as_long_as_the_header_area_and_has_nothing_that_is_not_named():
    seen = forge.view_of(BACKUP)
    areas = {each: BACKUP[each.offset : each.end] for each in seen.pair.referenced}
    content = restore.backup_image(seen, areas)
    assert content[: HEADERS + 2 * SLOT] == BACKUP[: HEADERS + 2 * SLOT]
    assert content[HEADERS + 2 * SLOT :] == bytes(6 * SLOT)
    assert len(content) == seen.pair.length


def test_a_header_that_is_worth_a_backup():
    restore.check_backup(forge.view_of(BACKUP))


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (forge.newer(BACKUP, [Which.PRIMARY]), NeedsReconcile),
        (forge.unsealed(BACKUP, Which.SECONDARY), NeedsReconcile),
        (forge.with_token(BACKUP, 1, wipe=forge.intent(area(3))), NeedsReconcile),
        (
            forge.edited(BACKUP, lambda raw: raw["config"].update(requirements={"mandatory": ["x"]})),
            RequirementsPresent,
        ),
    ],
)
def test_a_header_that_is_not(image, error):
    with pytest.raises(error, match="cannot back up the header"):
        restore.check_backup(forge.view_of(image))


def test_one_good_copy_is_enough_and_the_newer_one_counts():
    torn = restore.read_backup(forge.unsealed(BACKUP, Which.PRIMARY))
    assert torn.view.metadata.raw == forge.view_of(BACKUP).metadata.raw
    edited = forge.edited(BACKUP, lambda raw: raw["tokens"].clear(), [Which.SECONDARY])
    assert restore.read_backup(forge.newer(edited, [Which.SECONDARY])).view.keys == ()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(4096),
        b"LUKS\xba\xbe\0\1".ljust(HEADERS, b"\0"),
        BACKUP[: HEADERS + SLOT],
        BACKUP[: HEADERS + 8 * SLOT - 1],
        forge.unsealed(forge.unsealed(BACKUP, Which.PRIMARY), Which.SECONDARY),
        # Its checksum is right, it is newer, and only libcryptsetup may accept it.
        forge.newer(forge.edited(BACKUP, lambda raw: raw["tokens"].clear() or raw.update(odd=2**65), [Which.PRIMARY]),
                    [Which.PRIMARY]),
    ],
)  # fmt: skip
def test_what_is_no_backup(content):
    with pytest.raises(FormatError, match="cannot use the backup"):
        restore.read_backup(content)


# ---- where the keyslots go


def test_nothing_is_to_be_done_where_nothing_differs():
    assert prepared(BACKUP) == Change()
    assert prepared(forge.newer(BACKUP, forge.BOTH, 7)) == Change()
    assert prepared(BACKUP, prove=True) == Change(survivors=frozenset({0, 1}))


def test_a_token_alone_writes_no_keyslot():
    image = forge.edited(BACKUP, lambda raw: raw["tokens"].clear())
    plan = planned(image, prepared(image))
    assert [step.phase for step in plan.steps] == [Phase.HEADER_PRIMARY, Phase.HEADER_SECONDARY]
    assert [write.offset for write in plan.held] == [HEADERS, HEADERS + SLOT]
    assert forge.view_of(done(image)).metadata.raw == forge.view_of(BACKUP).metadata.raw


@pytest.mark.parametrize("field", ["label", "subsystem"])
def test_a_field_alone_is_restored(field):
    start = prepared(BACKUP, forge.with_fields(BACKUP, **{field: b"no text: \xff"})).start
    assert start is not None
    for which in Which:
        assert forge.fields_of(start.pair.raw, which)[field].rstrip(b"\0") == b"no text: \xff"
    assert b"text" in done(BACKUP, forge.with_fields(BACKUP, **{field: b"text"}))[:HDR_SIZE]


def test_I9_the_sequence_number_rises_above_both():
    for image, backup in ((forge.newer(OTHER, forge.BOTH, 90), BACKUP), (OTHER, forge.newer(BACKUP, forge.BOTH, 90))):
        first = max(forge.view_of(image).seqid, forge.view_of(backup).seqid)
        assert forge.view_of(done(image, backup)).seqid > first


def test_I4_keyslots_that_lie_over_others_go_into_free_space():
    change = prepared(OTHER)
    assert change.start is not None
    assert set(change.start.areas) == {area(3), area(4)}
    image = after(OTHER, planned(OTHER, change))
    assert [opened_by(image, secret) for secret in (KEEP, OLD, b"other", b"third")] == [[0], [1], [], []]
    (key,) = forge.view_of(image).keys
    assert key.complete, "the fingerprint of a moved keyslot is that of its new place"
    assert wiped_record(change) == [{"offset": str(HEADERS), "size": str(3 * SLOT)}]
    assert change.closing == (RemoveToken(1),)


def test_a_key_that_another_tool_has_changed_stays_so():
    stale = forge.with_token(BACKUP, 1, fingerprint="sha256:0")
    (key,) = forge.view_of(done(OTHER, stale)).keys
    assert key.stale
    (bare,) = forge.view_of(done(OTHER, forge.edited(BACKUP, lambda raw: raw["tokens"]["0"].pop("fingerprint")))).keys
    assert bare.complete
    assert bare.token.fingerprint is None


def test_a_key_that_the_volume_has_elsewhere_stays_there():
    once = done(OTHER)
    assert prepared(once) == Change()
    alone = forge.edited(once, lambda raw: raw["tokens"].clear())
    assert not [step for step in planned(alone, prepared(alone)).steps if step.phase is Phase.NEW_AREA]


def test_equal_bytes_twice_are_two_keyslots():
    blank = forge.put(BACKUP, HEADERS, bytes(2 * SLOT))
    image = forge.put(OTHER, HEADERS, bytes(SLOT))
    change = prepared(image, blank)
    assert change.start is not None
    assert len(change.start.areas) == 2


def test_a_damaged_keyslot_is_written_elsewhere_and_its_space_wiped():
    image = forge.put(BACKUP, area(1).offset, bytes(SLOT))
    change = prepared(image)
    assert change.start is not None
    assert set(change.start.areas) == {area(0), area(2)}
    assert wiped_record(change) == forge.intent(area(1))
    assert opened_by(after(image, planned(image, change)), OLD) == [1]


def test_the_largest_goes_first_into_the_first_gap_that_is_wide_enough():
    def widened(raw):
        raw["keyslots"]["1"]["area"]["size"] = str(2 * SLOT)

    backup = forge.edited(make_volume([KEEP, OLD]), widened)
    change = prepared(
        forge.edited(OTHER, lambda raw: raw["keyslots"]["2"]["area"].update(offset=str(area(3).offset))), backup
    )
    assert change.start is not None
    assert set(change.start.areas) == {Extent(area(4).offset, 2 * SLOT), area(2)}


def test_a_gap_behind_an_area_that_is_not_aligned_begins_at_the_next_block():
    def short(raw):
        raw["keyslots"]["2"]["area"] |= {"offset": str(area(2).offset), "size": "512"}

    third = make_volume([KEEP, OLD, b"third"], seed=1)
    backup = forge.edited(third, short)
    image = forge.edited(OTHER, lambda raw: raw["keyslots"].update({"2": forge.json_of(backup)["keyslots"]["2"]}))
    image = forge.put(image, area(2).offset, backup[area(2).offset :][:512])
    change = prepared(image, backup)
    assert change.start is not None
    assert set(change.start.areas) == {Extent(area(2).offset, 512), area(3), area(4)}
    with pytest.raises(NeedsPerson, match="not aligned"):
        prepared(image, BACKUP)  # where it would have to be wiped


def test_no_room_beside_what_is_referenced():
    full = make_volume([bytes([65 + n]) for n in range(7)], seed=6)
    with pytest.raises(NoFreeArea, match=r"keyslot 1 .* remove a keyslot"):
        prepared(full)


def test_a_keyslot_of_another_kind_stays_where_it_was_or_is_not_restored():
    def foreign(raw):
        raw["keyslots"]["2"] = {
            "type": "odd", "key_size": 1, "area": {"type": "none", "offset": str(area(5).offset), "size": str(SLOT)}
        }  # fmt: skip

    backup = forge.edited(BACKUP, foreign)
    assert forge.view_of(done(OTHER, backup)).metadata.keyslots[2].area == area(5)
    backup = forge.edited(backup, lambda raw: raw["keyslots"]["2"]["area"].update(offset=str(area(2).offset)))
    with pytest.raises(NeedsPerson, match="keyslot 2 of type 'odd'"):
        prepared(OTHER, backup)


def test_an_area_that_is_not_aligned_is_not_written():
    backup = forge.edited(BACKUP, lambda raw: raw["keyslots"]["1"]["area"].update(offset=str(area(4).offset + 512)))
    with pytest.raises(NeedsPerson, match="not aligned"):
        prepared(OTHER, backup)


# ---- what waited to be wiped


def test_what_the_backup_left_to_be_wiped_is_wiped_where_it_is_free():
    pending = forge.with_token(
        BACKUP, 1, wipe=forge.intent(area(2), area(5), Extent(0, 4096), Extent(area(6).offset, 512))
    )
    change = prepared(OTHER, pending)
    assert change.wipe == (area(5),)
    image = after(OTHER, planned(OTHER, change))
    assert forge.view_of(image).pending == ()
    assert image[area(5).offset : area(5).end] == noise(SLOT)


def test_a_record_in_the_backup_goes_the_same_way():
    def recorded(raw):
        raw["tokens"]["3"] = {"type": "luksrotd-wipe", "keyslots": [], "version": 1, "wipe": forge.intent(area(5))}

    image = done(OTHER, forge.edited(BACKUP, recorded))
    assert set(forge.view_of(image).metadata.tokens) == {0}
    assert image[area(5).offset : area(5).end] == noise(SLOT)


def with_all_tokens(image: bytes, ours: bool) -> bytes:
    def fill(raw):
        for number in range(0 if not ours else 1, layout.TOKENS_MAX):
            raw["tokens"][str(number)] = {"type": "x", "keyslots": []}

    return forge.edited(image, fill)


def test_without_a_free_token_a_key_of_ours_carries_the_record():
    backup = with_all_tokens(BACKUP, ours=True)
    change = prepared(OTHER, backup)
    (record,), (clear,) = change.edits, change.closing
    assert isinstance(record, SetToken)
    assert isinstance(clear, SetToken)
    assert (record.token, clear.token) == (0, 0)
    assert record.body["wipe"] == forge.intent(Extent(HEADERS, 3 * SLOT))
    assert forge.view_of(done(OTHER, backup)).pending == ()


def test_without_either_there_is_no_restore_that_has_to_wipe():
    backup = with_all_tokens(BACKUP, ours=False)
    with pytest.raises(NoFreeKeyslot, match="all 32"):
        prepared(OTHER, backup)
    image = forge.edited(backup, lambda raw: raw["tokens"].pop("7"))
    assert forge.view_of(done(image, backup)).metadata.raw == forge.view_of(backup).metadata.raw


def test_more_areas_than_a_record_can_name():
    backup = make_volume([KEEP], areas=140, hdr_size=65536)
    many = make_volume([KEEP, *(bytes([n]) for n in range(1, 70))], areas=140, seed=3, hdr_size=65536)
    many = forge.edited(
        many, lambda raw: [raw["keyslots"][str(n)]["area"].update(offset=str(131072 + 2 * n * SLOT)) for n in range(70)]
    )
    with pytest.raises(NeedsPerson, match="too many"):
        prepared(many, backup)


# ---- refusals


def with_digest(image: bytes, **members: object) -> bytes:
    return forge.edited(image, lambda raw: raw["digests"]["0"].update(members))


@pytest.mark.parametrize(
    ("backup", "message"),
    [
        (make_volume([KEEP], uuid="11111111-2222-4333-8444-555555555555"), "of the volume 11111111"),
        (with_digest(BACKUP, salt="b3RoZXI="), "another volume key"),
        (with_digest(BACKUP, digest="b3RoZXI="), "another volume key"),
        (with_digest(BACKUP, iterations=9), "another volume key"),
        (with_digest(BACKUP, hash="sha1"), "another volume key"),
        (with_digest(BACKUP, type="other"), "another volume key"),
        (make_volume([KEEP], areas=9), "keyslots areas"),
        (forge.edited(BACKUP, lambda raw: raw["segments"]["0"].update(sector_size=4096)), "encrypted in another way"),
        (forge.edited(BACKUP, lambda raw: raw["segments"]["0"].update(iv_tweak="8")), "encrypted in another way"),
        (forge.edited(BACKUP, lambda raw: raw["segments"]["0"].update(offset="1048576")), "encrypted in another way"),
    ],
)
def test_the_header_of_other_data_is_refused(backup, message):
    with pytest.raises(BackupMismatch, match=message):
        prepared(OTHER, backup)


def test_requirements_of_either_are_refused():
    required = forge.edited(BACKUP, lambda raw: raw["config"].update(requirements={"mandatory": ["x"]}))
    with pytest.raises(RequirementsPresent, match="cannot restore this header"):
        prepared(OTHER, required)
    with pytest.raises(RequirementsPresent, match="cannot change the volume"):
        prepared(required, OTHER)


def test_I5_a_backup_that_nothing_opens_is_refused():
    backup = forge.keyslot_removed(forge.keyslot_removed(BACKUP, 1), 0)
    with pytest.raises(LastKeyslot):
        prepared(OTHER, backup)


def test_a_sequence_number_at_the_end_of_numbers_is_refused():
    with pytest.raises(FormatError, match=r"cannot use the backup: .* out of range"):
        prepared(OTHER, forge.with_fields(BACKUP, seqid=2**64 - 1))


def test_the_proof_is_a_keyslot_of_the_backup():
    assert prepared(OTHER, prove=True).survivors == {0, 1}
    assert prepared(OTHER, prove=True).needs_unlock


# ---- a device that has lost its header


LOST = bytes(HEADERS) + OTHER[HEADERS:]


def revived(image: bytes, backup: Backup) -> CommitPlan:
    change = restore.prepare_lost(image[:HEADERS], backup)
    return plan_revival(image[:HEADERS], change, shadowed(image, change), noise)


def test_a_device_without_a_header_gets_all_of_it():
    plan = revived(LOST, backup_of(BACKUP))
    assert (plan.seqid_before, plan.held) == (0, ())
    image = after(LOST, plan)
    assert [opened_by(image, secret) for secret in (KEEP, OLD)] == [[0], [1]]
    assert forge.view_of(image).metadata.raw == forge.view_of(BACKUP).metadata.raw
    assert restore.prepare_lost(LOST[:HEADERS], backup_of(BACKUP), prove=True).survivors == {0, 1}


def test_what_waited_to_be_wiped_is_wiped_there_too():
    pending = backup_of(forge.with_token(BACKUP, 1, wipe=forge.intent(area(5))))
    image = after(LOST, revived(LOST, pending))
    assert image[area(5).offset : area(5).end] == noise(SLOT)
    assert forge.view_of(image).pending == ()


def test_a_backup_with_one_copy_makes_two_with_salts_of_their_own():
    half = restore.read_backup(forge.erased(BACKUP, Which.SECONDARY))
    image = after(LOST, revived(LOST, half))
    salts = [forge.fields_of(image, which)["salt"] for which in Which]
    assert salts[0] == forge.fields_of(BACKUP, Which.PRIMARY)["salt"] != salts[1]
    assert forge.pair_of(image).agree


@pytest.mark.parametrize("which", Which)
def test_what_is_left_of_another_header_is_believed(which):
    other = make_volume([KEEP], uuid="11111111-2222-4333-8444-555555555555")
    left = forge.unsealed(other, which)[forge.offset_of(other, which) :][:HDR_SIZE]
    raw = forge.put(bytes(HEADERS), forge.offset_of(other, which), left)
    with pytest.raises(BackupMismatch, match=f"left of the {which} copy is of 11111111"):
        restore.prepare_lost(raw, backup_of(BACKUP))
    own = forge.unsealed(BACKUP, which)[forge.offset_of(BACKUP, which) :][:HDR_SIZE]
    assert restore.prepare_lost(forge.put(bytes(HEADERS), forge.offset_of(BACKUP, which), own), backup_of(BACKUP))


# ---- what the planner refuses


def test_a_revival_needs_a_header():
    with pytest.raises(ConsistencyError, match="no header to start from"):
        plan_revival(bytes(HEADERS), Change(), shadowed(BACKUP, Change()), noise)
    change = restore.prepare_lost(LOST[:HEADERS], backup_of(BACKUP))
    with pytest.raises(ConsistencyError, match="no header to start from"):
        plan_revival(b"", change, shadowed(LOST, change), noise)


def planned_from(start: Start, image: bytes = OTHER) -> CommitPlan:
    change = replace(prepared(OTHER), start=start)
    return plan_commit(forge.pair_of(image), change, shadowed(image, change), noise)


def test_a_start_that_is_not_whole_is_refused():
    start = prepared(OTHER).start
    assert start is not None
    for areas in ({}, {**start.areas, area(7): bytes(SLOT)}, dict.fromkeys(start.areas, b"short")):
        with pytest.raises(ConsistencyError, match="not whole"):
            planned_from(replace(start, areas=areas))


def test_I9_a_start_that_is_not_newer_is_refused():
    start = prepared(OTHER).start
    assert start is not None
    with pytest.raises(ConsistencyError, match="not higher"):
        planned_from(start, forge.newer(OTHER, forge.BOTH, 1))


def test_I4_a_start_over_what_the_device_references_is_refused():
    backup = backup_of(BACKUP)
    raised = forge.newer(BACKUP, forge.BOTH, 50)
    shifted = forge.edited(raised, lambda raw: raw["keyslots"]["1"]["area"].update(offset=str(area(1).offset + 512)))
    there = forge.pair_of(shifted)
    with pytest.raises(ConsistencyError, match="not free"):
        planned_from(Start(there, {where: bytes(SLOT) for where in there.referenced}))
    # The very same range counts as held: the commit insists on its bytes.
    plan = planned_from(Start(forge.pair_of(raised), backup.areas))
    assert [write.data for write in plan.held] == list(backup.areas.values())


def test_I5_a_start_of_other_data_is_refused():
    start = prepared(OTHER).start
    assert start is not None
    with pytest.raises(ConsistencyError, match="another volume key"):
        planned_from(start, with_digest(OTHER, salt="b3RoZXI="))


# ---- what is shown beforehand


def shown(image: bytes, backup: bytes) -> list[tuple[str, str, str]]:
    return [(one.what, one.name, one.how) for one in preview(forge.view_of(image), prepared(image, backup))]


def test_the_difference_names_keyslots_tokens_and_areas():
    assert shown(OTHER, BACKUP) == [
        ("keyslot", "0", "replace"),
        ("keyslot", "1", "replace"),
        ("keyslot", "2", "remove"),
        ("token", "0", "add"),
        ("area", "32768", "wipe"),
        ("area", "36864", "wipe"),
        ("area", "40960", "wipe"),
        ("area", "45056", "rewrite"),
        ("area", "49152", "rewrite"),
    ]


def test_no_difference():
    assert shown(BACKUP, BACKUP) == []


def test_other_settings_and_other_places_of_the_same_key():
    less = forge.edited(BACKUP, lambda raw: raw["keyslots"]["1"].update(priority=2))
    assert shown(less, BACKUP) == [("keyslot", "1", "change")]
    damaged = forge.put(BACKUP, area(1).offset, bytes(SLOT))
    assert ("keyslot", "1", "move") in shown(damaged, BACKUP)


def test_keyslots_without_a_salt_are_compared_whole():
    def foreign(size):
        slot = {
            "type": "odd",
            "key_size": size,
            "area": {"type": "none", "offset": str(area(5).offset), "size": "4096"},
        }
        return lambda raw: raw["keyslots"].update({"2": slot})

    one, two = (forge.edited(BACKUP, foreign(size)) for size in (1, 2))
    assert shown(one, two) == [("keyslot", "2", "replace")]
    assert shown(one, one) == []


def test_fields_config_and_unknown_objects():
    def edit(raw):
        raw["config"]["flags"] = ["allow-discards"]
        raw["extra"] = {"a": 1}
        raw["tokens"]["0"]["data"] = {"ref": "other"}

    other = forge.edited(forge.with_fields(BACKUP, label=b"new"), edit)
    assert shown(other, BACKUP) == [
        ("token", "0", "change"),
        ("header", "label", "change"),
        ("header", "config", "change"),
        ("header", "extra", "remove"),
    ]
    assert shown(BACKUP, other)[-1] == ("header", "extra", "add")


def test_a_lost_header_is_all_new():
    change = restore.prepare_lost(LOST[:HEADERS], backup_of(BACKUP))
    assert change.start is not None
    found = restored(None, change, change.start)
    assert [(one.what, one.name, one.how) for one in found] == [
        ("keyslot", "0", "add"),
        ("keyslot", "1", "add"),
        ("token", "0", "add"),
        ("area", "32768", "rewrite"),
        ("area", "36864", "rewrite"),
    ]
    assert found[0].before == {}
    assert found[0].after["offset"] == 32768


def test_no_passphrase_is_shown():
    salt = forge.json_of(BACKUP)["keyslots"]["0"]["kdf"]["salt"]
    assert base64.b64decode(salt)
    assert salt.encode() not in serialise(
        {str(n): [d.before, d.after] for n, d in enumerate(preview(forge.view_of(OTHER), prepared(OTHER)))}
    )
