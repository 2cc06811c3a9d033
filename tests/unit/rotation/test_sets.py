# SPDX-License-Identifier: GPL-2.0-or-later
import pytest

from luksrotd.errors import InvalidRequest, NeedsPerson
from luksrotd.luks2.layout import Which
from luksrotd.rotation import sets
from luksrotd.rotation.sets import SetState, Standing, Step
from tests.support import forge
from tests.support.simengine import make_volume

GROUP = {"id": "rack-4", "size": 3}
OTHER = {"id": "rack-5", "size": 3}
BASE = make_volume([b"keep", b"old", b"new"])


def old(**members):
    return forge.with_token(BASE, 1, **members)


def staged(**members):
    return forge.with_token(old(), 2, 1, **{"generation": 2, "state": "staged", "group": GROUP} | members)


def finished(**members):
    return forge.with_token(BASE, 2, **{"generation": 2, "group": GROUP} | members)


def status(*images, group=None):
    return sets.status([forge.view_of(image) for image in images], "backup", group)


#: The volumes, the state, the group that is found.
STATES = [
    ((old(), old(), old()), SetState.UNSTAGED, None),
    ((staged(), old(), old()), SetState.PARTLY_STAGED, "rack-4"),
    ((old(), staged(), staged()), SetState.PARTLY_STAGED, "rack-4"),
    ((staged(), staged(), staged()), SetState.STAGED, "rack-4"),
    ((finished(), staged(), staged()), SetState.FINISHING, "rack-4"),
    ((finished(), staged(), finished()), SetState.FINISHING, "rack-4"),
    ((finished(), finished(), finished()), SetState.FINISHED, "rack-4"),
    # of an earlier set: one was staged, and finished, alone since
    ((finished(), finished(group=OTHER), finished()), SetState.UNSTAGED, None),
]


@pytest.mark.parametrize(("images", "state", "group"), STATES)
def test_the_state_of_a_set(images, state, group):
    found = status(*images)
    assert (found.state, found.group and found.group.id, found.why) == (state, group, "")
    assert found.group is None or found.group.size == 3


def test_what_is_known_of_each_volume():
    one, two, three = status(staged(), finished(generation=7), old(generation=4)).members
    assert (one.standing, one.generation, one.keyslot) == (Standing.STAGED, 2, 2)
    assert (two.standing, two.generation, two.keyslot) == (Standing.FINISHED, 7, 2)
    assert (three.standing, three.generation, three.keyslot, three.group) == (Standing.OLD, 4, 1, None)
    assert one.uuid == forge.view_of(BASE).uuid


def test_what_was_finished_for_an_earlier_set_is_old_for_the_next_one():
    mixed = (staged(), old(group=OTHER), old(group=OTHER))
    assert [member.standing for member in status(*mixed).members] == [Standing.STAGED, Standing.OLD, Standing.OLD]
    assert status(finished(), finished(), finished(), group="rack-9").state is SetState.UNSTAGED


def test_a_set_is_found_by_its_id_too():
    images = (staged(), staged(group=OTHER), old())
    assert "is staged for set rack-5" in status(*images, group="rack-4").why
    assert "is staged for set rack-4" in status(*images, group="rack-5").why
    assert "rack-4" in status(*images).why
    assert "rack-5" in status(*images).why


@pytest.mark.parametrize(
    ("images", "why"),
    [
        ((finished(), old(), old()), "some volumes are finished, and on others nothing is staged"),
        ((finished(), staged(), old()), "some volumes are finished, and on others nothing is staged"),
        ((staged(), staged(), old(name="another")), "it has no managed key named 'backup'"),
        ((staged(), staged(), BASE), "it has no managed key named 'backup'"),
        ((staged(), staged(), staged(group=None)), "generation 2 is staged on it alone"),
        ((staged(), staged(), staged(group=OTHER)), "generation 2 is staged for set rack-5"),
        ((staged(), staged(), staged(generation=1)), "the staged key named 'backup' is not newer"),
        ((staged(), staged(), staged(fingerprint="sha256:0")), "another tool has changed its keyslot"),
        ((staged(), staged(), forge.keyslot_removed(staged(), 2)), "its token names 0 keyslots"),
        ((staged(), staged(), old(fingerprint="sha256:0")), "another tool has changed its keyslot"),
        ((staged(), staged(), staged(group=GROUP | {"size": 2})), "do not agree about the size of set rack-4"),
        ((staged(), staged()), "3 volumes belong to set rack-4, not 2"),
        ((staged(), staged(), old(), old()), "3 volumes belong to set rack-4, not 4"),
        ((finished(), finished()), "3 volumes belong to set rack-4, not 2"),
    ],
)
def test_what_a_person_must_decide(images, why):
    group = "rack-4" if any(forge.view_of(image).named("backup") for image in images) else None
    found = status(*images, group=group)
    assert found.state is SetState.MIXED
    assert why in found.why
    assert found.steps == frozenset()


def test_a_header_in_doubt_is_no_ground_to_go_on():
    image = forge.edited(forge.newer(staged(), [Which.PRIMARY]), lambda raw: raw.update(config={}), [Which.PRIMARY])
    assert forge.view_of(image).pair.doubt
    assert forge.view_of(image).pair.doubt in status(staged(), staged(), image).why


STEPS = {
    SetState.UNSTAGED: {Step.STAGE},
    SetState.PARTLY_STAGED: {Step.STAGE, Step.ABORT},
    SetState.STAGED: {Step.STAGE, Step.FINISH, Step.ABORT},
    SetState.FINISHING: {Step.FINISH},
    SetState.FINISHED: {Step.FINISH},
}


@pytest.mark.parametrize("step", Step)
@pytest.mark.parametrize(("images", "state", "group"), STATES)
def test_the_ends_that_a_set_can_be_brought_to(images, state, group, step):
    found = status(*images)
    assert found.steps == STEPS[state]
    if step in STEPS[state]:
        sets.check(found, step)
    else:
        with pytest.raises((InvalidRequest, NeedsPerson), match=f"cannot {step} key 'backup' on the set: "):
            sets.check(found, step)


def test_a_mixed_set_is_left_to_a_person():
    for step in Step:
        with pytest.raises(NeedsPerson, match="3 volumes belong to set rack-4, not 2"):
            sets.check(status(staged(), staged()), step)


def test_one_volume_alone_is_a_set_that_its_key_does_not_know():
    found = status(staged(group=None))
    assert (found.state, found.group, found.why) == (SetState.STAGED, None, "")
    assert found.steps == {Step.STAGE, Step.FINISH, Step.ABORT}


def test_the_set_that_is_under_way():
    def under_way(*images):
        return sets.under_way([forge.view_of(image) for image in images], "backup")

    assert under_way(staged(), old(), finished(group=OTHER)) == "rack-4"
    assert under_way(old(), finished()) is None
    assert under_way(staged(), staged(group=OTHER)) is None
    assert under_way(staged(), staged(group=None)) is None
