# SPDX-License-Identifier: GPL-2.0-or-later
"""Two witnesses of one rotation: dm-log-writes in the machine, and QEMU's blklogwrites outside of it."""

from tests.beds.machine import restored
from tests.installed.vm.test_flakey import phase_place
from tests.installed.vm.volumes import FILES, SMALL, kit, make_volume, place, put
from tests.powercut.writelog import parse

SECTOR = 512
PHASES = ("new-area", "primary", "secondary", "old-area", "primary", "secondary")


def test_both_see_the_phases_of_a_commit_each_with_its_flush(tmp_path):
    volume = make_volume(tmp_path / "volume", SMALL)
    places = [phase_place(volume, phase) for phase in PHASES]
    disk, spare, log = tmp_path / "disk", tmp_path / "spare", tmp_path / "log"
    put(disk, [volume])
    begin = place(0) // SECTOR
    script = f"""
    dmsetup create logged --table "0 $(blockdev --getsz /dev/vdb) log-writes /dev/vdb /dev/vdc"
    dmsetup create volume --table "0 {SMALL // SECTOR} linear /dev/mapper/logged {begin}"
    rotate /dev/mapper/volume backup new
    udevadm settle
    dmsetup remove --retry volume
    dmsetup remove --retry logged
    sync /dev/vdc"""
    with restored("bookworm", disk=disk, spare=spare, log=log) as machine:
        machine.check(kit(script), FILES)
    outside = epochs(parse(log.read_bytes()))
    inside = epochs(parse(spare.read_bytes()))
    assert inside == outside
    assert len(outside) == len(PHASES)
    for epoch, (first, last) in zip(outside, places, strict=True):
        written = [number * SECTOR - place(0) for number in epoch]
        assert first <= min(written)
        assert max(written) < last


def epochs(requests):
    """What was written between one flush and the next: sectors → contents.  What had no effect is left out."""
    found = [{}]
    for request in requests:
        if request.flush and found[-1]:
            found.append({})
        if request.write:
            data, first = request.write.data, request.write.offset // SECTOR
            for number in range(len(data) // SECTOR):
                found[-1][first + number] = data[number * SECTOR :][:SECTOR]
        if request.fua:
            found.append({})
    return [epoch for epoch in found if epoch]
