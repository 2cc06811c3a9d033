# SPDX-License-Identifier: GPL-2.0-or-later
"""Real libcryptsetup in a real worker on shadows of real images."""

import contextlib
import hashlib
import json
import os
import struct

import pytest

from luksrotd.errors import (
    EngineError,
    FormatError,
    InvalidRequest,
    MetadataFull,
    NoFreeArea,
    NoFreeKeyslot,
    WrongCredential,
)
from luksrotd.host.worker import WorkerEngine
from luksrotd.ports import SecretFd
from luksrotd.rotation.edits import (
    PBKDF_FOR_RANDOM_KEYS,
    AddKeyslot,
    DestroyKeyslot,
    Pbkdf,
    RemoveToken,
    SetToken,
)
from luksrotd.rotation.fingerprint import fingerprint
from tests.engine.shadow import PlainShadow, memfd, shadow_of
from tests.support.makeimage import (
    KEY,
    add_key,
    cryptsetup_opens,
    import_token,
    luks_dump_json,
    make_image,
    run,
)

pytestmark = pytest.mark.asyncio

NEW = b"the new key\n\0with odd bytes"
AREA = 258048
TOKEN = {"type": "luksrotd", "keyslots": ["1"]}


@contextlib.asynccontextmanager
async def worker(shadow, unlock=KEY, new=NEW):
    secrets = {"unlock": SecretFd(memfd(unlock)), "new": SecretFd(memfd(new))}
    with contextlib.ExitStack() as stack:
        for source in secrets.values():
            stack.callback(os.close, source.fd)
        async with WorkerEngine().session(shadow, secrets) as session:
            yield session


def add(keyslot, pbkdf=PBKDF_FOR_RANDOM_KEYS):
    return AddKeyslot(keyslot, "new", pbkdf)


def copies(shadow):
    size = struct.unpack(">Q", shadow.read(8, 8))[0]
    return shadow.read(0, size), shadow.read(size, size)


def whole(copy):
    """Whether the checksum of a header copy is right."""
    bare = copy[:448] + bytes(64) + copy[512:]
    return hashlib.sha256(bare).digest() == copy[448:480]


async def test_rotation_adds_sets_the_token_and_destroys(image, shadow, tmp_path):
    import_token(image, {"type": "foreign", "keyslots": ["0"], "x": {"y": [1, 2.5, None, "ü"]}}, 0)
    shadow = shadow_of(image)
    before = image.read_bytes()
    async with worker(shadow) as session:
        assert await session.load() == luks_dump_json(image)
        assert await session.unlock() == 0
        await session.apply([add(1), SetToken(3, TOKEN, fingerprint_of=1), DestroyKeyslot(0)])
        assert await session.opens(1, "new")
        assert not await session.opens(0, "unlock")
        assert not await session.opens(1, "unlock")
        metadata = await session.load()
    result = shadow.save(tmp_path / "result")
    assert luks_dump_json(result) == metadata
    assert list(metadata["keyslots"]) == ["1"]
    assert metadata["tokens"]["0"] == {"type": "foreign", "keyslots": [], "x": {"y": [1, 2.5, None, "ü"]}}
    assert metadata["tokens"]["3"] == {**TOKEN, "fingerprint": fingerprint(metadata["keyslots"]["1"])}
    assert cryptsetup_opens(result, NEW, 1)
    assert not cryptsetup_opens(result, KEY)
    assert image.read_bytes() == before


async def test_the_new_area_is_not_one_that_the_device_references(image, shadow):
    areas = [slot["area"] for slot in luks_dump_json(image)["keyslots"].values()]
    old = shadow.read(int(areas[0]["offset"]), AREA)
    async with worker(shadow) as session:
        await session.unlock()
        await session.apply([add(7)])
        area = (await session.load())["keyslots"]["7"]["area"]
    assert int(area["offset"]) >= int(areas[0]["offset"]) + AREA
    assert shadow.read(int(areas[0]["offset"]), AREA) == old


