# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of docs/spec/reconcile.md, row by row: each test builds exactly that state."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import Which
from luksrotd.names import TOKEN_TYPE, WIPE_TOKEN_TYPE
from luksrotd.rotation import reconcile
from luksrotd.rotation import token as tokens
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import DestroyKeyslot, RemoveToken, SetToken
from luksrotd.rotation.leftovers import Rules
from luksrotd.rotation.reconcile import Action, Code, Finding
from tests.support import forge
from tests.support.planning import FRESH, KEEP, OLD, after, planned
from tests.support.simengine import make_volume

PLAIN = make_volume([KEEP, OLD, FRESH], areas=40)
AREAS = [PLAIN_AREA.area for PLAIN_AREA in forge.view_of(PLAIN).metadata.keyslots.values()]
FREE = Extent(65536, 4096)
EXPIRY = datetime(2026, 6, 1, tzinfo=UTC)
LATER = EXPIRY + timedelta(days=1)


def paired(*keys: Mapping[str, Any], image: bytes = PLAIN) -> bytes:
    """Tokens 0, 1, … of ours: the first names keyslot 1, the next keyslot 2; ``keyslot=None`` for none."""
    for number, members in enumerate(keys):
        rest = {"generation": number + 1} | dict(members)
        image = forge.with_token(image, rest.pop("keyslot", number + 1), number, **rest)
    return image


def recorded(image: bytes, *extents: Extent, number: int = 7) -> bytes:
    return forge.edited(image, lambda raw: raw["tokens"].update({str(number): tokens.record(extents)}))


def found(image: bytes, **rules: Any) -> list[Finding]:
    return list(reconcile.diagnose(forge.view_of(image), (), Rules(**rules)))


def codes(image: bytes, **rules: Any) -> list[tuple[Code, Action]]:
    return [(finding.code, finding.action) for finding in found(image, **rules)]


def repair(image: bytes, **rules: Any) -> Change | None:
    return reconcile.repair(forge.view_of(image), Rules(**rules))


def mended(image: bytes, **rules: Any) -> bytes:
    """After one commit."""
    change = repair(image, **rules)
    assert change is not None
    return after(image, planned(image, change))


def tokens_of(image: bytes) -> dict[str, Any]:
    found_there: dict[str, Any] = forge.json_of(image)["tokens"]
    return found_there


def keyslots_of(image: bytes) -> list[str]:
    return sorted(forge.json_of(image)["keyslots"])


def changed_blocks(before: bytes, now: bytes) -> set[int]:
    """Behind the headers."""
    blocks = range(32768, len(before), 4096)
    return {block for block in blocks if before[block : block + 4096] != now[block : block + 4096]}


def blocks_of(*extents: Extent) -> set[int]:
    return {block for extent in extents for block in range(extent.offset, extent.end, 4096)}


def staged(**members: Any) -> bytes:
    return paired({}, {"state": "staged", "expires_at": tokens.utc(EXPIRY)} | members)


TWO_PAIRS = paired({}, {})
UNSETTLED = paired({}, {"retires": ["0"], "fingerprint": "sha256:x"})
UNSETTLED = forge.edited(UNSETTLED, lambda raw: raw["tokens"]["1"].pop("fingerprint"))

