# SPDX-License-Identifier: GPL-2.0-or-later
"""Any mix of edits as one change, or a refusal that says what is wrong."""

from types import MappingProxyType

import pytest

from luksrotd.errors import (
    InvalidRequest,
    LastKeyslot,
    MetadataFull,
    NeedsPerson,
    NeedsReconcile,
    NoFreeArea,
    NoFreeKeyslot,
    RequirementsPresent,
)
from luksrotd.luks2 import jsontext, layout
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import Which
from luksrotd.rotation.draft import Draft, parse_token
from luksrotd.rotation.edits import NEW, Pbkdf, RemoveToken, SetToken
from luksrotd.rotation.edits import AddKeyslot as Add
from luksrotd.rotation.edits import DestroyKeyslot as Destroy
from tests.support import forge
from tests.support.planning import KEEP, OLD, after, planned, staged_volume, volume
from tests.support.simengine import make_volume, opened_by

PLAIN = make_volume([KEEP, OLD, b"2"])
CHEAP = Pbkdf("pbkdf2", iterations=1000)
NOTE = {"type": "note", "keyslots": []}


def draft(image: bytes = PLAIN) -> Draft:
    return Draft(forge.view_of(image))


def with_tokens(image: bytes, **tokens: dict[str, object]) -> bytes:
    """With tokens of other tools, by their numbers after "t"."""
    return forge.edited(
        image, lambda raw: raw["tokens"].update({name[1:]: {**NOTE, **body} for name, body in tokens.items()})
    )


def test_everything_at_once_is_one_change():
    made = draft(with_tokens(PLAIN, t3={"keyslots": ["1"]}, t5={}))
    assert made.add_keyslot("a", CHEAP) == 3
    assert made.add_keyslot("b", CHEAP, 9) == 9
    assert made.set_token({**NOTE, "keyslots": ["3"]}) == 0
    assert made.set_token({**NOTE, "keyslots": ["9"]}, 5) == 5
    made.remove_token(3)
    made.destroy_keyslot(1)
    change = made.change()
    record = {
        "type": "luksrotd-wipe",
        "keyslots": [],
        "version": 1,
        "wipe": forge.intent(made.view.metadata.keyslots[1].area),
    }
    assert change.edits == (
        Add(3, "a", CHEAP),
        Add(9, "b", CHEAP),
        SetToken(0, {**NOTE, "keyslots": ["3"]}),
        SetToken(5, {**NOTE, "keyslots": ["9"]}),
        SetToken(3, record),
        Destroy(1),
    )
    assert change.closing == (RemoveToken(3),)
    assert change.survivors is None
    assert made.secrets == ("a", "b")


def test_the_change_can_be_planned():
    made = draft()
    made.set_token({**NOTE, "keyslots": [str(made.add_keyslot(NEW, CHEAP))]}, 7)
    made.destroy_keyslot(1)
    done = after(PLAIN, planned(PLAIN, made.change()))
    assert opened_by(done, OLD) == []
    assert forge.json_of(done)["tokens"] == {"7": {**NOTE, "keyslots": ["3"]}}


def test_tokens_alone_need_no_credential():
    made = draft()
    made.set_token(NOTE)
    assert not made.change().needs_unlock


def test_I5_who_removes_a_keyslot_shows_one_that_stays():
    made = draft()
    made.destroy_keyslot(1)
    assert made.change().survivors == {0, 2}
    made.destroy_keyslot(1)
    assert made.change().destroyed == (1,)


def test_I5_the_last_way_in_is_not_removed():
    made = draft()
    for keyslot in range(3):
        made.destroy_keyslot(keyslot)
    with pytest.raises(LastKeyslot):
        made.change()
    made.add_keyslot(NEW, CHEAP)
    assert made.change().destroyed == (0, 1, 2)


# ---- numbers


