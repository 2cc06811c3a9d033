# SPDX-License-Identifier: GPL-2.0-or-later
"""What a job tells the bus: one Completed however it ends, and what a late client reads."""

import asyncio

import pytest

from luksrotd import names
from luksrotd.bus.job import Job
from luksrotd.config import Limits
from luksrotd.errors import Busy, Conflict, Outcome
from luksrotd.ports import Caller
from luksrotd.rotation.protocol import Phase
from luksrotd.service.handover import Secrets
from luksrotd.service.jobs import Kind
from luksrotd.service.progress import Stage
from luksrotd.service.runner import Request, Runner
from tests.support.faketimers import FakeTimers

pytestmark = pytest.mark.asyncio
OWNER = Caller(":1.7", 1000)
CANCELLED = names.ERROR_PREFIX + "Cancelled"


class World:
    """A runner of one job at a time, whose jobs send their signals into ``sent``."""

    def __init__(self):
        self.timers = FakeTimers()
        self.runner = Runner(Limits(jobs=1), timers=self.timers)
        self.runner.observe(self)
        self.sent = []
        self.go = asyncio.Event()
        self.begun = asyncio.Event()
        self.shown = {}

    def send(self, message):
        self.sent.append(message)

    def job_added(self, job):
        self.shown[job.number] = Job(None, self.runner, job, OWNER)
        self.shown[job.number].exported(self, f"{names.JOB_PATH}/{job.number}")

    def job_ended(self, job):
        pass

    def job_forgotten(self, job):
        pass

    def start(self, steps=(Stage.DERIVING,), error=None, abandoned=None, volumes=("a",)):
        async def work(job):
            for step in steps:
                job.entered(step)
            self.begun.set()
            await self.go.wait()
            if error:
                raise error

        return self.runner.submit(
            Request(Kind.ROTATE, volumes, work, "backup", OWNER, secrets=Secrets(abandoned=abandoned))
        )

    def completed(self, job):
        path = f"{names.JOB_PATH}/{job.number}"
        return [message.body for message in self.sent if (message.path, message.member) == (path, "Completed")]

    def read(self, job):
        return {name: variant.value for name, variant in self.shown[job.number].values().items()}


async def succeed(world):
    job = world.start()
    world.go.set()
    return job


async def fail(world):
    job = world.start(error=Conflict("cannot go on", outcome=Outcome.WIPE_PENDING))
    world.go.set()
    return job


async def hit_a_bug_while_committing(world):
    job = world.start([Phase.HEADER_PRIMARY], error=ZeroDivisionError())
    world.go.set()
    return job


async def cancel_queued(world):
    world.start()
    job = world.start()
    world.runner.cancel(job)
    return job


async def cancel_before_it_has_begun(world):
    job = world.start()
    world.runner.cancel(job)
    world.runner.cancel(job)
    return job


async def cancel_running(world):
    job = world.start()
    await world.begun.wait()
    world.runner.cancel(job)
    world.runner.cancel(job)
    return job


async def try_to_cancel_committing(world):
    job = world.start([Phase.HEADER_PRIMARY])
    await world.begun.wait()
    with pytest.raises(Busy):
        world.runner.cancel(job)
    world.go.set()
    return job


async def vanish(world):
    async def gone():
        await world.begun.wait()

    return world.start(abandoned=gone)


async def drain(world):
    job = world.start()
    await world.begun.wait()
    await world.runner.drain()
    return job


async def drain_queued(world):
    world.start()
    job = world.start()
    await world.runner.drain()
    return job


async def drain_committing(world):
    job = world.start([Phase.HEADER_PRIMARY])
    await world.begun.wait()
    asyncio.get_running_loop().call_soon(world.go.set)
    await world.runner.drain()
    return job


async def drain_a_set(world):
    job = world.start([Phase.HEADER_PRIMARY], volumes=("a", "b"))
    await world.begun.wait()
    await world.runner.drain()
    return job


ENDS = {
    succeed: ("finished", True, "committed", ""),
    fail: ("failed", False, "committed-wipe-pending", names.ERROR_PREFIX + "Conflict"),
    hit_a_bug_while_committing: (
        "failed",
        False,
        "unknown-reconcile-needed",
        names.ERROR_PREFIX + "Internal",
    ),
    cancel_queued: ("cancelled", False, "unchanged", CANCELLED),
    cancel_before_it_has_begun: ("cancelled", False, "unchanged", CANCELLED),
    cancel_running: ("cancelled", False, "unchanged", CANCELLED),
    try_to_cancel_committing: ("finished", True, "committed", ""),
    vanish: ("cancelled", False, "unchanged", CANCELLED),
    drain: ("cancelled", False, "unchanged", CANCELLED),
    drain_queued: ("cancelled", False, "unchanged", CANCELLED),
    drain_committing: ("finished", True, "committed", ""),
    drain_a_set: ("failed", False, "unknown-reconcile-needed", CANCELLED),
}


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
async def test_however_it_ends_it_says_so_once_and_a_late_client_can_read_it(end):
    world = World()
    job = await end(world)
    await asyncio.wait([ended := asyncio.ensure_future(job.wait())])
    ended.exception()
    world.go.set()
    await world.runner.drain()
    job.cancelling()  # whatever is told to it afterwards
    state, success, outcome, error = ENDS[end]
    read = world.read(job)
    assert world.completed(job) == [[success, outcome, error, read["ErrorMessage"]]]
    assert (read["State"], read["Outcome"], read["ErrorName"]) == (state, outcome, error)
    assert (read["Cancellable"], read["ProgressEstimated"]) == (False, False)
    assert (read["Progress"] == 1.0) == success
    of_job = [message for message in world.sent if message.path.endswith(f"/{job.number}")]
    assert of_job[-1].member == "Completed", "nothing comes after it"
    assert of_job[-2].member == "PropertiesChanged", "who reads the properties then finds the end in them"


async def test_only_what_changed_is_told_a_few_times_a_second_and_only_while_keys_are_derived():
    world = World()
    job = world.start()
    await world.begun.wait()
    before = len(world.sent)
    world.timers.pass_time(1)
    told = [message.body[1] for message in world.sent[before:]]
    assert 2 <= len(told) <= 5
    assert all(change.keys() == {"Progress"} for change in told)
    assert world.read(job)["ProgressEstimated"]
    job.entered(Stage.DELIVERING)
    assert world.sent[-1].body[1]["ProgressEstimated"].value is False
    before = len(world.sent)
    world.timers.pass_time(1000)
    assert len(world.sent) == before
    world.go.set()
    await job.wait()
    assert not world.timers.pending


async def test_the_volumes_of_a_set_are_its_devices():
    world = World()
    job = world.start(volumes=("1-a", "2-b"))
    assert world.read(job)["Devices"] == [f"{names.DEVICE_PATH}/1_a", f"{names.DEVICE_PATH}/2_b"]
    await world.runner.drain()
