# SPDX-License-Identifier: GPL-2.0-or-later
"""Open transactions on a simulated volume: whose they are, what ends them, and what is left wherever they end."""

import asyncio
import json
import os
from contextlib import ExitStack, suppress
from dataclasses import replace

import pytest

from luksrotd.config import Limits
from luksrotd.errors import (
    Busy,
    Cancelled,
    Conflict,
    InvalidRequest,
    LastKeyslot,
    MetadataFull,
    NeedsPerson,
    NotAuthorized,
    SecretRejected,
    StaleGeneration,
    TooMany,
    UnknownDevice,
    WrongCredential,
)
from luksrotd.ports import Caller, GenerateInto, SecretFd, TokenSource
from luksrotd.rotation.edits import NEW, UNLOCK
from luksrotd.service.drafts import MAX_SECONDS, Drafts
from luksrotd.service.handover import Handover, Secrets
from luksrotd.service.jobs import Kind
from luksrotd.service.jobs import State as JobState
from luksrotd.service.memory import needed_kib
from luksrotd.service.owned import Ending, Means, OwnedTransaction, State
from luksrotd.service.progress import Stage
from luksrotd.service.runner import Runner
from luksrotd.service.schedule import Limits as JobLimits
from tests.service.world import FAST, NEXT, NODE, OLD, OWNER, UUID, Key, World, is_open
from tests.support import forge
from tests.support.simengine import VOLUME_KEY_CONTENT, make_volume
from tests.support.simkeeper import SimKeeper
from tests.support.simlocks import Level
from tests.support.tokenplugin import token

pytestmark = pytest.mark.asyncio
OTHER = Caller(":1.8", 1000)
ROOT = Caller(":1.9", 0)
TOKEN = json.dumps({"type": "note", "keyslots": [], "text": "new"})


class Bus:
    """Who is on the bus; from each connection only once, as ``bus.caller.Callers`` has it."""

    def __init__(self):
        self._gone = {}
        self.watchers = 0

    async def gone(self, caller):
        name = caller.name
        self.watchers += 1
        try:
            await self._gone.setdefault(name, asyncio.Event()).wait()
        finally:
            self.watchers -= 1

    def leave(self, caller):
        self._gone.setdefault(caller.name, asyncio.Event()).set()


class Scene(World):
    """The world with open transactions; in the end nothing of them may be left."""

    def __init__(self, runner=None, limits=None):
        super().__init__(runner)
        self.bus, self.keeper = Bus(), SimKeeper()
        self.host = self.volumes._host
        self.drafts = Drafts(self.host, Means(self.registry, self.runner, self.keeper), self.bus.gone, limits)
        self.drafts.observe(self)
        self.events = []
        self.ended = asyncio.Event()

    def transaction_added(self, transaction):
        self.events.append(("added", transaction.terms.number))

    def transaction_ended(self, transaction):
        self.events.append(("ended", transaction.terms.number))
        self.ended.set()

    async def begin(self, owner=OWNER, **options):
        return (await self.drafts.begin(UUID, owner, **options)).of(owner)

    def secret(self, name, secret, *, pipe=False, owner=OWNER):
        """One secret; None is generated."""
        resources = ExitStack()
        if secret is None:
            handover = Handover(Key(), owner)
            self.closed.append(handover.fd)
            resources.callback(handover.close)
            gone = lambda: handover.abandoned(lambda: self.bus.gone(owner))  # noqa: E731 -- as in bus
            return Secrets({name: GenerateInto(handover.fd)}, resources, handover, gone)
        if pipe:
            fd, theirs = os.pipe()
            os.write(theirs, secret)
            os.close(theirs)
        else:
            fd = os.memfd_create("test-secret", os.MFD_CLOEXEC)
            os.pwrite(fd, secret, 0)
        self.closed.append(fd)
        resources.callback(os.close, fd)
        return Secrets({name: SecretFd(fd)}, resources)

    def unlock(self, transaction, secret=OLD, **options):
        return transaction.unlock(self.secret(UNLOCK, secret), **options)

    def add(self, transaction, secret=NEXT, keyslot=None):
        return transaction.add_keyslot(self.secret(NEW, secret), FAST, keyslot)

    def check_nothing_is_left(self):
        """No transaction, watcher, timer, descriptor."""
        assert not self.drafts.transactions
        assert self.bus.watchers == 0
        assert not [fd for fd in self.closed if is_open(fd)]
        assert not open_memfds()
        timers = [handle for handle in asyncio.get_running_loop()._scheduled if not handle.cancelled()]
        assert not [
            handle for handle in timers if isinstance(getattr(handle._callback, "__self__", None), OwnedTransaction)
        ]


