# SPDX-License-Identifier: GPL-2.0-or-later
"""The record: one entry for each change, whether it succeeds or fails, that tells no secret and no associated data."""

import asyncio
from datetime import timedelta

import pytest

from luksrotd.errors import InteractiveAuthorizationRequired, LuksrotdError, NotAuthorized, Outcome
from luksrotd.names import MessageId
from luksrotd.ports import Caller, DeviceRef, Host
from luksrotd.rotation.lineage import lineage
from luksrotd.rotation.view import view
from luksrotd.service import actor
from luksrotd.service.audit import Audit
from luksrotd.service.denials import QUIET, REMEMBERED, RecordedAuthority
from luksrotd.service.reporter import Reporter
from tests.service.world import NODE, OTHER_UUID, OWNER, World
from tests.support import forge
from tests.support.crashverbs import DESCRIBED, ORDINARY, SECRETS, VERBS
from tests.support.simdisk import Write
from tests.support.simengine import UUID, make_volume
from tests.support.simhost import SimClock, SimJournal
from tests.support.simulation import MAIN, NEW, OLD, Simulation, run

#: MESSAGE_ID and kind of the last entry, by the beginning of the verb's name.
EXPECTED = {
    "enrolment": (MessageId.ENROLLED, "enroll"),
    "rotation": (MessageId.ROTATED, "rotate"),
    "staging": (MessageId.STAGED, "stage"),
    "finish": (MessageId.FINISHED, "finish"),
    "abort": (MessageId.ABORTED, "abort"),
    "removal": (MessageId.REMOVED, "remove"),
    "other associated data": (MessageId.DATA_CHANGED, "set-data"),
    "adoption": (MessageId.ADOPTED, "adopt"),
    "release": (MessageId.RELEASED, "release"),
    "recreation": (MessageId.RECREATED, "recreate"),
    "transaction": (MessageId.TRANSACTION, "transaction"),
    "reconcile": (MessageId.RECONCILED, "reconcile"),
    "header restore": (MessageId.RESTORED, "restore"),
    "scrub": (MessageId.SCRUBBED, "scrub"),
}
PLANTED = [secret.decode() for secret in SECRETS.values()] + list(DESCRIBED)


def prepared(name):
    simulation = Simulation(make_volume(ORDINARY))
    VERBS[name].prepare(simulation)
    simulation.journal.entries.clear()
    return simulation


def changed(content):
    """Another tool puts another key into keyslot 2."""
    return forge.edited(
        content, lambda raw: raw["keyslots"]["2"]["kdf"].update(salt=raw["keyslots"]["0"]["kdf"]["salt"])
    )


def state(simulation):
    """Sequence number, keyslots, and generation of the key."""
    seen = view(simulation.pair)
    current = lineage(seen, "backup").current
    keyslots = ",".join(map(str, sorted(seen.metadata.keyslots)))
    return seen.seqid, keyslots, current.token.generation if current else 0


def written(simulation):
    return [entry.fields for entry in simulation.journal.entries]


@pytest.mark.parametrize("name", VERBS)
def test_every_change_is_recorded_once_with_what_was_and_what_is(name):
    simulation = prepared(name)
    before = state(simulation)
    VERBS[name].operate(simulation)
    after = state(simulation)
    *mended, entry = written(simulation)
    assert (entry["message_id"], entry["kind"]) == next(EXPECTED[key] for key in EXPECTED if name.startswith(key))
    # What a crash had left is mended first, and is a change of its own.
    assert [first["message_id"] for first in mended] == [MessageId.RECONCILED] * len(mended)
    assert len(mended) == (1 if name.endswith("first") else 0)
    for earlier, later in zip([before[0], *(one["seqid_after"] for one in mended)], [*mended, entry], strict=True):
        assert later["seqid_before"] == earlier
    assert entry["seqid_after"] == after[0]
    for fields in (*mended, entry):
        assert (fields["uuid"], fields["node"], fields["outcome"]) == (UUID, "/dev/sim0", "committed")
    if entry["kind"] != "scrub":
        assert entry["keyslots_before"] == (mended[-1]["keyslots_after"] if mended else before[1])
        assert entry["keyslots_after"] == after[1]
    if "key" in entry:
        assert entry["generation_before"] == before[2]
        assert entry["generation"] in {key.token.generation for key in view(simulation.pair).keys} | {0}
        assert entry["phase"] == "done"
    assert not [text for text in PLANTED if text in simulation.journal.text()]


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize("gone", [0, 2, 4])
def test_every_failure_is_recorded_once_with_what_is_true(name, gone):
    simulation = prepared(name)
    before = state(simulation)
    simulation.disk.faults.gone_at_write = simulation.disk.writes + gone
    try:
        VERBS[name].operate(simulation)
    except LuksrotdError as error:
        failed = error
    else:
        return  # it does not write that often
    *mended, entry = written(simulation)
    assert [first["message_id"] for first in mended] in ([], [MessageId.RECONCILED])
    assert entry["kind"] == next(kind for key, (_, kind) in EXPECTED.items() if name.startswith(key))
    assert (entry["outcome"], entry["error"]) == (failed.outcome, failed.code)
    unchanged = failed.outcome is Outcome.UNCHANGED
    assert entry["message_id"] == (MessageId.FAILED if unchanged else MessageId.INTERRUPTED)
    assert entry["priority"] == (4 if unchanged else 3)
    if unchanged and not mended:
        assert entry.get("seqid_after", before[0]) == before[0]
    assert not [text for text in PLANTED if text in simulation.journal.text()]