async def test_destroy_overwrites_the_area(image, shadow):
    offset = int(luks_dump_json(image)["keyslots"]["0"]["area"]["offset"])
    old = shadow.read(offset, 256000)
    async with worker(shadow) as session:
        await session.apply([DestroyKeyslot(0)])
    new = shadow.read(offset, 256000)
    assert sum(a == b for a, b in zip(old, new, strict=True)) < 256000 / 100


async def test_edits_without_a_key_need_no_unlock(image):
    import_token(image, {"type": "luksrotd", "keyslots": []}, 4)
    shadow = shadow_of(image)
    async with worker(shadow) as session:
        await session.apply([RemoveToken(4), SetToken(5, {"type": "luksrotd", "keyslots": ["0"]})])
        assert (await session.load())["tokens"] == {"5": {"type": "luksrotd", "keyslots": ["0"]}}


async def test_removing_a_token_that_is_not_there_changes_no_token(shadow):
    async with worker(shadow) as session:
        await session.apply([RemoveToken(9)])
        assert (await session.load())["tokens"] == {}


@pytest.mark.parametrize(
    "pbkdf",
    [
        Pbkdf("argon2id", iterations=4, memory_kib=32, parallel=2),
        Pbkdf("argon2i", iterations=5, memory_kib=64, parallel=1),
        Pbkdf("pbkdf2", hash="sha256", iterations=1234),
    ],
    ids=lambda pbkdf: pbkdf.type,
)
async def test_key_derivation_is_as_asked_for(shadow, pbkdf):
    async with worker(shadow) as session:
        await session.unlock()
        await session.apply([add(1, pbkdf)])
        assert await session.opens(1, "new")
        kdf = (await session.load())["keyslots"]["1"]["kdf"]
    asked = {"type": pbkdf.type, "hash": pbkdf.hash, "iterations": pbkdf.iterations}
    if pbkdf.type != "pbkdf2":
        asked = {
            "type": pbkdf.type,
            "time": pbkdf.iterations,
            "memory": pbkdf.memory_kib,
            "cpus": pbkdf.parallel,
        }
    assert asked.items() <= kdf.items()


async def test_unknown_hash_is_the_callers_fault(shadow):
    async with worker(shadow) as session:
        await session.unlock()
        with pytest.raises(InvalidRequest, match=r"cannot use key derivation pbkdf2"):
            await session.apply([add(1, Pbkdf("pbkdf2", hash="nonsense", iterations=1000))])


@pytest.mark.parametrize(
    "options",
    [
        {"key_size": 256, "keyslots_size": 1024 * 1024},
        {"metadata_size": 65536},
        {"sector_size": 4096},
        {"detached": True},
    ],
)
async def test_every_layout(tmp_path, options):
    image = make_image(tmp_path / "layout", **options)
    shadow = shadow_of(image)
    async with worker(shadow) as session:
        await session.unlock()
        await session.apply([add(1), DestroyKeyslot(0)])
        assert await session.opens(1, "new")
    assert cryptsetup_opens(shadow.save(tmp_path / "result"), NEW, 1)


# -- credentials -------------------------------------------------------------------------------------------------


async def test_wrong_passphrase(shadow):
    async with worker(shadow, unlock=b"wrong") as session:
        with pytest.raises(WrongCredential, match=r"^cannot unlock the volume: the credential opens no keyslot$"):
            await session.unlock()
        with pytest.raises(EngineError, match=r"after it failed"):
            await session.load()


async def test_unlock_by_a_given_keyslot(tmp_path):
    shadow = shadow_of(make_image(tmp_path / "two", extra_keys={5: b"five"}))
    async with worker(shadow, unlock=b"five") as session:
        assert await session.unlock() == 5
        assert await session.unlock(5) == 5
        with pytest.raises(WrongCredential, match=r"does not open keyslot 0"):
            await session.unlock(0)


async def test_unlock_by_a_keyslot_that_is_not_there(shadow):
    async with worker(shadow) as session:
        with pytest.raises(WrongCredential):
            await session.unlock(6)


