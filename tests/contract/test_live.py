# SPDX-License-Identifier: GPL-2.0-or-later
"""``LiveEngine``: real libcryptsetup on a real image and loop device, and the simulated one on a simulated disk."""

import contextlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from luksrotd.errors import (
    DeviceError,
    EngineError,
    InvalidRequest,
    LuksrotdError,
    SecretRejected,
    WrongCredential,
)
from luksrotd.host.blockdev import BlockDevices
from luksrotd.host.live import LiveWorkerEngine
from luksrotd.host.locks import HostLocks
from luksrotd.luks2.pair import read_pair
from luksrotd.ports import DeviceIdentity, DeviceRef, GenerateInto, SecretFd, TokenSource
from luksrotd.rotation.edits import NEW, UNLOCK, AddKeyslot, DestroyKeyslot, Pbkdf, RemoveToken, SetToken
from luksrotd.rotation.fingerprint import fingerprint
from tests.contract.conftest import loop_device
from tests.support.makeimage import make_image
from tests.support.simdisk import SimDevices, SimDisk
from tests.support.simengine import SimEngine, make_volume
from tests.support.simlive import SimLive
from tests.support.simlocks import SimLocks
from tests.support.tokenplugin import token

pytestmark = pytest.mark.asyncio

MIB = 1024 * 1024
MAIN, FRESH = b"main", b"fresh"
CHEAP = Pbkdf("pbkdf2", iterations=1000)
TOKEN = {"type": "luksrotd", "keyslots": [], "name": "backup", "generation": 1, "data": {}, "retires": []}


@dataclass
class Rig:
    """One device, and an engine for it."""

    engine: Any
    locks: Any
    device: Any

    @contextlib.asynccontextmanager
    async def asking(self, number, pin=None):
        """A session whose credential is a token."""
        with contextlib.ExitStack() as stack:
            source = TokenSource(number)
            if pin is not None:
                fd = os.memfd_create("pin")
                stack.callback(os.close, fd)
                os.pwrite(fd, pin, 0)
                source = TokenSource(number, SecretFd(fd))
            async with self.engine.session(self.device, {UNLOCK: source}) as session:
                yield session

    @contextlib.asynccontextmanager
    async def session(self, unlock=MAIN, new=FRESH):
        with contextlib.ExitStack() as stack:
            sources = {}
            for name, secret in {UNLOCK: unlock, NEW: new}.items():
                fd = os.memfd_create(name)
                stack.callback(os.close, fd)
                os.pwrite(fd, secret or b"", 0)
                sources[name] = GenerateInto(fd) if secret is None else SecretFd(fd)
            async with self.engine.session(self.device, sources) as session:
                yield session

    @property
    def pair(self):
        return read_pair(self.device.read, self.device.size)

    @property
    def raw(self):
        return self.pair.winner.metadata.raw

    async def check_unlocked(self):
        """A session that is idle holds no metadata lock."""
        async with self.locks.metadata(self.device, exclusive=True):
            pass


@pytest.fixture(params=["simulated", "image", "loop device"])
def rig(request, tmp_path):
    if request.param == "simulated":
        devices, locks = SimDevices(SimDisk(make_volume([MAIN]))), SimLocks()
        yield Rig(SimLive(SimEngine(), devices, locks), locks, devices.open(DeviceRef("/dev/sim0")))
        return
    image = make_image(tmp_path / "image", key=MAIN, keyslots_size=2 * MIB, size=4 * MIB)
    with contextlib.ExitStack() as stack:
        path = str(image) if request.param == "image" else stack.enter_context(loop_device(image))
        device = BlockDevices().open(DeviceRef(str(path)))
        stack.callback(device.close)
        yield Rig(LiveWorkerEngine(), HostLocks(), device)


async def test_each_edit_is_on_the_device_at_once_in_both_copies(rig):
    before = rig.pair.winner.header.seqid
    async with rig.session() as session:
        assert await session.load() == rig.raw
        await rig.check_unlocked()
        assert await session.unlock() == 0
        await session.apply([SetToken(3, TOKEN)])
        assert rig.raw["tokens"]["3"] == TOKEN
        await session.apply([AddKeyslot(2, pbkdf=CHEAP, token=3)])
        assert rig.raw["tokens"]["3"]["keyslots"] == ["2"]
        assert "2" in rig.raw["digests"]["0"]["keyslots"]
        assert (rig.pair.agree, rig.pair.winner.header.seqid) == (True, before + 2)
        await rig.check_unlocked()
        assert await session.opens(2, NEW)
        assert not await session.opens(0, NEW)
        settled = {**TOKEN, "keyslots": ["2"]}
        await session.apply([SetToken(3, settled, fingerprint_of=2)])
        assert rig.raw["tokens"]["3"] == {**settled, "fingerprint": fingerprint(rig.raw["keyslots"]["2"])}
        await session.apply([DestroyKeyslot(2)])
        assert rig.raw["tokens"]["3"]["keyslots"] == []
        await session.apply([RemoveToken(3)])
    assert rig.raw["tokens"] == {}
    assert list(rig.raw["keyslots"]) == ["0"]
    assert (rig.pair.agree, rig.pair.winner.header.seqid) == (True, before + 5)
    assert rig.device.read_medium(0, len(rig.pair.raw)) == rig.pair.raw
    await rig.check_unlocked()


