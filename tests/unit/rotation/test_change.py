# SPDX-License-Identifier: GPL-2.0-or-later
from luksrotd.rotation.change import Change, written_tokens
from luksrotd.rotation.edits import AddKeyslot, DestroyKeyslot, RemoveToken, SetToken
from tests.support import forge
from tests.support.planning import volume

ADD, SET, REMOVE, DESTROY = AddKeyslot(2), SetToken(0, {"type": "x"}), RemoveToken(1), DestroyKeyslot(1)


def test_what_a_change_adds_and_retires():
    change = Change((ADD, SET, REMOVE, DESTROY))
    assert (change.added, change.destroyed, change.needs_unlock) == ((ADD,), (1,), True)
    before = forge.pair_of(volume()).winner.metadata
    assert change.retired(before) == (before.keyslots[1].area,)


def test_only_an_added_keyslot_needs_the_volume_key():
    assert not Change((SET, DESTROY), closing=(REMOVE,)).needs_unlock


def test_the_last_edit_of_a_token_counts():
    assert written_tokens((ADD, SET, REMOVE)) == {0: SET, 1: None}
    assert written_tokens((SET, RemoveToken(0))) == {0: None}
