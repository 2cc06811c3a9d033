# SPDX-License-Identifier: GPL-2.0-or-later
from luksrotd.rotation.fingerprint import fingerprint
from tests.support import forge
from tests.support.planning import volume

SLOT = forge.json_of(volume())["keyslots"]["1"]


def test_it_changes_with_the_salt_and_the_offset():
    moved = SLOT | {"area": SLOT["area"] | {"offset": "4096"}}
    salted = SLOT | {"kdf": SLOT["kdf"] | {"salt": "AAAA"}}
    assert len({fingerprint(SLOT), fingerprint(moved), fingerprint(salted)}) == 3


def test_it_stays_when_anything_else_changes():
    assert fingerprint(SLOT | {"priority": 2, "x-unknown": 1}) == fingerprint(SLOT)


def test_the_value_is_pinned():
    # Tokens on disk hold it: it must never change.
    slot = {"kdf": {"salt": "c2FsdA=="}, "area": {"offset": "32768"}}
    assert fingerprint(slot) == "sha256:49f18c10780135f32bc5b80078773322c258c226c787761add5bdc08c569f58b"
