# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks whose writes fail, or are lost, in one place: each phase of a commit meets that in turn.

dm-flakey covers that place alone, so that it is known what fails; all else of the volume is well.
"""

import json

import pytest

from tests.beds.machine import restored
from tests.installed.vm.volumes import FILES, KEYS, SMALL, cut_out, header, kit, make_volume, managed, opens, place, put

SECTOR = 512
HEADER_BYTES = 16384
FAULTS = {"error": "1 error_writes", "drop": "1 drop_writes"}
NOTHING_LEFT = """
found=$(reconcile true)
echo "$found"
[ "$(grep --only-matching ' 0 0 ""' <<<"$found" | wc --lines)" = 4 ]
"""
CREATE = "dmsetup create {name} <<END\n{table}\nEND\n"
MEND = "dmsetup reload {name} --table '0 {sectors} linear /dev/vdb {begin}'\ndmsetup resume {name}\n"


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_told_is_true_and_reconcile_mends_it(fault, tmp_path):
    volumes = [make_volume(tmp_path / f"volume{number}", SMALL) for number in range(4)]
    places = [phase_place(volumes[0], phase) for phase in ("new-area", "primary", "secondary", "old-area")]
    disk = tmp_path / "disk"
    put(disk, volumes)
    sick = "".join(
        CREATE.format(name=f"volume{number}", table=table(number, begin, end, FAULTS[fault]))
        for number, (begin, end) in enumerate(places)
    )
    well = "".join(
        MEND.format(name=f"volume{number}", sectors=SMALL // SECTOR, begin=place(number) // SECTOR)
        for number in range(4)
    )
    with restored("bookworm", disk=disk) as machine:
        script = f"""{sick}
        for number in 0 1 2 3; do
            job=$(start Rotate /dev/mapper/volume$number backup new)
            ended $job >end
            echo $(head -n 3 end)
        done
        ! journalctl --unit luksrotd | grep Traceback
        """
        told = [line.split() for line in machine.check(kit(script), FILES).splitlines()]
        assert [state for _, state, *_ in told] == ['"failed"'] * 4, told
        outcomes = [json.loads(outcome) for _, _, _, outcome, *_ in told]
        assert outcomes[0] == "unchanged"
        for number, outcome in enumerate(outcomes):
            assert_true(outcome, cut_out(disk, number, tmp_path / "now"))
        machine.check(kit(f"{well}\nreconcile false\n{NOTHING_LEFT}"), FILES)
    for number in range(4):
        now = cut_out(disk, number, tmp_path / "now")
        assert opens(now, KEYS["old"])
        assert opens(now, KEYS["new"]) != opens(now, KEYS["backup"])
        (token,) = managed(now)
        assert "wipe" not in token
    # The faults were met: the volume whose new area is sick cannot have been rotated.
    assert opens(cut_out(disk, 0, tmp_path / "now"), KEYS["backup"])


def phase_place(volume, phase):
    """Which bytes of the volume a phase of a rotation writes: begin and end."""
    areas = sorted(
        (int(slot["area"]["offset"]), int(slot["area"]["size"])) for slot in header(volume)["keyslots"].values()
    )
    (_, size), (old, _) = areas
    return {
        "new-area": (old + size, old + 2 * size),
        "primary": (0, HEADER_BYTES),
        "secondary": (HEADER_BYTES, 2 * HEADER_BYTES),
        "old-area": (old, old + size),
    }[phase]


def table(number, begin, end, fault):
    """Of device-mapper, for a volume with a fault from byte ``begin`` to ``end``."""
    base = place(number) // SECTOR
    first, last, whole = begin // SECTOR, end // SECTOR, SMALL // SECTOR
    parts = [(0, first, "linear", ""), (first, last, "flakey", f" 0 1 {fault}"), (last, whole, "linear", "")]
    return "\n".join(
        f"{start} {stop - start} {target} /dev/vdb {base + start}{rest}"
        for start, stop, target, rest in parts
        if stop > start
    )


def assert_true(outcome, now):
    """What the caller was told, that is what the volume is; in any case a key that its token names opens it."""
    new, backup = opens(now, KEYS["new"]), opens(now, KEYS["backup"])
    assert opens(now, KEYS["old"])
    assert new or backup
    pending = any("wipe" in token for token in managed(now))
    allowed = {
        "unchanged": backup and not new,
        "committed": new and not backup and not pending,
        "committed-wipe-pending": new and not backup,
        "unknown-reconcile-needed": True,
    }
    assert allowed[outcome], (outcome, new, backup, pending)
