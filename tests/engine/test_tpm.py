# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes unlocked by a TPM: systemd's own token plugin, in a real worker, on a TPM in software."""

import contextlib
import grp
import os
from pathlib import Path

import pytest

from luksrotd.errors import EngineError, WrongCredential
from luksrotd.host.sources import groups_for
from luksrotd.host.worker import WorkerEngine
from luksrotd.ports import SecretFd, TokenSource
from luksrotd.rotation.edits import NEW, PBKDF_FOR_RANDOM_KEYS, UNLOCK, AddKeyslot
from tests.engine.shadow import memfd, shadow_of
from tests.support.makeimage import KEY, cryptsetup_opens, make_image
from tests.support.swtpm import soft_tpm

pytestmark = pytest.mark.asyncio
PIN = b"planted-pin-4711"
#: Any group but root's will do for that of the device.
GROUP = grp.getgrnam("tape").gr_gid


@pytest.fixture(scope="module")
def tpm(tmp_path_factory):
    with soft_tpm(tmp_path_factory.mktemp("tpm"), GROUP) as tpm:
        yield tpm


@pytest.fixture
def volume(tpm, tmp_path):
    """Keyslot 1 for token 0, the TPM alone; keyslot 2 for token 1, TPM and PIN."""
    image = make_image(tmp_path / "image", keyslots_size=2 * 1024 * 1024)
    tpm.enroll(image, KEY)
    tpm.enroll(image, KEY, pin=PIN)
    shadow = shadow_of(image)
    yield shadow
    shadow.close()
    tpm.settle()


@contextlib.asynccontextmanager
async def unlocking(shadow, engine, number, pin=None):
    with contextlib.ExitStack() as stack:
        fds = [memfd(b"a new key"), *([] if pin is None else [memfd(pin)])]
        for fd in fds:
            stack.callback(os.close, fd)
        source = TokenSource(number, SecretFd(fds[1]) if pin is not None else None)
        async with engine.session(shadow, {UNLOCK: source, NEW: SecretFd(fds[0])}) as session:
            yield session


def status_of(session):
    lines = Path(f"/proc/{session.pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


async def test_the_tpm_opens_the_volume_for_a_worker_of_no_rights(tpm, volume, tmp_path):
    engine = WorkerEngine(python=tpm.python, tpm=tpm.device)
    async with unlocking(volume, engine, 0) as session:
        assert await session.unlock() == 1
        found = status_of(session)
        assert found["Uid"].split()[0] != "0"
        assert found["Groups"].split() == [str(GROUP)]
        assert found["NoNewPrivs"] == "1"
        assert int(found["CapEff"], 16) == 0
        await session.apply([AddKeyslot(5, NEW, PBKDF_FOR_RANDOM_KEYS)])
        tpm.settle()
        assert await session.opens(1, UNLOCK)
        assert not await session.opens(2, UNLOCK)
    assert cryptsetup_opens(volume.save(tmp_path / "result"), b"a new key", 5)


async def test_the_tpm_and_a_pin(tpm, volume):
    engine = WorkerEngine(python=tpm.python, tpm=tpm.device)
    async with unlocking(volume, engine, 1, PIN) as session:
        assert await session.unlock() == 2
    for pin in (None, b"wrong"):
        tpm.settle()
        with pytest.raises(WrongCredential, match="PIN"):
            async with unlocking(volume, engine, 1, pin) as session:
                await session.unlock()


async def test_any_token_is_one_that_the_tpm_opens(tpm, volume):
    async with unlocking(volume, WorkerEngine(python=tpm.python, tpm=tpm.device), None, PIN) as session:
        assert await session.unlock() in (1, 2)


async def test_without_the_group_of_the_device_there_is_none(tpm, volume):
    with pytest.raises(EngineError, match="token 0"):
        async with unlocking(volume, WorkerEngine(python=tpm.python), 0) as session:
            await session.unlock()


async def test_without_a_tpm_the_error_says_so(volume):
    with pytest.raises(EngineError, match="the device that it needs is not there"):
        async with unlocking(volume, WorkerEngine(), 0) as session:
            await session.unlock()


async def test_only_a_token_brings_the_group_of_the_device(tpm, tmp_path):
    token, other = TokenSource(0), SecretFd(0)
    assert groups_for([other, token], tpm.device) == (GROUP,)
    assert groups_for([other], tpm.device) == ()
    (tmp_path / "file").touch()
    os.chown(tmp_path / "file", 0, GROUP)
    (tmp_path / "file").chmod(0o660)
    for node in (str(tmp_path / "file"), str(tmp_path / "missing"), "/dev/null"):
        assert groups_for([token], node) == ()
    with_mode(tpm.device, 0o640)
    assert groups_for([token], tpm.device) == ()
    with_mode(tpm.device, 0o660)


def with_mode(node, mode):
    Path(node).chmod(mode)
