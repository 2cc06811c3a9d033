# SPDX-License-Identifier: GPL-2.0-or-later
"""Every verb as a job on a simulated volume: what it does, and that it does it to the header that was meant."""

import asyncio
from contextlib import suppress
from datetime import timedelta

import pytest

from luksrotd.config import Config, Staged
from luksrotd.errors import (
    Cancelled,
    Internal,
    InvalidRequest,
    LastKeyslot,
    LuksrotdError,
    NeedsPerson,
    NeedsReconcile,
    StaleGeneration,
    TooMany,
    UnknownDevice,
    WrongCredential,
)
from luksrotd.luks2.areas import Extent
from luksrotd.ports import DeviceRef
from luksrotd.rotation.edits import NEW, UNLOCK, VOLUME_KEY, Pbkdf
from luksrotd.rotation.token import KeyState
from luksrotd.service import jobs, verbs
from luksrotd.service.handover import Secrets
from luksrotd.service.jobs import Kind, State
from luksrotd.service.memory import DEFAULT_KIB, WORKER_KIB
from luksrotd.service.verbs import Wanted
from tests.service.world import BACKUP, FAST, NEXT, NODE, OLD, OTHER_UUID, OWNER, UUID, World
from tests.support import forge
from tests.support.simdisk import SimDisk
from tests.support.simengine import VOLUME_KEY_CONTENT, make_volume
from tests.support.simlocks import Level

pytestmark = pytest.mark.asyncio
DATA = {"escrow": "vault/4711"}
SECRETS = {
    Kind.ENROLL: {UNLOCK: OLD, NEW: NEXT},
    Kind.ROTATE: {UNLOCK: OLD, NEW: NEXT},
    Kind.STAGE: {UNLOCK: OLD, NEW: NEXT},
    Kind.REMOVE: {UNLOCK: OLD},
    Kind.RECREATE: {UNLOCK: BACKUP},
}
#: How the volume must be for each verb, beside that it has the managed key.
BEFORE = {Kind.FINISH: Kind.STAGE, Kind.ABORT: Kind.STAGE, Kind.ADOPT: Kind.RELEASE, Kind.RECREATE: Kind.RELEASE}
VERBS = sorted(set(Kind) - jobs.UNSEEN - {Kind.TRANSACTION})


def begin(world, kind, secrets=None, **wanted):
    """A job."""
    opened = world.secrets(**(SECRETS.get(kind, {}) if secrets is None else secrets))
    wanted = Wanted(**{"pbkdf": FAST, "data": DATA, "keyslot": 1, **wanted})
    return world.operations.start(kind, UUID, OWNER, wanted, opened)


async def prepare(world, kind):
    """Make the volume such that the verb can be used."""
    if kind is not Kind.ENROLL:
        await begin(world, Kind.ENROLL, {UNLOCK: OLD, NEW: BACKUP}).wait()
    if kind in BEFORE:
        await begin(world, BEFORE[kind]).wait()


def keys(world):
    return [(key.token.name, key.token.generation, key.token.state, key.keyslot.id) for key in world.view.keys]


async def test_a_staged_key_is_finished():
    world = World()
    async with world.running():
        await prepare(world, Kind.FINISH)
        assert [key[2] for key in keys(world)] == [KeyState.ACTIVE, KeyState.STAGED]
        assert world.opened_by(BACKUP)
        assert world.opened_by(NEXT)
        with pytest.raises(InvalidRequest, match="generation 2 is staged"):
            await begin(world, Kind.FINISH, key_generation=1).wait()
        done = await begin(world, Kind.FINISH, key_generation=2).wait()
    assert (done.generation, done.keyslot) == (2, 2)
    assert keys(world) == [("backup", 2, KeyState.ACTIVE, 2)]
    assert not world.opened_by(BACKUP)


async def test_a_staged_key_is_aborted():
    world = World()
    async with world.running():
        await prepare(world, Kind.ABORT)
        with pytest.raises(InvalidRequest, match="generation 2 is staged"):
            await begin(world, Kind.ABORT, key_generation=7).wait()
        done = await begin(world, Kind.ABORT).wait()
    assert done.generation == 1
    assert keys(world) == [("backup", 1, KeyState.ACTIVE, 1)]
    assert not world.opened_by(NEXT)


