# SPDX-License-Identifier: GPL-2.0-or-later
"""Jobs that are disturbed: by callers that vanish, each other, cryptsetup, SIGTERM."""

import asyncio
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from dbus_next.signature import Variant

from luksrotd import names
from luksrotd.host.blockdev import BlockDevices
from luksrotd.host.locks import HostLocks
from luksrotd.ports import DeviceRef
from tests.support import makeimage
from tests.support.busclient import BusClient, CallFailed
from tests.support.daemon_process import (
    BACKUP,
    ENVIRONMENT,
    NEW,
    OLD,
    WAIT_SECONDS,
    appeared,
    ended,
    memfd,
    reached,
    running,
    start,
)
from tests.support.testbed import PROJECT, unprivileged_argv

pytestmark = pytest.mark.asyncio
DEVICE, JOB = names.DEVICE_INTERFACE, names.JOB_INTERFACE
SLOW = {"pbkdf-force-iterations": Variant("u", 1_000_000_000)}


async def until(condition):
    """Wait for something outside that nothing tells of."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():  # noqa: ASYNC110 -- of files and other processes there is no event
            await asyncio.sleep(0.005)


async def start_for_ever(client, volume):
    while True:
        await start(client, volume.path)


async def enrol(client, volume):
    await appeared(client, volume.path)
    job = await start(client, volume.path, "Enroll", new=BACKUP)
    assert (await ended(client, job))["State"] == "finished"


def workers_of(pid):
    """Processes that a daemon with that pid has started: they get its pid as an argument."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                argv = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"luksrotd.worker" in argv and str(pid).encode() in argv:
                found.append(int(process.name))
    return found


# -- callers -----------------------------------------------------------------------------------------------------


async def test_a_job_with_a_supplied_secret_outlives_its_caller(bed, client, volume, tmp_path):
    go, there = tmp_path / "go", tmp_path / "there"
    async with running(bed, client, hold=8, reached=str(there), go=str(go)):
        await enrol(client, volume)
        async with BusClient() as caller:
            job = await start(caller, volume.path)
            await until(there.exists)
        assert (await client.get_all(job, JOB))["State"] in ("running", "committing")
        go.touch()
        assert (await ended(client, job))["State"] == "finished"
    assert (volume.opens(NEW), volume.opens(BACKUP)) == (True, False)


async def test_a_job_with_a_generated_key_does_not(enrolled, client):
    before = enrolled.headers()
    async with BusClient() as caller:
        job = await start(caller, enrolled.path, new=None)
        await reached(client, job, Stage="delivering")
    done = await ended(client, job)
    assert (done["State"], done["ErrorName"]) == ("cancelled", names.ERROR_PREFIX + "Cancelled")
    assert enrolled.headers() == before


async def test_nor_does_it_while_it_still_derives(enrolled, daemon, client):
    async with BusClient() as caller:
        job = await start(caller, enrolled.path, new=None, pbkdf=Variant("s", "pbkdf2"), **SLOW)
        await reached(client, job, Stage="deriving")
    assert (await ended(client, job))["State"] == "cancelled"
    await until(lambda: not workers_of(daemon.pid))


async def test_cancelling_ends_a_derivation_at_once(enrolled, daemon, client):
    before = enrolled.headers()
    job = await start(client, enrolled.path, **SLOW)
    await reached(client, job, Stage="deriving", Cancellable=True)
    assert workers_of(daemon.pid)
    await client.call(job, JOB, "Cancel", "a{sv}", [{}])
    done = await ended(client, job)
    assert (done["State"], done["Outcome"], done["Cancellable"]) == ("cancelled", "unchanged", False)
    assert enrolled.headers() == before
    await until(lambda: not workers_of(daemon.pid))
    assert (await client.get_all(enrolled.path, DEVICE))["Busy"] is False


async def test_a_worker_is_started_ahead_of_the_next_job_and_ends_with_the_daemon(bed, client, volume):
    async with running(bed, client, spare=True) as daemon:
        await appeared(client, volume.path)
        assert not workers_of(daemon.pid), "none before it is known that there are jobs"
        await ended(client, await start(client, volume.path, "Enroll", new=BACKUP))
        await until(lambda: len(workers_of(daemon.pid)) == 1)
        (spare,) = workers_of(daemon.pid)
        job = await start(client, volume.path, **SLOW)
        await reached(client, job, Stage="deriving")
        await until(lambda: len(workers_of(daemon.pid)) == 2)
        assert spare in workers_of(daemon.pid), "it works"
        await client.call(job, JOB, "Cancel", "a{sv}", [{}])
        await ended(client, job)
        await until(lambda: len(workers_of(daemon.pid)) == 1)
        assert spare not in workers_of(daemon.pid), "nobody gets it again"
        daemon.terminate()
        assert await daemon.ended() == 0, daemon.log
        assert not workers_of(daemon.pid)