async def test_unlock_when_another_keyslot_is_unbound(image):
    """libcryptsetup 2.6.1 then says ENOENT, not EPERM, for a wrong passphrase."""
    add_key(image, KEY, b"unbound", "--unbound", "--key-size", "512", "--key-slot", "1")
    async with worker(shadow_of(image), unlock=b"wrong") as session:
        with pytest.raises(WrongCredential):
            await session.unlock()


@pytest.mark.parametrize("bits", ["512", "256", "1024"])
async def test_key_of_an_unbound_keyslot_is_not_the_volume_key(image, bits):
    add_key(image, KEY, b"unbound", "--unbound", "--key-size", bits, "--key-slot", "1")
    async with worker(shadow_of(image), unlock=b"unbound") as session:
        assert not await session.opens(1, "unlock")
        with pytest.raises(WrongCredential, match=r"keyslot 1"):
            await session.unlock(1)


async def test_a_keyslot_of_priority_ignore_opens_by_number_only(image):
    run("config", "--priority", "ignore", "--key-slot", "0", str(image))
    async with worker(shadow_of(image)) as session:
        assert await session.unlock(0) == 0
        assert await session.opens(0, "unlock")
        with pytest.raises(WrongCredential):
            await session.unlock()


@pytest.mark.parametrize("keyslot", [-1, -5])
async def test_opens_takes_no_any(shadow, keyslot):
    async with worker(shadow) as session:
        with pytest.raises(InvalidRequest, match=r"out of range"):
            await session.opens(keyslot, "unlock")


async def test_opens_is_false_for_a_number_that_is_not_there(shadow):
    async with worker(shadow) as session:
        assert not await session.opens(8, "unlock")


async def test_opens_wants_a_known_secret(shadow):
    async with worker(shadow) as session:
        with pytest.raises(InvalidRequest, match=r"'other'"):
            await session.opens(0, "other")


# -- what does not fit -------------------------------------------------------------------------------------------


async def test_no_free_keyslot(tmp_path):
    shadow = shadow_of(make_image(tmp_path / "default"))
    async with worker(shadow) as session:
        await session.unlock()
        await session.apply([add(number) for number in range(1, 32)])
        with pytest.raises(NoFreeKeyslot):
            await session.apply([add(3)])


@pytest.mark.parametrize("number", [0, 32, -1])
async def test_taken_and_impossible_numbers(shadow, number):
    async with worker(shadow) as session:
        await session.unlock()
        with pytest.raises(InvalidRequest, match=r"taken or out of range"):
            await session.apply([add(number)])


async def test_add_without_unlock(shadow):
    async with worker(shadow) as session:
        with pytest.raises(InvalidRequest, match=r"not unlocked"):
            await session.apply([add(1)])


async def test_no_free_area(tmp_path):
    shadow = shadow_of(make_image(tmp_path / "small", keyslots_size=2 * AREA))
    async with worker(shadow) as session:
        await session.unlock()
        await session.apply([add(1)])
        with pytest.raises(NoFreeArea):
            await session.apply([add(2)])


async def test_no_free_area_agrees_with_libcryptsetup_to_the_byte(tmp_path):
    """One block less than two areas, and gaps that are together, but not each, large enough."""
    shadow = shadow_of(make_image(tmp_path / "tight", keyslots_size=2 * AREA - 4096))
    async with worker(shadow) as session:
        await session.unlock()
        with pytest.raises(NoFreeArea):
            await session.apply([add(1)])


async def test_area_of_a_destroyed_keyslot_is_free_again(tmp_path):
    shadow = shadow_of(make_image(tmp_path / "small", keyslots_size=2 * AREA, extra_keys={1: b"one"}))
    async with worker(shadow) as session:
        await session.unlock()
        await session.apply([DestroyKeyslot(1), add(1)])
        assert await session.opens(1, "new")


async def test_token_too_large(shadow):
    async with worker(shadow) as session:
        with pytest.raises(MetadataFull, match=r"token 3"):
            await session.apply([SetToken(3, {**TOKEN, "keyslots": ["0"], "data": "x" * 20000})])