def open_memfds():
    """Those with secrets, by what they are called."""
    links = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 -- names are enough
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))  # noqa: PTH115 -- what a Path could not say
    return [link for link in links if "memfd:test-" in link]


async def turns(count=5):
    for _ in range(count):
        await asyncio.sleep(0)


async def test_edits_are_made_in_one_commit():
    scene = Scene()
    async with scene.running():
        mine = await scene.begin()
        assert (mine.volume, mine.node, mine.state, mine.unlocked) == (UUID, NODE, State.OPEN, False)
        await scene.unlock(mine)
        assert mine.unlocked
        assert await scene.add(mine) == 1
        assert await scene.add(mine, b"another", 7) == 7
        assert mine.set_token(json.dumps({"type": "note", "keyslots": ["1"]})) == 0
        assert mine.set_token(TOKEN, 5) == 5
        assert [(item.what, item.name, item.how) for item in mine.plan()] == [
            ("keyslot", "1", "add"),
            ("keyslot", "7", "add"),
            ("token", "0", "add"),
            ("token", "5", "add"),
        ]
        before = scene.view.seqid
        job = mine.commit()
        assert (job.kind, job.owner, mine.state) == (Kind.TRANSACTION, OWNER, State.COMMITTING)
        done = await job.wait()
        assert (done.seqid_before, done.seqid_after) == (before, scene.view.seqid)
        assert mine.state is State.ENDED
        assert scene.registry.get(UUID).view.seqid == done.seqid_after, "who learns that it is done finds it so"
        await turns()
        scene.check_nothing_is_left()
    assert (scene.opened_by(NEXT), scene.opened_by(b"another"), scene.opened_by(OLD)) == ([1], [7], [0])
    assert sorted(scene.view.metadata.tokens) == [0, 5]
    assert scene.events == [("added", 1), ("ended", 1)]


async def test_a_keyslot_goes_and_its_token_with_it():
    scene = Scene()
    scene.disk.replace(0, make_volume([OLD, b"goes"]))
    async with scene.running():
        mine = await scene.begin()
        mine.destroy_keyslot(1)
        mine.set_token(TOKEN, 4)
        mine.remove_token(4)
        await scene.unlock(mine)
        await mine.commit().wait()
    assert (scene.opened_by(b"goes"), scene.view.metadata.tokens) == ([], {})


async def test_nobody_but_the_owners_connection_gets_at_it():
    scene = Scene()
    async with scene.running():
        transaction = await scene.drafts.begin(UUID, OWNER)
        for stranger in (OTHER, ROOT):
            with pytest.raises(NotAuthorized, match="another connection has begun it"):
                transaction.of(stranger)
        assert transaction.of(Caller(OWNER.name, OWNER.uid, interactive=True)) is transaction
        transaction.abort()


# -- ends --------------------------------------------------------------------------------------------------------


def time_out(scene):
    """What the timers do; ``test_its_time_is_up`` shows that they do it."""
    for transaction in scene.drafts.transactions.values():
        transaction.leave(Ending.TIMED_OUT)


def abort(scene):
    for transaction in scene.drafts.transactions.values():
        if transaction.state is State.OPEN:
            transaction.abort()


ENDS = {
    Ending.ABORTED: abort,
    Ending.TIMED_OUT: time_out,
    Ending.OWNER_GONE: lambda scene: scene.bus.leave(OWNER),
    Ending.VOLUME_GONE: lambda scene: scene.watcher.remove(NODE),
    Ending.STOPPING: lambda scene: scene.drafts.close(),
}


@pytest.mark.parametrize("ending", ENDS)
async def test_whatever_ends_it_everything_is_closed_and_nothing_was_written(ending):
    scene = Scene()
    async with scene.running():
        mine = await scene.begin()
        await scene.unlock(mine)
        await scene.add(mine)
        await mine.add_keyslot(scene.secret(NEW, b"from a pipe", pipe=True), FAST)
        await scene.add(mine, None)
        assert any(is_open(fd) for fd in scene.closed)
        ENDS[ending](scene)
        await scene.ended.wait()
        await turns()
        scene.check_nothing_is_left()
        for call in (mine.plan, mine.commit, mine.abort, lambda: mine.set_token(TOKEN), lambda: mine.remove_token(0)):
            with pytest.raises(Cancelled, match=f"cannot go on: {ending}"):
                call()
        with pytest.raises(Cancelled, match=ending):
            await scene.unlock(mine)
        with pytest.raises(Cancelled, match=ending):
            await scene.add(mine)
    assert not scene.disk.log


