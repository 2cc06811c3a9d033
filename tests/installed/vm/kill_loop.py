# SPDX-License-Identifier: GPL-2.0-or-later
"""Rotations of a machine that loses its power in the middle, again and again.

    python -m tests.installed.vm.kill_loop [--rotations N] [--release RELEASE] [--seed N]

QEMU gets SIGKILL at a moment that the seed chooses.  The next machine finds the disk; luksrotd-reconcile.service runs
in it, or the daemon is asked to reconcile; then it rotates on, until its power is cut as well.  On the host the disk is
judged before and after reconcile: which keys open it.  What fails is kept.  Of what a real power cut does this has one
part only, that the guest's page cache is lost; for the rest see tests/powercut.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.beds.machine import restored
from tests.beds.roots import PROJECT
from tests.installed.vm.volumes import FILES, KEYS, header, kit, luksrotctl, make_volume, managed, opens
from tests.powercut.writelog import parse

HEADER_BYTES = 16384
PLACES = ("new area", "primary header", "secondary header", "old area", "primary header", "secondary header")
#: The last that was written.
REACHED = ("nothing", *(f"{number}. {place}" for number, place in enumerate(PLACES, 1)))
#: So many are cut at any time, the others at the first write of a phase, or soon after it, each phase as often.
BY_TIME = 0.1
JOB_SECONDS = 6.0
SOON_SECONDS = 0.03
PATIENCE = 600.0
OTHER = {"backup": "new", "new": "backup"}
BY_UNIT = """
udevadm trigger --settle /dev/vdb
systemctl restart luksrotd-reconcile.service
"""
BY_DAEMON = """
udevadm trigger --settle /dev/vdb
volume /dev/vdb
reconcile false
"""


@dataclass
class Cut:
    """A power cut: how far the commit had come, what it left, and who mended it."""

    key: str
    after: str
    left: str
    mended_by: str = ""


def main():
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rotations", type=int, default=200)
    parser.add_argument("--release", default="bookworm")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=PROJECT / "build" / "powercut" / "vm-kill.json")
    parser.add_argument("--kept", type=Path, default=PROJECT / "build" / "vm-kill")
    return run(parser.parse_args())


def run(options):
    """All rotations; 1 if one has left a volume that is not as it should be."""
    chance = random.Random(options.seed)
    cuts, failures = [], []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="luksrotd-kill-") as folder:
        disk, before = make_volume(Path(folder, "disk")), Path(folder, "before")
        cut = None
        for number in range(options.rotations + 1):  # the last machine mends only
            shutil.copyfile(disk, before)
            try:
                cut, mended = live(options.release, disk, chance, cut, last=number == options.rotations)
                cuts += [mended] if mended else []
            except AssertionError as error:
                failures.append({"after rotation": number, "error": str(error)[:2000]})
                keep(options.kept / f"{options.seed}-{number}", (before, disk))
                make_volume(disk)
                cut = None
            options.output.write_text(json.dumps(rows(options, cuts, failures), indent=2) + "\n")
            said = failures[-1] if failures and cut is None else cut
            print(f"{time.strftime('%T')} {number} {said}", flush=True)  # noqa: T201 - what the command is for
    return 1 if failures else 0


def rows(options, cuts, failures):
    """For docs/power-cuts.md: how many cuts there were at each place, and what they left."""
    left = Counter((cut.after, cut.left) for cut in cuts)
    kinds = sorted({cut.left for cut in cuts})
    found = [
        {
            "release": options.release,
            "the last that was written": after,
            "cuts": sum(left[after, kind] for kind in kinds),
        }
        | {f"left: {kind}": left[after, kind] for kind in kinds}
        for after in REACHED
    ]
    whole = {"release": options.release, "the last that was written": f"(seed {options.seed})", "cuts": len(cuts)}
    whole |= {f"left: {kind}": sum(left[after, kind] for after in REACHED) for kind in kinds}
    return [{**row, "violations": ""} for row in found] + [{**whole, "violations": len(failures)}]


def live(release, disk, chance, cut, *, last=False):
    """A machine's life: mend what ``cut`` has left, begin a rotation, lose the power.

    The new cut, and the old one, mended; AssertionError if it is not right.
    """
    log = disk.with_name("log")
    unit = chance.random() < 0.5
    with restored(release, disk=disk, log=log, noticed=False) as machine:
        if cut:
            machine.check(kit(BY_UNIT if unit else BY_DAEMON), FILES)
            assert "pending" not in judge(disk, cut.key)
            said = luksrotctl("reconcile", "--dry-run", disk)
            assert said == f"{disk}: clean\n", said
            cut.mended_by = "unit" if unit else "daemon"
        else:
            machine.check("udevadm trigger --settle /dev/vdb")
        if last:
            return None, cut
        key = next(name for name in OTHER if opens(disk, KEYS[name]))
        old = old_area(disk)
        written = log.stat().st_size
        machine.check(kit(f"start Rotate /dev/vdb {key} {OTHER[key]}"), FILES)
        if chance.random() < BY_TIME:
            time.sleep(chance.random() * JOB_SECONDS)
        else:
            wait_for(chance.choice(REACHED[1:]), log, written, old)
            time.sleep(max(chance.uniform(-SOON_SECONDS, SOON_SECONDS), 0))
        machine.kill()
    return Cut(key, reached(log, written, old), judge(disk, key)), cut


def old_area(disk):
    """Where the keyslot is that the rotation is to wipe: the begin and the end."""
    (token,) = managed(disk)
    area = header(disk)["keyslots"][token["keyslots"][0]]["area"]
    return int(area["offset"]), int(area["offset"]) + int(area["size"])


def wait_for(phase, log, written, old):
    """Until the rotation has come that far."""
    end, size = time.monotonic() + PATIENCE, 0
    while True:
        if log.stat().st_size != size:
            size = log.stat().st_size
            with suppress(ValueError):  # an entry is just being written
                if REACHED.index(reached(log, written, old)) >= REACHED.index(phase):
                    return
        assert time.monotonic() < end, f"the rotation has not come to its {phase}"
        time.sleep(0.0005)


def reached(log, written, old):
    """How far the rotation has come that began when the log was so long."""
    end, done = 512, 0
    for request in parse(log.read_bytes()) if log.stat().st_size else ():
        end += 512 + (len(request.write.data) if request.write else 0)
        place = place_of(request.write.offset, old) if request.write and end > written else None
        if place and place != PLACES[done - 1]:
            done = PLACES.index(place, done) + 1
    return REACHED[done]


def place_of(offset, old):
    """What is written at that byte of the volume."""
    if offset < 2 * HEADER_BYTES:
        return "primary header" if offset < HEADER_BYTES else "secondary header"
    return "old area" if old[0] <= offset < old[1] else "new area"


def judge(disk, key):
    """What a volume is, before the change or after it; AssertionError if it is neither."""
    there = [name for name in OTHER if opens(disk, KEYS[name])]
    assert opens(disk, KEYS["old"]), "the ordinary key does not open it"
    assert len(there) == 1, f"opened by {there}"
    (token,) = managed(disk)
    pending = ", wipe pending" if "wipe" in token else ""
    return f"{'before' if there == [key] else 'after'}{pending}"


def keep(folder, files):
    """For whoever looks at it."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)


if __name__ == "__main__":
    sys.exit(main())
