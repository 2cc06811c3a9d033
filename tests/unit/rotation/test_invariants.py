# SPDX-License-Identifier: GPL-2.0-or-later
"""The predicates can tell right from wrong: each is shown a state that breaks it."""

import hashlib
from dataclasses import replace

import pytest

from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import Which
from luksrotd.rotation import keys
from luksrotd.rotation.invariants import (
    Expectation,
    Opener,
    Violation,
    check_done,
    check_instant,
    check_sequence,
    check_write,
    foreign_parts,
    opener,
)
from luksrotd.rotation.protocol import Phase
from tests.support import forge
from tests.support.planning import ENROLL, KEEP, OLD, ROTATE, after, instants, planned, volume
from tests.support.simengine import make_volume

PLAIN = make_volume([KEEP, OLD])
OURS = forge.edited(volume(), lambda raw: raw["tokens"].update({"9": {"type": "x", "keyslots": ["0"]}}))
PLAN = planned(OURS, keys.rotate(forge.view_of(OURS), ROTATE))
DONE = after(OURS, PLAN)
OLD_AREA = forge.view_of(OURS).metadata.keyslots[1].area


def reader(image: bytes):
    return lambda offset, size: image[offset : offset + size]


def opener_of(image: bytes, keyslot: int) -> Opener:
    return opener(forge.view_of(image).metadata.keyslots[keyslot], reader(image))


EXPECTED = Expectation(
    keep={"the administrator's passphrase": opener_of(OURS, 0)},
    keys={"backup": {1: opener_of(OURS, 1), 2: opener_of(DONE, 2)}},
    allowed={"backup": frozenset({(1, 0), (2, 0)})},
    foreign=(foreign_parts(forge.pair_of(OURS).winner),),
)


def violations(image: bytes, expected: Expectation = EXPECTED) -> set[tuple[str, str]]:
    found = check_instant(forge.pair_of(image), reader(image), expected)
    assert all(isinstance(violation, Violation) for violation in found)
    return {(violation.invariant, violation.what.partition(": ")[2]) for violation in found}


def test_a_rotation_keeps_them_at_every_instant():
    assert [phase for phase, _ in instants(OURS, PLAN)][1:] == list(Phase)
    for phase, image in instants(OURS, PLAN):
        assert violations(image) == set(), phase


def test_an_enrolment_keeps_them_and_may_start_without_the_key():
    made = planned(PLAIN, keys.enroll(forge.view_of(PLAIN), ENROLL))
    expected = Expectation(
        keep={"a": opener_of(PLAIN, 0), "b": opener_of(PLAIN, 1)},
        keys={"backup": {1: opener_of(after(PLAIN, made), 2)}},
        allowed={"backup": frozenset({(0, 0), (1, 0)})},
        foreign=(foreign_parts(forge.pair_of(PLAIN).winner),),
    )
    for _, image in instants(PLAIN, made):
        assert violations(image, expected) == set()


def test_I2_each_copy_is_judged_alone():
    # The wipe before the second header: the copy in force is fine, the other one names a dead key.
    image = forge.put(OURS, OLD_AREA.offset, bytes(OLD_AREA.size))
    image = forge.put(image, 0, DONE[:16384])
    image = forge.put(image, 40960, DONE[40960:45056])
    found = check_instant(forge.pair_of(image), reader(image), EXPECTED)
    assert {(violation.invariant, violation.what.partition(" ")[0]) for violation in found} == {("I1", "secondary")}


def test_I1_a_credential_that_no_longer_opens():
    dead = forge.put(OURS, forge.view_of(OURS).metadata.keyslots[0].area.offset, bytes(4096))
    assert violations(dead) == {("I1", "the administrator's passphrase does not open any more")}
    salted = forge.edited(OURS, lambda raw: raw["keyslots"]["0"]["kdf"].update(salt="AAAA"))
    assert ("I1", "the administrator's passphrase does not open any more") in violations(salted)


def test_I1_a_token_that_describes_another_key():
    # luksChangeKey in place: the token stayed, the key did not.
    dead = forge.put(OURS, OLD_AREA.offset, bytes(4096))
    assert violations(dead) == {("I1", "what the token of 'backup' describes does not open")}
    other = forge.with_token(OURS, 0)
    assert ("I1", "what the token of 'backup' describes does not open") in violations(other)