async def test_its_time_is_up():
    scene = Scene()
    async with scene.running():
        mine = await scene.begin(seconds=0.01)
        assert mine.terms.seconds == 0.01
        timers = asyncio.get_running_loop()._scheduled
        assert [timer.when() for timer in timers if timer._callback == mine.leave] == [mine.terms.deadline]
        await scene.ended.wait()
        with pytest.raises(Cancelled, match="time of the transaction is up"):
            mine.plan()
        scene.check_nothing_is_left()


async def test_the_time_is_as_configured_unless_the_caller_wants_another():
    scene = Scene(limits=Limits(transaction_seconds=7200))
    async with scene.running():
        loop = asyncio.get_running_loop()
        before = loop.time()
        usual, longest = await scene.begin(), await scene.begin(seconds=MAX_SECONDS)
        assert (usual.terms.seconds, longest.terms.seconds) == (7200, 3600)
        assert before + 7200 <= usual.terms.deadline <= loop.time() + 7200
        for seconds in (0, MAX_SECONDS + 1e-6, 2**64 / 1e6):
            with pytest.raises(InvalidRequest, match="at most 3600 s"):
                await scene.begin(seconds=seconds)
        scene.drafts.close()


async def test_the_end_of_one_leaves_the_others_alone():
    scene = Scene()
    async with scene.running():
        first, second, third = [await scene.begin(owner) for owner in (OWNER, OWNER, OTHER)]
        second.abort()
        assert scene.drafts.transactions == {1: first, 3: third}
        scene.bus.leave(OWNER)
        await turns()
        assert scene.drafts.transactions == {3: third}
        third.abort()
        await turns()
        scene.check_nothing_is_left()


async def test_an_observer_or_listener_that_fails_keeps_nothing_open(caplog):
    class Bad:
        def __getattr__(self, name):
            raise ZeroDivisionError

    scene = Scene()
    scene.drafts._observers.insert(0, Bad())
    async with scene.running():
        mine = await scene.begin()
        mine.subscribe(lambda: 1 / 0)
        await scene.add(mine)
        mine.abort()
        await turns()
        scene.check_nothing_is_left()
    assert scene.events == [("added", 1), ("ended", 1)]
    assert "an observer of transaction 1 failed" in caplog.text
    assert "a listener of transaction 1 failed" in caplog.text


# -- beginnings --------------------------------------------------------------------------------------------------


async def test_a_user_has_so_many_and_all_together_so_many():
    scene = Scene(limits=Limits(transactions=4, transactions_per_user=2))
    async with scene.running():
        first, _ = await scene.begin(), await scene.begin(OTHER)
        with pytest.raises(TooMany, match="2 of the user are open"):
            await scene.begin()
        await scene.begin(ROOT)
        await scene.begin(ROOT)
        with pytest.raises(TooMany, match="4 are open"):
            await scene.begin(ROOT)
        first.abort()
        await scene.begin(ROOT)
        scene.drafts.close()
        with pytest.raises(Busy, match="stopping"):
            await scene.begin(ROOT)


async def test_those_that_are_about_to_begin_count():
    scene = Scene(limits=Limits(transactions_per_user=3))
    async with scene.running():
        results = await asyncio.gather(*(scene.begin() for _ in range(8)), return_exceptions=True)
        assert len(scene.drafts.transactions) == 3
        assert [type(result) for result in results if isinstance(result, Exception)] == [TooMany] * 5
        assert not scene.drafts._beginning
        scene.drafts.close()


async def test_other_limits_hold_from_then_on():
    scene = Scene()
    async with scene.running():
        old = await scene.begin()
        scene.drafts.configure(Limits(transactions_per_user=1, transaction_seconds=5))
        with pytest.raises(TooMany):
            await scene.begin()
        assert (old.terms.seconds, old.state) == (300, State.OPEN)
        assert (await scene.begin(ROOT)).terms.seconds == 5
        scene.drafts.close()