async def test_a_staged_key_expires_when_the_caller_says():
    world = World()
    async with world.running():
        await prepare(world, Kind.STAGE)
        await begin(world, Kind.STAGE, expires_after=timedelta(hours=1)).wait()
        assert [key.token.expires_at for key in world.view.keys] == ["", "2026-01-01T01:00:00Z"]
        await begin(world, Kind.ABORT).wait()
        await begin(world, Kind.STAGE, expires_after=None).wait()
    assert [key.token.expires_at for key in world.view.keys] == ["", ""]


async def test_data_is_changed_and_the_key_removed():
    world = World()
    async with world.running():
        await prepare(world, Kind.SET_DATA)
        done = await begin(world, Kind.SET_DATA, data={"escrow": "moved"}).wait()
        assert done.generation == 1
        assert await world.operations.data(UUID, "backup") == {"escrow": "moved"}
        with pytest.raises(LastKeyslot):
            await begin(world, Kind.REMOVE, {UNLOCK: BACKUP}).wait()
        done = await begin(world, Kind.REMOVE).wait()
    assert (done.generation, done.keyslot) == (0, None)
    assert not keys(world)
    assert not world.opened_by(BACKUP)


async def test_a_keyslot_is_adopted_and_released():
    world = World()
    async with world.running():
        with pytest.raises(WrongCredential):
            await begin(world, Kind.ADOPT, {UNLOCK: NEXT}, keyslot=0).wait()
        assert not keys(world)
        done = await begin(world, Kind.ADOPT, {UNLOCK: OLD}, keyslot=0, name="desk").wait()
        assert (done.name, done.generation, done.keyslot) == ("desk", 1, 0)
        done = await begin(world, Kind.RELEASE, name="desk").wait()
        assert done.keyslot is None
        await begin(world, Kind.ADOPT, {}, keyslot=0).wait()  # without a credential
    assert keys(world) == [("backup", 1, KeyState.ACTIVE, 0)]
    assert world.opened_by(OLD) == [0]


async def test_what_is_lost_is_recreated():
    world = World()
    async with world.running():
        await prepare(world, Kind.RECREATE)
        assert not keys(world)
        done = await begin(world, Kind.RECREATE).wait()
        assert (done.generation, done.keyslot) == (1, 1)
        assert world.opened_by(BACKUP) == [1]
        await begin(world, Kind.REMOVE).wait()
        done = await begin(world, Kind.RECREATE, {VOLUME_KEY: VOLUME_KEY_CONTENT, NEW: NEXT}).wait()
    assert keys(world) == [("backup", 1, KeyState.ACTIVE, done.keyslot)]
    assert world.opened_by(NEXT)


async def test_free_space_is_overwritten_and_the_job_can_be_stopped_between_the_pieces():
    world = World()
    async with world.running():
        before = world.disk.content
        job = begin(world, Kind.SCRUB)
        states = []
        job.subscribe(lambda: states.append(job.state))
        done = await job.wait()
        assert done.bytes > 0
        assert State.COMMITTING not in states
    headers = 2 * world.view.pair.hdr_size
    assert world.disk.content[:headers] == before[:headers]
    assert world.disk.content != before


# -- one form for all --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VERBS)
async def test_every_verb_closes_its_secrets_when_it_is_refused(kind):
    world = World()
    async with world.running():
        with pytest.raises(UnknownDevice):
            world.operations.start(kind, OTHER_UUID, OWNER, Wanted(), world.secrets(**SECRETS.get(kind, {})))
        with pytest.raises(TooMany):
            [begin(world, kind) for _ in range(20)]
    # that all are closed is looked at by running()


