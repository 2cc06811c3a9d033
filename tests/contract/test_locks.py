# SPDX-License-Identifier: GPL-2.0-or-later
"""``ports.DeviceLocks``, simulated and with flock(2), against other processes and the real cryptsetup.

A wait is never timed: a lock that is held elsewhere and a deadline of 0 gives an error, a far deadline gives the lock
once the other process lets go, and whether cryptsetup waits for us stands in /proc/locks.  Where a lock must be free,
locks are patient: a udevd may be looking at the loop device, with a shared lock on its node.
"""

import asyncio
import fcntl
import os
import subprocess
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import pytest

from luksrotd import names
from luksrotd.errors import Busy, LockError, LockTimeout
from luksrotd.host.blockdev import BlockDevices
from luksrotd.host.locks import HostLocks, runtime_directory
from luksrotd.ports import DeviceIdentity, DeviceRef
from tests.contract.conftest import PASSPHRASE, child, delete_partitions, flocked, loop_device, run
from tests.support.simdisk import SimDevice, SimDisk
from tests.support.simlocks import Level, SimLocks

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("no_leaked_descriptors")]
FOREVER = 3600.0


class SimBench:
    """Simulated locks on a simulated device."""

    def __init__(self, *, block):
        self.device = SimDevice(SimDisk(bytes(4096), identity=DeviceIdentity(block, 7, 1)))
        self._locks = SimLocks()

    def locks(self, *, patient=False):
        self._locks.wait = patient
        return self._locks

    @contextmanager
    def elsewhere(self, level, *, exclusive=True):
        held = self._locks.held_elsewhere(level, self.device, exclusive=exclusive)
        held.__enter__()
        released = False

        def release():
            nonlocal released
            if not released:
                released = True
                held.__exit__(None, None, None)

        yield release
        release()


class RealBench:
    """Real locks on a real device, in directories of their own."""

    def __init__(self, device, tmp_path, whole_disk):
        self.device = device
        self.runtime = tmp_path / "runtime"
        self.cryptsetup = tmp_path / "cryptsetup"
        self.cryptsetup.mkdir(0o700)
        self.runtime.mkdir(0o700)
        self._whole_disk = whole_disk

    def locks(self, *, patient=False):
        wait = FOREVER if patient else 0.0
        return HostLocks(runtime=str(self.runtime), cryptsetup=str(self.cryptsetup), job_wait=wait, lock_wait=wait)

    def path(self, level):
        identity = self.device.identity
        if level is Level.JOB:
            return self.runtime / f"lock-{identity}"
        if level is Level.METADATA and identity.block:
            return self.cryptsetup / f"L_{identity.major}:{identity.minor}"
        return Path(self._whole_disk)

    def elsewhere(self, level, *, exclusive=True):
        return flocked(
            self.path(level), fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, create=level != Level.WHOLE_DISK
        )


@contextmanager
def real_bench(kind, image, tmp_path):
    with loop_device(image) if kind == "loop" else _itself(image) as path:
        device = BlockDevices().open(DeviceRef(str(path)), writable=True)
        try:
            yield RealBench(device, tmp_path, path)
        finally:
            device.close()


@contextmanager
def _itself(image):
    yield image


@pytest.fixture
def image(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(65536))
    return image


@pytest.fixture(params=["sim-file", "sim-block", "file", "loop"])
def bench(request, image, tmp_path):
    if request.param.startswith("sim"):
        yield SimBench(block=request.param == "sim-block")
        return
    with real_bench(request.param, image, tmp_path) as bench:
        yield bench


def take(locks, level, device, *, exclusive=True):
    if level is Level.JOB:
        return locks.job(device)
    return locks.metadata(device, exclusive=exclusive) if level is Level.METADATA else locks.whole_disk(device)


def levels(bench):
    return tuple(Level) if bench.device.identity.block else (Level.JOB, Level.METADATA)


async def test_all_three_nest_and_can_be_had_again(bench):
    locks = bench.locks(patient=True)
    entered = []
    for exclusive in (False, True, True):
        metadata = locks.metadata(bench.device, exclusive=exclusive)
        async with locks.job(bench.device), metadata, locks.whole_disk(bench.device):
            entered.append(exclusive)
    assert entered == [False, True, True]


async def test_a_lock_held_elsewhere_is_not_to_be_had(bench):
    for level in levels(bench):
        error = Busy if level is Level.JOB else LockTimeout
        with bench.elsewhere(level) as release:
            with pytest.raises(error, match=r"^cannot "):
                async with take(bench.locks(), level, bench.device):
                    raise AssertionError("entered")
            release()
            async with take(bench.locks(patient=True), level, bench.device):
                pass