async def test_a_volume_that_cannot_be_written_has_none():
    scene = Scene()
    async with scene.running():
        with pytest.raises(UnknownDevice):
            await scene.drafts.begin("11111111-2222-4333-8444-555555555555", OWNER)
        scene.watcher.put("/dev/sim1", UUID)
        await turns(20)
        with pytest.raises(NeedsPerson):
            await scene.begin()
        scene.check_nothing_is_left()


async def test_only_if_the_volume_is_still_as_the_caller_saw_it():
    scene = Scene()
    async with scene.running():
        seen = scene.registry.get(UUID).view.seqid
        (await scene.begin(generation=seen)).abort()
        for generation in (0, seen - 1, seen + 1, 2**64 - 1):
            with pytest.raises(StaleGeneration, match=f"at sequence number {seen}, not {generation}"):
                await scene.begin(generation=generation)
        await turns()
        scene.check_nothing_is_left()


@pytest.mark.parametrize("ending", [Ending.OWNER_GONE, Ending.VOLUME_GONE, Ending.STOPPING])
async def test_what_happens_while_the_header_is_read_is_noticed(ending):
    scene = Scene()
    async with scene.running():
        held = scene.host.devices.open(scene.registry.get(UUID).ref)
        with scene.locks.held_elsewhere(Level.METADATA, held):
            beginning = asyncio.ensure_future(scene.begin())
            while not scene.locks._released:  # noqa: ASYNC110 -- it waits for the lock
                await asyncio.sleep(0)
            ENDS[ending](scene)
            await turns()
        held.close()
        with pytest.raises((Cancelled, UnknownDevice, Busy)):
            await beginning
        await turns()
        scene.check_nothing_is_left()
        assert not scene.events


# -- credentials -------------------------------------------------------------------------------------------------


async def test_a_wrong_credential_leaves_it_open_and_another_one_can_be_shown():
    scene = Scene()
    async with scene.running():
        mine = await scene.begin()
        await scene.add(mine)
        with pytest.raises(InvalidRequest, match="not been unlocked"):
            mine.commit()
        with pytest.raises(WrongCredential):
            await scene.unlock(mine, b"wrong")
        assert not mine.unlocked
        await scene.unlock(mine)
        with pytest.raises(WrongCredential):
            await scene.unlock(mine, b"wrong")
        assert mine.unlocked, "the one that was right is still there"
        await mine.commit().wait()
    assert scene.opened_by(NEXT)


async def test_the_credential_that_was_shown_last_counts_and_the_others_are_closed():
    scene = Scene()
    scene.disk.replace(0, make_volume([OLD, b"other"]))
    async with scene.running():
        mine = await scene.begin()
        mine.destroy_keyslot(1)
        await scene.unlock(mine, VOLUME_KEY_CONTENT, volume_key=True)
        await scene.unlock(mine, b"other")
        await scene.unlock(mine, OLD)
        assert len(open_memfds()) == 1
        await mine.commit().wait()
    assert not scene.opened_by(b"other")


async def test_the_volume_key_opens_it_too():
    scene = Scene()
    async with scene.running():
        mine = await scene.begin()
        await scene.add(mine)
        with pytest.raises(WrongCredential):
            await scene.unlock(mine, OLD, volume_key=True)
        await scene.unlock(mine, VOLUME_KEY_CONTENT, volume_key=True)
        await mine.commit().wait()
    assert scene.opened_by(NEXT)


async def test_secrets_may_come_by_pipes_though_they_are_read_twice():
    scene = Scene()
    async with scene.running():
        mine = await scene.begin()
        await mine.unlock(scene.secret(UNLOCK, OLD, pipe=True))
        await mine.add_keyslot(scene.secret(NEW, NEXT, pipe=True), FAST)
        await mine.commit().wait()
    assert scene.opened_by(NEXT)


@pytest.mark.parametrize("pin", [b"1234", None])
async def test_a_token_unlocks_it_and_the_pin_may_come_by_a_pipe(pin):
    scene = Scene()
    asked = {"3": token(OLD, pin=pin)}
    scene.disk.replace(0, forge.edited(scene.disk.content, lambda raw: raw["tokens"].update(asked)))
    async with scene.running():
        mine = await scene.begin()
        given = scene.secret(UNLOCK, pin, pipe=True) if pin else Secrets()
        await mine.unlock(replace(given, sources={UNLOCK: TokenSource(3, given.sources.get(UNLOCK))}))
        await scene.add(mine)
        await mine.commit().wait()
    assert scene.opened_by(NEXT)


