# SPDX-License-Identifier: GPL-2.0-or-later
"""What a program can do in one commit, and how secrets get into it."""

import asyncio
import os

import pytest

from luksrotd import transaction
from luksrotd.errors import DeviceError, InvalidRequest, SecretRejected, UnknownDevice, WrongCredential
from luksrotd.luks2.pair import parse_pair
from luksrotd.rotation.protocol import Phase
from luksrotd.transaction import PBKDF_FOR_RANDOM_KEYS, Outcome, Pbkdf
from tests.api.conftest import OTHER
from tests.support.makeimage import (
    KEY,
    cryptsetup_opens,
    import_token,
    luks_dump_json,
    make_image,
    run,
)

pytestmark = pytest.mark.asyncio
CHEAP = Pbkdf("pbkdf2", iterations=1000)
NOTE = {"type": "note", "keyslots": []}


def area_of(image, keyslot):
    area = luks_dump_json(image)["keyslots"][str(keyslot)]["area"]
    return int(area["offset"]), int(area["size"])


async def test_many_edits_are_one_commit(image, key):
    import_token(image, {**NOTE, "keyslots": ["1"], "n": 3}, 3)
    import_token(image, {**NOTE, "n": 7}, 7)
    offset, size = area_of(image, 1)
    before = image.read_bytes()
    steps = []
    async with transaction.begin(image) as tx:
        await tx.unlock(key)
        first = tx.add_keyslot(b"first", pbkdf=CHEAP)
        second = tx.add_keyslot(b"second", pbkdf=PBKDF_FOR_RANDOM_KEYS, keyslot=9)
        token = tx.set_token({"type": "example", "keyslots": [str(first)], "x": {"y": [1, 2.5, None, "ü"]}})
        tx.set_token({**NOTE, "keyslots": [str(second)], "n": 8}, token=7)
        for number in range(20, 30):
            tx.set_token({**NOTE, "n": number}, token=number)
        tx.remove_token(3)
        tx.destroy_keyslot(1)
        assert [(each.what, each.name, each.how) for each in tx.plan()] == [
            ("keyslot", "2", "add"),
            ("keyslot", "9", "add"),
            ("keyslot", "1", "remove"),
            ("token", "0", "add"),
            ("token", "3", "remove"),
            ("token", "7", "change"),
            *(("token", str(number), "add") for number in range(20, 30)),
            ("area", str(offset), "wipe"),
        ]
        assert image.read_bytes() == before
        done = await tx.commit(steps.append)
    assert (first, second, token) == (2, 9, 0)
    assert [step for step in steps if isinstance(step, Phase)] == list(Phase)
    assert done.uuid == luks_dump_json_uuid(image) == tx.uuid
    after = image.read_bytes()
    pair = parse_pair(after)
    assert pair.agree
    assert (done.seqid_before, done.seqid_after) == (parse_pair(before).winner.header.seqid, pair.winner.header.seqid)
    metadata = luks_dump_json(image)
    assert sorted(metadata["keyslots"]) == ["0", "2", "9"]
    assert metadata["tokens"] == {
        "0": {"type": "example", "keyslots": ["2"], "x": {"y": [1, 2.5, None, "ü"]}},
        "7": {**NOTE, "keyslots": ["9"], "n": 8},
        **{str(number): {**NOTE, "n": number} for number in range(20, 30)},
    }
    for secret, keyslot in ((KEY, 0), (b"first", 2), (b"second", 9)):
        assert cryptsetup_opens(image, secret, keyslot)
    assert not cryptsetup_opens(image, OTHER)
    same = sum(a == b for a, b in zip(before[offset : offset + size], after[offset : offset + size], strict=True))
    assert same < size / 100
    assert after[pair.length :] == before[pair.length :]


def luks_dump_json_uuid(image):
    return run("luksUUID", str(image)).strip()


async def test_tokens_alone_need_no_credential(image):
    async with transaction.begin(str(image)) as tx:
        tx.set_token(NOTE)
        tx.set_token(NOTE, token=31)
        await tx.commit()
    assert luks_dump_json(image)["tokens"] == {"0": NOTE, "31": NOTE}


async def test_the_metadata_are_those_of_the_beginning_and_the_callers_own(image):
    before = luks_dump_json(image)
    async with transaction.begin(image) as tx:
        tx.set_token(NOTE)
        assert tx.metadata == before
        tx.metadata["keyslots"].clear()
        assert tx.metadata == before