def test_numbers_are_the_lowest_that_are_free_before_and_after():
    made = draft(with_tokens(PLAIN, t0={}, t1={}))
    made.remove_token(0)
    made.destroy_keyslot(0)
    assert [made.set_token(NOTE), made.set_token(NOTE)] == [2, 3]
    assert [made.add_keyslot("a", CHEAP), made.add_keyslot("b", CHEAP)] == [3, 4]


def test_a_token_is_written_over_as_often_as_one_likes():
    made = draft(with_tokens(PLAIN, t0={}))
    made.remove_token(0)
    made.set_token({**NOTE, "n": 1}, 0)
    made.set_token({**NOTE, "n": 2}, 0)
    assert made.change().edits == (SetToken(0, {**NOTE, "n": 2}),)


@pytest.mark.parametrize(
    ("number", "message"), [(-1, "numbers go from 0 to 31"), (32, "numbers go from 0 to 31"), (1, "is taken")]
)
def test_keyslot_numbers_that_cannot_be(number, message):
    with pytest.raises(InvalidRequest, match=message):
        draft().add_keyslot(NEW, CHEAP, number)


@pytest.mark.parametrize("number", [-1, 32])
def test_token_numbers_that_cannot_be(number):
    with pytest.raises(InvalidRequest, match="numbers go from 0 to 31"):
        draft().set_token(NOTE, number)


def test_the_number_of_a_keyslot_that_goes_is_not_free_yet():
    made = draft()
    made.destroy_keyslot(1)
    with pytest.raises(InvalidRequest, match="cannot add keyslot 1: the number is taken"):
        made.add_keyslot(NEW, CHEAP, 1)


def test_no_number_is_left():
    made = draft(with_tokens(PLAIN, **{f"t{number}": {} for number in range(layout.TOKENS_MAX)}))
    with pytest.raises(NoFreeKeyslot, match="cannot add a token: all 32 are taken; remove one first"):
        made.set_token(NOTE)
    made.destroy_keyslot(1)
    with pytest.raises(NoFreeKeyslot, match="remove a token first"):
        made.change()
    full = draft(make_volume([b"%d" % number for number in range(32)], areas=40))
    with pytest.raises(NoFreeKeyslot, match="cannot add a keyslot: all 32 are taken"):
        full.add_keyslot(NEW, CHEAP)


# ---- what is wrong with one edit


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (7, "not JSON"),
        ({**NOTE, "x": b"y"}, "not JSON"),
        ({**NOTE, "x": float("nan")}, "not JSON"),
        ({}, "no type"),
        ({"keyslots": []}, "no type"),
        ({"type": "", "keyslots": []}, "no type"),
        ({"type": 1, "keyslots": []}, "no type"),
        ({"type": "luksrotd", "keyslots": []}, "verbs of their own"),
        ({"type": "luksrotd-wipe", "keyslots": []}, "verbs of their own"),
        ({"type": "luks2-mine", "keyslots": []}, "'luks2-mine': libcryptsetup keeps"),
        ({"type": "x"}, "not an array of strings"),
        ({"type": "x", "keyslots": "0"}, "not an array of strings"),
        ({"type": "x", "keyslots": [0]}, "not an array of strings"),
        ({"type": "x", "keyslots": [["0"]]}, "not an array of strings"),
        ({"type": "x", "keyslots": ["0", "0"]}, "names a keyslot twice"),
        ({**NOTE, "x": "\0"}, "NUL"),
        ({**NOTE, "x": 2**64}, "64 bits"),
    ],
)
def test_tokens_that_are_none(body, message):
    with pytest.raises(InvalidRequest, match=message):
        draft().set_token(body)


def test_a_token_that_is_nested_into_itself():
    body: dict[str, object] = dict(NOTE)
    body["x"] = body
    with pytest.raises(InvalidRequest, match="not JSON"):
        draft().set_token(body)


def test_a_token_is_taken_as_it_is_now_and_as_json_has_it():
    body = {"type": "luks2-keyring", "keyslots": [], "x": (1, 2)}
    made = draft()
    made.set_token(MappingProxyType(body))
    body["x"] = 3
    assert made.change().edits == (SetToken(0, {"type": "luks2-keyring", "keyslots": [], "x": [1, 2]}),)