#: Everything that is mended by itself: what is found, and which tokens and keyslots are left.
REPAIRED = {
    "two pairs": (TWO_PAIRS, [Code.KEY_SUPERSEDED], "1", "02"),
    "two pairs, the newer one first": (paired({"generation": 5}, {}), [Code.KEY_SUPERSEDED], "0", "01"),
    "two pairs, the newer one not settled": (UNSETTLED, [Code.KEY_SUPERSEDED, Code.KEY_UNSETTLED], "1", "02"),
    "a retired pair": (paired({"state": "retired"}, {}), [Code.KEY_RETIRED], "1", "02"),
    "a retired pair alone": (paired({"state": "retired"}), [Code.KEY_RETIRED], "", "02"),
    "a retired pair beside another name": (
        paired({"state": "retired"}, {"name": "spare"}),
        [Code.KEY_RETIRED],
        "1",
        "02",
    ),
    "a retired token": (paired({"state": "retired", "keyslot": None}, {}), [Code.KEY_RETIRED], "1", "012"),
    "a replaced token": (
        paired({"keyslot": None}, {"retires": ["0"]}),
        [Code.KEY_RETIRED, Code.KEY_UNSETTLED],
        "1",
        "012",
    ),
    "not settled": (paired({"retires": []}), [Code.KEY_UNSETTLED], "0", "012"),
    "staged and not settled": (
        paired({}, {"state": "staged", "retires": []}),
        [Code.KEY_UNSETTLED],
        "01",
        "012",
    ),
    "not born": (paired({}, {"keyslot": None, "retires": ["0"]}), [Code.KEY_UNBORN], "0", "012"),
    "not born, the first of its name": (paired({"keyslot": None, "retires": []}), [Code.KEY_UNBORN], "", "012"),
    "staged and not born": (
        paired({}, {"keyslot": None, "state": "staged", "retires": []}),
        [Code.KEY_UNBORN],
        "0",
        "012",
    ),
    "a wipe record": (recorded(paired({}), FREE), [Code.WIPE_PENDING], "0", "012"),
    "a wipe record alone": (recorded(PLAIN, FREE), [Code.WIPE_PENDING], "", "012"),
    "a wipe record and two pairs": (
        recorded(TWO_PAIRS, FREE),
        [Code.WIPE_PENDING, Code.KEY_SUPERSEDED],
        "1",
        "02",
    ),
    "two pairs, both with a wipe intent": (
        paired({"wipe": forge.intent(FREE)}, {"wipe": forge.intent(Extent(FREE.end, 8192))}),
        [Code.WIPE_PENDING, Code.WIPE_PENDING, Code.KEY_SUPERSEDED],
        "1",
        "02",
    ),
    "the keyslot of a staged key has gone": (
        forge.keyslot_removed(staged(), 2),
        [Code.TOKEN_WITHOUT_KEYSLOT],
        "0",
        "01",
    ),
    "the keyslot of a newer key has gone": (
        forge.keyslot_removed(TWO_PAIRS, 2),
        [Code.TOKEN_WITHOUT_KEYSLOT],
        "0",
        "01",
    ),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_a_row_that_is_repaired(name):
    image, expected, left_tokens, left_keyslots = REPAIRED[name]
    assert codes(image) == [(code, Action.REPAIR) for code in expected]
    now = mended(image)
    assert "".join(sorted(tokens_of(now))) == left_tokens
    assert "".join(keyslots_of(now)) == left_keyslots
    assert not any("wipe" in token or "retires" in token for token in tokens_of(now).values())
    # I7: once is enough.
    assert codes(now) == []
    assert repair(now) is None


@pytest.mark.parametrize("name", REPAIRED)
def test_the_difference_that_is_announced_is_the_one_that_is_made(name):
    image, *_ = REPAIRED[name]
    told = reconcile.differences(forge.view_of(image))
    now = mended(image)
    for kind, before, left in (
        ("token", tokens_of(image), tokens_of(now)),
        ("keyslot", forge.json_of(image)["keyslots"], forge.json_of(now)["keyslots"]),
    ):
        odd = {number for number in before.keys() | left.keys() if before.get(number) != left.get(number)}
        assert {one.name for one in told if one.what == kind} == odd
    for one in told:
        if one.what == "token":
            assert (dict(one.before), dict(one.after)) == (
                tokens_of(image).get(one.name, {}),
                tokens_of(now).get(one.name, {}),
            )
    areas = [Extent(int(one.name), one.before["size"]) for one in told if one.what == "area"]
    assert blocks_of(*areas) == changed_blocks(image, now)


#: What a crash of ours can leave: it must not stand in the way of the next transaction.
CRASHES = [name for name in REPAIRED if "gone" not in name]


@pytest.mark.parametrize("name", CRASHES)
def test_a_crash_of_ours_is_finished_before_anything_else(name):
    image, *_ = REPAIRED[name]
    assert repair(image, orphans=False) == repair(image)


def test_the_kept_token_carries_the_wipe_intent():
    change = repair(TWO_PAIRS)
    assert change is not None
    kept = tokens_of(TWO_PAIRS)["1"]
    pending = {**kept, "wipe": forge.intent(AREAS[1])}
    assert change == Change((RemoveToken(0), SetToken(1, pending), DestroyKeyslot(1)), (SetToken(1, kept),))


def test_what_was_pending_on_the_pair_that_goes_is_inherited():
    image, *_ = REPAIRED["two pairs, both with a wipe intent"]
    change = repair(image)
    assert change is not None
    (pending,) = (edit for edit in change.edits if isinstance(edit, SetToken))
    assert pending.body["wipe"] == forge.intent(AREAS[1], FREE, Extent(FREE.end, 8192))
    assert change.wipe == (Extent(FREE.offset, 3 * 4096),)


def test_a_record_stays_until_its_ranges_are_wiped():
    change = repair(recorded(TWO_PAIRS, FREE))
    assert change is not None
    assert RemoveToken(7) not in change.edits
    assert RemoveToken(7) in change.closing


def test_a_settled_token_gets_its_fingerprint():
    now = tokens_of(mended(UNSETTLED))["1"]
    assert now["fingerprint"] == tokens_of(TWO_PAIRS)["1"]["fingerprint"]


def test_a_retired_pair_without_a_successor_leaves_a_record_for_its_area():
    change = repair(paired({"state": "retired"}))
    assert change is not None
    record = {"type": WIPE_TOKEN_TYPE, "keyslots": [], "version": 1, "wipe": forge.intent(AREAS[1])}
    assert change == Change((SetToken(0, record), DestroyKeyslot(1)), (RemoveToken(0),))


def test_more_ranges_than_a_token_holds_are_wiped_first():
    many = forge.intent(*(Extent(65536 + 8192 * number, 4096) for number in range(tokens.WIPE_MAX)))
    image = paired({"wipe": many}, {}, image=make_volume([KEEP, OLD, FRESH], areas=100))
    change = repair(image)
    assert change is not None
    assert change.edits == ()
    assert len(change.wipe) == tokens.WIPE_MAX
    once = after(image, planned(image, change))
    assert codes(once) == [(Code.KEY_SUPERSEDED, Action.REPAIR)]
    assert codes(mended(once)) == []


def test_I5_a_retired_key_that_is_the_last_way_in_stays():
    image = paired({"state": "retired", "keyslot": 0}, image=make_volume([KEEP]))
    (one,) = found(image)
    assert (one.code, one.action) == (Code.KEY_RETIRED, Action.PERSON)
    assert "nothing else opens the volume" in one.message
    assert repair(image) is None


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (paired({"fingerprint": "sha256:x", "state": "retired"}, {}), [Code.KEYSLOT_CHANGED]),
        (paired({"fingerprint": "sha256:x"}, {"retires": ["0"]}), [Code.KEYSLOT_CHANGED, Code.KEY_UNSETTLED]),
        (
            forge.edited(TWO_PAIRS, lambda raw: raw["tokens"].update({"9": {"type": "x", "keyslots": ["1"]}})),
            [Code.TOKEN_AMBIGUOUS],
        ),
        (paired({"wipe": forge.intent(Extent(0, 4096))}, {}), [Code.WIPE_INTENT_BAD]),
        (recorded(paired({}), Extent(0, 4096)), [Code.WIPE_INTENT_BAD]),
        (recorded(paired({}), Extent(FREE.offset, 512)), [Code.WIPE_INTENT_BAD]),
        (
            forge.edited(PLAIN, lambda raw: raw["tokens"].update({"3": {"type": WIPE_TOKEN_TYPE, "keyslots": []}})),
            [Code.TOKEN_UNREADABLE],
        ),
    ],
)
def test_I5_what_is_not_provably_ours_stays(image, expected):
    people = [code for code, action in codes(image) if action is Action.PERSON]
    assert people == [code for code in expected if code is not Code.KEY_UNSETTLED]
    assert [code for code, _ in codes(image)] == expected
    change = repair(image)
    assert change is None or not change.edits
    assert change is None or not any(isinstance(edit, RemoveToken) for edit in change.closing)


