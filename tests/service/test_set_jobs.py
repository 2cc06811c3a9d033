# SPDX-License-Identifier: GPL-2.0-or-later
"""Verbs on sets of simulated volumes as jobs: one job for all, and an account of each."""

import asyncio
import os

import pytest

from luksrotd.errors import Cancelled, DeviceError, InvalidRequest, NeedsPerson, Outcome, SecretRejected, UnknownDevice
from luksrotd.ports import DeviceIdentity, DeviceRef, SecretFd
from luksrotd.rotation.edits import NEW, UNLOCK
from luksrotd.rotation.sets import SetState
from luksrotd.rotation.token import Group
from luksrotd.service.jobs import Kind, State
from luksrotd.service.progress import Stage
from luksrotd.service.setjobs import failure
from luksrotd.service.setwork import Happened, MemberResult, SetResult
from luksrotd.service.verbs import Wanted
from tests.service.world import FAST, NEXT, OTHER_UUID, OWNER, World
from tests.support.simdisk import SimDisk
from tests.support.simengine import opened_by
from tests.support.simset import enrolled
from tests.support.simulation import MAIN, OLD

pytestmark = pytest.mark.asyncio
SIZE = 3


@pytest.fixture(scope="module", autouse=True)
def images():
    """Made beforehand: that takes a loop of its own."""
    for number in range(SIZE):
        enrolled(number)


class SetWorld(World):
    """Three volumes with one managed key."""

    def __init__(self):
        disks = [
            SimDisk(enrolled(number), path=f"/dev/sim{number}", identity=DeviceIdentity(True, 259, number))
            for number in range(SIZE)
        ]
        super().__init__(disks=disks)
        self.uuids = [self.watcher.present[disk.path] for disk in self.disks]

    def begin(self, kind, *, unlock=MAIN, new=NEXT, uuids=None, **wanted):
        """A job on the set."""
        secrets = self.secrets(**{UNLOCK: unlock, NEW: new}) if kind is Kind.STAGE else self.secrets()
        wanted = Wanted(**{"pbkdf": FAST, **wanted})
        return self.sets.start(kind, uuids or self.uuids, OWNER, wanted, secrets)

    def opening(self, secret):
        """On how many volumes the secret opens something."""
        return sum(bool(opened_by(disk.content, secret)) for disk in self.disks)


def happened(result):
    return [member.happened for member in result.members]


async def test_a_set_is_staged_and_finished_in_one_job_each():
    world = SetWorld()
    async with world.running():
        assert (await world.sets.status(world.uuids, "backup", None)).state is SetState.UNSTAGED
        job = world.begin(Kind.STAGE)
        assert job.volumes == tuple(world.uuids)
        assert all(world.runner.busy(uuid) for uuid in world.uuids)
        done = await job.wait()
        assert (happened(done), done.state, done.group.size) == ([Happened.STAGED] * SIZE, SetState.STAGED, SIZE)
        assert [member.ref.uuid for member in done.members] == world.uuids
        assert (world.opening(NEXT), world.opening(OLD)) == (SIZE, SIZE)
        states = {key.token.state for uuid in world.uuids for key in world.registry.get(uuid).view.keys}
        assert states == {"active", "staged"}, "the registry knows by the time that the job has ended"
        status = await world.sets.status(world.uuids, "backup", done.group.id)
        assert (status.group, status.state) == (done.group, SetState.STAGED)
        with pytest.raises(NeedsPerson, match="set"):
            await world.begin(Kind.FINISH, group="another").wait()
        done = await world.begin(Kind.FINISH, group=done.group.id).wait()
        assert (happened(done), done.state) == ([Happened.FINISHED] * SIZE, SetState.FINISHED)
    assert (world.opening(NEXT), world.opening(OLD), world.opening(MAIN)) == (SIZE, 0, SIZE)


async def test_a_set_is_aborted():
    world = SetWorld()
    async with world.running():
        await world.begin(Kind.STAGE).wait()
        done = await world.begin(Kind.ABORT).wait()
        assert (happened(done), done.state) == ([Happened.ABORTED] * SIZE, SetState.UNSTAGED)
    assert (world.opening(NEXT), world.opening(OLD)) == (0, SIZE)


@pytest.mark.parametrize("keep", [False, True])
async def test_a_job_that_fails_on_one_volume_tells_what_became_of_each(keep):
    world = SetWorld()
    async with world.running():
        world.disks[1].observer = fail_at_the_first_write
        job = world.begin(Kind.STAGE, keep=keep)
        with pytest.raises(DeviceError, match="/dev/sim1"):
            await job.wait()
        first = Happened.STAGED if keep else Happened.UNDONE
        assert happened(job.result) == [first, Happened.FAILED, Happened.NOTHING]
        assert job.result.state is (SetState.PARTLY_STAGED if keep else SetState.UNSTAGED)
        assert job.outcome is (Outcome.COMMITTED if keep else Outcome.UNCHANGED)
        assert job.state is State.FAILED
        world.disks[1].observer = None
        if keep:  # taken up again, with the same secret
            done = await world.begin(Kind.STAGE).wait()
            assert happened(done) == [Happened.ALREADY, Happened.STAGED, Happened.STAGED]
    assert world.opening(NEXT) == (SIZE if keep else 0)