def test_a_wrong_credential_is_recorded_with_the_phase_it_got_to():
    simulation = prepared("rotation")
    with pytest.raises(LuksrotdError):
        simulation.rotate(b"wrong", NEW, ref="planted data")
    (entry,) = written(simulation)
    assert (entry["error"], entry["outcome"], entry["phase"]) == ("WrongCredential", "unchanged", "deriving")
    assert entry["message_id"] == MessageId.FAILED
    assert (entry["seqid_before"], entry["keyslots_before"], entry["generation_before"]) == state(simulation)
    assert (entry["seqid_after"], entry["keyslots_after"], entry["generation"]) == state(simulation)
    assert "planted data" not in simulation.journal.text()
    assert "wrong" not in simulation.journal.text().replace("WrongCredential", "")


def test_the_keyslots_that_come_and_go():
    simulation = prepared("rotation")
    VERBS["rotation"].operate(simulation)
    (entry,) = written(simulation)
    assert (entry["keyslots_before"], entry["keyslots_after"]) == ("0,1,2", "0,1,3")
    assert (entry["keyslots_added"], entry["keyslots_removed"], entry["keyslot"]) == ("3", "2", 3)
    assert (entry["generation_before"], entry["generation"], entry["key"]) == (1, 2, "backup")


def test_a_volume_that_is_not_there_is_named_as_it_was_asked_for():
    simulation = Simulation(make_volume([MAIN]))
    with pytest.raises(LuksrotdError):
        run(simulation.volumes.release(DeviceRef("/dev/none", uuid=OTHER_UUID)))
    (entry,) = written(simulation)
    assert (entry["uuid"], entry["node"], entry["error"]) == (OTHER_UUID, "/dev/none", "UnknownDevice")
    assert "seqid_before" not in entry


def test_a_bug_is_recorded_as_one():
    simulation = prepared("finish")
    simulation.disk.observer = lambda operation: isinstance(operation, Write) and 1 / 0
    with pytest.raises(ZeroDivisionError):
        simulation.finish()
    (entry,) = written(simulation)
    assert (entry["error"], entry["outcome"]) == ("Internal", Outcome.UNKNOWN)


def test_a_set_is_recorded_with_its_id():
    simulation = prepared("staging")
    VERBS["staging"].operate(simulation)
    assert "group" not in written(simulation)[0]
    with pytest.raises(LuksrotdError):
        run(simulation.volumes.finish(simulation.ref, group="0123456789abcdef"))
    assert written(simulation)[-1]["group"] == "0123456789abcdef"


def test_steps_are_recorded_as_steps():
    simulation = prepared("other associated data")
    run(simulation.stepwise.set_data(simulation.ref, {"ref": "planted data"}))
    (entry,) = simulation.journal.entries
    assert (entry.message, entry.fields["engine"]) == ("associated data changed in steps", "stepwise")
    assert (entry.fields["seqid_after"], entry.fields["message_id"]) == (state(simulation)[0], MessageId.DATA_CHANGED)
    assert "planted data" not in simulation.journal.text()


def test_what_steps_have_left_is_recorded_when_it_is_mended_first():
    simulation = prepared("other associated data")
    simulation.disk.replace(4096, bytes(512))
    run(simulation.stepwise.set_data(simulation.ref, {}))
    mended, entry = written(simulation)
    assert (mended["message_id"], mended["codes"]) == (MessageId.RECONCILED, "header-copy-bad")
    assert (entry["message_id"], entry["seqid_before"]) == (MessageId.DATA_CHANGED, mended["seqid_after"])


