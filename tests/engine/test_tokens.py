# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes unlocked by LUKS2 tokens: a real worker, real libcryptsetup, and a token plugin made for that."""

import contextlib
import errno
import os
from pathlib import Path

import pytest

from luksrotd.errors import EngineError, InvalidRequest, SecretRejected, WrongCredential
from luksrotd.host.worker import WorkerEngine
from luksrotd.ports import SecretFd, TokenSource
from luksrotd.rotation.edits import NEW, PBKDF_FOR_RANDOM_KEYS, UNLOCK, VOLUME_KEY, AddKeyslot, SetToken
from tests.engine.shadow import memfd, shadow_of
from tests.support.makeimage import KEY, add_key, cryptsetup_opens, import_token, make_image
from tests.support.tokenplugin import TYPE, token

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("token_plugin")]

OTHER, PIN = b"the key of keyslot 1", b"planted-pin-1234"


@pytest.fixture
def volume(tmp_path):
    """Makes a shadow of a volume with two keyslots and these tokens."""
    with contextlib.ExitStack() as stack:

        def make(*tokens, numbered=None):
            image = make_image(tmp_path / "image", keyslots_size=1024 * 1024, extra_keys={1: OTHER})
            for number, body in {**dict(enumerate(tokens)), **(numbered or {})}.items():
                import_token(image, body, number)
            shadow = shadow_of(image)
            stack.callback(shadow.close)
            return shadow

        yield make


@contextlib.asynccontextmanager
async def unlocking(shadow, number=None, pin=None, **more):
    with contextlib.ExitStack() as stack:
        source = TokenSource(number)
        if pin is not None:
            fd = memfd(pin)
            stack.callback(os.close, fd)
            source = TokenSource(number, SecretFd(fd))
        async with WorkerEngine().session(shadow, {UNLOCK: source, **more}) as session:
            yield session


async def refused(shadow, number=None, pin=None):
    """What is said about a token that does not unlock."""
    with pytest.raises((WrongCredential, EngineError)) as caught:
        async with unlocking(shadow, number, pin) as session:
            await session.unlock()
    return caught.value


def loaded(session):
    """The token plugins in the worker's memory."""
    lines = Path(f"/proc/{session.pid}/maps").read_text().splitlines()
    return {Path(line.split()[-1]).name for line in lines if "libcryptsetup-token" in line}


# -- unlocking ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [3, None])
async def test_a_token_opens_its_keyslot(volume, number):
    shadow = volume(numbered={3: token(OTHER, [1])})
    async with unlocking(shadow, number) as session:
        assert await session.unlock() == 1
        assert await session.unlock(1) == 1
        assert await session.opens(1, UNLOCK)
        assert not await session.opens(0, UNLOCK)


async def test_what_a_token_unlocked_can_add_a_keyslot(volume, tmp_path):
    shadow, new = volume(token(KEY)), memfd(b"a new key")
    async with unlocking(shadow, 0, **{NEW: SecretFd(new)}) as session:
        await session.unlock()
        await session.apply(
            [SetToken(5, {"type": "luksrotd", "keyslots": []}), AddKeyslot(4, NEW, PBKDF_FOR_RANDOM_KEYS, 5)]
        )
        assert await session.opens(4, NEW)
        # A transaction that was overtaken begins again, by the same worker.
        assert await session.unlock() == 0
    os.close(new)
    assert cryptsetup_opens(shadow.save(tmp_path / "result"), b"a new key", 4)


async def test_any_token_is_the_first_that_does(volume):
    broken, wrong = token(KEY, errno=errno.EAGAIN), token(b"wrong", [1])
    shadow = volume(broken, wrong, {"type": "luksrotd", "keyslots": []}, token(OTHER, [1]), token(KEY, [0]))
    async with unlocking(shadow) as session:
        assert await session.unlock() == 1
        assert await session.opens(0, UNLOCK)
        assert await session.unlock(0) == 0


async def test_a_token_of_several_keyslots_is_the_way_into_the_one_that_it_opens(volume):
    shadow = volume(token(OTHER, [0, 1]))
    async with unlocking(shadow, 0) as session:
        assert await session.unlock() == 1
        assert not await session.opens(0, UNLOCK)


async def test_a_token_never_opens_by_an_unbound_keyslot(tmp_path):
    image = make_image(tmp_path / "image", keyslots_size=1024 * 1024)
    add_key(image, KEY, OTHER, "--unbound", "--key-slot", "1", "--key-size", "512")
    import_token(image, token(OTHER, [1]), 0)
    shadow = shadow_of(image)
    with contextlib.closing(shadow):
        assert "token 0" in (await refused(shadow)).message


async def test_a_pin(volume):
    shadow = volume(token(KEY, pin=PIN))
    async with unlocking(shadow, 0, PIN) as session:
        assert await session.unlock() == 0
    for pin in (None, b"wrong", PIN + b"\n"):
        error = await refused(shadow, 0, pin)
        assert isinstance(error, WrongCredential)
        assert "PIN" in error.message
        assert "planted" not in repr([error, *getattr(error, "__notes__", [])])