async def test_two_jobs_in_one_process_exclude_each_other(bench):
    async def second():
        async with bench.locks().job(bench.device):
            raise AssertionError("entered")

    async with bench.locks().job(bench.device):
        with pytest.raises(Busy):
            await asyncio.create_task(second())


async def test_it_waits_for_the_lock_until_the_other_lets_go(bench):
    for level in levels(bench):
        locks = bench.locks(patient=True)
        entered = asyncio.Event()

        async def enter(level=level, locks=locks, entered=entered):
            async with take(locks, level, bench.device):
                entered.set()

        with bench.elsewhere(level) as release:
            task = asyncio.create_task(enter())
            for _ in range(20):
                await asyncio.sleep(0)
            assert not entered.is_set()
            release()
            await task
        assert entered.is_set()


async def test_shared_metadata_locks_go_together_and_exclude_an_exclusive_one(bench):
    locks = bench.locks()
    with bench.elsewhere(Level.METADATA, exclusive=False):
        async with locks.metadata(bench.device, exclusive=False):
            pass
        with pytest.raises(LockTimeout):
            async with locks.metadata(bench.device, exclusive=True):
                raise AssertionError("entered")
    with bench.elsewhere(Level.METADATA), pytest.raises(LockTimeout):
        async with locks.metadata(bench.device, exclusive=False):
            raise AssertionError("entered")


async def entering(locks, device, order, *, exclusive):
    """Asks for the lock, and gets as far as it can now."""

    async def enter():
        async with locks.metadata(device, exclusive=exclusive):
            order.append("exclusive" if exclusive else "shared")

    task = asyncio.create_task(enter())
    for _ in range(20):
        await asyncio.sleep(0)
    return task


async def test_who_only_reads_does_not_keep_out_who_waits_to_write(bench):
    """Shared locks that overlap, as of callers who ask again and again, would do so for ever."""
    locks, order = bench.locks(patient=True), []
    async with locks.metadata(bench.device, exclusive=False):
        writer = await entering(locks, bench.device, order, exclusive=True)
        reader = await entering(locks, bench.device, order, exclusive=False)
        assert order == []
    await asyncio.gather(writer, reader)
    assert order == ["exclusive", "shared"]


async def test_a_writer_that_gives_up_keeps_nobody_waiting(bench):
    locks, order = bench.locks(patient=True), []
    async with locks.metadata(bench.device, exclusive=False):
        writers = [await entering(locks, bench.device, order, exclusive=True) for _ in range(2)]
        reader = await entering(locks, bench.device, order, exclusive=False)
        writers[0].cancel()
        await asyncio.wait([writers[0]])
        assert order == []
        writers[1].cancel()
        await reader
    assert order == ["shared"]


async def test_a_cancelled_wait_leaves_nothing_behind(bench):
    for level in levels(bench):
        with bench.elsewhere(level) as release:
            task = asyncio.create_task(take(bench.locks(patient=True), level, bench.device).__aenter__())
            for _ in range(20):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            release()
            async with take(bench.locks(patient=True), level, bench.device):
                pass


async def test_an_error_inside_releases(bench):
    for level in levels(bench):
        with pytest.raises(ZeroDivisionError):
            async with take(bench.locks(patient=True), level, bench.device):
                raise ZeroDivisionError
        with bench.elsewhere(level):
            pass


# -- only the real ones ------------------------------------------------------------------------------------------


@pytest.fixture(params=["file", "loop"])
def real(request, image, tmp_path):
    with real_bench(request.param, image, tmp_path) as bench:
        yield bench


def flock_gets(path):
    """Whether flock(1) gets the lock, shared, at once."""
    command = ["flock", "--shared", "--nonblock", "--conflict-exit-code", "9", str(path), "true"]
    done = subprocess.run(command, check=False)
    assert done.returncode in (0, 9)
    return done.returncode == 0


async def test_it_is_the_flock_that_others_see(real):
    for level in levels(real):
        async with take(real.locks(patient=True), level, real.device):
            assert not flock_gets(real.path(level))
        assert flock_gets(real.path(level))


async def test_nor_does_a_reader_wait_longer_for_a_writer_than_for_the_lock(real):
    locks = real.locks(patient=True)
    async with locks.metadata(real.device, exclusive=False):
        writer = await entering(locks, real.device, [], exclusive=True)
        locks._lock_wait = 0.0
        with pytest.raises(LockTimeout, match="a change of it waits"):
            await locks.metadata(real.device, exclusive=False).__aenter__()
        writer.cancel()
        await asyncio.wait([writer])
    assert not locks._precedence._passed
    assert not locks._precedence._writers


async def test_lock_files_are_private_and_do_not_pile_up(real):
    locks = real.locks()
    async with locks.job(real.device), locks.metadata(real.device, exclusive=True):
        made = [*real.runtime.iterdir(), *real.cryptsetup.iterdir()]
        assert len(made) == (2 if real.device.identity.block else 1)
        assert all(file.stat().st_mode & 0o7777 == 0o600 for file in made)
    assert [*real.runtime.iterdir(), *real.cryptsetup.iterdir()] == []