def test_a_token_comes_as_json_text():
    assert parse_token('{"type": "é", "keyslots": []}', 30) == {"type": "é", "keyslots": []}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ('{"x": NaN}', "not JSON"),
        ('{"x": "\ud800"}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ('{"x": {"y": 1, "y": 2}}', "a member twice"),
        (f'{{"x": [{"0," * jsontext.VALUES_MAX}0]}}', "too many values"),
        (f'{{"x": "{"é" * 500_000}"}}', "longer than the metadata area of 1000000 bytes"),
    ],
)
def test_json_text_that_is_no_token_is_refused(text, why):
    with pytest.raises(InvalidRequest, match=f"cannot write a token: .*{why}"):
        parse_token(text, 1_000_000)


def test_I3_a_token_of_ours_is_not_written_over():
    with pytest.raises(InvalidRequest, match="cannot write token 0: it is luksrotd's own"):
        draft(volume()).set_token(NOTE, 0)


def test_what_is_not_there_cannot_go():
    made = draft()
    with pytest.raises(InvalidRequest, match="cannot remove token 3: there is none"):
        made.remove_token(3)
    with pytest.raises(InvalidRequest, match="cannot remove keyslot 3: there is none"):
        made.destroy_keyslot(3)
    made.add_keyslot(NEW, CHEAP, 3)
    with pytest.raises(InvalidRequest, match="cannot remove keyslot 3: there is none"):
        made.destroy_keyslot(3)


def test_a_token_can_be_taken_back():
    made = draft()
    assert made.set_token(NOTE) == 0
    made.remove_token(0)
    with pytest.raises(InvalidRequest, match="the transaction is empty"):
        made.change()
    with pytest.raises(InvalidRequest, match="cannot remove token 0: there is none"):
        made.remove_token(0)


# ---- what is wrong with all of them together


def test_nothing_to_do():
    with pytest.raises(InvalidRequest, match="the transaction is empty"):
        draft().change()


@pytest.mark.parametrize("reference", ["1", "7", "01", "x" * 99])
def test_a_token_names_keyslots_that_will_be_there(reference):
    made = draft()
    made.destroy_keyslot(1)
    made.set_token({**NOTE, "keyslots": [reference]})
    with pytest.raises(InvalidRequest, match="cannot write token 0: there will be no keyslot") as caught:
        made.change()
    assert len(caught.value.message) < 120


def test_I3_a_managed_keyslot_has_one_token_only():
    made = draft(volume())
    made.set_token({**NOTE, "keyslots": ["1"]})
    with pytest.raises(InvalidRequest, match="cannot write token 1: keyslot 1 belongs to key 'backup'"):
        made.change()


def test_a_token_that_names_a_keyslot_that_goes_must_go_or_change_too():
    made = draft(with_tokens(PLAIN, t4={"keyslots": ["0", "1"]}))
    made.destroy_keyslot(1)
    with pytest.raises(InvalidRequest, match=r"cannot remove keyslot 1: token 4 \(note\) names it"):
        made.change()
    made.set_token({**NOTE, "keyslots": ["0"]}, 4)
    assert made.change()
    made.remove_token(4)
    assert made.change().closing == (RemoveToken(4),)


def test_I3_a_managed_key_goes_as_a_whole():
    made = draft(volume())
    made.destroy_keyslot(1)
    with pytest.raises(InvalidRequest, match="cannot remove a part of key 'backup'"):
        made.change()
    made.remove_token(0)
    assert (made.change().destroyed, made.change().closing) == ((1,), (RemoveToken(0),))
    made = draft(volume())
    made.remove_token(0)
    with pytest.raises(InvalidRequest, match="to keep the keyslot, release the key"):
        made.change()


