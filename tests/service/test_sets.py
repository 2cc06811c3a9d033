# SPDX-License-Identifier: GPL-2.0-or-later
"""Sets of volumes: what is refused, what is undone, what is told; tests/crash/test_sets.py has the power cuts."""

import asyncio
import os
from datetime import timedelta

import pytest

from luksrotd.errors import (
    Busy,
    Cancelled,
    DeviceError,
    ForeignSignature,
    InvalidRequest,
    NeedsPerson,
    NoFreeArea,
    Outcome,
    SecretRejected,
    UnknownDevice,
    WrongCredential,
)
from luksrotd.luks2.pair import parse_pair
from luksrotd.ports import DeviceRef, GenerateInto, SecretFd
from luksrotd.rotation.edits import NEW as NEW_NAME
from luksrotd.rotation.edits import UNLOCK
from luksrotd.rotation.lineage import lineage
from luksrotd.rotation.sets import SetState, Standing
from luksrotd.rotation.view import view
from luksrotd.service.setwork import Happened, SetRequest
from tests.support.simdisk import SimDevice
from tests.support.simengine import make_volume
from tests.support.simlocks import Level
from tests.support.simset import SIZE, SimulatedSet, enrolled, opens
from tests.support.simulation import CHEAP, MAIN, NEW, OLD, run, secrets

REQUEST = SetRequest(None, CHEAP)
STEPS = range(3)
"""Of a staging: the new area and both headers, each a write and a flush."""


@pytest.fixture
def simulated():
    return SimulatedSet([enrolled(number) for number in range(SIZE)])


@pytest.fixture
def staged(simulated):
    simulated.stage()
    simulated.order.clear()
    return simulated


def happened(result):
    return [member.happened for member in result.members]


def open_by(simulated):
    return ["".join(letter for letter, key in zip("mon", (MAIN, OLD, NEW), strict=True) if opens(image, key))
            for image in simulated.images]  # fmt: skip


def tokens(simulated):
    return [lineage(view(parse_pair(image)), "backup") for image in simulated.images]


def test_the_same_key_is_staged_on_all_and_finished_on_all(simulated):
    before = [line.current.token for line in tokens(simulated)]
    result = simulated.stage(expires_after=timedelta(hours=2))
    assert (result.state, happened(result), result.errors) == (SetState.STAGED, [Happened.STAGED] * SIZE, ())
    assert open_by(simulated) == ["mon"] * SIZE
    for line, old in zip(tokens(simulated), before, strict=True):
        assert line.current.token == old
        assert (line.staged.token.generation, line.staged.token.data) == (old.generation + 1, old.data)
        assert (line.staged.token.group, line.staged.token.expires_at) == (result.group, "2026-01-01T02:00:00Z")
    assert result.group.size == SIZE
    result = simulated.finish()
    assert (result.state, happened(result)) == (SetState.FINISHED, [Happened.FINISHED] * SIZE)
    assert open_by(simulated) == ["mn"] * SIZE
    assert [change.change.generation for change in result.members] == [old.generation + 1 for old in before]


def test_abort_takes_it_back_everywhere(staged):
    before = [line.current.token for line in tokens(staged)]
    result = staged.abort()
    assert (result.state, happened(result)) == (SetState.UNSTAGED, [Happened.ABORTED] * SIZE)
    assert open_by(staged) == ["mo"] * SIZE
    assert [line.current.token for line in tokens(staged)] == before


def test_a_key_is_generated_once_and_safe_before_the_first_write(simulated):
    fd = os.memfd_create("key")
    delivered = []

    async def deliver():
        assert simulated.order == []
        delivered.append(os.pread(fd, 4096, 0))

    with secrets(unlock=MAIN) as sources:
        sources = {**sources, NEW_NAME: GenerateInto(fd)}
        result = run(simulated.sets.stage(simulated.refs, sources, REQUEST, deliver=deliver))
    os.close(fd)
    assert result.errors == ()
    [key] = delivered
    assert all(opens(image, key) for image in simulated.images)


def test_a_key_that_cannot_be_made_safe_is_staged_nowhere(simulated):
    async def deliver():
        raise SecretRejected("cannot write it")

    fd = os.memfd_create("key")
    with secrets(unlock=MAIN) as sources:
        sources = {**sources, NEW_NAME: GenerateInto(fd)}
        result = run(simulated.sets.stage(simulated.refs, sources, REQUEST, deliver=deliver))
    os.close(fd)
    assert happened(result) == [Happened.FAILED, Happened.NOTHING, Happened.NOTHING]
    assert simulated.order == []