async def test_what_cannot_be_kept_is_refused_at_once():
    scene = Scene()
    async with scene.running():
        mine = await scene.begin()
        with pytest.raises(SecretRejected):
            await mine.unlock(scene.secret(UNLOCK, b"", pipe=True))
        with pytest.raises(SecretRejected):
            await mine.add_keyslot(scene.secret(NEW, b"", pipe=True), FAST)
        await scene.unlock(mine)
        assert await scene.add(mine) == 1, "the number was not given away"
        mine.abort()


async def test_a_credential_waits_its_turn_and_costs_as_much_as_any_other_job():
    scene = Scene(Runner(JobLimits(waiting_per_volume=1)))
    async with scene.running():
        submitted = []
        submit = scene.runner.submit
        scene.runner.submit = lambda request: submitted.append(request) or submit(request)
        mine = await scene.begin()
        scene.keeper.go.clear()
        first = asyncio.ensure_future(scene.unlock(mine))
        await turns()
        with pytest.raises(Busy, match="another credential is being tried"):
            await scene.unlock(mine)
        with pytest.raises(Busy, match="still being tried"):
            mine.commit()
        scene.keeper.go.set()
        await first
        (request,) = submitted
        assert (request.kind, request.volumes, request.owner) == (Kind.VERIFY, (UUID,), OWNER)
        assert request.memory_kib == needed_kib(mine.view)

        jobs = [scene.start("enroll", name=name) for name in "ab"]
        with pytest.raises(Busy, match="1 jobs are waiting"):
            await scene.unlock(mine, b"not tried")
        await scene.add(mine)
        with pytest.raises(Busy, match="1 jobs are waiting"):
            mine.commit()
        assert (mine.state, mine.unlocked) == (State.OPEN, True)
        for job in jobs:
            scene.runner.cancel(job)
        await asyncio.wait([asyncio.ensure_future(job.wait()) for job in jobs])
        await mine.commit().wait()
    assert scene.opened_by(NEXT), "its secret was still there"


@pytest.mark.parametrize("ending", ENDS)
@pytest.mark.parametrize("waiting", ["for the pipe", "in the queue", "for the lock"])
async def test_it_ends_while_a_credential_is_being_tried(ending, waiting):
    scene = Scene()
    async with scene.running():
        mine = await scene.begin()
        held = scene.host.devices.open(scene.registry.get(UUID).ref)
        with scene.locks.held_elsewhere(Level.METADATA, held):
            if waiting == "for the pipe":
                scene.keeper.go.clear()
            if waiting == "in the queue":
                before = scene.start("enroll")
            unlocking = asyncio.ensure_future(scene.unlock(mine))
            await turns(3)
            ENDS[ending](scene)
            await scene.ended.wait()
            with pytest.raises(Cancelled, match=ending):
                await unlocking
            await turns()
            assert not is_open(scene.closed[-1])
        held.close()
        if waiting == "in the queue":
            await asyncio.wait([asyncio.ensure_future(before.wait())])
        scene.check_nothing_is_left()
        assert not scene.runner.busy(UUID)


# -- commits -----------------------------------------------------------------------------------------------------


async def test_a_refusal_of_the_edits_leaves_it_open():
    scene = Scene()
    async with scene.running():
        mine = await scene.begin()
        with pytest.raises(InvalidRequest, match="empty"):
            mine.plan()
        with pytest.raises(InvalidRequest, match="empty"):
            mine.commit()
        mine.destroy_keyslot(0)
        await scene.unlock(mine)
        for call in (mine.plan, mine.commit):
            with pytest.raises(LastKeyslot):
                call()
        await scene.add(mine)
        mine.set_token(json.dumps({"type": "note", "keyslots": [], "text": "x" * 12000}))
        assert mine.state is State.OPEN
        with pytest.raises(MetadataFull):
            mine.commit()
        mine.remove_token(0)
        await mine.commit().wait()
    assert (scene.opened_by(OLD), scene.opened_by(NEXT)) == ([], [1])


