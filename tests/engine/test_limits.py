# SPDX-License-Identifier: GPL-2.0-or-later
"""What does not fit, and what cannot be loaded, with real libcryptsetup."""

import hashlib
import json
import struct

import pytest

from luksrotd.errors import (
    EngineError,
    FormatError,
    InvalidRequest,
    MetadataFull,
    NoFreeArea,
    NoFreeKeyslot,
)
from luksrotd.rotation.edits import (
    DestroyKeyslot,
    RemoveToken,
    SetToken,
)
from luksrotd.rotation.fingerprint import fingerprint
from tests.engine.sessions import AREA, TOKEN, add, worker
from tests.engine.shadow import PlainShadow, shadow_of
from tests.support.makeimage import (
    luks_dump_json,
    make_image,
)

pytestmark = pytest.mark.asyncio


def copies(shadow):
    size = struct.unpack(">Q", shadow.read(8, 8))[0]
    return shadow.read(0, size), shadow.read(size, size)


def whole(copy):
    """Whether the checksum of a header copy is right."""
    bare = copy[:448] + bytes(64) + copy[512:]
    return hashlib.sha256(bare).digest() == copy[448:480]


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
        with pytest.raises(EngineError) as caught:
            await session.load()
    # What libcryptsetup would print is in the message, and not on stderr.
    assert caught.value.message.startswith("cannot load the header: EINVAL (Device /proc/self/fd/")
    assert "too small" in caught.value.message
    assert not hasattr(caught.value, "__notes__")


async def test_fingerprint_wants_a_luks2_keyslot():
    with pytest.raises(FormatError):
        fingerprint({"type": "reencrypt", "area": {"offset": "0"}})
