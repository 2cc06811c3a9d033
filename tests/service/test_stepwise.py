# SPDX-License-Identifier: GPL-2.0-or-later
"""The stepwise engine on a simulated host: what it does, and what is true when it is stopped."""

import asyncio
import itertools
from contextlib import asynccontextmanager

import pytest

from luksrotd.errors import (
    Busy,
    Conflict,
    ConsistencyError,
    DeviceError,
    EngineCrashed,
    EngineError,
    ForeignSignature,
    KeyExists,
    LastKeyslot,
    LuksrotdError,
    NeedsReconcile,
    NoFreeArea,
    Outcome,
    StaleGeneration,
    WrongCredential,
)
from luksrotd.luks2.layout import Which
from luksrotd.rotation.lineage import lineage
from luksrotd.rotation.view import view
from luksrotd.service.progress import fraction
from tests.support import forge
from tests.support.simengine import SimSession, make_volume, opened_by
from tests.support.simlocks import Level
from tests.support.simulation import CHEAP, MAIN, NEW, OLD, Simulation, run, secrets

#: Header writes of a rotation: five steps, two copies each; two areas.
ROTATION_WRITES = 12


class Stepping(Simulation):
    """The verbs, in steps."""

    def enroll(self, unlock=MAIN, new=OLD, **options):
        with secrets(unlock=unlock, new=new) as sources:
            return run(self.stepwise.enroll(self.ref, sources, data={"ref": 1}, pbkdf=CHEAP, **options))

    def rotate(self, unlock=MAIN, new=NEW, **options):
        with secrets(unlock=unlock, new=new) as sources:
            return run(self.stepwise.rotate(self.ref, sources, data={"ref": 2}, pbkdf=CHEAP, **options))

    def stage(self, unlock=MAIN, new=NEW, **options):
        with secrets(unlock=unlock, new=new) as sources:
            return run(self.stepwise.stage(self.ref, sources, data={"ref": 2}, pbkdf=CHEAP, **options))

    def finish(self):
        return run(self.stepwise.finish(self.ref))

    def abort(self):
        return run(self.stepwise.abort(self.ref))

    def remove(self, unlock=MAIN):
        with secrets(unlock=unlock) as sources:
            return run(self.stepwise.remove(self.ref, sources))

    @property
    def seen(self):
        return view(self.pair)

    @property
    def line(self):
        return lineage(self.seen, "backup")

    def opens(self, secret):
        return opened_by(self.disk.content, secret)

    def at(self, call, number, what):
        """Do ``what`` when that call of libcryptsetup is made for the ``number``-th time, from 0."""
        plain, counted = self.engine.on_call, [0]

        def on_call(name):
            plain(name)
            if name == call or not call:
                counted[0] += 1
                if counted[0] == number + 1:
                    what()

        self.engine.on_call = on_call

    def put(self, content):
        """Another tool's doing."""
        self.disk.replace(0, content)

    def foreign_token(self, number=9):
        """What another tool writes: a token of its own, and a higher sequence number."""
        image = forge.edited(self.disk.content, lambda raw: raw["tokens"].update({str(number): FOREIGN}))
        self.put(forge.newer(image, tuple(Which)))


FOREIGN = {"type": "foreign", "keyslots": []}


def fail(error):
    def raise_it():
        raise error

    return raise_it


@pytest.fixture
def plain():
    simulation = Stepping(make_volume([MAIN]))
    yield simulation
    assert not simulation.devices.leaked
    assert not simulation.locks._holds
    assert simulation.engine.live == 0


@pytest.fixture
def enrolled(plain):
    plain.enroll()
    plain.disk.log.clear()
    plain.disk.writes = plain.disk.flushes = 0
    plain.engine.calls.clear()
    plain.locks.log.clear()
    return plain


# ---- the verbs


def test_enrol_rotate_stage_finish_remove(plain):
    done = plain.enroll()
    assert (done.generation, done.keyslot, done.seqid_after - done.seqid_before) == (1, 1, 3)
    assert (plain.opens(OLD), plain.opens(MAIN)) == ([1], [0])
    done = plain.rotate()
    assert (done.generation, done.keyslot, done.seqid_after - done.seqid_before) == (2, 2, 5)
    assert (plain.opens(OLD), plain.opens(NEW)) == ([], [2])
    staged = plain.stage(new=b"third")
    assert (staged.generation, plain.line.staged.token.generation) == (3, 3)
    assert (plain.opens(NEW), plain.opens(b"third")) == ([2], [1])
    assert plain.abort().generation == 2
    assert plain.opens(b"third") == []
    plain.stage(new=b"third")
    assert plain.finish().generation == 3
    assert (plain.opens(NEW), plain.opens(b"third")) == ([], [1])
    gone = plain.remove()
    assert (gone.generation, gone.keyslot) == (0, None)
    assert plain.seen.keys == ()
    assert plain.opens(MAIN) == [0]
    messages = [entry.message for entry in plain.journal.entries]
    assert messages[:2] == ["key enrolled in steps", "key rotated in steps"]
    assert str(NEW) not in plain.journal.text()