async def test_numbers_and_texts_out_of_range_are_refused_one_by_one():
    scene = Scene()
    async with scene.running():
        mine = await scene.begin()
        for number in (0, 32, 2**31, 2**32 - 1):
            with pytest.raises(InvalidRequest):
                await scene.add(mine, keyslot=number)
        for number in (32, 2**32 - 1):
            for call in (lambda n=number: mine.set_token(TOKEN, n), mine.destroy_keyslot, mine.remove_token):
                with pytest.raises(InvalidRequest):
                    call(number) if call in (mine.destroy_keyslot, mine.remove_token) else call()
        for text in ("", "[]", "[" * 10_000, '{"a":' * 10_000, "x" * 10_000_000, '{"type": "note"}', "{}"):
            with pytest.raises(InvalidRequest):
                mine.set_token(text)
        deep = '{"type":"note","keyslots":[],"x":' + "[" * 31 + "]" * 31 + "}"
        mine.set_token(deep)
        with pytest.raises(InvalidRequest, match="nested deeper"):
            mine.commit()
        assert [await scene.add(mine, keyslot=number) for number in (31, None)] == [31, 1]
        mine.abort()


async def test_it_is_committed_once():
    scene = Scene()
    async with scene.running():
        mine = await scene.begin()
        mine.set_token(TOKEN)
        job = mine.commit()
        for call in (mine.commit, mine.plan, mine.abort, lambda: mine.set_token(TOKEN)):
            with pytest.raises(InvalidRequest, match="being committed"):
                call()
        with pytest.raises(InvalidRequest, match="being committed"):
            await scene.unlock(mine)
        await job.wait()
    assert len(scene.view.metadata.tokens) == 1


async def test_a_keyslot_whose_secret_comes_after_the_commit_is_too_late():
    scene = Scene()
    async with scene.running():
        mine = await scene.begin()
        mine.set_token(TOKEN)
        scene.keeper.go.clear()
        adding = asyncio.ensure_future(scene.add(mine))
        await turns()
        job = mine.commit()
        scene.keeper.go.set()
        with pytest.raises(InvalidRequest, match="being committed"):
            await adding
        await job.wait()
        await turns()
        scene.check_nothing_is_left()


async def test_a_volume_of_which_a_copy_appears_is_not_written():
    scene = Scene()
    async with scene.running():
        mine = await scene.begin()
        mine.set_token(TOKEN)
        scene.watcher.put("/dev/sim1", UUID)
        await turns(20)
        with pytest.raises(NeedsPerson):
            mine.commit()
        scene.watcher.remove("/dev/sim1")
        await turns(20)
        await mine.commit().wait()


async def test_of_two_on_one_volume_the_second_commit_is_a_conflict():
    scene = Scene()
    async with scene.running():
        first, second = await scene.begin(), await scene.begin(OTHER)
        for mine in (first, second):
            mine.set_token(TOKEN)
            await scene.unlock(mine)
            await scene.add(mine)
        jobs = [first.commit(), second.commit()]
        await jobs[0].wait()
        with pytest.raises(Conflict, match="another tool has changed the header since"):
            await jobs[1].wait()
        await turns()
        assert jobs[1].state is JobState.FAILED
        scene.check_nothing_is_left()
    assert len(scene.view.metadata.keyslots) == 2


async def test_a_commit_that_is_cancelled_ends_it():
    scene = Scene()
    async with scene.running():
        mine = await scene.begin()
        await scene.unlock(mine)
        await scene.add(mine)
        job = mine.commit()
        scene.runner.cancel(job)
        with pytest.raises(Cancelled):
            await job.wait()
        await turns()
        scene.check_nothing_is_left()
    assert not scene.disk.log


@pytest.mark.parametrize("ending", ENDS)
async def test_once_it_commits_nothing_of_that_ends_it(ending):
    """But a volume that has gone, of course."""
    scene = Scene()
    async with scene.running():
        mine = await scene.begin()
        await scene.unlock(mine)
        await scene.add(mine)
        held = scene.host.devices.open(scene.registry.get(UUID).ref)
        with scene.locks.held_elsewhere(Level.METADATA, held):
            job = mine.commit()
            await turns(10)
            ENDS[ending](scene)
            await turns()
            assert (mine.state, job.ended) == (State.COMMITTING, False)
        held.close()
        await job.wait()
        await turns()
        scene.check_nothing_is_left()
    assert scene.opened_by(NEXT)


# -- a generated key ---------------------------------------------------------------------------------------------


async def generating(scene):
    """A transaction with a generated key, whose commit waits until that is safe: the job."""
    mine = await scene.begin()
    await scene.unlock(mine)
    await scene.add(mine, None)
    job = mine.commit()
    reached = asyncio.Event()
    job.subscribe(lambda: reached.set() if job.ended or job.step is Stage.DELIVERING else None)
    await reached.wait()
    return job


