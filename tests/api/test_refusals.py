# SPDX-License-Identifier: GPL-2.0-or-later
"""What cannot be committed as a whole is refused before anything is written, and the message says what would help."""

import json

import pytest

from luksrotd import transaction
from luksrotd.errors import (
    Conflict,
    ForeignSignature,
    InvalidRequest,
    LastKeyslot,
    MetadataFull,
    NeedsReconcile,
    NoFreeArea,
    NoFreeKeyslot,
    RequirementsPresent,
)
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import Which
from luksrotd.transaction import Outcome, Pbkdf
from tests.api.conftest import OTHER
from tests.support import forge
from tests.support.makeimage import (
    KEY,
    add_key,
    cryptsetup_opens,
    import_token,
    luks_dump_json,
    run,
)

pytestmark = pytest.mark.asyncio
CHEAP = Pbkdf("pbkdf2", iterations=1000)
NOTE = {"type": "note", "keyslots": []}


async def refuses(image, edit, error, match, credential=KEY):
    """``edit`` is refused when it is queued or planned, and by commit, and the image stays as it is."""
    before = image.read_bytes()
    async with transaction.begin(image) as tx:
        await tx.unlock(credential)
        with pytest.raises(error, match=match) as first:
            edit(tx) or tx.plan()
        with pytest.raises((error, InvalidRequest)) as second:
            await tx.commit()
    assert first.value.outcome is second.value.outcome is Outcome.UNCHANGED
    assert image.read_bytes() == before


async def test_no_room_beside_what_is_still_referenced(image):
    def edit(tx):
        for _ in range(3):
            tx.add_keyslot(b"x", pbkdf=CHEAP)
        tx.destroy_keyslot(1)

    await refuses(image, edit, NoFreeArea, "3 times 258048 bytes .* beside what is still referenced; remove a keyslot")


async def test_the_last_way_in(image):
    def edit(tx):
        tx.destroy_keyslot(0)
        tx.destroy_keyslot(1)

    await refuses(image, edit, LastKeyslot, "the last keyslot that opens the volume; add another one first, or with it")


async def test_no_token_number(image):
    def edit(tx):
        for _ in range(32):
            tx.set_token(NOTE)
        tx.destroy_keyslot(1)

    await refuses(image, edit, NoFreeKeyslot, "all 32 tokens are taken, and one is needed .*; remove a token first")


async def test_metadata_that_do_not_fit(image):
    await refuses(
        image, lambda tx: tx.set_token({**NOTE, "x": "y" * 12_000}), MetadataFull, "remove keyslots or tokens first"
    )


async def test_a_token_that_would_name_nothing(image):
    import_token(image, {**NOTE, "keyslots": ["1"]}, 4)
    await refuses(image, lambda tx: tx.destroy_keyslot(1), InvalidRequest, r"token 4 \(note\) names it; change that")


async def test_nothing_to_do(image):
    await refuses(image, lambda _: None, InvalidRequest, "the transaction is empty")


async def test_a_refusal_leaves_the_transaction_open(image):
    async with transaction.begin(image) as tx:
        tx.set_token({**NOTE, "x": "y" * 12_000}, token=3)
        with pytest.raises(MetadataFull):
            await tx.commit()
        tx.set_token(NOTE, token=3)
        await tx.commit()
    assert luks_dump_json(image)["tokens"] == {"3": NOTE}


# ---- refused by what the shadow shows


async def fails(image, edit, error, match, *, credential=KEY, volume_key=False):
    """The commit is refused when libcryptsetup has tried it on the shadow."""
    before = image.read_bytes()
    async with transaction.begin(image) as tx:
        await tx.unlock(credential, volume_key=volume_key)
        edit(tx)
        assert tx.plan()
        with pytest.raises(error, match=match) as caught:
            await tx.commit()
    assert caught.value.outcome is Outcome.UNCHANGED
    assert image.read_bytes() == before