@pytest.mark.parametrize("kind", VERBS)
async def test_every_verb_refuses_a_volume_that_is_there_twice(kind):
    twin = SimDisk(make_volume([OLD]), path="/dev/sim1")
    world = World(disks=[SimDisk(make_volume([OLD]), path=NODE), twin])
    async with world.running():
        with pytest.raises(NeedsPerson, match="show one UUID"):
            begin(world, kind)
        for planned in (Kind.ENROLL, Kind.RECONCILE):
            with pytest.raises(NeedsPerson, match="show one UUID"):
                await world.operations.plan(UUID, planned, Wanted())
    assert not world.disk.log
    assert not twin.log


async def test_a_verification_ends_when_nobody_waits_for_it():
    world = World()
    async with world.running():
        await prepare(world, Kind.ROTATE)
        held = world.devices.open(DeviceRef(NODE))
        with world.locks.held_elsewhere(Level.METADATA, held, exclusive=True):
            secrets = world.secrets(**{UNLOCK: BACKUP})
            waiting = asyncio.create_task(world.operations.verify(UUID, OWNER, "backup", secrets, world.gone.wait))
            await asyncio.sleep(0)
            assert world.runner.busy(UUID)
            world.gone.set()
            with pytest.raises(Cancelled, match="caller is gone"):
                async with asyncio.timeout(10):
                    await waiting
        held.close()
        assert not world.runner.busy(UUID)


async def test_a_job_says_how_much_memory_it_needs(monkeypatch):
    view = forge.view_of(make_volume([OLD]))  # pbkdf2
    argon = {"type": "argon2id", "time": 4, "memory": 2048, "cpus": 1}

    def claim(raw):
        raw["keyslots"]["0"]["kdf"] = {**argon, "salt": raw["keyslots"]["0"]["kdf"]["salt"]}

    world = World(disks=[SimDisk(forge.edited(make_volume([OLD]), claim), path=NODE)])
    unlock, both = world.secrets(**{UNLOCK: OLD}), world.secrets(**{UNLOCK: OLD, NEW: NEXT})
    assert verbs.memory_kib(view, Pbkdf(), Secrets()) == WORKER_KIB
    assert verbs.memory_kib(view, Pbkdf(), unlock) == WORKER_KIB
    assert verbs.memory_kib(view, Pbkdf(), both) == WORKER_KIB + DEFAULT_KIB
    assert verbs.memory_kib(view, Pbkdf(memory_kib=4096), both) == WORKER_KIB + 4096
    assert verbs.memory_kib(None, FAST, unlock) == WORKER_KIB + DEFAULT_KIB
    unlock.close()
    both.close()
    asked = []
    submit = world.runner.submit
    monkeypatch.setattr(world.runner, "submit", lambda request: asked.append(request) or submit(request))
    async with world.running():
        await prepare(world, Kind.ROTATE)
        await world.operations.verify(UUID, OWNER, "backup", world.secrets(**{UNLOCK: OLD}))
        await begin(world, Kind.SCRUB).wait()
    assert [request.memory_kib - WORKER_KIB for request in asked] == [2048, 2048, 0]


# -- only at ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VERBS)
async def test_a_verb_is_refused_at_another_sequence_number_and_done_at_the_one_that_was_meant(kind):
    world = World()
    async with world.running():
        await prepare(world, kind)
        before, seqid = world.disk.content, world.view.seqid
        for wrong in (seqid - 1, seqid + 1, 0):
            with pytest.raises(StaleGeneration, match=f"at sequence number {seqid}, not {wrong}"):
                await begin(world, kind, only_at=wrong).wait()
        assert world.disk.content == before
        await begin(world, kind, only_at=seqid).wait()
        assert world.disk.content != before