def test_what_a_person_must_decide_is_recorded_when_it_is_reconciled():
    simulation = prepared("rotation")
    simulation.disk.replace(0, changed(simulation.disk.content))
    assert simulation.reconcile(dry_run=True).needs_person
    assert written(simulation) == []
    simulation.reconcile()
    (entry,) = written(simulation)
    assert (entry["message_id"], entry["kind"], entry["codes"]) == (
        MessageId.NEEDS_PERSON, "needs-person", "keyslot-changed",
    )  # fmt: skip
    assert not [text for text in PLANTED if text in simulation.journal.text()]


@pytest.mark.asyncio
async def test_what_needs_a_person_when_it_comes_is_recorded_once():
    world = World()
    reporter = Reporter(world.volumes.audit)
    world.registry.observe(reporter)
    world.probe.planted[NODE] = ("xfs",)
    async with world.running():
        assert await needing_person(world) == ["foreign-signature"]
        for _ in range(2):
            world.registry.refresh(UUID)
            assert await needing_person(world) == ["foreign-signature"]
        world.probe.planted.clear()
        world.registry.refresh(UUID)
        assert await needing_person(world) == ["foreign-signature"]
        world.probe.planted[NODE] = ("xfs",)
        world.registry.refresh(UUID)
        assert await needing_person(world) == ["foreign-signature"] * 2
        volume = world.registry.get(UUID)
        reporter.volume_changed(volume, fresh=True)
        assert len(await needing_person(world)) == 2
        reporter.volume_removed(volume)
        reporter.volume_changed(volume, fresh=True)
        assert len(await needing_person(world)) == 3


async def needing_person(world):
    await world.registry.settle(UUID)
    fields = [entry.fields for entry in world.journal.entries]
    return [one["codes"] for one in fields if one["message_id"] == MessageId.NEEDS_PERSON]


# -- who -------------------------------------------------------------------------------------------------------


def test_who_acts_is_this_process_by_itself():
    simulation = Simulation(make_volume([MAIN]))
    simulation.enroll(MAIN, OLD)
    (entry,) = written(simulation)
    assert (entry["uid"], entry["client"]) == (0, "luksrotd")
    assert not {"unit", "sender", "job"} & entry.keys()


def test_who_acts_is_who_it_runs_for():
    simulation = prepared("release")
    caller = Caller(":1.9", 1000, client="busctl", unit="session-3.scope")

    async def work():
        with actor.acting(caller, 17):
            await simulation.volumes.release(simulation.ref)

    run(work())
    (entry,) = written(simulation)
    assert (entry["uid"], entry["client"], entry["unit"]) == (1000, "busctl", "session-3.scope")
    assert (entry["sender"], entry["job"]) == (":1.9", 17)
    assert actor.current() == actor.Actor()


@pytest.mark.asyncio
async def test_a_job_acts_for_its_owner_also_when_another_callers_end_starts_it():
    world = World()
    async with world.running():
        other = Caller(":1.99", 99)
        with actor.acting(other):
            first, second = world.start("enroll", new=b"backup"), world.start("rotate")
        await first.wait()
        await second.wait()
    jobs = [(entry.fields["uid"], entry.fields["sender"], entry.fields["job"]) for entry in world.journal.entries]
    assert jobs == [(OWNER.uid, OWNER.name, first.number), (OWNER.uid, OWNER.name, second.number)]


@pytest.mark.asyncio
async def test_a_job_that_is_cancelled_is_recorded():
    world = World()
    async with world.running():
        job = world.start("enroll", new=None, old=b"old")
        delivering = asyncio.Event()
        job.subscribe(lambda: job.step == "delivering" and delivering.set())
        await delivering.wait()
        world.runner.cancel(job)
        with pytest.raises(LuksrotdError):
            await job.wait()
    (entry,) = [one.fields for one in world.journal.entries]
    assert (entry["error"], entry["outcome"], entry["phase"]) == ("Cancelled", "unchanged", "delivering")


# -- refusals --------------------------------------------------------------------------------------------------


class Strict:
    def __init__(self):
        self.error = NotAuthorized("cannot authorize")

    async def check(self, caller, action, details):
        if self.error:
            raise self.error


