# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon outlives: the bus, polkit, a bad configuration, a slow disk at its own end."""

import asyncio
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from luksrotd import names
from tests.integration.test_jobs import SLOW, until, workers_of
from tests.support import makeimage
from tests.support.busclient import BusClient, CallFailed
from tests.support.daemon_process import (
    BACKUP,
    ENVIRONMENT,
    NEW,
    OLD,
    appeared,
    disk,
    ended,
    reached,
    start,
    take_key,
)
from tests.support.fake_logind import FakeLogind
from tests.support.manager import managed
from tests.support.testbed import PROJECT

pytestmark = pytest.mark.asyncio
DEVICE, JOB = names.DEVICE_INTERFACE, names.JOB_INTERFACE
ENROLMENT, OPERATIONS = 6, 12
"""Writes and flushes of an enrolment, and of a rotation."""
OBJECTS = (names.ROOT_PATH, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")


async def enrol(client, volume):
    await appeared(client, volume.path)
    assert (await ended(client, await start(client, volume.path, "Enroll", new=BACKUP)))["State"] == "finished"


@pytest.fixture
def volume(bed):
    with disk(bed) as volume:
        yield volume


@asynccontextmanager
async def before(volume):
    """A client of the bus that is to go, which has enrolled a key."""
    async with BusClient() as client:
        await client.subscribe()
        await enrol(client, volume)
        yield client


@pytest.fixture
def restart(bed):
    """Ends the bus by its process id; what is returned starts it again, at the same address."""
    started = True

    async def kill(daemon):
        nonlocal started
        started = False
        await asyncio.to_thread(bed.kill_bus)
        await daemon.manager.hears("STATUS=no system bus; 1 volumes")

        async def again(status="STATUS=1 volumes"):
            nonlocal started
            started = True
            await asyncio.to_thread(bed.start_bus)
            await daemon.manager.hears(status)

        return again

    yield kill
    if not started:
        bed.start_bus()


# -- the bus -------------------------------------------------------------------------------------------------------


async def test_a_derivation_outlives_the_bus(bed, volume, restart):
    async with managed(bed) as daemon:
        async with before(volume) as client:
            job = await start(client, volume.path, **SLOW)
            await reached(client, job, Stage="deriving")
            again = await restart(daemon)
        assert workers_of(daemon.pid)
        await again()
        async with BusClient() as client:
            await client.subscribe()
            assert job in (await client.call(*OBJECTS))[0]
            await reached(client, job, Stage="deriving", State="running", StartedByUid=0)
            assert (await client.get_all(volume.path, DEVICE))["Busy"] is True
            await client.call(job, JOB, "Cancel", "a{sv}", [{}])
            assert (await ended(client, job))["State"] == "cancelled"
            assert (await ended(client, await start(client, volume.path)))["State"] == "finished"
        assert volume.opens(NEW)
        assert "Traceback" not in daemon.log


async def test_a_commit_outlives_the_bus(bed, volume, restart, tmp_path):
    go, there = tmp_path / "go", tmp_path / "there"
    async with managed(bed, hold=10, reached=str(there), go=str(go)) as daemon:
        async with before(volume) as client:
            job = await start(client, volume.path)
            await until(there.exists)
            await reached(client, job, State="committing")
            again = await restart(daemon)
        await again()
        async with BusClient() as client:
            await client.subscribe()
            await reached(client, job, State="committing", Cancellable=False)
            go.touch()
            done = await ended(client, job)
            assert (done["State"], done["Outcome"]) == ("finished", "committed")
            assert (await client.get_all(volume.path, DEVICE))["Generation"] == done["Result"]["seqid-after"].value
        assert (volume.opens(NEW), volume.opens(BACKUP)) == (True, False)
        assert "Traceback" not in daemon.log


async def test_a_result_can_be_read_on_the_next_bus(bed, volume, restart, tmp_path):
    go, there = tmp_path / "go", tmp_path / "there"
    async with managed(bed, hold=10, reached=str(there), go=str(go)) as daemon:
        async with before(volume) as client:
            job = await start(client, volume.path)
            await until(there.exists)
            again = await restart(daemon)
        go.touch()
        await until(lambda: not workers_of(daemon.pid) and volume.opens(NEW) and not volume.opens(BACKUP))
        await again()
        async with BusClient() as client:
            await client.subscribe()
            done = await ended(client, job)
            assert (done["State"], done["Result"]["generation"].value) == ("finished", 2)


async def test_a_key_that_nobody_can_take_any_more_is_given_up(bed, volume, restart):
    async with managed(bed) as daemon:
        async with before(volume) as client:
            headers = volume.headers()
            job = await start(client, volume.path, new=None)
            await reached(client, job, Stage="delivering")
            again = await restart(daemon)
        await again()
        async with BusClient() as client:
            await client.subscribe()
            done = await ended(client, job)
            assert (done["State"], done["Outcome"]) == ("cancelled", "unchanged")
            with pytest.raises(CallFailed):
                await client.call(job, JOB, "TakeKey", "a{sv}", [{}])
    assert volume.headers() == headers


async def test_an_open_transaction_ends_with_the_bus(bed, volume, restart):
    async with managed(bed) as daemon:
        async with before(volume) as client:
            (path,) = await client.call(volume.path, DEVICE, "BeginTransaction", "a{sv}", [{}])
            assert path in (await client.call(*OBJECTS))[0]
            again = await restart(daemon)
        await again()
        async with BusClient() as client:
            found = (await client.call(*OBJECTS))[0]
            assert volume.path in found
            assert not [path for path in found if path.startswith(names.TRANSACTION_PATH)]


async def test_a_volume_that_comes_while_there_is_no_bus(bed, volume, restart):
    async with managed(bed) as daemon:
        async with before(volume):
            again = await restart(daemon)
        with disk(bed, "second") as second:
            await daemon.manager.hears("STATUS=no system bus; 2 volumes")
            await again("STATUS=2 volumes")
            async with BusClient() as client:
                await client.subscribe()
                assert {volume.path, second.path} <= set((await client.call(*OBJECTS))[0])


async def test_without_a_bus_it_still_stops(bed, volume, restart):
    async with managed(bed, environment={"WATCHDOG_USEC": "40000"}) as daemon:
        async with before(volume):
            await restart(daemon)
        for _ in range(100):  # more than can have been on the way
            await daemon.manager.hears("WATCHDOG=1")
        daemon.terminate()
        assert await daemon.ended() == 0
        assert "Traceback" not in daemon.log


async def test_it_complains_once_and_leaks_nothing_however_often_the_bus_goes(bed, volume, restart):
    async with managed(bed) as daemon:
        files = 0
        for number in range(4):
            async with BusClient() if number else before(volume) as client:
                await client.call(*OBJECTS)
                again = await restart(daemon)
            await again()
            async with BusClient() as client:
                await client.call(*OBJECTS)
            files = files or daemon.open_files()
        await until(lambda: daemon.open_files() <= files)
        assert daemon.log.count("the bus connection was lost") == 4
        assert daemon.log.count("cannot serve now") <= 8


# -- polkit --------------------------------------------------------------------------------------------------------


async def test_polkit_may_be_started_again(bed, volume):
    list_volumes = (names.ROOT_PATH, names.MANAGER_INTERFACE, "GetDevices", "a{sv}", [{}])
    async with managed(bed), BusClient() as client:
        bed.set_rules("polkit.addRule(function (a, s) { return polkit.Result.YES; });")
        try:
            assert await client.call(*list_volumes) == [[volume.path]]
            await asyncio.to_thread(bed.stop_polkitd)
            with pytest.raises(CallFailed) as caught:
                await client.call(*list_volumes)
            assert caught.value.name == names.ERROR_PREFIX + "NotAuthorized"
            await asyncio.to_thread(bed.start_polkitd)
            assert await client.call(*list_volumes) == [[volume.path]]
        finally:
            bed.set_rules("")


# -- the configuration ---------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    (tmp_path / "luksrotd.conf.d").mkdir()

    def write(text, name="luksrotd.conf"):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o644)

    write.directory = str(tmp_path)
    return write