@pytest.mark.parametrize(
    ("kind", "call"),
    [(kind, call) for kind in VERBS for call in ("session", "last") if (kind, call) != (Kind.SCRUB, "last")],
)
async def test_nothing_slips_in_between_the_decision_and_the_commit(kind, call):
    """Another tool writes after the first look, or after the last one before the commit."""
    world = World()
    async with world.running():
        await prepare(world, kind)
        names = []
        world.engine.on_call = names.append
        before, seqid = world.disk.content, world.view.seqid
        await begin(world, kind).wait()  # to count the calls
        calls = len(names)
        moved = forge.newer(before, forge.BOTH)
        for only_at in (seqid, None):
            world.disk.replace(0, before)
            await world.registry.settle(UUID)
            seen = []

            def interfere(name, seen=seen):
                seen.append(name)
                if len(seen) == calls if call == "last" else name == call and seen.count(name) == 1:
                    world.disk.replace(0, moved)

            world.engine.on_call = interfere
            job = begin(world, kind, only_at=only_at)
            if only_at is None:
                await job.wait()  # it begins again, on what is there now
                assert world.disk.content != moved
            else:
                with pytest.raises(StaleGeneration):
                    await job.wait()
                assert job.outcome == "unchanged"
                headers = 2 * world.view.pair.hdr_size
                assert world.disk.content[:headers] == moved[:headers]
            world.engine.on_call = names.append


async def test_what_a_crash_left_is_finished_first_so_the_header_has_moved():
    world = World()
    async with world.running():
        await prepare(world, Kind.ROTATE)
        seqid = world.view.seqid
        gap = Extent(world.view.free[0].offset, 4096)
        pending = {**world.view.metadata.tokens[0].raw, "wipe": forge.intent(gap)}
        world.disk.replace(0, forge.edited(world.disk.content, lambda raw: raw["tokens"].update({"0": pending})))
        with pytest.raises(StaleGeneration):
            await begin(world, Kind.ROTATE, only_at=seqid).wait()
    assert not world.view.pending
    assert world.view.seqid > seqid
    assert world.opened_by(BACKUP)


# -- the dry run --------------------------------------------------------------------------------------------------

PLANNED = sorted(set(VERBS) - {Kind.SCRUB, Kind.RECREATE})


def objects(world):
    """Keyslots and tokens, comparably."""
    raw = world.view.metadata
    return {
        **{("keyslot", str(number)): slot.raw for number, slot in raw.keyslots.items()},
        **{("token", str(number)): token.raw for number, token in raw.tokens.items()},
    }


@pytest.mark.parametrize("kind", PLANNED)
async def test_what_is_planned_is_what_is_done(kind):
    world = World()
    async with world.running():
        await prepare(world, kind)
        before, seqid = objects(world), world.view.seqid
        world.disk.log.clear()
        world.engine.calls.clear()
        planned = await world.operations.plan(UUID, kind, Wanted(pbkdf=FAST, data=DATA, keyslot=1))
        assert not world.disk.log
        assert not world.engine.calls, "no worker"
        assert planned.seqid == seqid
        await begin(world, kind, only_at=planned.seqid).wait()
    after = objects(world)
    told = {(one.what, one.name): one.how for one in planned.differences if one.what in ("keyslot", "token")}
    how = {
        item: "add" if item not in before else "remove" if item not in after else "change"
        for item in before.keys() | after.keys()
        if before.get(item) != after.get(item)
    }
    same = {item for item in told if item not in how}  # the data that was given is what there was
    assert {item: kind for item, kind in told.items() if item not in same} == how
    assert same == ({("token", "0")} if kind is Kind.SET_DATA else set())
    wiped = [one for one in planned.differences if one.what == "area"]
    assert len(wiped) == sum(kind == "remove" for (what, _), kind in how.items() if what == "keyslot")


@pytest.mark.parametrize("kind", VERBS)
async def test_a_plan_is_refused_as_the_verb_is(kind):
    """On a volume without the key, with the key, and with a staged one."""
    world = World()
    async with world.running():
        for further in (None, Kind.ENROLL, Kind.STAGE):
            if further:
                await begin(world, further, {UNLOCK: OLD, NEW: BACKUP}).wait()
            start = world.disk.content
            for wanted in ({}, {"name": "other"}, {"name": "no name"}, {"keyslot": 9}, {"key_generation": 5}):
                planned = done = None
                try:
                    await world.operations.plan(
                        UUID, kind, Wanted(**{"pbkdf": FAST, "data": DATA, "keyslot": 1, **wanted})
                    )
                except LuksrotdError as error:
                    planned = error
                if kind not in PLANNED:
                    assert isinstance(planned, InvalidRequest)
                    continue
                try:
                    await begin(world, kind, **wanted).wait()
                except LuksrotdError as error:
                    done = error
                assert (type(planned), str(planned)) == (type(done), str(done))
                world.disk.replace(0, start)
                await world.registry.settle(UUID)