async def test_a_generated_key_is_handed_over_by_the_job():
    scene = Scene()
    async with scene.running():
        job = await generating(scene)
        with pytest.raises(NotAuthorized):
            await job.handover.take(OTHER)
        fd = await job.handover.take(OWNER)
        job.handover.confirm(OWNER)
        await job.wait()
        with os.fdopen(fd, "rb") as file:
            assert scene.opened_by(file.read()) == [1]


async def test_one_key_is_generated_and_no_more():
    scene = Scene()
    async with scene.running():
        mine = await scene.begin()
        await scene.add(mine, None)
        with pytest.raises(InvalidRequest, match="generated already"):
            await scene.add(mine, None)
        assert await scene.add(mine) == 2
        mine.abort()


@pytest.mark.parametrize("taken", [False, True])
async def test_an_owner_that_leaves_before_its_key_is_safe_takes_the_commit_with_it(taken):
    scene = Scene()
    async with scene.running():
        job = await generating(scene)
        if taken:
            os.close(await job.handover.take(OWNER))
        scene.bus.leave(OWNER)
        with pytest.raises(Cancelled, match="its caller is gone"):
            await job.wait()
        await turns()
        scene.check_nothing_is_left()
    assert not scene.disk.log


# -- anywhere ----------------------------------------------------------------------------------------------------


async def whole(scene, secret):
    """A client from its beginning to its end: with a generated key, or with secrets in pipes."""
    mine = await scene.begin()
    await mine.unlock(scene.secret(UNLOCK, OLD, pipe=True))
    await mine.add_keyslot(scene.secret(NEW, secret, pipe=True), FAST)
    mine.set_token(TOKEN)
    job = mine.commit()
    if secret is None:
        os.close(await job.handover.take(OWNER))
        job.handover.confirm(OWNER)
    await job.wait()


async def disturbed(secret, arrange):
    """``whole``, which ``arrange(scene, client)`` has disturbed somewhere: whether it was committed."""
    scene = Scene()
    async with scene.running():
        before = scene.disk.content
        client = asyncio.ensure_future(whole(scene, secret))
        await arrange(scene, client)
        await asyncio.wait([client])
        error = None if client.cancelled() else client.exception()
        assert error is None or isinstance(error, Cancelled | UnknownDevice | Busy), error
        scene.bus.leave(OWNER)  # who is still there has finished, and goes, too
        while scene.runner.busy(UUID):  # noqa: ASYNC110 -- of all jobs there may be
            await asyncio.sleep(0)
        await turns()
        scene.check_nothing_is_left()
        headers = 2 * scene.view.pair.hdr_size
        committed = len(scene.view.metadata.keyslots) == 2
        assert committed == (len(scene.view.metadata.tokens) == 1)
        assert committed or scene.disk.content[:headers] == before[:headers]
        assert not scene.view.pending
    return committed


DISTURBANCES = {**ENDS, "the call is cancelled": None, "the job is cancelled": None}


def disturb(scene, client, what):
    if what == "the call is cancelled":
        client.cancel()
    elif what == "the job is cancelled":
        for job in scene.runner.jobs.values():
            if job.cancellable:
                scene.runner.cancel(job)
    else:
        ENDS[what](scene)


@pytest.mark.parametrize("secret", [NEXT, None], ids=["given", "generated"])
@pytest.mark.parametrize("what", DISTURBANCES)
async def test_disturbed_after_any_number_of_turns_of_the_loop(what, secret):
    outcomes = []
    for number in range(0, 100, 1 if what is Ending.OWNER_GONE else 3):

        async def arrange(scene, client, number=number):
            await turns(number)
            disturb(scene, client, what)

        outcomes.append(await disturbed(secret, arrange))
    assert not all(outcomes)


@pytest.mark.parametrize("secret", [NEXT, None], ids=["given", "generated"])
@pytest.mark.parametrize("what", DISTURBANCES)
async def test_disturbed_at_each_call_of_the_worker(what, secret):
    calls = []

    async def count(scene, client):
        scene.engine.on_call = calls.append

    assert await disturbed(secret, count)
    assert len(calls) >= 8
    for number in range(len(calls)):

        async def arrange(scene, client, number=number):
            left = iter(range(1000))
            scene.engine.on_call = lambda name: disturb(scene, client, what) if next(left) == number else None

        await disturbed(secret, arrange)