def test_I3_a_token_of_ours_that_names_several_keyslots_goes_with_all_of_them():
    made = draft(forge.with_token(PLAIN, 1, keyslots=["1", "2"]))
    made.remove_token(0)
    made.destroy_keyslot(1)
    with pytest.raises(InvalidRequest, match="cannot remove a part of key"):
        made.change()
    made.destroy_keyslot(2)
    assert made.change().destroyed == (1, 2)


def test_a_token_of_ours_that_has_lost_its_keyslot_may_go():
    made = draft(forge.with_token(PLAIN, None))
    made.remove_token(0)
    assert made.change().edits == (RemoveToken(0),)


def test_a_token_of_ours_that_we_cannot_read_stays():
    made = draft(forge.with_token(PLAIN, None, version=9))
    made.remove_token(0)
    with pytest.raises(NeedsPerson, match="cannot remove token 0: it is luksrotd's own"):
        made.change()
    beside = draft(with_tokens(forge.with_token(PLAIN, None, version=9), t4={}))
    beside.remove_token(4)
    assert beside.change().edits == (RemoveToken(4),)


def test_a_wipe_record_stays_until_its_ranges_are_wiped():
    record = {"type": "luksrotd-wipe", "wipe": forge.intent(Extent(61440, 4096))}
    made = draft(with_tokens(PLAIN, t4=record))
    made.remove_token(4)
    with pytest.raises(NeedsReconcile, match="not been wiped"):
        made.change()
    bad = draft(with_tokens(PLAIN, t4={"type": "luksrotd-wipe", "wipe": []}))
    bad.remove_token(4)
    with pytest.raises(NeedsPerson, match="cannot remove token 4"):
        bad.change()


def nested(levels: int) -> dict[str, object]:
    return {"x": nested(levels - 1)} if levels > 1 else {}


@pytest.mark.parametrize(("levels", "fits"), [(29, True), (30, False), (500, False)])
def test_a_token_that_libcryptsetup_could_not_read_back(levels, fits):
    made = draft()
    made.set_token({**NOTE, "x": nested(levels)})
    if fits:
        planned(PLAIN, made.change())
    else:
        with pytest.raises(InvalidRequest, match="nested deeper than 30 levels"):
            made.change()


def test_what_has_to_be_written_must_fit():
    made = draft()
    made.set_token({**NOTE, "x": "y" * 12_000})
    with pytest.raises(MetadataFull, match="remove keyslots or tokens first"):
        made.change()


def test_what_goes_makes_room_for_what_comes():
    image = with_tokens(PLAIN, t0={"x": "y" * 9_000})
    made = draft(image)
    made.set_token({**NOTE, "x": "z" * 9_000})
    with pytest.raises(MetadataFull):
        made.change()
    made.remove_token(0)
    planned(image, made.change())


def test_the_new_areas_must_fit_beside_the_old_ones():
    image = make_volume([KEEP, OLD], areas=3)
    made = draft(image)
    made.destroy_keyslot(1)
    made.add_keyslot("a", CHEAP)
    assert made.change()
    made.add_keyslot("b", CHEAP)
    with pytest.raises(NoFreeArea, match="2 times 4096 bytes"):
        made.change()


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (forge.edited(PLAIN, lambda raw: raw["config"].update(requirements={"mandatory": ["x"]})), RequirementsPresent),
        (forge.newer(PLAIN, [Which.SECONDARY]), NeedsReconcile),
        (with_tokens(PLAIN, t4={"type": "luksrotd-wipe", "wipe": forge.intent(Extent(61440, 4096))}), NeedsReconcile),
    ],
)
def test_volumes_on_which_luksrotd_does_not_write(image, error):
    made = draft(image)
    made.set_token(NOTE)
    with pytest.raises(error):
        made.change()


def test_a_staged_pair_can_go_as_a_whole():
    image = staged_volume()
    made = draft(image)
    made.remove_token(1)
    made.destroy_keyslot(2)
    done = after(image, planned(image, made.change()))
    assert [key.token.generation for key in forge.view_of(done).keys] == [1]