async def test_a_lock_file_that_others_use_stays(image, tmp_path):
    with real_bench("loop", image, tmp_path) as bench, bench.elsewhere(Level.METADATA, exclusive=False):
        async with bench.locks().metadata(bench.device, exclusive=False):
            pass
        assert bench.path(Level.METADATA).exists()


async def test_a_lock_on_an_unlinked_file_is_none(image, tmp_path):
    """The holder unlinks the file while we wait, as libcryptsetup does: a new one is made and locked."""
    with real_bench("loop", image, tmp_path) as bench:
        path = bench.path(Level.METADATA)
        with bench.elsewhere(Level.METADATA) as release:
            entering = bench.locks(patient=True).metadata(bench.device, exclusive=True)
            task = asyncio.create_task(entering.__aenter__())
            for _ in range(20):
                await asyncio.sleep(0)
            path.unlink()
            release()
            await task
            with path.open() as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            await entering.__aexit__(None, None, None)


async def test_missing_directories_are_made(real):
    real.runtime.rmdir()
    real.cryptsetup.rmdir()
    locks = real.locks()
    async with locks.job(real.device), locks.metadata(real.device, exclusive=True):
        assert real.runtime.stat().st_mode & 0o7777 == 0o700
    assert real.cryptsetup.exists() == real.device.identity.block


@pytest.mark.parametrize("level", [Level.JOB, Level.METADATA])
@pytest.mark.parametrize("what", ["symlink", "dangling", "file", "no-parent"])
async def test_a_directory_that_is_none_is_refused(image, tmp_path, level, what):
    with real_bench("loop", image, tmp_path) as bench:
        directory = bench.path(level).parent
        directory.rmdir()
        if what == "file":
            directory.touch()
        elif what == "no-parent":
            bench.runtime = bench.cryptsetup = tmp_path / "missing" / "directory"
        else:
            elsewhere = tmp_path / "elsewhere"
            directory.symlink_to(elsewhere)
            if what == "symlink":
                elsewhere.mkdir()
        with pytest.raises(LockError, match=r"^cannot use the lock directory "):
            async with take(bench.locks(), level, bench.device):
                raise AssertionError("entered")


@pytest.mark.parametrize("level", [Level.JOB, Level.METADATA])
@pytest.mark.parametrize("what", ["symlink", "directory", "fifo"])
async def test_a_lock_file_that_is_none_is_refused(image, tmp_path, level, what):
    with real_bench("loop", image, tmp_path) as bench:
        path = bench.path(level)
        if what == "symlink":
            (tmp_path / "victim").touch()
            path.symlink_to(tmp_path / "victim")
        elif what == "directory":
            path.mkdir()
        else:
            os.mkfifo(path)
        with pytest.raises(LockError, match=r"^cannot .* the lock file "):
            async with take(bench.locks(), level, bench.device):
                raise AssertionError("entered")


@pytest.mark.parametrize(("mode", "owner"), [(0o770, 0), (0o777, 0), (0o700, 65534)])
async def test_a_runtime_directory_that_others_can_write_to_is_refused(real, mode, owner):
    real.runtime.chmod(mode)
    os.chown(real.runtime, owner, 0)
    with pytest.raises(LockError, match="others can write to it"):
        async with real.locks().job(real.device):
            raise AssertionError("entered")


async def test_an_image_that_was_replaced_is_refused(image, tmp_path):
    with real_bench("file", image, tmp_path) as bench:
        other = tmp_path / "other"
        other.write_bytes(bytes(65536))
        with bench.elsewhere(Level.METADATA) as release:
            task = asyncio.create_task(bench.locks(patient=True).metadata(bench.device, exclusive=True).__aenter__())
            for _ in range(20):
                await asyncio.sleep(0)
            other.rename(image)
            release()
            with pytest.raises(LockError, match="replaced"):
                await task
        for _ in range(2):
            with pytest.raises(LockError, match=f"^cannot lock {image}: "):
                async with bench.locks().metadata(bench.device, exclusive=False):
                    raise AssertionError("entered")
            image.unlink(missing_ok=True)


async def test_the_disk_of_a_partition_is_locked(tmp_path):
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(8 * 1024 * 1024)
    run("sfdisk", "--quiet", str(image), data=b"label: gpt\nsize=4MiB\n")
    with loop_device(image) as disk:
        run("partx", "--add", disk)
        try:
            with real_bench("file", f"{disk}p1", tmp_path) as bench:
                assert bench.device.identity.block
                async with bench.locks(patient=True).whole_disk(bench.device):
                    assert not flock_gets(disk)
                assert flock_gets(disk)
        finally:
            delete_partitions(disk)