def test_data(enrolled):
    run(enrolled.stepwise.set_data(enrolled.ref, {"x": 1}))
    assert enrolled.line.current.token.data == {"x": 1}
    assert enrolled.opens(OLD) == [1]


def test_the_job_lock_is_held_throughout_and_the_metadata_lock_never_while_libcryptsetup_works(enrolled):
    enrolled.rotate()
    levels = [event for event in enrolled.locks.log if event.level is not Level.METADATA]
    assert [event.text for event in levels] == ["+job", "-job"]
    assert not any(event.exclusive for event in enrolled.locks.log if event.level is Level.METADATA)


def test_it_says_where_it_is(enrolled):
    seen = []
    enrolled.rotate(progress=seen.append)
    assert seen[0] == "locking"
    assert seen[-1] == "done"
    assert [fraction(step) for step in seen] == sorted(fraction(step) for step in seen)


def test_the_new_key_is_handed_over_before_anything_is_written(enrolled):
    async def deliver():
        raise DeviceError("cannot write it down")

    before = enrolled.disk.content
    with pytest.raises(DeviceError, match="write it down"):
        enrolled.rotate(deliver=deliver)
    assert enrolled.disk.content == before


# ---- refused


def test_refusals_write_nothing(enrolled):
    before = enrolled.disk.content
    with pytest.raises(KeyExists):
        enrolled.enroll()
    with pytest.raises(WrongCredential):
        enrolled.rotate(unlock=b"wrong")
    with pytest.raises(LastKeyslot):
        enrolled.remove(unlock=OLD)
    enrolled.probe.planted["/dev/sim0"] = ("LVM2_member",)
    with pytest.raises(ForeignSignature):
        enrolled.rotate()
    del enrolled.probe.planted["/dev/sim0"]
    device = enrolled.devices.open(enrolled.ref)
    with enrolled.locks.held_elsewhere(Level.JOB, device), pytest.raises(Busy):
        enrolled.rotate()
    device.close()
    assert enrolled.disk.content == before


def test_a_wipe_that_is_pending_is_not_libcryptsetups_to_do(enrolled):
    intent = forge.intent(enrolled.seen.free[-1])
    enrolled.put(forge.edited(enrolled.disk.content, lambda raw: raw["tokens"]["0"].update(wipe=intent)))
    with pytest.raises(NeedsReconcile, match="not been wiped"):
        enrolled.rotate()


def test_copies_that_libcryptsetup_does_not_tell_apart(enrolled):
    """Equal sequence numbers: its load recovers nothing."""
    other = forge.edited(enrolled.disk.content, lambda raw: raw["tokens"].update({"9": FOREIGN}), [Which.SECONDARY])
    enrolled.put(other)
    with pytest.raises(NeedsReconcile, match="differ"):
        enrolled.rotate()


def test_a_copy_that_may_outrank_the_one_that_we_read(enrolled):
    bad = forge.edited(enrolled.disk.content, lambda raw: raw.pop("config"), [Which.SECONDARY])
    enrolled.put(forge.newer(bad, [Which.SECONDARY]))
    with pytest.raises(NeedsReconcile, match="in force"):
        enrolled.rotate()


def test_a_bad_copy_is_recovered_by_libcryptsetup_first(enrolled):
    enrolled.put(forge.erased(enrolled.disk.content, Which.SECONDARY))
    assert enrolled.rotate().generation == 2
    assert enrolled.pair.agree


# ---- cut short


def finished(simulation, told):
    """After a power cut, and reconcile: one of both ends, and the one that was told if any was."""
    simulation.disk.power_cut()
    assert simulation.opens(MAIN) == [0]
    assert not simulation.line.unclear
    current = simulation.line.current
    assert simulation.opens({1: OLD, 2: NEW}[current.token.generation]) == [current.keyslot.id]
    assert simulation.reconcile().left == ()
    alive = [secret for secret in (OLD, NEW) if simulation.opens(secret)]
    assert len(alive) == 1
    assert len(simulation.seen.keys) == 1
    assert simulation.seen.keys[0].token.retires is None
    if told in (Outcome.UNCHANGED, Outcome.COMMITTED, Outcome.WIPE_PENDING):
        assert alive == ([OLD] if told is Outcome.UNCHANGED else [NEW])


@pytest.mark.parametrize("arrived", [0, 512], ids=["error", "short"])
@pytest.mark.parametrize("number", range(ROTATION_WRITES))
def test_a_write_that_fails(enrolled, number, arrived):
    enrolled.disk.faults.writes = {number: arrived}
    with pytest.raises(LuksrotdError) as caught:
        enrolled.rotate()
    finished(enrolled, caught.value.outcome)


