# SPDX-License-Identifier: GPL-2.0-or-later
"""The volume key in place of a passphrase, on the real worker."""

import contextlib
import os

import pytest

from luksrotd.errors import EngineError, WrongCredential
from luksrotd.host.worker import WorkerEngine
from luksrotd.ports import SecretFd
from tests.engine.sessions import NEW, add
from tests.engine.shadow import memfd, shadow_of
from tests.support.makeimage import KEY, cryptsetup_opens, make_image, run

pytestmark = pytest.mark.asyncio


@pytest.fixture
def volume_key(image, tmp_path):
    """As cryptsetup gives it out."""
    key, path = tmp_path / "key", tmp_path / "volume-key"
    key.write_bytes(KEY)
    run("luksDump", "--dump-volume-key", "--volume-key-file", str(path), "--key-file", str(key), str(image))
    return path.read_bytes()


@contextlib.asynccontextmanager
async def worker(shadow, **secrets):
    sources = {name.replace("_", "-"): SecretFd(memfd(secret)) for name, secret in secrets.items()}
    with contextlib.ExitStack() as stack:
        for source in sources.values():
            stack.callback(os.close, source.fd)
        async with WorkerEngine().session(shadow, sources) as session:
            yield session


async def test_with_the_volume_key_a_keyslot_can_be_added(shadow, volume_key, tmp_path):
    async with worker(shadow, volume_key=volume_key, new=NEW) as session:
        await session.take_volume_key()
        await session.apply([add(1)])
        assert await session.opens(1, "new")
    assert cryptsetup_opens(shadow.save(tmp_path / "result"), NEW, 1)


@pytest.mark.parametrize("key_size", [256, 512])
async def test_another_key_of_the_right_length_is_wrong(tmp_path, key_size):
    shadow = shadow_of(make_image(tmp_path / "other", keyslots_size=1024 * 1024, key_size=key_size))
    async with worker(shadow, volume_key=bytes(key_size // 8)) as session:
        with pytest.raises(WrongCredential, match="this is not its volume key"):
            await session.take_volume_key()


@pytest.mark.parametrize(
    "alter", [lambda key: key[:-1], lambda key: key + b"\0", lambda key: key[:1], lambda key: key * 2, lambda _: KEY]
)
async def test_a_key_of_another_length_is_wrong(shadow, volume_key, alter):
    async with worker(shadow, volume_key=alter(volume_key)) as session:
        with pytest.raises(WrongCredential, match="this is not its volume key"):
            await session.take_volume_key()


async def test_one_bit_counts(shadow, volume_key):
    async with worker(shadow, volume_key=bytes([volume_key[0] ^ 1]) + volume_key[1:]) as session:
        with pytest.raises(WrongCredential):
            await session.take_volume_key()


async def test_a_wrong_volume_key_unlocks_nothing_afterwards(shadow, volume_key):
    async with worker(shadow, volume_key=volume_key[::-1], new=NEW) as session:
        with pytest.raises(WrongCredential):
            await session.take_volume_key()
        with pytest.raises(EngineError):
            await session.apply([add(1)])


async def test_no_volume_key_was_given(shadow):
    async with worker(shadow, unlock=KEY) as session:
        with pytest.raises(Exception, match="cannot find a secret named 'volume-key'"):
            await session.take_volume_key()
