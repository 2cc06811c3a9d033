# SPDX-License-Identifier: GPL-2.0-or-later
"""What a job is taken to need."""

from luksrotd.rotation.edits import PBKDF_FOR_RANDOM_KEYS, Pbkdf
from luksrotd.service.memory import DEFAULT_KIB, WORKER_KIB, needed_kib
from tests.support import forge
from tests.support.simengine import make_volume

PLAIN = make_volume([b"a", b"b", b"c"])


def argon2(memory: int) -> dict[str, object]:
    return {"type": "argon2id", "time": 4, "memory": memory, "cpus": 1, "salt": "AAAA"}


def volume(*memories: int) -> bytes:
    """Keyslot 1, 2, … with argon2 of that memory; keyslot 0 with pbkdf2."""

    def edit(raw):
        for number, memory in enumerate(memories, 1):
            raw["keyslots"][str(number)]["kdf"] = argon2(memory)

    return forge.edited(PLAIN, edit)


def test_pbkdf2_needs_no_more_than_the_worker():
    assert needed_kib(forge.view_of(PLAIN)) == WORKER_KIB
    assert needed_kib(forge.view_of(PLAIN), PBKDF_FOR_RANDOM_KEYS, Pbkdf("pbkdf2")) == WORKER_KIB


def test_the_largest_derivation_counts_once_for_they_come_one_after_the_other():
    seen = forge.view_of(volume(70_000, 300_000))
    assert needed_kib(seen) == WORKER_KIB + 300_000
    assert needed_kib(seen, Pbkdf(memory_kib=100_000)) == WORKER_KIB + 300_000
    assert needed_kib(seen, Pbkdf(memory_kib=400_000), Pbkdf("argon2i", memory_kib=500_000)) == WORKER_KIB + 500_000


def test_what_nobody_says_is_the_default_of_libcryptsetup():
    assert needed_kib(forge.view_of(PLAIN), Pbkdf()) == WORKER_KIB + DEFAULT_KIB


def test_a_volume_that_is_not_known_is_taken_for_an_ordinary_one():
    assert needed_kib(None) == WORKER_KIB + DEFAULT_KIB
    assert needed_kib(None, Pbkdf(memory_kib=2 * DEFAULT_KIB)) == WORKER_KIB + 2 * DEFAULT_KIB


def test_keyslots_without_derivation_need_nothing():
    image = forge.edited(PLAIN, lambda raw: raw["keyslots"]["1"].update(type="x-unknown", kdf=argon2(5_000_000)))
    assert needed_kib(forge.view_of(image)) == WORKER_KIB


def test_a_volume_without_keyslots_needs_the_worker():
    image = PLAIN
    for number in range(3):
        image = forge.keyslot_removed(image, number)
    assert needed_kib(forge.view_of(image)) == WORKER_KIB
