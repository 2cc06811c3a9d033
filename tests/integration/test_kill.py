# SPDX-License-Identifier: GPL-2.0-or-later
"""``kill -9`` of the daemon at every write and flush: what real cryptsetup says, before and after a reconcile."""

import signal
from pathlib import Path

import pytest

from luksrotd import direct
from luksrotd.ports import DeviceRef
from tests.integration.test_jobs import until, workers_of
from tests.support import makeimage
from tests.support.daemon_process import BACKUP, OLD, appeared, ended, running, settled, start
from tests.support.testbed import PROJECT

pytestmark = pytest.mark.asyncio
OPERATIONS = 12


@pytest.fixture
def volumes(monkeypatch):
    """The use cases in this process, as luksrotctl --direct has them."""
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    return direct.volumes()


async def killed_rotation(bed, client, volume, new, number, when):
    """Start a rotation in a daemon that is killed at an operation; wait for both ends."""
    async with running(bed, client, kill=number, when=when) as daemon:
        await appeared(client, volume.path)
        await start(client, volume.path, new=new)
        assert await daemon.ended() == -signal.SIGKILL
        await until(lambda: not workers_of(daemon.pid))


def opens_on_a_copy(bed, volume, *secrets):
    """Whether cryptsetup accepts each secret on what is there now; on the volume itself it would mend the header."""
    copy = bed.dir / "copy.img"
    copy.write_bytes(Path(volume.node).read_bytes())
    opened = [makeimage.cryptsetup_opens(copy, secret) for secret in secrets]
    copy.unlink()
    return opened


async def enrolled(bed, client, volume):
    async with running(bed, client):
        await appeared(client, volume.path)
        job = await start(client, volume.path, "Enroll", new=BACKUP)
        assert (await ended(client, job))["State"] == "finished"


async def test_killed_at_any_write_or_flush_a_reconcile_makes_it_whole(bed, client, volume, volumes):
    """Six phases of a write and a flush each.  Killed after one is killed before the next, as far as the disk knows.

    The key that each run leaves is where the next one starts.
    """
    await enrolled(bed, client, volume)
    live, generation, went_forward, found = BACKUP, 1, [], []
    for number in range(OPERATIONS):
        new = f"rotated-{number}".encode()
        await killed_rotation(bed, client, volume, new, number, "before")
        # Before the reconcile: whoever unlocks now, gets in.
        old_opens, *opened = opens_on_a_copy(bed, volume, OLD, live, new)
        assert old_opens
        assert any(opened)

        crashed = volume.headers()
        first = await volumes.reconcile(DeviceRef(volume.node))
        mended = volume.headers()
        second = await volumes.reconcile(DeviceRef(volume.node))
        assert (second.found, second.left, volume.headers()) == ((), (), mended), "the second one has nothing to do"
        assert (crashed != mended) == bool(first.found)

        # Exactly one pair, and its key, and nobody else's.
        opened = [secret for secret in (live, new) if volume.opens(secret)]
        assert len(opened) == 1, number
        ((name, keyslot),) = volume.pairs()
        assert name == "backup"
        assert volume.opens(opened[0], keyslot)
        assert volume.opens(OLD, 0)
        metadata = volume.metadata()
        assert set(metadata["keyslots"]) == {"0", str(keyslot)}
        (token,) = metadata["tokens"].values()
        generation += opened[0] == new
        assert (token["generation"], "wipe" in token) == (generation, False)
        went_forward.append(opened[0] == new)
        found.append([finding.code.value for finding in first.found])
        live = opened[0]
    assert went_forward == [False] * 3 + [True] * (OPERATIONS - 3)
    differ, wipe = "header-copies-differ", "wipe-pending"
    # new area, copy 1 | copy 1 written, copy 2 not | wipe | clear 1 | clear 2
    assert found == [[]] * 3 + [[differ, wipe]] * 2 + [[wipe]] * 4 + [[differ]] * 2 + [[]]


async def test_killed_after_the_last_flush_it_is_done(bed, client, volume, volumes):
    await enrolled(bed, client, volume)
    await killed_rotation(bed, client, volume, b"last", OPERATIONS - 1, "after")
    assert (volume.opens(b"last"), volume.opens(BACKUP)) == (True, False)
    assert (await volumes.reconcile(DeviceRef(volume.node))).found == ()


async def test_the_next_daemon_finishes_what_the_killed_one_left(bed, client, volume):
    await enrolled(bed, client, volume)
    await killed_rotation(bed, client, volume, b"new", 6, "before")
    assert "wipe" in next(iter(volume.metadata()["tokens"].values()))
    async with running(bed, client):
        await appeared(client, volume.path)
        seen = await settled(client, volume.path, Problems=[])
        assert not seen["Keys"][0]["wipe-pending"].value
        assert (volume.opens(b"new"), volume.opens(BACKUP), volume.opens(OLD)) == (True, False, True)
        done = await ended(client, await start(client, volume.path, new=b"newer"))
        assert done["State"] == "finished"
