# SPDX-License-Identifier: GPL-2.0-or-later
import pytest

from luksrotd.luks2 import layout
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import Which
from tests.support import forge
from tests.support.planning import KEEP, OLD, volume
from tests.support.simengine import UUID, make_volume

PLAIN = make_volume([KEEP, OLD])


def test_a_managed_key_and_an_ordinary_passphrase():
    seen = forge.view_of(volume())
    (key,) = seen.keys
    assert (key.token.name, key.token.generation, key.stale, key.shared) == ("backup", 1, False, False)
    assert key.keyslot is not None
    assert key.keyslot.id == 1
    assert seen.ordinary == (0,)
    assert seen.named("backup") == (key,)
    assert seen.named("spare") == ()


def test_what_the_header_says():
    seen = forge.view_of(forge.with_fields(volume(), label=b"root"))
    assert (seen.uuid, seen.label, seen.seqid) == (UUID, "root", 3)
    assert seen.metadata is seen.pair.winner.metadata
    kept = seen.summary
    assert (kept.label, kept.seqid, kept.digest) == ("root", 3, seen.digest)
    assert (kept.metadata, kept.keys, kept.ordinary) == (seen.metadata, seen.keys, (0,))


def test_foreign_tokens_are_no_keys_of_ours():
    image = forge.edited(PLAIN, lambda raw: raw["tokens"].update({"0": {"type": "systemd-tpm2", "keyslots": ["1"]}}))
    seen = forge.view_of(image)
    assert (seen.keys, seen.ordinary) == ((), (0,))


def test_tokens_without_exactly_one_keyslot_have_none():
    assert forge.view_of(forge.with_token(PLAIN, None)).keys[0].keyslot is None
    two = forge.with_token(PLAIN, 1, keyslots=["0", "1"])
    assert forge.view_of(two).keys[0].keyslot is None
    twice = forge.with_token(PLAIN, 1, keyslots=["1", "1"])
    assert forge.view_of(twice).keys[0].keyslot is None


def test_a_keyslot_changed_by_another_tool_is_stale():
    salted = forge.edited(volume(), lambda raw: raw["keyslots"]["1"]["kdf"].update(salt="AAAA"))
    assert forge.view_of(salted).keys[0].stale


def test_a_token_without_fingerprint_is_believed():
    assert not forge.view_of(forge.with_token(PLAIN, 1, fingerprint=None)).keys[0].stale


@pytest.mark.parametrize("fingerprint", [None, "sha256:x"])
def test_I5_a_keyslot_that_we_cannot_have_made_is_not_taken_for_ours(fingerprint):
    unknown = forge.edited(PLAIN, lambda raw: raw["keyslots"]["1"].update(type="x-unknown"))
    assert forge.view_of(forge.with_token(unknown, 1, fingerprint=fingerprint)).keys[0].stale

    def unbind(raw):
        raw["digests"]["0"]["keyslots"] = ["0"]
        raw["digests"]["1"] = dict(raw["digests"]["0"], keyslots=["1"], segments=[])

    unbound = forge.with_token(forge.edited(PLAIN, unbind), 1, fingerprint=fingerprint)
    assert forge.view_of(unbound).keys[0].stale


def test_a_keyslot_that_another_token_names_is_shared():
    image = forge.edited(volume(), lambda raw: raw["tokens"].update({"1": {"type": "x", "keyslots": ["1"]}}))
    assert forge.view_of(image).keys[0].shared


def test_a_token_that_cannot_be_read_is_shown_and_claims_its_keyslot():
    seen = forge.view_of(forge.with_token(PLAIN, 1, 4, version=9))
    assert (seen.keys, seen.ordinary, list(seen.unreadable)) == ((), (0,), [4])


def test_ranges_that_are_to_be_wiped():
    image = forge.with_token(PLAIN, 1, wipe=forge.intent(Extent(45056, 4096), Extent(49152, 4096)))
    assert forge.view_of(image).pending == (Extent(45056, 4096), Extent(49152, 4096))


def test_I4_free_space_is_what_neither_copy_references():
    newer = forge.newer(forge.keyslot_removed(PLAIN, 0), [Which.PRIMARY])
    image = forge.put(newer, 16384, PLAIN[16384:32768])
    assert forge.view_of(image).free == (Extent(32768 + 8192, 6 * 4096),)


def test_free_numbers():
    seen = forge.view_of(volume())
    assert (seen.free_keyslot(), seen.free_token()) == (2, 1)
    taken = {str(number): {"type": "x", "keyslots": []} for number in range(layout.TOKENS_MAX)}
    assert forge.view_of(forge.edited(PLAIN, lambda raw: raw.update(tokens=taken))).free_token() is None