@pytest.mark.parametrize("name", [UNLOCK, NEW_NAME])
def test_a_secret_that_can_be_read_only_once_is_refused(simulated, name):
    reader, writer = os.pipe()
    os.write(writer, MAIN)
    os.close(writer)
    with secrets(unlock=MAIN, new=NEW) as sources, pytest.raises(SecretRejected, match="only once"):
        run(simulated.sets.stage(simulated.refs, {**sources, name: SecretFd(reader)}, REQUEST))
    os.close(reader)
    assert simulated.order == []


@pytest.mark.parametrize("use", [SimulatedSet.stage, SimulatedSet.finish, SimulatedSet.abort])
def test_no_volume_counts_twice(staged, use):
    staged.refs = [*staged.refs, staged.refs[0]]
    with pytest.raises(InvalidRequest, match="twice"):
        use(staged)
    assert staged.order == []


@pytest.mark.parametrize("use", [SimulatedSet.stage, SimulatedSet.finish, SimulatedSet.abort])
def test_nothing_is_begun_while_one_volume_is_busy(staged, use):
    with staged.locks.held_elsewhere(Level.JOB, SimDevice(staged.disks[2])), pytest.raises(Busy):
        use(staged)
    assert staged.order == []
    use(staged)


@pytest.mark.parametrize("use", [SimulatedSet.stage, SimulatedSet.finish, SimulatedSet.abort])
def test_all_locks_are_held_and_given_back(staged, use):
    staged.disks[0].observer = lambda _: held.append([staged.locks.held(SimDevice(disk))[0] for disk in staged.disks])
    held = []
    use(staged)
    assert held == [[Level.JOB] * SIZE] * len(held)
    assert staged.locks._holds == []
    assert staged.devices.leaked == ()


def test_what_one_volume_refuses_is_refused_before_anything_is_written(simulated):
    simulated.probe.planted["/dev/sim2"] = ("ext4",)
    with pytest.raises(ForeignSignature, match=r"\(/dev/sim2\)$"):
        simulated.stage()
    del simulated.probe.planted["/dev/sim2"]
    run(simulated.volumes.release(simulated.refs[1]))
    simulated.order.clear()
    with pytest.raises(NeedsPerson, match="no managed key"):
        simulated.stage()
    simulated.refs[2] = DeviceRef("/dev/none")
    with pytest.raises(UnknownDevice):
        simulated.stage()
    assert simulated.order == []
    assert simulated.devices.leaked == ()


def test_a_volume_without_room_is_found_before_anything_is_written(simulated):
    full = SimulatedSet([make_volume([MAIN], areas=2)])
    with secrets(unlock=MAIN, new=OLD) as sources:
        run(full.volumes.enroll(full.refs[0], sources, data={}, pbkdf=CHEAP))
    simulated = SimulatedSet([*simulated.images[:2], *full.images])
    with pytest.raises(NoFreeArea, match=r"\(/dev/sim2\)$"):
        simulated.stage()
    assert simulated.order == []


def another_credential(number):
    """A volume that ``MAIN`` does not open."""
    other = SimulatedSet([make_volume([b"something else"])])
    with secrets(unlock=b"something else", new=OLD) as sources:
        run(other.volumes.enroll(other.refs[0], sources, data={}, pbkdf=CHEAP))
    return [enrolled(at) if at != number else other.images[0] for at in range(SIZE)]


@pytest.mark.parametrize("number", range(SIZE))
def test_if_it_fails_on_one_it_is_undone_on_the_others(number):
    simulated = SimulatedSet(another_credential(number))
    before = [line.current.token for line in tokens(simulated)]
    result = simulated.stage()
    rest = [Happened.NOTHING] * (SIZE - number - 1)
    assert happened(result) == [*[Happened.UNDONE] * number, Happened.FAILED, *rest]
    assert [type(error) for error in result.errors] == [WrongCredential]
    assert result.state is SetState.UNSTAGED
    assert [line.current.token for line in tokens(simulated)] == before
    assert not any(opens(image, NEW) for image in simulated.images)


def test_or_kept_and_taken_up_again(simulated):
    images = simulated.images
    simulated = SimulatedSet(another_credential(1))
    result = simulated.stage(keep=True)
    assert happened(result) == [Happened.STAGED, Happened.FAILED, Happened.NOTHING]
    assert result.state is SetState.PARTLY_STAGED
    again = SimulatedSet([simulated.images[0], *images[1:]], seed=9)
    with pytest.raises(WrongCredential, match=r"another one is staged.*\(/dev/sim0\)"):
        again.stage(new=b"another key")
    with pytest.raises(NeedsPerson, match="not staged on all"):
        again.finish()
    fd = os.memfd_create("key")
    with secrets(unlock=MAIN) as sources, pytest.raises(InvalidRequest, match="the first one is staged"):
        run(again.sets.stage(again.refs, {**sources, NEW_NAME: GenerateInto(fd)}, REQUEST))
    os.close(fd)
    assert again.order == []
    done = again.stage()
    assert (happened(done), done.state) == ([Happened.ALREADY, Happened.STAGED, Happened.STAGED], SetState.STAGED)
    assert done.group == result.group
    assert set(again.order) == {1, 2}