async def test_a_plan_tells_of_a_token_what_everybody_may_see():
    world = World()
    async with world.running():
        await prepare(world, Kind.STAGE)
        await begin(world, Kind.STAGE).wait()
        planned = await world.operations.plan(UUID, Kind.FINISH, Wanted(data=DATA))
        (staged,) = (one for one in planned.differences if (one.what, one.how) == ("token", "change"))
        common = {"type": "luksrotd", "keyslots": [2], "name": "backup", "generation": 2, "adopted": False}
        common |= {"wipe-pending": False, "rotated-at": "2026-01-01T00:00:00Z"}
        assert staged.before == {**common, "state": "staged", "expires-at": "2026-01-31T00:00:00Z"}
        assert staged.after == {**common, "state": "active"}
        for data, given in ((DATA, {"data-given": True}), (None, {})):
            planned = await world.operations.plan(UUID, Kind.ENROLL, Wanted("other", data))
            (added,) = (one for one in planned.differences if one.what == "token")
            assert added.before == {}
            assert (
                added.after == {**common, "keyslots": [3], "name": "other", "generation": 1, "state": "active"} | given
            )


async def test_a_plan_says_what_must_come_first():
    world = World()
    async with world.running():
        await prepare(world, Kind.ROTATE)
        world.disk.replace(4096, bytes(512))
        with pytest.raises(NeedsReconcile):
            await world.operations.plan(UUID, Kind.ROTATE, Wanted())
        planned = await world.operations.plan(UUID, Kind.RECONCILE, Wanted())
        (difference,) = planned.differences
        assert (difference.what, difference.name, difference.how) == ("header", "primary", "rewrite")
        world.probe.planted[NODE] = ("ext4",)
        with pytest.raises(LuksrotdError, match="ext4"):
            await world.operations.plan(UUID, Kind.ENROLL, Wanted(name="other"))


async def test_no_plan_tells_associated_data_nor_whether_it_was_guessed():
    """Neither ours nor what an adopted token has; nor salts, digests and fingerprints."""
    planted = "planted-4711"
    foreign = {"type": "acme", "keyslots": ["0"], "blob": planted}
    image = forge.edited(make_volume([OLD]), lambda raw: raw["tokens"].update({"5": foreign}))
    world = World(disks=[SimDisk(image, path=NODE)])
    told = []

    async def plan(kind, **wanted):
        with suppress(LuksrotdError):
            planned = await world.operations.plan(UUID, kind, Wanted(pbkdf=FAST, **wanted))
            told.append(repr(planned))
            return planned.differences
        return None

    async with world.running():
        for step in (Kind.ENROLL, Kind.STAGE, Kind.FINISH):
            for kind in (*PLANNED, Kind.RECONCILE):
                for wanted in ({}, {"data": {"escrow": "guessed"}}, {"keyslot": 0}):
                    await plan(kind, **{"keyslot": 1, **wanted})
                assert await plan(kind, data={"x": planted}) == await plan(kind, data={"x": "x"}), kind
            secrets = {} if step is Kind.FINISH else {UNLOCK: OLD, NEW: b"another" if step is Kind.STAGE else BACKUP}
            await begin(world, step, secrets, data={"x": planted}).wait()
        await begin(world, Kind.ADOPT, {}, keyslot=0, name="desk", data={"x": planted}).wait()
        for kind in PLANNED:
            for name in ("desk", "backup"):
                await plan(kind, name=name)
        raw = world.view.metadata.raw
    assert len(told) > 40
    hidden = [planted, "guessed", *(slot["kdf"]["salt"] for slot in raw["keyslots"].values())]
    hidden += [token["fingerprint"] for token in raw["tokens"].values()]
    assert all(hidden)
    for text in told:
        assert not [secret for secret in hidden if secret in text]


