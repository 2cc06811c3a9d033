# SPDX-License-Identifier: GPL-2.0-or-later
"""A client that leaves at any await: no job, no transaction, no lock, no descriptor is left of it.

The daemon is all there, but for the bus and the machine.  Every suspension of every task of it counts: first all of
them are counted, then the same is done again and again, with the client leaving at the first, the second, … of them.
"""

import asyncio
import os
from contextlib import contextmanager, suppress

import pytest
from dbus_next.signature import Variant

from luksrotd import names
from luksrotd.bus.convert import device_path
from luksrotd.luks2.pair import parse_pair
from luksrotd.rotation.view import view
from luksrotd.service import threads
from tests.bus.loopback import Loopback, Steps, Vanished
from tests.service.world import BACKUP, NEXT, OLD, UUID

pytestmark = pytest.mark.asyncio
VOLUME = device_path(UUID)
DEVICE, JOB, TRANSACTION = names.DEVICE_INTERFACE, names.JOB_INTERFACE, names.TRANSACTION_INTERFACE
FAST = {"pbkdf": Variant("s", "pbkdf2"), "pbkdf-force-iterations": Variant("u", 1000)}
GENERATE = {"generate": Variant("b", True)}
GIVEN = {"fd": Variant("h", 1)}
SHOWN = {"fd": Variant("h", 0)}
AWAY = 30


@contextmanager
def memfds(*secrets):
    fds = []
    for secret in secrets:
        fds.append(os.memfd_create("test-secret", os.MFD_CLOEXEC))
        os.pwrite(fds[-1], secret, 0)
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


async def change(world, method, old, new, path=VOLUME, interface=DEVICE, *first):
    """A verb with a new secret, which is generated if there is none; to its end."""
    secrets = [old] if new is None else [old, new]
    signature = "".join("ao" for _ in first) + "sa{sv}a{sv}a{sv}"
    with memfds(*secrets) as fds:
        body = [*first, "", SHOWN, GENERATE if new is None else GIVEN, FAST]
        (job,) = await world.call(path, interface, method, signature, body, fds)
    await to_its_end(world, job, taken=new is None)


async def to_its_end(world, path, *, taken):
    if taken:
        await world.call(path, JOB, "TakeKey", "a{sv}", [{}])
        await world.call(path, JOB, "ConfirmKey", "a{sv}", [{}])
    job = world.runner.jobs[int(path.rpartition("/")[2])]
    await job.wait()


async def enroll(world):
    await change(world, "Enroll", OLD, None)


async def rotate(world):
    await change(world, "Rotate", BACKUP, None)


async def rotate_to_a_given_one(world):
    await change(world, "Rotate", BACKUP, NEXT)


async def stage(world):
    await change(world, "Stage", BACKUP, None)


async def stage_a_set(world):
    await change(world, "Stage", BACKUP, None, names.ROOT_PATH, names.MANAGER_INTERFACE, [VOLUME])


async def verify(world):
    with memfds(BACKUP) as fds:
        await world.call(VOLUME, DEVICE, "VerifyKey", "sa{sv}a{sv}", ["", SHOWN, {}], fds)


async def read(world):
    await world.call(VOLUME, DEVICE, "GetData", "sa{sv}", ["", {}])
    await world.call(VOLUME, DEVICE, "Plan", "ssa{sv}", ["rotate", "", {}])


async def reconcile(world):
    await world.call(VOLUME, DEVICE, "Reconcile", "a{sv}", [{}])
    await world.call(names.ROOT_PATH, names.MANAGER_INTERFACE, "Reconcile", "a{sv}", [{}])


async def transaction(world):
    (path,) = await world.call(VOLUME, DEVICE, "BeginTransaction", "a{sv}", [{}])
    with memfds(OLD, NEXT) as fds:
        await world.call(path, TRANSACTION, "Unlock", "a{sv}a{sv}", [SHOWN, {}], fds[:1])
        await world.call(path, TRANSACTION, "AddKeyslot", "a{sv}a{sv}", [GIVEN, FAST], fds)
    await world.call(path, TRANSACTION, "AddKeyslot", "a{sv}a{sv}", [GENERATE, FAST])
    await world.call(path, TRANSACTION, "SetToken", "sa{sv}", ['{"type": "note", "keyslots": []}', {}])
    (job,) = await world.call(path, TRANSACTION, "Commit", "a{sv}", [{}])
    await to_its_end(world, job, taken=True)


SCENARIOS = [
    enroll,
    rotate,
    rotate_to_a_given_one,
    stage,
    stage_a_set,
    verify,
    read,
    reconcile,
    transaction,
]


async def left_at(number, scenario):
    """The scenario, with the client leaving at that suspension: how many there were, and whether it came to its end."""
    world = Loopback()
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(AWAY), world.serving():
        if scenario is not enroll:
            await world.enrolled()
        before = memfds_of_this_process()
        tasks = len(asyncio.all_tasks())
        steps = Steps(number, world.leave)
        loop.set_task_factory(steps.factory)
        try:
            has_ended = await came_to_its_end(world, scenario)
        finally:
            loop.set_task_factory(None)
        if not world.left.is_set():
            world.leave()
        while world.answering or busy(world) or world.drafts.transactions or len(asyncio.all_tasks()) != tasks:  # noqa: ASYNC110 -- no event tells
            await asyncio.sleep(0)
        assert memfds_of_this_process() == before
        assert not world.callers.is_known(":1.77")
        assert not world.guard.calls._taken
        assert not world.guard.dialogues._taken
        assert not threads._places
        assert not world.locks._holds
        seen = view(parse_pair(world.disk.content))
        assert not seen.pending
        assert parse_pair(world.disk.content).agree
    return steps.taken, has_ended


def busy(world):
    return [job for job in world.runner.jobs.values() if not job.ended]


def memfds_of_this_process():
    links = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 -- names are enough
        with suppress(FileNotFoundError):  # that of the directory
            links.append(os.readlink(f"/proc/self/fd/{name}"))  # noqa: PTH115 -- what a Path could not say
    return sorted(link for link in links if "memfd:" in link)


async def came_to_its_end(world, scenario):
    client = asyncio.ensure_future(scenario(world))
    await asyncio.wait({client})
    if isinstance(client.exception(), Vanished):
        return False
    client.result()
    return True


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_nothing_is_left_wherever_a_client_leaves(scenario):
    taken, has_ended = await left_at(-1, scenario)
    assert has_ended
    assert taken > 10, "they are counted"
    for number in range(taken):
        await left_at(number, scenario)