async def test_an_area_that_goes_is_overwritten(rig):
    area = rig.pair.winner.metadata.keyslots[0].area
    material = rig.device.read(area.offset, area.size)
    async with rig.session() as session:
        await session.unlock()
        await session.apply([SetToken(0, TOKEN)])
        await session.apply([AddKeyslot(1, pbkdf=CHEAP, token=0)])
        await session.apply([DestroyKeyslot(0)])
        assert await session.opens(1, NEW)
    assert rig.device.read_medium(area.offset, area.size) != material


async def test_a_generated_secret_opens(rig):
    async with rig.session(new=None) as session:
        await session.unlock()
        await session.apply([SetToken(0, TOKEN)])
        await session.apply([AddKeyslot(1, pbkdf=CHEAP, token=0)])
        assert await session.opens(1, NEW)


async def test_a_change_that_another_session_made_is_loaded(rig):
    async with rig.session() as first:
        await first.load()
        async with rig.session() as second:
            await second.apply([SetToken(0, TOKEN)])
        assert (await first.load())["tokens"] == {"0": TOKEN}
        await first.apply([RemoveToken(0)])
    assert rig.raw["tokens"] == {}


async def test_a_wrong_credential(rig):
    before = rig.pair.raw
    async with rig.session(unlock=b"wrong") as session:
        with pytest.raises(WrongCredential):
            await session.unlock()
    assert rig.pair.raw == before


async def test_another_device_than_the_one_that_was_opened(rig):
    class Other:
        """The same path, but it was another device when it was opened."""

        path, size = rig.device.path, rig.device.size
        identity = replace(rig.device.identity, minor=rig.device.identity.minor + 1)

    assert isinstance(Other.identity, DeviceIdentity)
    with pytest.raises(DeviceError, match="another device"):
        async with Rig(rig.engine, rig.locks, Other()).session():
            pass


async def test_a_device_that_has_gone(tmp_path):
    image = make_image(tmp_path / "image", key=MAIN, keyslots_size=2 * MIB, size=4 * MIB)
    device = BlockDevices().open(DeviceRef(str(image)))
    image.rename(tmp_path / "elsewhere")
    with pytest.raises(DeviceError, match="No such file"):
        async with Rig(LiveWorkerEngine(), HostLocks(), device).session():
            pass
    device.close()


class TestRealOnly:
    """What a simulation has no part in."""

    @pytest.fixture
    def real(self, tmp_path):
        image = make_image(tmp_path / "image", key=MAIN, keyslots_size=2 * MIB, size=4 * MIB)
        device = BlockDevices().open(DeviceRef(str(image)))
        yield Rig(LiveWorkerEngine(), HostLocks(), device)
        device.close()

    async def test_a_stale_context_does_not_overwrite_what_another_one_wrote(self, real):
        """libcryptsetup compares sequence numbers under its lock."""
        async with real.session() as first:
            await first.load()
            async with real.session() as second:
                await second.apply([SetToken(0, TOKEN)])
            with pytest.raises(LuksrotdError):
                await first.apply([SetToken(1, TOKEN)])
        assert list(real.raw["tokens"]) == ["0"]

    async def test_a_token_that_is_not_there(self, real):
        before = real.raw
        async with real.session() as session:
            await session.unlock()
            with pytest.raises((EngineError, InvalidRequest)):
                await session.apply([AddKeyslot(1, pbkdf=CHEAP, token=7)])
        assert real.raw == before

    async def test_the_worker_has_no_other_descriptors_and_gains_no_privileges(self, real):
        async with real.session() as session:
            await session.load()
            process = Path("/proc", str(session.pid))
            status = dict(
                line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line
            )
            opened = {str(fd.readlink()) for fd in (process / "fd").iterdir()}
            limits = (process / "limits").read_text()
        assert status["NoNewPrivs"] == "1"
        assert re.search(r"Max core file size +0 +0 ", limits)
        own = ("/dev/null", "/dev/random", "/dev/urandom", "socket:", "/memfd:luksrotd-worker-stderr")
        assert {name for name in opened if not name.startswith(own)} == {real.device.path}

    async def test_an_empty_secret(self, real):
        with pytest.raises(SecretRejected):
            async with real.session(new=b""):
                pass


@pytest.mark.usefixtures("token_plugin")
async def test_a_token_is_a_credential(rig):
    async with rig.session() as session:
        bodies = [token(MAIN, errno=5), token(b"wrong"), token(MAIN, pin=b"1234"), token(MAIN, []), token(MAIN)]
        await session.apply([SetToken(number, body) for number, body in enumerate(bodies)])
        await session.unlock()
        await session.apply([AddKeyslot(2, pbkdf=CHEAP), SetToken(5, token(FRESH, [2]))])
    for number, pin in ((4, None), (4, b"needless"), (2, b"1234"), (None, None), (None, b"1234")):
        async with rig.asking(number, pin) as session:
            assert await session.unlock() == 0
            assert await session.opens(0, UNLOCK)
            assert not await session.opens(1, UNLOCK)
            assert await session.opens(2, UNLOCK) is (number is None), "any: the one that knows that keyslot"
    async with rig.asking(None) as session:
        assert await session.unlock(2) == 2
    for number, pin, refusal in (
        (0, None, EngineError),
        (1, None, WrongCredential),
        (2, None, WrongCredential),
        (2, b"123", WrongCredential),
        (9, None, WrongCredential),
    ):
        async with rig.asking(number, pin) as session:
            with pytest.raises(refusal):
                await session.unlock()
    async with rig.asking(1) as session:
        assert not await session.opens(0, UNLOCK)