async def test_a_reload_changes_what_is_managed(bed, volume, config):
    async with managed(bed, config=config.directory) as daemon, BusClient() as client:
        await client.subscribe()
        await appeared(client, volume.path)
        config(f"[Devices]\nDeny=uuid:{volume.uuid}\n", "luksrotd.conf.d/10-deny.conf")
        daemon.reload()
        reloading = await daemon.manager.hears("RELOADING=1")
        assert "\nMONOTONIC_USEC=" in reloading
        await daemon.manager.hears("READY=1")
        assert (await client.signal("InterfacesRemoved")).body[0] == volume.path
        config("", "luksrotd.conf.d/10-deny.conf")
        daemon.reload()
        assert (await client.signal("InterfacesAdded")).body[0] == volume.path


async def test_volumes_that_udev_does_not_show(bed, tmp_path, config):
    """An image file from the start, and a detached header since a reload; each can be rotated."""
    image, header, data = tmp_path / "vault.img", tmp_path / "data.hdr", tmp_path / "data.img"
    makeimage.make_image(image, key=OLD)
    makeimage.make_image(header, key=OLD)
    data.write_bytes(bytes(1 << 20))
    config(f"[Volume]\nPath={image}\n")
    async with managed(bed, config=config.directory) as daemon, BusClient() as client:
        await client.subscribe()
        listed = (names.ROOT_PATH, names.MANAGER_INTERFACE, "GetDevice", "sa{sv}")
        (vault,) = await client.call(*listed, [str(image), {}])
        config(f"[Volume]\nPath={image}\n[Volume]\nPath={data}\nHeader={header}\n")
        daemon.reload()
        path = (await client.signal("InterfacesAdded")).body[0]
        seen = await client.get_all(path, DEVICE)
        assert (seen["Node"], seen["Header"]) == (str(data), str(header))
        for volume in (vault, path):
            assert (await ended(client, await start(client, volume, "Enroll", new=BACKUP)))["State"] == "finished"
        assert makeimage.cryptsetup_opens(str(image), BACKUP)
        assert makeimage.cryptsetup_opens(str(header), BACKUP)
        config("")
        daemon.reload()
        assert {(await client.signal("InterfacesRemoved")).body[0] for _ in range(2)} == {vault, path}