async def test_every_keyslot_can_be_replaced_at_once(image):
    async with transaction.begin(image) as tx:
        await tx.unlock(OTHER)
        for keyslot in (0, 1):
            tx.destroy_keyslot(keyslot)
        tx.add_keyslot(b"the only one", pbkdf=CHEAP)
        await tx.commit()
    assert list(luks_dump_json(image)["keyslots"]) == ["2"]
    assert cryptsetup_opens(image, b"the only one")
    assert not cryptsetup_opens(image, KEY)


async def test_a_keyslot_goes_where_the_passphrase_opens_one_that_stays(image):
    async with transaction.begin(image) as tx:
        await tx.unlock(KEY)
        tx.destroy_keyslot(1)
        await tx.commit()
    assert not cryptsetup_opens(image, OTHER)
    assert cryptsetup_opens(image, KEY)
    assert not luks_dump_json(image)["tokens"]


async def test_a_detached_header(tmp_path, key):
    header = make_image(tmp_path / "header", detached=True)
    data = tmp_path / "header.data"
    content = data.read_bytes()
    async with transaction.begin(data, header=header) as tx:
        await tx.unlock(key)
        keyslot = tx.add_keyslot(b"new", pbkdf=CHEAP)
        await tx.commit()
    assert cryptsetup_opens(header, b"new", keyslot)
    assert data.read_bytes() == content
    with pytest.raises(UnknownDevice):
        async with transaction.begin(tmp_path / "no such data", header=header):
            pass


# ---- leaving without a commit


async def test_a_block_that_is_left_writes_nothing(image):
    before = image.read_bytes()
    async with transaction.begin(image) as tx:
        await tx.unlock(KEY)
        tx.add_keyslot(b"new", pbkdf=CHEAP)
        tx.destroy_keyslot(1)
    assert image.read_bytes() == before
    with pytest.raises(InvalidRequest, match="it is over"):
        await tx.commit()


async def test_neither_does_one_that_an_error_leaves(image):
    before = image.read_bytes()

    async def fails():
        async with transaction.begin(image) as tx:
            tx.set_token(NOTE)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fails()
    assert image.read_bytes() == before


async def test_an_aborted_transaction_takes_nothing_more(image):
    before = image.read_bytes()
    async with transaction.begin(image) as tx:
        tx.set_token(NOTE)
        tx.abort()
        tx.abort()
        for call in (
            lambda: tx.set_token(NOTE),
            lambda: tx.remove_token(0),
            lambda: tx.destroy_keyslot(0),
            lambda: tx.add_keyslot(b"x"),
            tx.plan,
        ):
            with pytest.raises(InvalidRequest, match="it is over"):
                call()
        for work in (tx.commit, lambda: tx.unlock(KEY)):
            with pytest.raises(InvalidRequest, match="it is over"):
                await work()
    assert image.read_bytes() == before


async def test_a_transaction_commits_once(image):
    async with transaction.begin(image) as tx:
        tx.set_token(NOTE)
        await tx.commit()
        with pytest.raises(InvalidRequest, match="it is over"):
            await tx.commit()
    assert luks_dump_json(image)["tokens"] == {"0": NOTE}


async def test_a_cancelled_commit_writes_nothing(image):
    before = image.read_bytes()
    async with transaction.begin(image) as tx:
        tx.set_token(NOTE)
        task = asyncio.ensure_future(tx.commit())
        await asyncio.sleep(0)  # it has begun
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert image.read_bytes() == before


# ---- secrets


def opened(path):
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


async def test_a_descriptor_is_read_from_its_start_and_stays_the_callers(image, key, tmp_path):
    new = tmp_path / "new"
    new.write_bytes(b"new\n")
    fds = [opened(key), opened(new)]
    try:
        for fd in fds:
            os.lseek(fd, 2, os.SEEK_SET)
        async with transaction.begin(image) as tx:
            await tx.unlock(fds[0])
            tx.add_keyslot(fds[1], pbkdf=CHEAP)
            await tx.commit()
        assert [os.lseek(fd, 0, os.SEEK_CUR) for fd in fds] == [2, 2]
    finally:
        for fd in fds:
            os.close(fd)
    assert cryptsetup_opens(image, b"new\n", 2)


async def test_a_bytearray_is_zeroed(image):
    credential, new = bytearray(KEY), bytearray(b"new")
    async with transaction.begin(image) as tx:
        await tx.unlock(credential)
        tx.add_keyslot(new, pbkdf=CHEAP)
        assert (credential, new) == (bytes(len(KEY)), bytes(3))
        await tx.commit()
    assert cryptsetup_opens(image, b"new", 2)


