# SPDX-License-Identifier: GPL-2.0-or-later
"""Scrubbing in pieces: what changes, what does not, when it can be stopped, and what it meets."""

import asyncio
import functools

import pytest

from luksrotd.errors import DeviceError, ForeignSignature, Outcome
from luksrotd.luks2.layout import Which
from luksrotd.rotation.scrub import free_blocks
from luksrotd.rotation.view import view
from luksrotd.service import scrub
from luksrotd.service.progress import Stage, ignore
from tests.support import forge
from tests.support.simdisk import Write
from tests.support.simengine import make_volume, opened_by
from tests.support.simulation import MAIN, NEW, OLD, Simulation, run

BLOCK = 4096


@functools.cache
def image():
    simulation = Simulation(make_volume([MAIN]))
    simulation.enroll(MAIN, OLD)
    return simulation.disk.content


def enrolled(sector_size=512):
    return Simulation(image(), sector_size=sector_size)


def scrubbed(simulation, piece=8192, progress=ignore):
    return run(scrub.run(simulation.volumes._transactor, simulation.ref, progress, piece=piece))


def changed(before, after):
    return {block for block in range(0, len(before), BLOCK) if before[block:][:BLOCK] != after[block:][:BLOCK]}


def free(simulation):
    return {block for extent in free_blocks(view(simulation.pair)) for block in range(extent.offset, extent.end, BLOCK)}


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_everything_unreferenced_changes_and_nothing_else(sector_size):
    simulation = enrolled(sector_size=sector_size)
    before, expected = simulation.disk.content, free(simulation)
    done = run(simulation.volumes.scrub(simulation.ref))
    assert changed(before, simulation.disk.content) == expected
    assert (done.bytes, done.uuid) == (len(expected) * BLOCK, simulation.pair.winner.header.uuid)
    assert "keyslot space scrubbed" in simulation.journal.text()
    assert opened_by(simulation.disk.content, OLD) == [1]


def test_each_piece_is_a_transaction_of_its_own():
    simulation = enrolled()
    simulation.disk.log.clear()
    before, expected = simulation.disk.content, free(simulation)
    assert scrubbed(simulation).bytes == len(expected) * BLOCK
    assert changed(before, simulation.disk.content) == expected
    sizes = [sum(len(write.data) for write in epoch) for epoch in simulation.disk.epochs()]
    assert sizes == [8192, 8192, 8192, 0]
    held = [event.text for event in simulation.locks.log if "metadata" in event.text and "shared" not in event.text]
    assert held == ["+metadata", "-metadata"] * 4


def test_what_another_tool_takes_between_two_pieces_is_left_alone():
    simulation = enrolled()
    other = Simulation(image())
    for number in range(4):
        other.enroll(MAIN, b"other %d" % number, name=f"other{number}")
    after = other.disk.content
    for number in range(3):
        after = forge.keyslot_removed(after, 2 + number)
    area = other.pair.winner.metadata.keyslots[5].area

    begun = []

    def come(step):
        begun.append(step)
        if begun.count(Stage.LOCKING) == 2:
            simulation.disk.replace(0, after[:32768])
            simulation.disk.replace(area.offset, after[area.offset : area.end])

    scrubbed(simulation, piece=4096, progress=come)
    places = {operation.offset for operation in simulation.disk.log if isinstance(operation, Write)}
    assert places == {32768 + number * BLOCK for number in (2, 3, 4, 6, 7)}
    assert area.offset == 32768 + 5 * BLOCK
    assert opened_by(simulation.disk.content, b"other 3") == [5]
    assert opened_by(simulation.disk.content, OLD) == [1]


def test_a_wipe_that_is_pending_is_finished_first():
    simulation = enrolled()
    image = forge.edited(
        simulation.disk.content, lambda raw: raw["tokens"]["0"].update(wipe=[{"offset": "49152", "size": "4096"}])
    )
    simulation.disk.replace(0, forge.newer(image, [Which.PRIMARY]))
    scrubbed(simulation)
    assert simulation.pair.agree
    assert simulation.reconcile().found == ()


def test_a_foreign_signature_stops_it():
    simulation = enrolled()
    simulation.probe.planted[simulation.disk.path] = ("ext4",)
    before = simulation.disk.content
    with pytest.raises(ForeignSignature):
        scrubbed(simulation)
    assert simulation.disk.content == before


@pytest.mark.asyncio
async def test_a_cancel_takes_effect_between_two_pieces():
    simulation = enrolled()
    simulation.disk.log.clear()
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(
        scrub.run(simulation.volumes._transactor, simulation.ref, ignore, piece=4096),
    )

    def stop(operation):
        if isinstance(operation, Write):
            loop.call_soon_threadsafe(task.cancel)

    simulation.disk.observer = stop
    with pytest.raises(asyncio.CancelledError):
        await task
    writes = [operation for operation in simulation.disk.log if isinstance(operation, Write)]
    assert [len(write.data) for write in writes] == [4096]
    assert simulation.disk.dirty == ()
    assert simulation.devices.leaked == ()


@pytest.mark.parametrize("fault", ["write", "flush"])
def test_a_device_that_fails_leaves_the_volume_as_it_was(fault):
    simulation = enrolled()
    if fault == "write":
        simulation.disk.faults.writes[1] = 0
    else:
        simulation.disk.faults.flushes[1] = 0
    with pytest.raises(DeviceError) as caught:
        scrubbed(simulation)
    assert caught.value.outcome is Outcome.UNCHANGED
    simulation.disk.power_cut()
    assert opened_by(simulation.disk.content, OLD) == [1]
    assert simulation.reconcile().found == ()
    assert simulation.rotate(MAIN, NEW).generation == 2


def test_progress_says_done_once_at_the_end():
    steps = []
    scrubbed(enrolled(), progress=steps.append)
    assert steps.count(Stage.DONE) == 1
    assert steps[-1] is Stage.DONE
    assert steps.count("wipe-old") == 3