async def test_keyslot_that_does_not_fit_into_the_metadata(image, shadow):
    used = len(json.dumps(luks_dump_json(image), separators=(",", ":")))
    async with worker(shadow) as session:
        await session.unlock()
        await session.apply([SetToken(0, {"type": "x", "keyslots": ["0"], "data": "x" * (12288 - used - 150)})])
        with pytest.raises(MetadataFull, match=r"keyslot 1"):
            await session.apply([add(1)])


def nested(depth):
    return {"type": "x", "keyslots": [], "data": [] if depth == 0 else [nested(depth - 1)["data"]]}


@pytest.mark.parametrize(
    "body",
    [
        {"type": "x", "keyslots": ["9"]},
        {"type": "luks2-x", "keyslots": []},
        {"keyslots": []},
        {"type": "x", "keyslots": [], "clamped": 2**70},
        {"type": "x", "keyslots": [], "clamped": -(2**63) - 1},
        {"type": "x", "keyslots": [], "cut\0": 1},
        {"type": "x", "keyslots": [], "surrogate": "\ud800"},
        nested(40),
    ],
)
async def test_tokens_that_cannot_be_stored_as_they_are(shadow, body):
    async with worker(shadow) as session:
        with pytest.raises(InvalidRequest, match=r"cannot write token 1"):
            await session.apply([SetToken(1, body)])


async def test_json_values_survive(shadow):
    body = {
        "type": "x",
        "keyslots": ["0"],
        "data": ["a\0b", "é\u2028", 2**63, -(2**63), 0.1 + 0.2, True, None, {"": ""}],
    }
    async with worker(shadow) as session:
        await session.apply([SetToken(1, body)])
        assert (await session.load())["tokens"]["1"] == body


@pytest.mark.parametrize("token", [-1, 32])
@pytest.mark.parametrize("edit", [lambda token: SetToken(token, {"type": "x", "keyslots": []}), RemoveToken])
async def test_token_numbers_out_of_range(shadow, token, edit):
    async with worker(shadow) as session:
        with pytest.raises(InvalidRequest, match=r"out of range"):
            await session.apply([edit(token)])


async def test_fingerprint_of_a_keyslot_that_is_not_there(shadow):
    async with worker(shadow) as session:
        with pytest.raises(InvalidRequest, match=r"no keyslot 1"):
            await session.apply([SetToken(1, TOKEN, fingerprint_of=1)])


async def test_destroying_a_keyslot_that_is_not_there(shadow):
    async with worker(shadow) as session:
        with pytest.raises(EngineError, match=r"^cannot destroy keyslot 4: ENOENT$"):
            await session.apply([DestroyKeyslot(4)])


# -- loading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [0, 1])
async def test_load_heals_a_torn_copy_on_the_shadow(image, shadow, torn):
    before, size = image.read_bytes(), len(copies(shadow)[0])
    shadow.write(torn * size + 4096, bytes(512))
    assert [whole(copy) for copy in copies(shadow)] == [torn == 1, torn == 0]
    async with worker(shadow) as session:
        assert await session.load() == luks_dump_json(image)
    assert [whole(copy) for copy in copies(shadow)] == [True, True]
    assert copies(shadow)[0][4096:] == copies(shadow)[1][4096:]
    assert image.read_bytes() == before


async def test_load_without_a_header():
    shadow = PlainShadow(16 * 1024 * 1024)
    async with worker(shadow) as session:
        with pytest.raises(EngineError, match=r"^cannot load the header: EINVAL$"):
            await session.load()


async def test_load_of_a_shadow_that_is_too_short(shadow):
    short = PlainShadow(32768)
    short.write(0, shadow.read(0, 32768))
    async with worker(short) as session:
        with pytest.raises(EngineError, match=r"too small"):
            await session.load()


async def test_fingerprint_wants_a_luks2_keyslot():
    with pytest.raises(FormatError):
        fingerprint({"type": "reencrypt", "area": {"offset": "0"}})