def test_a_set_of_that_id(staged):
    group = staged.stage().group
    assert staged.order == []
    assert staged.stage(group=group.id).group == group
    with pytest.raises(NeedsPerson, match=f"is staged for set {group.id}"):
        staged.stage(group="another")
    assert staged.order == []


def test_the_next_set_does_not_ask_which_one_came_before(staged):
    staged.finish()
    assert staged.stage(new=b"third").state is SetState.STAGED
    staged.abort()
    staged.refs = staged.refs[:2]
    assert staged.stage(new=b"third").state is SetState.STAGED


@pytest.mark.parametrize("number", range(SIZE))
@pytest.mark.parametrize("kind", ["writes", "flushes"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("keep", [False, True])
def test_a_device_that_fails_while_it_is_staged(simulated, number, kind, step, keep):
    setattr(simulated.disks[number].faults, kind, {step: 0})
    result = simulated.stage(keep=keep)
    failed = result.members[number]
    assert isinstance(failed.error, DeviceError)
    others = [Happened.STAGED if keep else Happened.UNDONE] * number
    assert happened(result)[:number] == others
    assert happened(result)[number + 1 :] == [Happened.NOTHING] * (SIZE - number - 1)
    assert failed.happened is (Happened.UNDONE if failed.change else Happened.FAILED)
    for disk in simulated.disks:
        disk.power_cut()
    rebooted = SimulatedSet(simulated.images, seed=9)
    rebooted.reconcile()
    assert open_by(rebooted)[:number] == ["mon" if keep else "mo"] * number
    assert open_by(rebooted)[number + 1 :] == ["mo"] * (SIZE - number - 1)
    if failed.happened is Happened.UNDONE or failed.error.outcome is Outcome.UNCHANGED:
        assert open_by(rebooted)[number] == "mo"
    back = SimulatedSet(rebooted.images)
    if any("n" in letters for letters in open_by(back)):
        back.abort()
    assert open_by(back) == ["mo"] * SIZE
    assert rebooted.stage().state is SetState.STAGED


def test_the_first_volume_that_cannot_be_finished_stops_it(staged):
    staged.disks[0].faults.writes = {staged.disks[0].writes: 0}
    result = staged.finish()
    assert happened(result) == [Happened.FAILED, Happened.NOTHING, Happened.NOTHING]
    assert result.state is SetState.STAGED
    assert open_by(staged) == ["mon"] * SIZE
    assert staged.abort().state is SetState.UNSTAGED


def test_once_one_is_finished_the_others_have_their_turn(staged):
    staged.disks[1].faults.writes = {staged.disks[1].writes: 0}
    result = staged.finish()
    assert happened(result) == [Happened.FINISHED, Happened.FAILED, Happened.FINISHED]
    assert (result.state, open_by(staged)) == (SetState.FINISHING, ["mn", "mon", "mn"])
    with pytest.raises(NeedsPerson, match="finished on some volumes"):
        staged.abort()
    with pytest.raises(NeedsPerson, match="finished on some volumes"):
        staged.stage()
    result = staged.finish()
    assert happened(result) == [Happened.ALREADY, Happened.FINISHED, Happened.ALREADY]
    assert (result.state, open_by(staged)) == (SetState.FINISHED, ["mn"] * SIZE)


def test_a_volume_that_goes_is_told_and_the_state_is_not_guessed(staged):
    def pull(_):
        staged.disks[2].faults.gone = True

    staged.disks[0].observer = pull
    result = staged.finish()
    assert happened(result) == [Happened.FINISHED, Happened.FINISHED, Happened.FAILED]
    assert (type(result.errors[0]), result.state) == (UnknownDevice, None)


def test_abort_goes_on_where_one_fails(staged):
    staged.disks[0].faults.writes = {staged.disks[0].writes: 0}
    result = staged.abort()
    assert happened(result) == [Happened.FAILED, Happened.ABORTED, Happened.ABORTED]
    assert (result.state, open_by(staged)) == (SetState.PARTLY_STAGED, ["mon", "mo", "mo"])
    result = staged.abort()
    assert happened(result) == [Happened.ABORTED, Happened.ALREADY, Happened.ALREADY]


@pytest.mark.parametrize("step", ["finish", "abort"])
def test_a_part_of_a_set_goes_neither_way(staged, step):
    staged.refs = staged.refs[:2]
    with pytest.raises(NeedsPerson, match="3 volumes belong to set"):
        getattr(staged, step)()
    for act in (staged.volumes.finish, staged.volumes.abort):
        with pytest.raises(NeedsPerson, match="name all of them"):
            run(act(staged.refs[0]))
    assert staged.order == []


@pytest.mark.parametrize("step", ["finish", "abort"])
def test_what_was_staged_alone_is_no_set(simulated, step):
    with pytest.raises(InvalidRequest, match="no new generation"):
        getattr(simulated, step)()
    with secrets(unlock=MAIN, new=NEW) as sources:
        run(simulated.volumes.stage(simulated.refs[0], sources, data=None, pbkdf=CHEAP))
    simulated.order.clear()
    with pytest.raises(NeedsPerson, match="is staged on it alone"):
        getattr(simulated, step)()
    with pytest.raises(InvalidRequest, match="not staged on a set"):
        run(simulated.volumes.finish(simulated.refs[0], group="rack-4"))
    assert simulated.order == []


def cancelled_at(simulated, work, call, turn, *, again=False):
    """Run ``work``, and cancel it when the engine is called with ``call`` for the ``turn``-th time.

    ``again``: and at each of its calls afterwards.
    """

    async def main():
        task = asyncio.ensure_future(work)
        seen = []

        def on_call(name):
            seen.append(name)
            if seen.count(call) >= turn and (again or (name == call and seen.count(call) == turn)):
                task.cancel()

        simulated.engine.on_call = on_call
        return await task

    return run(main())


@pytest.mark.parametrize("keep", [False, True])
def test_who_stops_it_half_way_gets_it_undone(simulated, keep):
    with secrets(unlock=MAIN, new=NEW) as sources:
        work = simulated.sets.stage(simulated.refs, sources, SetRequest(None, CHEAP, keep=keep))
        result = cancelled_at(simulated, work, "unlock", 2)
    first = Happened.STAGED if keep else Happened.UNDONE
    assert happened(result) == [first, Happened.FAILED, Happened.NOTHING]
    assert [type(error) for error in result.errors] == [Cancelled]
    assert open_by(simulated) == ["mon" if keep else "mo", "mo", "mo"]
    assert simulated.locks._holds == []


def test_no_impatience_keeps_it_from_being_undone(simulated):
    with secrets(unlock=MAIN, new=NEW) as sources:
        work = simulated.sets.stage(simulated.refs, sources, REQUEST)
        result = cancelled_at(simulated, work, "unlock", 3, again=True)
    assert happened(result) == [Happened.UNDONE, Happened.UNDONE, Happened.FAILED]
    assert (result.state, open_by(simulated)) == (SetState.UNSTAGED, ["mo"] * SIZE)


def test_who_stops_it_before_it_has_begun_is_cancelled(simulated):
    with secrets(unlock=MAIN, new=NEW) as sources, pytest.raises(asyncio.CancelledError):
        cancelled_at(simulated, simulated.sets.stage(simulated.refs, sources, REQUEST), "unlock", 1)
    assert simulated.order == []
    assert simulated.locks._holds == []


@pytest.mark.parametrize(("step", "letters"), [("finish", "mn"), ("abort", "mo")])
def test_the_ends_can_be_stopped_between_two_volumes(staged, step, letters):
    result = cancelled_at(staged, getattr(staged.sets, step)(staged.refs), "session", 2)
    assert [type(error) for error in result.errors] == [Cancelled]
    assert open_by(staged) == [letters, "mon", "mon"]
    assert getattr(staged, step)().errors == ()


@pytest.mark.parametrize("step", ["finish", "abort"])
def test_the_ends_can_be_stopped_before_they_have_begun(staged, step):
    with pytest.raises(asyncio.CancelledError):
        cancelled_at(staged, getattr(staged.sets, step)(staged.refs), "session", 1)
    assert staged.order == []


def test_the_status_reads_only(staged):
    status = run(staged.sets.status(staged.refs))
    assert (status.state, [member.standing for member in status.members]) == (SetState.STAGED, [Standing.STAGED] * SIZE)
    assert run(staged.sets.status(staged.refs[:2])).state is SetState.MIXED
    assert run(staged.sets.status(staged.refs, group="another")).state is SetState.MIXED
    assert staged.order == []


def test_no_secret_in_the_journal(staged):
    staged.finish()
    assert len(staged.journal.entries) == 2 * SIZE
    assert not any(secret.decode() in staged.journal.text() for secret in (MAIN, OLD, NEW))