@pytest.fixture
def refusing():
    journal, clock, strict = SimJournal(), SimClock(), Strict()
    simulation = Simulation(make_volume([MAIN]))
    old = simulation.host
    host = Host(
        old.devices, old.locks, old.shadows, old.engine, old.probe, old.entropy, clock, journal, old.inventories
    )
    authority = RecordedAuthority(strict, Audit(host), clock)
    authority.journal, authority.clock, authority.strict = journal, clock, strict
    return authority


def refuse(authority, uid=1000, action="org.luksrotd1.rotate", error=NotAuthorized):
    details = {"device": "/dev/sda", "uuid": UUID, "key": "backup", "operation": "Rotate", "bus": "usb"}
    caller = Caller(":1.5", uid, client="evil")
    with pytest.raises(error):
        asyncio.run(authority.check(caller, action, details))


def test_a_refusal_is_recorded(refusing):
    refuse(refusing)
    (entry,) = refusing.journal.entries
    assert entry.fields == {
        "kind": "denied", "message_id": MessageId.DENIED, "priority": 5, "action": "org.luksrotd1.rotate",
        "uuid": UUID, "node": "/dev/sda", "key": "backup", "operation": "Rotate",
        "uid": 1000, "client": "evil", "sender": ":1.5",
    }  # fmt: skip


def test_what_is_allowed_or_asked_back_is_no_refusal(refusing):
    refusing.strict.error = None
    asyncio.run(refusing.check(OWNER, "org.luksrotd1.rotate", {}))
    refusing.strict.error = InteractiveAuthorizationRequired("cannot authorize")
    refuse(refusing, error=InteractiveAuthorizationRequired)
    assert refusing.journal.entries == []


def test_nobody_fills_the_journal_with_refusals(refusing):
    for _ in range(1000):
        refuse(refusing)
    assert len(refusing.journal.entries) == 1
    refuse(refusing, action="org.luksrotd1.enroll")
    refuse(refusing, uid=1001)
    assert len(refusing.journal.entries) == 3
    refusing.clock.advance(QUIET - timedelta(seconds=1))
    refuse(refusing)
    assert len(refusing.journal.entries) == 3
    refusing.clock.advance(timedelta(seconds=1))
    refuse(refusing)
    assert refusing.journal.entries[-1].fields["unrecorded"] == 1000
    refusing.clock.advance(-QUIET * 2)  # a clock that was set back
    refuse(refusing)
    assert "unrecorded" not in refusing.journal.entries[-1].fields


def test_not_everybody_is_remembered(refusing):
    for uid in range(REMEMBERED + 1):
        refuse(refusing, uid=uid)
    assert len(refusing._quiet) == REMEMBERED
    refuse(refusing, uid=0)
    assert len(refusing.journal.entries) == REMEMBERED + 2


# -- events ----------------------------------------------------------------------------------------------------


def test_events_have_their_entries():
    simulation = Simulation(make_volume([MAIN]))
    audit = Audit(simulation.host)
    audit.started("1.0")
    audit.configured()
    audit.misconfigured("/etc/luksrotd/luksrotd.conf:7: cannot read\nthat")
    audit.foreign_change(UUID, "/dev/sda", 3, 5, "newer")
    audit.stopped()
    audit.stopped("the bus connection was lost")
    found = [
        (entry.fields["message_id"], entry.fields["priority"], entry.message) for entry in simulation.journal.entries
    ]
    assert found == [
        (MessageId.STARTED, 6, "luksrotd 1.0 started"),
        (MessageId.CONFIGURED, 6, "configuration loaded"),
        (MessageId.MISCONFIGURED, 3, "configuration rejected: /etc/luksrotd/luksrotd.conf:7: cannot read?that"),
        (MessageId.FOREIGN_CHANGE, 5, "another tool has changed the header"),
        (MessageId.STOPPED, 6, "luksrotd stopped"),
        (MessageId.STOPPED, 3, "luksrotd stopped: the bus connection was lost"),
    ]
    change = simulation.journal.entries[3].fields
    assert (change["uuid"], change["seqid_before"], change["seqid_after"], change["how"]) == (UUID, 3, 5, "newer")


def test_what_a_caller_or_a_disk_says_cannot_break_the_entry():
    simulation = Simulation(make_volume([MAIN]))
    with pytest.raises(LuksrotdError):
        simulation.enroll(MAIN, OLD, name="x\nLUKSROTD_UID=0" + "y" * 5000)
    (entry,) = written(simulation)
    assert "\n" not in entry["key"]
    assert len(entry["key"]) <= 2000