@pytest.mark.parametrize(("pin", "why"), [(b"", "it is empty"), (b"x" * 101, "it is longer than 100 bytes")])
async def test_a_pin_that_cannot_be_read(volume, pin, why):
    fd = memfd(pin)
    try:
        with pytest.raises(SecretRejected) as caught:
            async with WorkerEngine().session(volume(token(KEY)), {UNLOCK: TokenSource(0, SecretFd(fd, 100))}):
                pass
    finally:
        os.close(fd)
    assert caught.value.message == f"cannot use the secret 'unlock PIN': {why}"


# -- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "kind", "why"),
    [
        (token(b"wrong"), WrongCredential, "what it gives opens no keyslot"),
        (token(KEY, [1]), WrongCredential, "what it gives opens no keyslot"),
        (token(KEY, []), EngineError, "no plugin gives anything, or no keyslot of the volume is named"),
        ({"type": "nobody-has-this", "keyslots": ["0"]}, EngineError, "no plugin gives anything"),
        (token(KEY, errno=errno.EAGAIN), EngineError, "the device that it needs is not there"),
        (token(KEY, errno=errno.EIO), EngineError, "EIO (The test plugin fails, as it was told)"),
        (token(KEY, errno=errno.EPERM), EngineError, "The test plugin fails"),
        ({"type": "luksrotd", "keyslots": ["0"]}, WrongCredential, "it has no token"),
        (
            {"type": "systemd-fido2", "keyslots": ["0"]},
            EngineError,
            "type systemd-fido2 is not supported",
        ),
        ({"type": "systemd-pkcs11", "keyslots": ["0"]}, EngineError, "type systemd-pkcs11 is not supported"),
    ],
)
@pytest.mark.parametrize("number", [0, None])
async def test_a_token_that_does_not_open_it(volume, number, body, kind, why):
    error = await refused(volume(body), number)
    assert type(error) is kind
    assert why in error.message


@pytest.mark.parametrize("number", [7, 32, -2, None])
async def test_a_token_that_is_not_there(volume, number):
    assert isinstance(await refused(volume(), number), WrongCredential)


@pytest.mark.parametrize(("before", "opened"), [(2, True), (3, False)])
async def test_a_header_full_of_tokens_does_not_use_up_the_tries_of_a_pin(volume, before, opened):
    shadow = volume(*[token(KEY, pin=b"another")] * before, token(KEY, pin=PIN))
    if opened:
        async with unlocking(shadow, None, PIN) as session:
            assert await session.unlock() == 0
    else:
        assert isinstance(await refused(shadow, None, PIN), WrongCredential)
    async with unlocking(shadow, before, PIN) as session:
        assert await session.unlock() == 0, "by its number it is asked for"


async def test_of_several_failures_a_wrong_pin_is_told(volume):
    shadow = volume(token(KEY, errno=errno.EAGAIN), token(KEY, pin=PIN), token(KEY, errno=errno.EIO))
    assert "token 1" in (await refused(shadow, None, b"wrong")).message


async def test_a_token_can_only_unlock(volume):
    for name in (NEW, VOLUME_KEY):
        with pytest.raises(InvalidRequest, match="can only unlock"):
            async with unlocking(volume(token(KEY)), 0, **{name: TokenSource(0)}) as session:
                await (session.take_volume_key() if name == VOLUME_KEY else _add(session))


async def _add(session):
    await session.unlock()
    await session.apply([AddKeyslot(4, NEW, PBKDF_FOR_RANDOM_KEYS)])


# -- what the worker may ------------------------------------------------------------------------------------------


async def test_without_a_token_source_no_header_makes_the_worker_load_a_plugin(volume):
    """libcryptsetup would load one for each type that it writes a token of, too."""
    shadow, fd = volume(token(KEY)), memfd(KEY)
    hostile = SetToken(4, token(KEY))
    async with WorkerEngine().session(shadow, {UNLOCK: SecretFd(fd)}) as session:
        await session.load()
        assert await session.unlock() == 0
        await session.apply([hostile])
        assert loaded(session) == set()
    os.close(fd)
    async with unlocking(shadow, 0) as session:
        await session.load()
        assert loaded(session) == set(), "nor does it before one is asked"
        await session.unlock()
        assert loaded(session) == {f"libcryptsetup-token-{TYPE}.so"}


async def test_only_the_plugin_that_is_needed_is_loaded(volume):
    tpm = {"type": "systemd-tpm2", "keyslots": ["0"], "tpm2-pcrs": [], "tpm2-blob": "", "tpm2-policy-hash": ""}
    shadow = volume(tpm, token(KEY))
    async with unlocking(shadow, 1) as session:
        await session.unlock()
        assert loaded(session) == {f"libcryptsetup-token-{TYPE}.so"}