async def test_where_job_locks_are():
    assert runtime_directory() == runtime_directory({}, uid=0) == names.RUNTIME_DIRECTORY
    assert runtime_directory({"XDG_RUNTIME_DIR": "/run/user/1000"}, uid=1000) == "/run/user/1000/luksrotd"
    for unusable in ({}, {"XDG_RUNTIME_DIR": ""}, {"XDG_RUNTIME_DIR": "relative"}):
        with pytest.raises(LockError, match="XDG_RUNTIME_DIR"):
            runtime_directory(unusable, uid=1000)


# -- against cryptsetup itself -----------------------------------------------------------------------------------


@pytest.fixture(params=["file", "loop"])
def luks2(request, luks2_image):
    with loop_device(luks2_image) if request.param == "loop" else _itself(luks2_image) as path:
        device = BlockDevices().open(DeviceRef(str(path)), writable=True)
        yield device
        device.close()


def waits_for_a_flock(pid):
    """Whether the kernel lists that process as blocked ("1: -> FLOCK ADVISORY WRITE 42 …")."""
    return any(
        fields[1:3] == ["->", "FLOCK"] and fields[5] == str(pid)
        for fields in map(str.split, Path("/proc/locks").read_text().splitlines())
    )


async def until_it_waits(process):
    while not waits_for_a_flock(process.pid):
        assert process.poll() is None, process.communicate()
        await asyncio.sleep(0.002)


READ = ("luksDump",)
WRITE = ("luksAddKey", "--batch-mode", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "{key}")


@pytest.mark.parametrize("command", [READ, WRITE], ids=["read", "write"])
@pytest.mark.parametrize("exclusive", [True, False], ids=["exclusive", "shared"])
async def test_cryptsetup_waits_for_us(luks2, tmp_path, command, exclusive):
    key = tmp_path / "key"
    key.write_bytes(PASSPHRASE)
    key.chmod(0o600)
    new = tmp_path / "new"
    new.write_bytes(b"new")
    new.chmod(0o600)
    arguments = [argument.format(key=key) for argument in command]
    arguments += [luks2.path, *([str(new)] if command is WRITE else [])]
    header = luks2.read_medium(0, 32768)
    async with AsyncExitStack() as held:
        await held.enter_async_context(HostLocks(lock_wait=FOREVER).metadata(luks2, exclusive=exclusive))
        with child("cryptsetup", *arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            if exclusive or command is WRITE:
                await until_it_waits(process)
                assert luks2.read_medium(0, 32768) == header
                await held.aclose()
            assert process.wait() == 0, process.stderr.read()
    assert (luks2.read_medium(0, 32768) != header) == (command is WRITE)


async def test_we_wait_for_cryptsetup(luks2, tmp_path):
    """cryptsetup is stopped while it holds its lock for the key derivation of luksAddKey."""
    key = tmp_path / "key"
    key.write_bytes(PASSPHRASE)
    key.chmod(0o600)
    slow = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "2000000000")
    command = ("cryptsetup", "luksAddKey", "--batch-mode", *slow, "--key-file", str(key), luks2.path, str(key))
    with child(*command) as process:
        while not holds_exclusively(process.pid):
            assert process.poll() is None
            await asyncio.sleep(0.002)
        with pytest.raises(LockTimeout):
            async with HostLocks(lock_wait=0).metadata(luks2, exclusive=False):
                raise AssertionError("entered")
        entering = HostLocks(lock_wait=FOREVER).metadata(luks2, exclusive=True)
        task = asyncio.create_task(entering.__aenter__())
        process.kill()
        await task
        await entering.__aexit__(None, None, None)


def holds_exclusively(pid):
    return any(
        fields[1:5] == ["FLOCK", "ADVISORY", "WRITE", str(pid)]
        for fields in map(str.split, Path("/proc/locks").read_text().splitlines())
    )


# -- only the simulated one --------------------------------------------------------------------------------------


async def test_the_simulated_locks_insist_on_their_order():
    bench = SimBench(block=True)
    locks, device = bench.locks(), bench.device
    async with locks.job(device), locks.metadata(device, exclusive=False):
        assert locks.held(device) == (Level.JOB, Level.METADATA)
        for wrong in (locks.job(device), locks.metadata(device, exclusive=False)):
            with pytest.raises(AssertionError, match="asked for while"):
                await wrong.__aenter__()
        other = SimDevice(SimDisk(bytes(4096), identity=DeviceIdentity(True, 7, 2)))
        async with locks.job(other):
            pass
    assert [event.text for event in locks.log if event.identity == device.identity] == [
        "+job",
        "+metadata shared",
        "-metadata shared",
        "-job",
    ]
