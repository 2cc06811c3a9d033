# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the wipe intent goes when keyslots go."""

import pytest

from luksrotd.errors import NoFreeKeyslot
from luksrotd.luks2 import layout
from luksrotd.rotation.edits import AddKeyslot, DestroyKeyslot, RemoveToken, SetToken
from luksrotd.rotation.retirement import Carrier, retire
from tests.support import forge
from tests.support.simengine import make_volume

PLAIN = forge.view_of(make_volume([b"0", b"1", b"2"]))
AREAS = [PLAIN.metadata.keyslots[number].area for number in range(3)]
BODY = {"type": "luksrotd", "keyslots": ["0"], "name": "backup"}


def record(*keyslots: int) -> dict[str, object]:
    wipe = forge.intent(*(AREAS[number] for number in keyslots))
    return {"type": "luksrotd-wipe", "keyslots": [], "version": 1, "wipe": wipe}


def with_tokens(count: int):
    taken = {str(number): {"type": "x", "keyslots": []} for number in range(count)}
    return forge.view_of(forge.edited(make_volume([b"0", b"1", b"2"]), lambda raw: raw["tokens"].update(taken)))


def test_the_intent_goes_into_the_token_that_stays():
    change = retire(PLAIN, [1], [7], carrier=Carrier(3, BODY, 0), first=(AddKeyslot(5),), survivors=frozenset({0}))
    pending = SetToken(3, {**BODY, "wipe": forge.intent(AREAS[1])}, 0)
    assert change.edits == (RemoveToken(7), AddKeyslot(5), pending, DestroyKeyslot(1))
    assert change.closing == (SetToken(3, BODY, 0),)
    assert change.survivors == {0}


def test_nothing_to_wipe_is_no_intent():
    change = retire(PLAIN, [], [7], carrier=Carrier(3, BODY))
    assert (change.edits, change.closing) == ((RemoveToken(7), SetToken(3, BODY)), ())


def test_only_tokens_go():
    change = retire(PLAIN, [], [7, 8], first=(SetToken(1, {}),))
    assert (change.edits, change.closing) == ((RemoveToken(7), RemoveToken(8), SetToken(1, {})), ())


def test_without_a_carrier_the_intent_takes_the_place_of_a_token_that_goes():
    change = retire(PLAIN, [1, 2], [7, 8])
    assert change.edits == (RemoveToken(8), SetToken(7, record(1, 2)), DestroyKeyslot(1), DestroyKeyslot(2))
    assert change.closing == (RemoveToken(7),)


def test_else_it_takes_a_number_that_nobody_wants():
    change = retire(with_tokens(2), [1], first=(SetToken(2, {}),))
    assert change.edits == (SetToken(2, {}), SetToken(3, record(1)), DestroyKeyslot(1))
    assert change.closing == (RemoveToken(3),)


def test_where_all_numbers_are_taken_one_must_go():
    full = with_tokens(layout.TOKENS_MAX)
    assert retire(full, [1], [31]).closing == (RemoveToken(31),)
    with pytest.raises(NoFreeKeyslot, match="remove a token first"):
        retire(full, [1])
    with pytest.raises(NoFreeKeyslot, match="all 32 tokens are taken"):
        retire(with_tokens(layout.TOKENS_MAX - 1), [1], first=(SetToken(31, {}),))
