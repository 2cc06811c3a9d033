# SPDX-License-Identifier: GPL-2.0-or-later
"""Many jobs at once: volumes side by side, one volume in order, nobody in the way of others; and how far they are."""

import signal

import pytest
from dbus_next.signature import Variant

from luksrotd import names
from luksrotd.service.progress import Stage, fraction
from tests.support.busclient import BusClient, CallFailed
from tests.support.daemon_process import BACKUP, appeared, disk, ended, reached, running, start

pytestmark = pytest.mark.asyncio
DEVICE, JOB = names.DEVICE_INTERFACE, names.JOB_INTERFACE
#: It would take hours, so whatever the test waits for comes while keys are derived.
SLOW = {"pbkdf-force-iterations": Variant("u", 1_000_000_000)}
LIMITS_EXCEEDED = "org.freedesktop.DBus.Error.LimitsExceeded"


@pytest.fixture
def other(bed):
    """A second volume."""
    with disk(bed, "other") as volume:
        yield volume


async def cancel(client, job):
    await client.call(job, JOB, "Cancel", "a{sv}", [{}])
    return await ended(client, job)


async def state(client, job):
    return await client.get(job, JOB, "State")


async def test_two_volumes_side_by_side(daemon, client, volume, other):
    await appeared(client, other.path)
    jobs = [await start(client, path, "Enroll", new=BACKUP, **SLOW) for path in (volume.path, other.path)]
    for job in jobs:
        await reached(client, job, Stage="deriving", State="running")
    for path in (volume.path, other.path):
        assert await client.get(path, DEVICE, "Busy")
    assert [await state(client, job) for job in jobs] == ["running", "running"]
    for job in jobs:
        assert (await cancel(client, job))["State"] == "cancelled"


async def test_one_volume_in_order(daemon, client, volume, other):
    await appeared(client, other.path)
    slow = await start(client, volume.path, "Enroll", new=BACKUP, **SLOW)
    behind = [await start(client, volume.path, "Enroll", new=BACKUP, name=name) for name in ("one", "two")]
    await reached(client, slow, Stage="deriving")
    elsewhere = await start(client, other.path, "Enroll", new=BACKUP)
    assert (await ended(client, elsewhere))["State"] == "finished", "it waits for nobody"
    assert [await state(client, job) for job in behind] == ["queued", "queued"]
    await cancel(client, slow)
    assert [(await ended(client, job))["State"] for job in behind] == ["finished", "finished"]
    assert volume.pairs() == [("one", 1), ("two", 2)]


async def test_the_queue_of_a_volume_is_bounded_and_its_end_is_told(daemon, client, volume):
    jobs = [await start(client, volume.path, "Enroll", new=BACKUP, **SLOW) for _ in range(5)]
    with pytest.raises(CallFailed, match="4 jobs are waiting for the volume") as caught:
        await start(client, volume.path, "Enroll", new=BACKUP)
    assert caught.value.name == names.ERROR_PREFIX + "Busy"
    assert (await cancel(client, jobs.pop()))["State"] == "cancelled"
    jobs.append(await start(client, volume.path, "Enroll", new=BACKUP, **SLOW))
    for job in reversed(jobs):
        await cancel(client, job)


async def test_a_user_cannot_take_all_places(daemon, client, volume, nobody, rules):
    rules("YES")
    slow = await start(client, volume.path, "Enroll", new=BACKUP, **SLOW)
    scrub = (volume.path, DEVICE, "Scrub", "a{sv}", [{}])
    jobs = [(await nobody.call(*scrub))[0] for _ in range(2)]
    with pytest.raises(CallFailed, match="2 of the user's are waiting for the volume") as caught:
        await nobody.call(*scrub)
    assert caught.value.name == LIMITS_EXCEEDED
    jobs.append(await start(client, volume.path, "Enroll", new=BACKUP))
    await cancel(client, slow)
    assert [(await ended(client, job))["State"] for job in jobs] == ["finished"] * 3


async def test_memory_admits_key_derivations_and_more_of_it_more(bed, client, volume, other, tmp_path):
    """Each takes 64 MiB for argon2, and as much for the worker."""
    argon2 = {"pbkdf": Variant("s", "argon2id"), "pbkdf-memory": Variant("u", 64 * 1024), **SLOW}
    config = tmp_path / "luksrotd.conf"
    config.write_text("[Limits]\nMemoryMax=250M\n")
    async with running(bed, client, config=str(tmp_path)) as daemon:
        for path in (volume.path, other.path):
            await appeared(client, path)
        jobs = [await start(client, path, "Enroll", new=BACKUP, **argon2) for path in (volume.path, other.path)]
        await reached(client, jobs[0], Stage="deriving")
        assert await state(client, jobs[1]) == "queued"
        config.write_text("[Limits]\nMemoryMax=260M\n")
        daemon.process.send_signal(signal.SIGHUP)
        await reached(client, jobs[1], Stage="deriving")
        for job in jobs:
            assert (await cancel(client, job))["State"] == "cancelled"


async def test_progress_moves_while_keys_are_derived(daemon, client, volume):
    job = await start(client, volume.path, "Enroll", new=BACKUP, **SLOW)
    await reached(client, job, Stage="deriving")
    seen = [await client.get(job, JOB, "Progress")]
    assert await client.get(job, JOB, "ProgressEstimated")
    client.signals.clear()
    while len(seen) < 4:
        changed = await client.signal("PropertiesChanged")
        if changed.path == job:
            assert changed.body[1].keys() == {"Progress"}
            seen.append(changed.body[1]["Progress"].value)
    assert fraction(Stage.DERIVING) <= seen[0] <= seen[1] < seen[2] < seen[3] < fraction(Stage.VERIFYING)
    done = await cancel(client, job)
    assert (done["State"], done["ProgressEstimated"]) == ("cancelled", False)
    assert done["Progress"] < fraction(Stage.VERIFYING)


async def test_the_end_is_told_once_and_can_be_read_later(daemon, client, volume):
    async with BusClient() as watcher:
        await watcher.subscribe()
        jobs = [await start(client, volume.path, "Enroll", new=BACKUP, name=name) for name in ("one", "one", "two")]
        late = [await ended(client, job) for job in jobs]
        await watcher.get(jobs[0], JOB, "State")  # what was sent before the reply has arrived
        told = [signal.path for signal in watcher.signals if signal.member == "Completed"]
        assert told == jobs
    assert [job["State"] for job in late] == ["finished", "failed", "finished"]
    assert late[1]["ErrorName"] == names.ERROR_PREFIX + "KeyExists"
    assert late[0]["Result"]["name"].value == "one"
    assert [await client.get_all(job, JOB) for job in jobs] == late