# -- reconcile ----------------------------------------------------------------------------------------------------


async def test_staged_keys_that_have_expired_are_aborted_on_request_only():
    world = World()
    async with world.running():
        await prepare(world, Kind.FINISH)
        world.clock.advance(timedelta(days=31))
        done = await world.operations.reconcile(UUID, OWNER)
        assert [(found.code, found.action) for found in done.left] == [("staged-expired", "person")]
        planned = await world.operations.plan(UUID, Kind.RECONCILE, Wanted(), retire_expired=True)
        assert {(one.what, one.how) for one in planned.differences} >= {("keyslot", "remove"), ("token", "remove")}
        assert not (await world.operations.plan(UUID, Kind.RECONCILE, Wanted())).differences
        done = await world.operations.reconcile(UUID, OWNER, dry_run=True, retire_expired=True)
        assert len(keys(world)) == 2
        done = await world.operations.reconcile(UUID, OWNER, retire_expired=True)
        assert done.left == ()
        assert [key.token.generation for key in world.registry.get(UUID).view.keys] == [1]
    assert not world.opened_by(NEXT)


@pytest.mark.parametrize("retire", [True, False])
async def test_when_a_volume_appears_expired_keys_are_aborted_if_that_is_configured(retire):
    world = World()
    async with world.running():
        await prepare(world, Kind.FINISH)
    again = World(disks=[SimDisk(world.disk.content, path=NODE)])
    again.clock.advance(timedelta(days=31))
    again.operations.configure(Config(staged=Staged(retire_expired=retire)))
    started = Started()
    again.runner.observe(started)
    async with again.running():
        for job in started.jobs:
            await job.wait()
        assert bool(again.opened_by(NEXT)) is not retire
        assert [job.kind for job in started.jobs] == [Kind.RECONCILE] * retire


async def test_expired_keys_of_a_volume_that_is_there_twice_are_left_alone():
    world = World()
    async with world.running():
        await prepare(world, Kind.FINISH)
    disks = [SimDisk(world.disk.content, path=path) for path in (NODE, "/dev/sim1")]
    again = World(disks=disks)
    again.clock.advance(timedelta(days=31))
    again.operations.configure(Config(staged=Staged(retire_expired=True)))
    async with again.running():
        assert again.registry.get(UUID).ambiguous
    assert not [operation for disk in disks for operation in disk.log]


class Started:
    """Observes a runner."""

    def __init__(self):
        self.jobs = []

    def job_added(self, job):
        self.jobs.append(job)

    def job_ended(self, job):
        pass

    def job_forgotten(self, job):
        pass


async def test_all_volumes_are_reconciled_though_one_cannot_be():
    uuids = [UUID, OTHER_UUID, "22222222-2222-4333-8444-555555555555", "33333333-2222-4333-8444-555555555555"]
    disks = [SimDisk(make_volume([OLD], uuid=uuid), path=f"/dev/sim{n}") for n, uuid in enumerate(uuids)]
    world = World(disks=disks)
    async with world.running():
        disks[0].replace(4096, bytes(512))
        disks[1].replace(0, bytes(len(disks[1].content)))
        probe = world.probe.foreign

        async def stumble(device):
            if device.path == disks[3].path:
                raise RuntimeError("unforeseen")
            return await probe(device)

        async def stumble_too(devices):
            return not [found for device in devices for found in await stumble(device)]

        world.probe.foreign, world.probe.all_clear = stumble, stumble_too
        dry = await world.operations.reconcile_all(OWNER, dry_run=True)
        assert list(dry) == sorted(uuids)
        assert not disks[0].log
        done = await world.operations.reconcile_all(OWNER)
        assert [found.code for found in done[UUID].found] == ["header-copy-bad"]
        assert done[UUID].left == ()
        assert isinstance(done[OTHER_UUID], LuksrotdError)
        assert done[uuids[2]].found == ()
        assert isinstance(done[uuids[3]], Internal)
    assert forge.pair_of(disks[0].content).agree
