# SPDX-License-Identifier: GPL-2.0-or-later
"""Real libcryptsetup in a real worker on shadows of real images."""

import pytest

from luksrotd.errors import (
    EngineError,
    InvalidRequest,
    WrongCredential,
)
from luksrotd.rotation.edits import (
    DestroyKeyslot,
    Pbkdf,
    RemoveToken,
    SetToken,
)
from luksrotd.rotation.fingerprint import fingerprint
from tests.engine.sessions import AREA, NEW, TOKEN, add, worker
from tests.engine.shadow import shadow_of
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


async def test_opens_looks_at_the_shadow_anew(shadow):
    before = shadow.read(0, 32768)
    async with worker(shadow) as session:
        await session.unlock()
        await session.apply([add(1)])
        assert await session.opens(1, "new")
        shadow.write(0, before)
        assert not await session.opens(1, "new")


async def test_opens_is_false_for_a_number_that_is_not_there(shadow):
    async with worker(shadow) as session:
        assert not await session.opens(8, "unlock")


async def test_opens_wants_a_known_secret(shadow):
    async with worker(shadow) as session:
        with pytest.raises(InvalidRequest, match=r"'other'"):
            await session.opens(0, "other")