def test_I3_a_keyslot_without_its_token():
    image = forge.edited(OURS, lambda raw: raw["tokens"].pop("0"))
    assert violations(image) == {
        ("I3", "unexpected generations of key 'backup': none"),
        ("I3", "a keyslot of key 'backup' has no token"),
    }


def test_I3_a_keyslot_may_be_without_a_token_only_if_it_is_said_so():
    """Before an adoption, after a release."""
    image = forge.edited(OURS, lambda raw: raw["tokens"].pop("0"))
    allowed = {"backup": frozenset({(0, 0), (1, 0)})}
    assert violations(image, replace(EXPECTED, allowed=allowed)) == {("I3", "a keyslot of key 'backup' has no token")}
    alone = frozenset({opener_of(OURS, 1)})
    assert violations(image, replace(EXPECTED, allowed=allowed, alone=alone)) == set()


def test_I1_a_token_may_have_lost_its_keyslot_only_if_it_is_said_so():
    image = forge.keyslot_removed(OURS, 1)
    what = "what the token of 'backup' describes does not open"
    assert ("I1", what) in violations(image)
    assert ("I1", what) in violations(image, replace(EXPECTED, orphaned=frozenset({("backup", 2)})))
    assert ("I1", what) not in violations(image, replace(EXPECTED, orphaned=frozenset({("backup", 1)})))


def test_I3_two_live_pairs():
    two = forge.with_token(OURS, 0, 1, generation=2)
    assert ("I3", "unexpected generations of key 'backup': 1 (active), 2 (active)") in violations(two)


def test_I3_a_generation_that_never_was():
    image = forge.edited(OURS, lambda raw: raw["tokens"]["0"].update(generation=7))
    assert violations(image) == {("I3", "unexpected generations of key 'backup': 7 (active)")}


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: raw["tokens"].pop("9"),
        lambda raw: raw["keyslots"]["0"].update(priority=2),
        lambda raw: raw["config"].update(flags=["allow-discards"]),
        lambda raw: raw["segments"]["0"].update(iv_tweak="1"),
        lambda raw: raw["digests"]["0"].update(digest="AAAA"),
    ],
)
def test_I5_something_foreign_has_changed(edit):
    assert violations(forge.edited(OURS, edit)) == {("I5", "something foreign has changed")}


def test_I5_keyslots_of_other_types_are_foreign_too():
    def add(raw):
        raw["keyslots"]["7"] = {
            "type": "x",
            "key_size": 1,
            "area": {"type": "x", "offset": "61440", "size": "1"},
            "kdf": 1,
        }

    image = forge.edited(OURS, add)
    assert violations(image) == {("I5", "something foreign has changed")}


def done(image: bytes, gone: tuple[Opener, ...] = (opener_of(OURS, 1),)) -> set[str]:
    retired = {OLD_AREA: hashlib.sha256(OURS[OLD_AREA.offset : OLD_AREA.end]).hexdigest()}
    found = check_done(forge.pair_of(image), reader(image), gone, retired)
    assert {violation.invariant for violation in found} <= {"I6"}
    return {violation.what for violation in found}


def test_I6_after_success_nothing_of_the_old_key_is_left():
    assert done(DONE) == set()


def test_I6_what_is_left_is_named():
    assert done(OURS) == {"a retired credential still opens", f"the retired area at {OLD_AREA.offset} is intact"}
    assert done(forge.newer(DONE, [Which.PRIMARY])) == {"the header copies differ"}
    pending = forge.edited(DONE, lambda raw: raw["tokens"]["0"].update(wipe=forge.intent(Extent(45056, 4096))))
    assert done(pending) == {"a wipe intent is left"}


def test_I4_a_write_hits_nothing_that_a_copy_references():
    pair = forge.pair_of(volume())
    area = pair.referenced[0]
    assert check_write(pair, Extent(0, pair.hdr_size)) == ()
    assert check_write(pair, Extent(pair.referenced[-1].end, 4096)) == ()
    assert [violation.invariant for violation in check_write(pair, Extent(area.offset, 1))] == ["I4"]


@pytest.mark.parametrize(
    ("by", "changed", "right"), [(0, False, True), (0, True, False), (1, True, True), (3, False, True)]
)
def test_I9_the_sequence_number_rises(by, changed, right):
    before = forge.pair_of(volume())
    after = forge.pair_of(forge.newer(volume(), list(Which), by))
    assert (check_sequence(before, after, changed=changed) == ()) is right
    assert by == 0 or check_sequence(after, before, changed=False)[0].invariant == "I9"