async def test_who_removes_a_keyslot_shows_another_one(image):
    await fails(
        image,
        lambda tx: tx.destroy_keyslot(1),
        LastKeyslot,
        "cannot remove keyslot 1: the credential opens no other one; use one that stays",
        credential=OTHER,
    )


async def test_the_volume_key_is_no_other_keyslot(image, key, tmp_path):
    volume_key = tmp_path / "volume-key"
    run("luksDump", "--dump-volume-key", "--volume-key-file", str(volume_key), "--key-file", str(key), str(image))
    await fails(
        image,
        lambda tx: tx.destroy_keyslot(1),
        InvalidRequest,
        "by the volume key: show the passphrase of a keyslot that stays",
        credential=volume_key,
        volume_key=True,
    )


async def test_a_token_that_libcryptsetup_refuses(image):
    await fails(
        image,
        lambda tx: tx.set_token({"type": "luks2-keyring", "keyslots": ["0"], "x": 1}),
        InvalidRequest,
        "libcryptsetup refuses its content",
    )


# ---- refused at the beginning


async def begins_not(image, error, match):
    before = image.read_bytes()
    with pytest.raises(error, match=match) as caught:
        async with transaction.begin(image):
            pass
    assert caught.value.outcome is Outcome.UNCHANGED
    assert image.read_bytes() == before


async def test_requirements(image):
    def require(raw):
        raw["config"]["requirements"] = {"mandatory": ["x-frozen"]}

    image.write_bytes(forge.edited(image.read_bytes(), require))
    await begins_not(image, RequirementsPresent, "requires x-frozen; finish that with cryptsetup")


async def test_a_foreign_signature(image):
    content = image.read_bytes()
    image.write_bytes(forge.put(content, len(content) - 1024, b"Intel Raid ISM Cfg Sig. 1.1.00"))
    await begins_not(image, ForeignSignature, r"isw_raid_member.*; see wipefs\(8\)")


async def test_copies_that_differ(image):
    image.write_bytes(forge.newer(image.read_bytes(), [Which.PRIMARY]))
    await begins_not(image, NeedsReconcile, "copies differ; reconcile it first")


async def test_a_wipe_that_is_owed(image):
    space = forge.view_of(image.read_bytes()).metadata.keyslots_area
    intent = forge.intent(Extent(space.end - 4096, 4096))
    image.write_bytes(forge.with_token(image.read_bytes(), 1, wipe=intent))
    await begins_not(image, NeedsReconcile, "has not been wiped yet; reconcile it first")


# ---- somebody else was faster


@pytest.mark.parametrize("by", ["token", "keyslot", "restore"])
async def test_a_foreign_writer_between_begin_and_commit(image, tmp_path, by):
    backup = tmp_path / "backup"
    run("luksHeaderBackup", "--header-backup-file", str(backup), str(image))
    import_token(image, NOTE, 9)
    async with transaction.begin(image) as tx:
        await tx.unlock(KEY)
        tx.add_keyslot(b"new", pbkdf=CHEAP)
        if by == "token":
            import_token(image, NOTE, 5)
        elif by == "keyslot":
            add_key(image, KEY, b"theirs")
        else:
            run("luksHeaderRestore", "--header-backup-file", str(backup), str(image))
        theirs = image.read_bytes()
        with pytest.raises(Conflict, match="another tool has changed the header since") as caught:
            await tx.commit()
        with pytest.raises(InvalidRequest, match="it is over"):
            await tx.commit()
    assert caught.value.outcome is Outcome.UNCHANGED
    assert image.read_bytes() == theirs
    assert not cryptsetup_opens(image, b"new")


async def test_one_of_two_transactions_wins(image):
    async with transaction.begin(image) as first, transaction.begin(image) as second:
        first.set_token({**NOTE, "by": 1}, token=1)
        second.set_token({**NOTE, "by": 2}, token=2)
        await second.commit()
        with pytest.raises(Conflict):
            await first.commit()
    assert json.loads(run("token", "export", "--token-id", "2", str(image)))["by"] == 2
    assert list(luks_dump_json(image)["tokens"]) == ["2"]