async def test_descriptors_are_closed_whatever_becomes_of_the_job(enrolled, daemon, client):
    def open_files():
        """Secrets, shadows, devices, whatever the daemon opens for a job; its sockets and /dev/null stay."""
        links = []
        for link in Path(f"/proc/{daemon.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                links.append(str(link.readlink()))
        return [link for link in links if "memfd" in link or enrolled.node in link]

    job = await start(client, enrolled.path, **SLOW)
    await reached(client, job, Stage="deriving")
    assert [name for name in open_files() if "test-secret" in name], "so they would be seen"
    await client.call(job, JOB, "Cancel", "a{sv}", [{}])
    for arguments in ({"old": b"wrong"}, {"name": "unknown"}, {}, {"method": "Enroll"}):
        await ended(client, await start(client, enrolled.path, **arguments))
    for _ in range(2):
        job = await start(client, enrolled.path, old=OLD, new=None, **SLOW)
        await client.call(job, JOB, "Cancel", "a{sv}", [{}])
        await ended(client, job)
    for credential in ({"fd": Variant("h", 0), "keyfile": Variant("s", "/x")}, {"keyfile": Variant("s", "/nowhere")}):
        fd = memfd(OLD)
        body = ["", {"fd": Variant("h", 0)}, credential, {}]
        with pytest.raises(CallFailed):
            await client.call(enrolled.path, DEVICE, "Rotate", "sa{sv}a{sv}a{sv}", body, fds=[fd])
        os.close(fd)
    await until(lambda: not open_files())


async def test_two_rotations_of_one_volume_at_once(enrolled, client):
    jobs = [await start(client, enrolled.path, new=secret) for secret in (b"first", b"second")]
    results = [await ended(client, job) for job in jobs]
    assert [done["State"] for done in results] == ["finished"] * 2
    assert [done["Result"]["generation"].value for done in results] == [2, 3]
    assert [enrolled.opens(secret) for secret in (OLD, b"second", b"first", BACKUP)] == [True, True, False, False]
    assert enrolled.pairs() == [("backup", int(results[1]["Result"]["keyslot"].value))]


async def test_a_flood_of_jobs_is_refused_in_order(enrolled, client):
    jobs = [await start(client, enrolled.path, **SLOW)]
    with pytest.raises(CallFailed) as caught:
        jobs.extend([await start(client, enrolled.path) for _ in range(20)])
    assert caught.value.name == names.ERROR_PREFIX + "Busy"
    for job in reversed(jobs):
        await client.call(job, JOB, "Cancel", "a{sv}", [{}])
        assert (await ended(client, job))["State"] == "cancelled"


async def test_another_process_at_work_is_respected(enrolled, client, monkeypatch):
    """luksrotctl --direct and the daemon exclude each other by the job lock."""
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    device = BlockDevices().open(DeviceRef(enrolled.node))
    async with HostLocks().job(device):
        done = await ended(client, await start(client, enrolled.path))
    device.close()
    assert (done["State"], done["ErrorName"]) == ("failed", names.ERROR_PREFIX + "Busy")


# -- cryptsetup --------------------------------------------------------------------------------------------------


async def test_cryptsetup_racing_rotations_loses_nothing_on_either_side(enrolled, client):
    """50 rotations, each with a ``cryptsetup luksAddKey`` in the middle of one of its stages."""
    stages = ("reading", "deriving", "verifying", "waiting-for-metadata-lock", "header-primary", "wipe-old")
    alive, kept, conflicts = [], 5, 0

    def insist(call, *arguments, **keywords):
        """cryptsetup gives up, and says so, when the header changes between its read and its write."""
        nonlocal conflicts
        while True:
            try:
                return call(*arguments, **keywords)
            except AssertionError as error:
                if "concurrent LUKS2 metadata update" not in str(error):
                    raise
                conflicts += 1

    def foreign(number):
        insist(makeimage.add_key, enrolled.node, OLD, f"foreign-{number}".encode())
        alive.append(number)
        if len(alive) > kept:  # there are no more than 32 keyslots
            oldest = f"foreign-{alive.pop(0)}".encode()
            insist(makeimage.run, "luksRemoveKey", enrolled.node, "-", stdin=oldest)

    for number in range(50):
        job = await start(client, enrolled.path, new=f"rotated-{number}".encode())
        client.signals.clear()
        stage = ""
        while stage not in (stages[number % len(stages)], "done"):
            signal_ = await client.signal("PropertiesChanged")
            stage = signal_.body[1]["Stage"].value if "Stage" in signal_.body[1] and signal_.path == job else ""
        await asyncio.to_thread(foreign, number)
        done = await ended(client, job)
        assert (done["State"], done["Result"]["generation"].value) == ("finished", number + 2), done
    assert all(enrolled.opens(secret) for secret in (OLD, b"rotated-49"))
    assert not any(enrolled.opens(secret) for secret in (b"rotated-48", BACKUP))
    assert all(enrolled.opens(f"foreign-{number}".encode()) for number in alive)
    metadata = enrolled.metadata()
    assert len(metadata["keyslots"]) == 2 + kept
    assert [token["generation"] for token in metadata["tokens"].values()] == [51]


# -- the daemon's own end ----------------------------------------------------------------------------------------


async def test_sigterm_during_a_derivation_cancels_it(bed, client, volume):
    async with running(bed, client) as daemon:
        await enrol(client, volume)
        before = volume.headers()
        job = await start(client, volume.path, **SLOW)
        await reached(client, job, Stage="deriving")
        daemon.terminate()
        completed = await client.signal("Completed")
        while completed.path != job:
            completed = await client.signal("Completed")
        assert completed.body[:3] == [False, "unchanged", names.ERROR_PREFIX + "Cancelled"]
        assert await daemon.ended() == 0, daemon.log
        assert "Traceback" not in daemon.log
        assert volume.headers() == before
        assert not workers_of(daemon.pid)


async def test_sigterm_during_a_commit_finishes_it(bed, client, volume, tmp_path):
    go, there = tmp_path / "go", tmp_path / "there"
    async with running(bed, client, hold=10, reached=str(there), go=str(go)) as daemon:
        await enrol(client, volume)
        job = await start(client, volume.path)
        await until(there.exists)
        await reached(client, job, State="committing")
        with pytest.raises(CallFailed, match="point of no return"):
            await client.call(job, JOB, "Cancel", "a{sv}", [{}])
        daemon.terminate()
        with pytest.raises(CallFailed, match="stopping"):
            await start_for_ever(client, volume)  # until it has seen the signal
        go.touch()
        completed = await client.signal("Completed")
        while completed.path != job:
            completed = await client.signal("Completed")
        assert completed.body == [True, "committed", "", ""]
        assert await daemon.ended() == 0
    assert (volume.opens(NEW), volume.opens(BACKUP), volume.opens(OLD)) == (True, False, True)


async def test_systemd_is_told_when_it_is_ready_and_when_it_stops(bed, client, volume, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.setblocking(False)
        told = []
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "40000"}
        async with running(bed, client, environment=environment) as daemon:
            # Ready means that the volumes are there already.
            call = (names.ROOT_PATH, names.MANAGER_INTERFACE, "GetDevices", "a{sv}", [{}])
            assert await client.call(*call) == [[volume.path]]
            loop = asyncio.get_running_loop()
            while not any("READY=1" in text for text in told) or sum("WATCHDOG=1" in text for text in told) < 3:
                told.append((await loop.sock_recv(notify, 4096)).decode())
            daemon.terminate()
            while not any("STOPPING=1" in text for text in told):
                told.append((await loop.sock_recv(notify, 4096)).decode())
            assert await daemon.ended() == 0


async def test_a_second_daemon_does_not_start(bed, daemon, client):
    argv = [sys.executable, "-m", "tests.support.daemon_launcher", '{"prefix": "none-of-ours-"}']
    second = bed.spawn(argv, cwd=PROJECT, env=ENVIRONMENT, stderr=subprocess.PIPE)
    _, complaint = await asyncio.to_thread(second.communicate, timeout=WAIT_SECONDS)
    assert second.returncode == 1
    assert b"org.luksrotd1 is taken" in complaint


async def test_without_a_bus_it_does_not_start(bed, tmp_path):
    environment = {**ENVIRONMENT, "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={tmp_path}/bus"}
    argv = [sys.executable, "-m", "tests.support.daemon_launcher", '{"prefix": "none-of-ours-"}']
    daemon = bed.spawn(argv, cwd=PROJECT, env=environment, stderr=subprocess.PIPE)
    _, complaint = await asyncio.to_thread(daemon.communicate, timeout=WAIT_SECONDS)
    assert daemon.returncode == 1
    assert b"no system bus" in complaint
    assert b"Traceback" not in complaint


def command_line(*argv, **popen):
    return subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, check=False, env=ENVIRONMENT, **popen)


async def test_the_command_line():
    version = command_line(sys.executable, "-m", "luksrotd", "--version")
    assert (version.returncode, version.stdout) == (0, "luksrotd 0.1.0\n")
    assert command_line(sys.executable, "-m", "luksrotd", "--help").returncode == 0
    assert command_line(sys.executable, "-m", "luksrotd", "--nonsense").returncode == 2
    user = command_line(*unprivileged_argv(65534, "tests.support.run_main"))
    assert user.returncode == 1
    assert "must be run as root" in user.stderr
    assert "Traceback" not in user.stderr