async def test_limits_hold_from_the_next_job_on(bed, volume, config):
    async with managed(bed, config=config.directory) as daemon, BusClient() as client:
        await client.subscribe()
        await enrol(client, volume)
        config("[Limits]\nWaitingJobsPerVolume=1\n")
        daemon.reload()
        await daemon.manager.hears("READY=1")
        jobs = [await start(client, volume.path, **SLOW) for _ in range(2)]
        with pytest.raises(CallFailed) as caught:
            await start(client, volume.path)
        assert caught.value.name == names.ERROR_PREFIX + "Busy"
        for job in reversed(jobs):
            await client.call(job, JOB, "Cancel", "a{sv}", [{}])
            await ended(client, job)


async def test_with_a_bad_file_the_old_configuration_stays(bed, volume, config):
    config(f"[Devices]\nDeny=uuid:{volume.uuid}\n")
    async with managed(bed, config=config.directory) as daemon, BusClient() as client:
        assert (await client.call(*OBJECTS))[0].keys().isdisjoint({volume.path})
        config("[Devices]\nDeny=\n[Limits]\nJobs=none\n")
        daemon.reload()
        await daemon.manager.hears("RELOADING=1")
        complaint = f"{config.directory}/luksrotd.conf:4: Jobs=none: must be a whole number from 1 to 10000"
        await daemon.manager.hears(
            "READY=1", f"STATUS=cannot use the configuration: {complaint}; the old", "; 0 volumes"
        )
        assert complaint in daemon.log
        assert (await client.call(*OBJECTS))[0].keys().isdisjoint({volume.path})
        config("[Devices]\nDeny=\n[Limits]\nJobs=1\nJobz=2\n")
        daemon.reload()
        await daemon.manager.hears("READY=1", "STATUS=0 volumes")
        await daemon.manager.hears("STATUS=1 volumes")
        assert f"{config.directory}/luksrotd.conf:5: unknown key Jobz in [Limits], ignored" in daemon.log


async def test_with_a_bad_file_it_does_not_start(bed, config):
    config("[Devices]\nDeny=everything\n")
    async with managed(bed, ready=False, config=config.directory) as daemon:
        assert await daemon.ended() == 78
        await daemon.manager.hears("STATUS=cannot use the configuration: ", "luksrotd.conf:2: Deny=everything: ")
        assert "luksrotd.conf:2: Deny=everything: a rule is uuid:PATTERN" in daemon.log
        assert not [text for text in daemon.manager.told if "READY" in text]


async def test_many_reloads_leak_nothing(bed, volume, config):
    async with managed(bed, config=config.directory) as daemon:
        for number in range(30):
            config(f"[Limits]\nJobs={number}\n")  # 0 is refused
            daemon.reload()
            await daemon.manager.hears("READY=1")
            if number == 1:
                before = daemon.open_files()
        await until(lambda: daemon.open_files() <= before)