@pytest.mark.parametrize("landed", [0, None], ids=["lost", "landed"])
@pytest.mark.parametrize("number", range(30))
def test_a_flush_that_fails(enrolled, number, landed):
    """libcryptsetup does not notice; we do, if anything was lost by it."""
    enrolled.disk.faults.flushes = {number: landed}
    try:
        enrolled.rotate()
    except LuksrotdError as error:
        told = error.outcome
    else:
        told = Outcome.COMMITTED
        assert enrolled.disk.medium() == enrolled.disk.content, "what it reports is on the medium"
    finished(enrolled, told)


def calls_of_a_rotation():
    simulation = Stepping(make_volume([MAIN]))
    simulation.enroll()
    simulation = Stepping(simulation.disk.content)
    simulation.rotate()
    return len(simulation.engine.calls)


@pytest.mark.parametrize("number", range(calls_of_a_rotation()))
def test_a_worker_that_dies(enrolled, number):
    """What it left is taken back, or finished, by another one at once."""
    enrolled.at("", number, fail(EngineCrashed("cannot go on: it died")))
    with pytest.raises(EngineCrashed) as caught:
        enrolled.rotate()
    assert caught.value.outcome in (Outcome.UNCHANGED, Outcome.COMMITTED)
    assert enrolled.opens(OLD if caught.value.outcome is Outcome.UNCHANGED else NEW)
    assert len(enrolled.seen.keys) == 1
    finished(enrolled, caught.value.outcome)


def test_a_birth_that_has_no_room(enrolled):
    """Found out half-way only: then the token is taken back, and the header says what it said."""
    before = enrolled.seen.metadata.raw
    enrolled.at("apply-AddKeyslot", 0, fail(NoFreeArea("cannot add a keyslot: no room")))
    with pytest.raises(NoFreeArea) as caught:
        enrolled.rotate()
    assert caught.value.outcome is Outcome.UNCHANGED
    assert enrolled.seen.metadata.raw == before


def test_a_second_worker_that_dies_too(enrolled):
    def die_from_now_on():
        enrolled.engine.on_call = lambda _: fail(EngineCrashed("cannot go on: it died"))()
        raise EngineCrashed("cannot go on: it died")

    working = enrolled.engine.on_call
    enrolled.at("apply-AddKeyslot", 0, die_from_now_on)
    with pytest.raises(EngineCrashed) as caught:
        enrolled.rotate()
    assert caught.value.outcome is Outcome.UNKNOWN
    enrolled.engine.on_call = working
    finished(enrolled, caught.value.outcome)


def test_a_new_key_that_does_not_open_is_taken_back(enrolled):
    """The old one has not been touched then."""

    def spoil():
        area = enrolled.line.current.keyslot.area
        enrolled.disk.replace(area.offset, bytes(area.size))

    enrolled.at("opens", 0, spoil)
    before = enrolled.seen.metadata.raw
    with pytest.raises(ConsistencyError, match="with its own secret") as caught:
        enrolled.rotate()
    assert caught.value.outcome is Outcome.UNCHANGED
    assert enrolled.seen.metadata.raw == before
    assert enrolled.opens(OLD) == [1]


def test_a_change_that_libcryptsetup_reports_but_has_not_made(enrolled, monkeypatch):
    async def apply(session, edits):
        del session, edits

    monkeypatch.setattr(SimSession, "apply", apply)
    before = enrolled.disk.content
    with pytest.raises(EngineError, match="has not made") as caught:
        enrolled.rotate()
    assert caught.value.outcome is Outcome.UNCHANGED
    assert enrolled.disk.content == before


# ---- what an earlier run has left


@pytest.mark.parametrize("number", range(1, 5))
def test_the_next_run_finishes_what_was_cut(enrolled, number):
    """A first run up to ``number`` of its steps, then a rotation anew; all by libcryptsetup."""
    contents = []
    plain = enrolled.engine.on_call

    def on_call(name):
        plain(name)
        if name.startswith("apply-"):
            contents.append(enrolled.disk.content)

    enrolled.engine.on_call = on_call
    enrolled.rotate()
    assert len(contents) == 5
    again = Stepping(contents[number])
    done = again.rotate(new=b"third")
    assert done.generation == (2 if number < 2 else 3)
    assert again.opens(b"third") == [done.keyslot]
    assert (again.opens(OLD), again.opens(NEW)) == ([], [])
    assert len(again.seen.keys) == 1
    assert again.opens(MAIN) == [0]


# ---- other tools, meanwhile