#: Names whose keys cannot be told apart.
UNCLEAR = {
    "two of one generation": paired({"generation": 3}, {"generation": 3}),
    "two staged": paired({"state": "staged"}, {"state": "staged"}),
    "a staged key that is not newer": paired({"generation": 2}, {"generation": 2, "state": "staged"}),
    "a newer one that another tool has changed": paired({}, {"fingerprint": "sha256:x"}),
    "none that we wrote": paired({"fingerprint": "sha256:x"}, {"fingerprint": "sha256:x"}),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_I5_keys_that_cannot_be_told_apart_are_for_a_person(name):
    (unclear,) = (one for one in found(UNCLEAR[name]) if one.code is Code.NAME_AMBIGUOUS)
    assert unclear.action is Action.PERSON
    assert (unclear.tokens, unclear.keyslots, unclear.name) == ((0, 1), (1, 2), "backup")
    assert repair(UNCLEAR[name]) is None


def test_nothing_of_an_unclear_name_goes_but_its_wipes_are_finished():
    image = recorded(
        paired({"generation": 3}, {"generation": 3}, {"generation": 1, "state": "retired", "keyslot": 0}), FREE
    )
    change = repair(image)
    assert change == Change((), (RemoveToken(7),), (FREE,))


def test_a_staged_key_is_no_finding_before_it_expires():
    assert codes(staged()) == []
    assert codes(staged(), now=EXPIRY - timedelta(seconds=1)) == []
    assert codes(staged(expires_at=""), now=LATER) == []
    assert codes(staged(expires_at="soon"), now=LATER) == []


@pytest.mark.parametrize("now", [EXPIRY, LATER])
def test_a_staged_key_that_has_expired_is_for_a_person(now):
    (one,) = found(staged(), now=now)
    assert (one.code, one.action, one.since) == (Code.STAGED_EXPIRED, Action.PERSON, "2026-06-01T00:00:00Z")
    assert (one.tokens, one.keyslots, one.name) == ((1,), (2,), "backup")
    assert repair(staged(), now=now) is None
    assert repair(staged(), retire_expired=True) is None


def test_the_policy_may_abort_it():
    rules = {"now": LATER, "retire_expired": True}
    assert codes(staged(), **rules) == [(Code.STAGED_EXPIRED, Action.REPAIR)]
    now = mended(staged(), **rules)
    assert (tokens_of(now), keyslots_of(now)) == (tokens_of(paired({})), ["0", "1"])
    assert changed_blocks(staged(), now) == blocks_of(AREAS[2])
    assert codes(now, **rules) == []


@pytest.mark.parametrize(
    "image",
    [
        forge.edited(staged(), lambda raw: raw["tokens"]["0"].update(fingerprint="sha256:x")),
        forge.edited(staged(), lambda raw: raw["tokens"].pop("0")),
        forge.edited(staged(), lambda raw: raw["tokens"]["0"].update(wipe=forge.intent(Extent(0, 4096)))),
        staged(fingerprint="sha256:x"),
        staged(group={"id": "rack-4", "size": 2}),
    ],
    ids=["changed", "gone", "bad intent", "staged one changed", "one of a set"],
)
def test_the_policy_cannot_abort_what_has_nothing_to_fall_back_to_or_a_part_of_a_set(image):
    rules = {"now": LATER, "retire_expired": True}
    assert (Code.STAGED_EXPIRED, Action.PERSON) in codes(image, **rules)
    assert repair(image, **rules) is None


def test_a_set_of_one_volume_is_no_set():
    image = staged(group={"id": "rack-4", "size": 1})
    assert codes(image, now=LATER, retire_expired=True) == [(Code.STAGED_EXPIRED, Action.REPAIR)]


def test_a_superseded_pair_and_an_expired_one_go_together():
    image = make_volume([KEEP, OLD, FRESH, b"third"], areas=40)
    image = paired({}, {}, {"state": "staged", "expires_at": tokens.utc(EXPIRY)}, image=image)
    rules = {"now": LATER, "retire_expired": True}
    assert [code for code, _ in codes(image, **rules)] == [Code.KEY_SUPERSEDED, Code.STAGED_EXPIRED]
    now = mended(image, **rules)
    assert (sorted(tokens_of(now)), keyslots_of(now)) == (["1"], ["0", "2"])
    assert codes(now, **rules) == []


def test_a_staged_key_alone_is_for_a_person():
    image = forge.edited(staged(), lambda raw: raw["tokens"].pop("0"))
    assert codes(image) == [(Code.STAGED_ALONE, Action.PERSON)]
    assert repair(image) is None


def test_the_message_about_a_changed_keyslot_says_what_helps():
    (one,) = found(paired({"fingerprint": "sha256:x"}))
    assert (one.code, one.action) == (Code.KEYSLOT_CHANGED, Action.PERSON)
    assert "luksrotctl recreate" in one.message


@pytest.mark.parametrize(("requirement", "why"), [("offline-reencrypt", "re-encryption"), ("x-unknown", "left alone")])
def test_a_header_with_requirements_is_left_alone_and_it_says_why(requirement, why):
    image = forge.edited(TWO_PAIRS, lambda raw: raw["config"].update(requirements={"mandatory": [requirement]}))
    image = forge.newer(image, [Which.PRIMARY])
    everything = found(image, now=LATER, retire_expired=True)
    assert {one.action for one in everything} == {Action.PERSON}
    assert why in everything[-1].message
    assert repair(image) is None
    assert reconcile.differences(forge.view_of(image)) == ()


def test_the_tokens_keyslots_and_name_of_a_finding_are_numbers_too():
    (one,) = found(TWO_PAIRS)
    assert (one.tokens, one.keyslots, one.name) == ((0,), (1,), "backup")
    (one,) = found(recorded(PLAIN, FREE))
    assert (one.tokens, one.keyslots, one.name) == ((7,), (), "")
    (one,) = found(forge.with_token(PLAIN, 1, 4, version=9))
    assert one.tokens == (4,)


@pytest.mark.parametrize("which", Which)
def test_a_dry_run_tells_which_copy_is_written_again(which):
    (one,) = reconcile.differences(forge.view_of(forge.unsealed(paired({}), which)))
    assert (one.what, one.name, one.how, dict(one.after)) == ("header", str(which), "rewrite", {"seqid": 3})
    assert "checksum" in one.before["invalid"]
    (one,) = reconcile.differences(forge.view_of(forge.newer(paired({}), [which])))
    assert (one.name, dict(one.before), dict(one.after)) == (str(which.other), {"seqid": 3}, {"seqid": 4})


def test_a_dry_run_tells_what_is_done_after_the_copies_agree_again():
    """The losing copy still references the area of the key that the winner has retired."""
    before = paired({})
    behind = forge.keyslot_removed(paired({"wipe": forge.intent(AREAS[2])}), 2)
    behind = forge.newer(behind, forge.BOTH)
    image = forge.put(behind, 16384, before[16384:32768])
    header, token, area = reconcile.differences(forge.view_of(image))
    assert (header.what, header.name) == ("header", "secondary")
    assert (token.what, token.name, token.how) == ("token", "0", "change")
    assert (area.what, area.name, area.before) == ("area", str(AREAS[2].offset), {"size": 4096})


def test_nothing_to_do_is_no_difference():
    assert reconcile.differences(forge.view_of(paired({}))) == ()


def test_tokens_of_other_types_are_nobodys_leftovers():
    image = forge.edited(TWO_PAIRS, lambda raw: raw["tokens"]["0"].update(type="x-other"))
    assert codes(image) == []
    assert tokens_of(image)["1"]["type"] == TOKEN_TYPE


DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "spec" / "reconcile.md"


def test_the_table_has_every_code_with_its_actions():
    documented: dict[str, set[str]] = {}
    code = ""
    for line in DOCUMENT.read_text(encoding="utf-8").split("## The table")[1].split("\n## ")[0].splitlines():
        cells = [cell.strip(" `") for cell in line.split("|")]
        if len(cells) > 4 and cells[4] in set(Action):
            code = cells[1] or code
            documented.setdefault(code, set()).add(cells[4])
    assert documented.keys() == set(Code)
    states = [image for image, *_ in REPAIRED.values()]
    seen = {
        (one.code, one.action) for image in (*states, *UNCLEAR.values(), staged()) for one in found(image, now=LATER)
    }
    assert {action for code, action in seen if action not in documented[code]} == set()