async def test_a_hangup_before_it_is_ready_does_no_harm(bed, config):
    async with managed(bed, ready=False, config=config.directory) as daemon:
        await until(lambda: b"tests.support.daemon_launcher" in _argv(daemon.pid))
        await until(lambda: _catches(daemon.pid, signal.SIGHUP))
        daemon.reload()
        await daemon.manager.hears("READY=1")
        daemon.terminate()
        assert await daemon.ended() == 0


def _argv(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _catches(pid, number):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line for line in lines if line.startswith("SigCgt:"))
    return int(caught.split()[1], 16) >> (number - 1) & 1


# -- its own end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_waits_for_a_commit_on_a_slow_disk_however_often_it_is_asked(bed, volume, tmp_path, number):
    go, there = tmp_path / "go", tmp_path / "there"
    async with managed(bed, hold=10, reached=str(there), go=str(go)) as daemon, before(volume) as client:
        job = await start(client, volume.path)
        await reached(client, job, State="committing")
        await until(there.exists)
        for _ in range(3):
            daemon.process.send_signal(number)
        await daemon.manager.hears("STOPPING=1", "STATUS=finishing")
        extended = await daemon.manager.hears("EXTEND_TIMEOUT_USEC=")
        assert extended == "EXTEND_TIMEOUT_USEC=30000000"
        daemon.process.send_signal(number)
        assert daemon.process.poll() is None
        go.touch()
        assert await daemon.ended() == 0
    assert (volume.opens(NEW), volume.opens(BACKUP), volume.opens(OLD)) == (True, False, True)


# -- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def drop_in(bed):
    """A real drop-in, in the /run of the bed."""
    path = Path(names.CONFIG_DIRECTORIES[1], "10-test.conf")
    path.parent.mkdir(parents=True)
    yield path
    path.unlink(missing_ok=True)
    path.parent.rmdir()


async def test_an_admin_can_check_the_configuration(drop_in):
    def check():
        argv = [sys.executable, "-m", "luksrotd", "--check-config"]
        done = subprocess.run(argv, cwd=PROJECT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    assert check() == (0, "")
    drop_in.write_text("[Limits]\nJobs=2\nJobz=3\n")
    drop_in.chmod(0o644)
    assert check() == (0, f"WARNING: {drop_in}:3: unknown key Jobz in [Limits], ignored\n")
    drop_in.write_text("[Limits]\n\nJobs=two\n")
    complaint = f"{drop_in}:3: Jobs=two: must be a whole number from 1 to 10000"
    assert check() == (78, f"ERROR: cannot use the configuration: {complaint}\n")
    drop_in.chmod(0o666)
    complaint = f"{drop_in}: others can write it (mode 0666)"
    assert check() == (78, f"ERROR: cannot read the configuration: {complaint}\n")


# -- logind --------------------------------------------------------------------------------------------------------


@pytest.fixture
def logind(bed):
    logind = FakeLogind(bed)
    yield logind
    assert logind.end() == []


async def test_the_machine_does_not_go_down_while_a_volume_is_written(bed, logind, tmp_path):
    """Stopped before the first write and before the last flush of a rotation, and asked logind what it has given."""
    for number, hold in enumerate((ENROLMENT, ENROLMENT + OPERATIONS - 1)):
        go, there = tmp_path / f"go{number}", tmp_path / f"there{number}"
        with disk(bed, f"other{number}") as other:
            why = f"taken sleep:shutdown|luksrotd|changing the LUKS2 header of {other.node}|delay"
            async with managed(bed, hold=hold, reached=str(there), go=str(go)), BusClient() as client:
                await client.subscribe()
                await enrol(client, other)
                assert await lines(logind, 3) == ["asked", why, "released"]
                job = await start(client, other.path, new=None)
                await reached(client, job, Stage="delivering")  # all keys are derived, and nothing was asked for
                await take_key(client, job)
                await until(there.exists)
                assert await lines(logind, 2) == ["asked", why]
                await reached(client, job, Stage="new-area" if number == 0 else "clear-secondary")
                go.touch()
                assert (await ended(client, job))["State"] == "finished"
                assert await lines(logind, 1) == ["released"]


async def lines(logind, count):
    return [await asyncio.to_thread(logind.line) for _ in range(count)]


async def test_a_logind_that_hangs_holds_up_no_commit(bed, volume):
    logind = FakeLogind(bed, "ignore")
    async with managed(bed) as daemon, BusClient() as client:
        await client.subscribe()
        await enrol(client, volume)
        assert (await ended(client, await start(client, volume.path)))["State"] == "finished"
        assert daemon.log.count("logind does not answer") == 1
    assert logind.end() == ["asked"]