async def test_a_key_file_may_go_once_it_was_named(image, key, tmp_path):
    new = tmp_path / "new"
    new.write_bytes(b"new")
    async with transaction.begin(image) as tx:
        await tx.unlock(key)
        tx.add_keyslot(new, pbkdf=CHEAP)
        key.unlink()
        new.unlink()
        await tx.commit()
    assert cryptsetup_opens(image, b"new", 2)


async def test_a_wrong_credential_is_refused_at_once_and_another_one_can_be_tried(image, key):
    async with transaction.begin(image) as tx:
        for wrong in (b"wrong", KEY + b"\n"):
            with pytest.raises(WrongCredential, match="opens no keyslot") as caught:
                await tx.unlock(wrong)
            assert caught.value.outcome is Outcome.UNCHANGED
        tx.add_keyslot(b"new", pbkdf=CHEAP)
        with pytest.raises(InvalidRequest, match="has not been unlocked"):
            await tx.commit()
        await tx.unlock(key)
        await tx.commit()
    assert cryptsetup_opens(image, b"new", 2)


async def test_the_volume_key(image, key, tmp_path):
    volume_key = tmp_path / "volume-key"
    run("luksDump", "--dump-volume-key", "--volume-key-file", str(volume_key), "--key-file", str(key), str(image))
    right = volume_key.read_bytes()
    async with transaction.begin(image) as tx:
        for wrong in (right[:-1] + bytes([right[-1] ^ 1]), right[:-1], right + b"x", KEY):
            with pytest.raises(WrongCredential, match="this is not its volume key"):
                await tx.unlock(wrong, volume_key=True)
        with pytest.raises(WrongCredential):
            await tx.unlock(right)
        await tx.unlock(volume_key, volume_key=True)
        tx.add_keyslot(b"new", pbkdf=CHEAP)
        tx.destroy_keyslot(0)
        await tx.commit()
    assert cryptsetup_opens(image, b"new", 2)
    assert not cryptsetup_opens(image, KEY)


@pytest.mark.parametrize("secret", ["text", None, True, 1.5, ("x",)])
async def test_what_is_no_secret(image, secret):
    async with transaction.begin(image) as tx:
        with pytest.raises(InvalidRequest, match="must be a Path, a file descriptor, bytes or a bytearray"):
            await tx.unlock(secret)
        with pytest.raises(InvalidRequest, match="must be a Path"):
            tx.add_keyslot(secret)


async def test_secrets_that_cannot_be_read(image, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    reader, writer = os.pipe()
    try:
        async with transaction.begin(image) as tx:
            for secret, why in (
                (tmp_path / "none", "No such file"),
                (tmp_path, "cannot be read twice"),
                (tmp_path / "fifo", "cannot be read twice"),
                (reader, "cannot be read twice"),
                (-1, "Bad file descriptor"),
                (10**6, "Bad file descriptor"),
                (2**70, "there can be none"),
                (b"", "it is empty"),
            ):
                with pytest.raises(SecretRejected, match=why):
                    await tx.unlock(secret)
    finally:
        os.close(reader)
        os.close(writer)


async def test_no_message_has_a_secret(image):
    async with transaction.begin(image) as tx:
        with pytest.raises(WrongCredential) as caught:
            await tx.unlock(b"hunter2")
        tx.add_keyslot(b"hunter3", pbkdf=CHEAP)
        assert "hunter" not in f"{caught.value!r} {tx!r} {tx.plan()!r} {vars(tx)!r}"


# ---- which volume


async def test_the_volume_must_have_the_uuid_that_is_named(image):
    uuid = luks_dump_json_uuid(image)
    async with transaction.begin(image, uuid=uuid.upper()) as tx:
        assert tx.uuid == uuid
    with pytest.raises(UnknownDevice):
        async with transaction.begin(image, uuid="00000000-0000-4000-8000-000000000000"):
            pass


async def test_a_volume_that_is_not_there(tmp_path):
    with pytest.raises(InvalidRequest, match="name a device or a UUID"):
        async with transaction.begin():
            pass
    with pytest.raises(UnknownDevice, match="cannot"):
        async with transaction.begin(tmp_path / "none"):
            pass
    with pytest.raises((UnknownDevice, DeviceError), match="cannot"):
        async with transaction.begin(tmp_path):
            pass
    (tmp_path / "zeros").write_bytes(bytes(1 << 20))
    with pytest.raises(UnknownDevice):
        async with transaction.begin(tmp_path / "zeros"):
            pass
    with pytest.raises(UnknownDevice, match="cannot find a block device with the LUKS UUID"):
        async with transaction.begin(uuid="00000000-0000-4000-8000-000000000000"):
            pass