@pytest.mark.parametrize("number", range(11))
def test_another_tool_that_writes_between_two_steps(enrolled, number):
    """Right after the header has been read for the ``number``-th time, from 0."""
    metadata, counted = enrolled.locks.metadata, itertools.count()

    @asynccontextmanager
    async def overtaken(device, *, exclusive):
        async with metadata(device, exclusive=exclusive):
            yield
        if next(counted) == number:
            enrolled.foreign_token()

    enrolled.locks.metadata = overtaken
    try:
        told = enrolled.rotate() and Outcome.COMMITTED
    except Conflict as error:
        told = error.outcome
    assert next(counted) > number, "the header is read so often"
    assert enrolled.seen.metadata.raw["tokens"].pop("9") == FOREIGN
    assert told in (Outcome.COMMITTED, Outcome.UNCHANGED)
    assert enrolled.opens(NEW if told is Outcome.COMMITTED else OLD)
    assert len(enrolled.seen.keys) == 1
    finished(enrolled, told)


def test_another_tool_that_writes_while_the_key_is_handed_over(enrolled):
    async def deliver():
        enrolled.foreign_token(1)

    done = enrolled.rotate(deliver=deliver)
    assert enrolled.seen.metadata.raw["tokens"]["1"] == FOREIGN
    assert enrolled.line.current.token.id == 2, "it has decided anew: token 1 was taken"
    assert done.generation == 2


def test_another_tool_that_never_stops(enrolled):
    numbers = iter(range(2, 32))
    plain = enrolled.engine.on_call

    def on_call(name):
        plain(name)
        if name == "unlock":
            enrolled.foreign_token(next(numbers))

    enrolled.engine.on_call = on_call
    with pytest.raises(Conflict) as caught:
        enrolled.rotate()
    assert caught.value.outcome is Outcome.UNCHANGED
    assert enrolled.opens(OLD) == [1]


def test_a_header_that_libcryptsetup_reads_otherwise(enrolled):
    numbers = iter(range(2, 32))
    metadata = enrolled.locks.metadata

    def overtaken(device, *, exclusive):
        enrolled.foreign_token(next(numbers))
        return metadata(device, exclusive=exclusive)

    enrolled.locks.metadata = overtaken
    with pytest.raises(ConsistencyError, match="otherwise") as caught:
        enrolled.rotate()
    assert caught.value.outcome is Outcome.UNCHANGED


# ---- cancelled


def cancelled_at(simulation, call, number=0):
    """A rotation that is cancelled when libcryptsetup is called so."""

    async def work():
        task = asyncio.current_task()
        simulation.at(call, number, task.cancel)
        with secrets(unlock=MAIN, new=NEW) as sources:
            return await simulation.stepwise.rotate(simulation.ref, sources, data={}, pbkdf=CHEAP)

    return run(asyncio.wait_for(work(), None))


def test_cancelled_before_the_first_step(enrolled):
    before = enrolled.disk.content
    with pytest.raises(asyncio.CancelledError):
        cancelled_at(enrolled, "unlock")
    assert enrolled.disk.content == before


@pytest.mark.parametrize("call", ["apply-SetToken", "apply-AddKeyslot", "apply-DestroyKeyslot", "apply-RemoveToken"])
def test_cancelled_in_the_middle_it_runs_to_its_end(enrolled, call):
    assert cancelled_at(enrolled, call).generation == 2
    assert (enrolled.opens(OLD), len(enrolled.opens(NEW))) == ([], 1)


def test_cancelled_while_leftovers_are_finished(enrolled):
    """They are finished, and nothing new is begun."""
    enrolled.stage()
    enrolled.put(forge.edited(enrolled.disk.content, lambda raw: raw["tokens"]["1"].update(state="active")))
    with pytest.raises(asyncio.CancelledError):
        cancelled_at(enrolled, "apply-DestroyKeyslot")
    assert [key.token.generation for key in enrolled.seen.keys] == [2]
    assert enrolled.opens(OLD) == []


def test_steps_too_are_taken_only_at_the_sequence_number_that_was_meant():
    volume = Stepping(make_volume([MAIN]))
    volume.enroll()
    here = volume.pair.winner.header.seqid
    stepwise, before = volume.stepwise, volume.disk.content
    for seqid in (here - 1, here + 1):
        volume.stepwise = stepwise.at(seqid)
        for verb in (volume.rotate, volume.stage, volume.remove, lambda: volume.enroll(name="other")):
            with pytest.raises(StaleGeneration):
                verb()
        with pytest.raises(StaleGeneration):
            run(volume.stepwise.release(volume.ref))
    assert volume.disk.content == before
    assert volume.pair.winner.header.seqid == here
    volume.stepwise = stepwise.at(here)
    volume.rotate()
    volume.stepwise = stepwise
    volume.rotate(new=OLD)
    assert lineage(view(volume.pair), "backup").current.token.generation == 3
