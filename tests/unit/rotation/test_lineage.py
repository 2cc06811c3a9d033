# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is who among the keys of one name (docs/spec/token.md, "Several tokens of one name")."""

import itertools

import pytest

from luksrotd.rotation.lineage import Lineage, lineage, lineages
from tests.support import forge
from tests.support.simengine import make_volume

PLAIN = make_volume([b"0", b"1", b"2", b"3"])
STALE = {"fingerprint": "sha256:x"}


def with_keys(*keys: tuple[int | None, dict[str, object]]) -> bytes:
    """Token n on the n-th keyslot of ``keys``, with these members."""
    image = PLAIN
    for number, (keyslot, members) in enumerate(keys):
        image = forge.with_token(image, keyslot, number, **members)
    return image


def found(*keys: tuple[int | None, dict[str, object]]) -> Lineage:
    return lineage(forge.view_of(with_keys(*keys)), "backup")


def numbers(line: Lineage) -> tuple[int | None, int | None, set[int]]:
    """The tokens of the current, the staged and the superseded keys."""
    current, staged = (key and key.token.id for key in (line.current, line.staged))
    return current, staged, {key.token.id for key in line.superseded}


def active(generation: int, **more: object) -> dict[str, object]:
    return {"generation": generation, **more}


def staged(generation: int, **more: object) -> dict[str, object]:
    return {"generation": generation, "state": "staged", **more}


def retired(generation: int, **more: object) -> dict[str, object]:
    return {"generation": generation, "state": "retired", **more}


def test_there_is_no_such_key():
    assert found() == Lineage("backup")
    assert found((1, active(1, name="spare"))) == Lineage("backup")


def test_one_key():
    assert numbers(found((1, active(1)))) == (0, None, set())


@pytest.mark.parametrize("odd", [(1, active(1, **STALE)), (None, active(1)), (1, active(1, keyslots=["1", "2"]))])
def test_one_key_that_another_tool_has_changed_is_still_the_one(odd):
    assert numbers(found(odd)) == (0, None, set())


def test_a_rotation_that_waits():
    assert numbers(found((1, active(1)), (2, staged(2)))) == (0, 1, set())
    assert numbers(found((2, staged(7)), (1, active(3)))) == (1, 0, set())


def test_a_staged_key_alone():
    assert numbers(found((1, staged(2)))) == (None, 0, set())


def test_a_rotation_in_steps_that_was_cut_leaves_the_highest_generation_in_force():
    keys = [(1, active(1)), (2, active(2)), (3, active(3))]
    for order in itertools.permutations(keys):
        line = found(*order)
        assert line.current is not None
        assert line.current.token.generation == 3
        assert {key.token.generation for key in line.superseded} == {1, 2}


def test_a_staged_key_beside_a_superseded_one():
    assert numbers(found((1, active(1)), (2, active(2)), (3, staged(3)))) == (1, 2, {0})


def test_a_key_that_says_that_it_is_retired():
    assert numbers(found((1, retired(1)), (2, active(2)))) == (1, None, {0})
    assert numbers(found((1, active(1)), (2, retired(2)))) == (0, None, {1})
    assert numbers(found((1, retired(1)))) == (None, None, {0})


def test_a_key_that_a_newer_one_says_it_replaces():
    # Whatever another tool has done to the old one: the new one is there.
    assert numbers(found((1, active(1, **STALE)), (2, active(2, retires=["0"])))) == (1, None, {0})
    assert numbers(found((None, active(1)), (2, active(2, retires=["0"])))) == (1, None, {0})


@pytest.mark.parametrize(
    "new",
    [(2, active(2, retires=["0"], keyslots=["2", "3"])), (2, active(2, retires=["0"], **STALE))],
)
def test_a_key_that_is_not_as_we_wrote_it_replaces_nothing(new):
    assert "another tool has changed is newer" in found((1, active(1)), new).unclear


def test_a_staged_key_replaces_nothing_yet():
    assert numbers(found((1, active(1)), (2, staged(2, retires=["0"])))) == (0, 1, set())


def test_no_key_replaces_itself_or_a_newer_one():
    assert numbers(found((1, active(1, retires=["0"])))) == (0, None, set())
    assert numbers(found((1, active(1, retires=["1"])), (2, active(2, retires=["0"])))) == (1, None, {0})


def test_I1_keys_that_say_they_replace_each_other_are_not_all_superseded():
    line = found((1, active(2, retires=["1"])), (2, active(2, retires=["0"])))
    assert (line.current, line.superseded) == (None, ())
    assert "two keys named 'backup' have generation 2" in line.unclear


def test_a_key_that_was_not_born():
    assert numbers(found((1, active(1)), (None, active(2, retires=["0"])))) == (0, None, {1})
    assert numbers(found((None, active(1, retires=[])))) == (None, None, {0})
    assert numbers(found((1, active(1)), (None, staged(2, retires=[])))) == (0, None, {1})


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ([(1, active(1)), (2, active(1))], "two keys named 'backup' have generation 1"),
        ([(1, active(1)), (2, active(3)), (3, active(3))], "two keys named 'backup' have generation 3"),
        ([(1, active(1)), (2, staged(2)), (3, staged(3))], "2 keys named 'backup' are staged"),
        ([(1, active(2)), (2, staged(2))], "not newer than the active one"),
        ([(1, active(2)), (2, staged(1))], "not newer than the active one"),
        ([(1, active(1)), (2, active(2, **STALE))], "another tool has changed is newer"),
        ([(1, active(2)), (2, active(2, **STALE))], "another tool has changed is newer"),
        ([(1, active(1, **STALE)), (2, active(2, **STALE))], "2 keys are named 'backup', none of them as we wrote"),
    ],
)
def test_what_a_person_must_decide(keys, why):
    line = found(*keys)
    assert why in line.unclear
    assert (line.current, line.staged, line.superseded) == (None, None, ())


def test_an_old_key_that_another_tool_has_changed_is_in_nobodys_way():
    # It is not superseded: what is not as we wrote it is not ours to remove.
    assert numbers(found((1, active(1, **STALE)), (2, active(2)))) == (1, None, set())


def test_every_name_has_its_own():
    image = with_keys((1, active(1, name="b")), (2, active(5, name="a")), (3, staged(6, name="a")))
    assert [(line.name, *numbers(line)) for line in lineages(forge.view_of(image))] == [
        ("a", 1, 2, set()),
        ("b", 0, None, set()),
    ]