def fail_at_the_first_write(operation):
    raise DeviceError(f"cannot write: {type(operation).__name__}")


async def test_what_is_refused_on_one_volume_is_refused_before_anything():
    world = SetWorld()
    async with world.running():
        for uuids, error in (
            ([*world.uuids, OTHER_UUID], UnknownDevice),
            ([], InvalidRequest),
            ([*world.uuids, world.uuids[0]], InvalidRequest),
        ):
            with pytest.raises(error):
                world.sets.start(Kind.STAGE, uuids, OWNER, Wanted(), world.secrets(**{UNLOCK: MAIN, NEW: NEXT}))
            with pytest.raises(error):
                await world.sets.status(uuids, "backup", None)
        twin = SimDisk(enrolled(1), path="/dev/sim9")
        world.devices.disks[twin.path] = twin
        world.watcher.put(twin.path, world.uuids[1])
        while not world.registry.get(world.uuids[1]).ambiguous:  # noqa: ASYNC110 -- a task of the test itself
            await asyncio.sleep(0)
        for kind in (Kind.STAGE, Kind.FINISH, Kind.ABORT):
            with pytest.raises(NeedsPerson, match="show one UUID"):
                world.begin(kind)
    assert not [operation for disk in world.disks for operation in disk.log]


async def test_a_secret_that_can_be_read_only_once_is_refused():
    world = SetWorld()
    async with world.running():
        secrets = world.secrets(**{UNLOCK: MAIN})
        reader, writer = os.pipe()
        secrets.resources.callback(os.close, reader)
        os.close(writer)
        sources = {**secrets.sources, NEW: SecretFd(reader)}
        job = world.sets.start(
            Kind.STAGE, world.uuids, OWNER, Wanted(pbkdf=FAST), type(secrets)(sources, secrets.resources)
        )
        with pytest.raises(SecretRejected, match="several volumes"):
            await job.wait()
    assert world.opening(NEXT) == 0


async def test_staging_can_be_cancelled_until_the_last_volume_and_is_undone_then():
    """Each volume's staging is a commit, but none of them is the set's point of no return."""
    world = SetWorld()
    async with world.running():
        loop, jobs = asyncio.get_running_loop(), []

        async def on_loop():
            world.runner.cancel(jobs[0])

        def cancel(_):
            world.disks[2].observer = None
            asyncio.run_coroutine_threadsafe(on_loop(), loop).result()

        world.disks[2].observer = cancel
        jobs.append(world.begin(Kind.STAGE))
        with pytest.raises(Cancelled):
            await jobs[0].wait()
        assert jobs[0].state is State.CANCELLED
        assert happened(jobs[0].result)[:2] == [Happened.UNDONE, Happened.UNDONE]
        assert jobs[0].outcome is Outcome.UNCHANGED
    assert (world.opening(NEXT), world.opening(OLD)) == (0, SIZE)


async def test_one_generated_key_for_all():
    world = SetWorld()
    async with world.running():
        job = world.begin(Kind.STAGE, new=None)
        reached = asyncio.Event()
        job.subscribe(lambda: reached.set() if job.ended or job.step is Stage.DELIVERING else None)
        await reached.wait()
        assert not [operation for disk in world.disks for operation in disk.log]
        fd = await job.handover.take(OWNER)
        job.handover.confirm(OWNER)
        await job.wait()
        with os.fdopen(fd, "rb") as file:
            assert world.opening(file.read()) == SIZE


def member(happened, outcome=None):
    error = None if outcome is None else InvalidRequest("cannot go on", outcome=outcome)
    return MemberResult(DeviceRef(f"/dev/{happened}"), happened, error=error)


@pytest.mark.parametrize(
    ("members", "outcome"),
    [
        ([(Happened.UNDONE,), (Happened.FAILED, Outcome.UNCHANGED)], Outcome.UNCHANGED),
        ([(Happened.STAGED,), (Happened.FAILED, Outcome.UNCHANGED)], Outcome.COMMITTED),
        ([(Happened.FINISHED,), (Happened.FAILED, Outcome.WIPE_PENDING)], Outcome.WIPE_PENDING),
        ([(Happened.FAILED, Outcome.WIPE_PENDING), (Happened.FAILED, Outcome.UNKNOWN)], Outcome.UNKNOWN),
        ([(Happened.ALREADY,), (Happened.FAILED, Outcome.UNCHANGED)], Outcome.UNCHANGED),
        ([(Happened.STAGED, Outcome.UNCHANGED), (Happened.NOTHING,)], Outcome.COMMITTED),
        ([(Happened.UNDONE, Outcome.UNKNOWN), (Happened.NOTHING,)], Outcome.UNCHANGED),
    ],
)
async def test_the_outcome_of_a_set_is_the_gravest_of_its_volumes(members, outcome):
    error = failure(SetResult("backup", Group("x", 2), None, tuple(member(*one) for one in members)))
    assert error.outcome is outcome
    failed = next(one for one in members if len(one) > 1)
    assert error.message == f"cannot go on (/dev/{failed[0]})"
