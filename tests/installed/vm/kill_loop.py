# SPDX-License-Identifier: GPL-2.0-or-later
"""Rotations of a machine that loses its power in the middle, again and again.

    python -m tests.installed.vm.kill_loop [--rotations N] [--release RELEASE] [--seed N]

QEMU gets SIGKILL at a moment that the seed chooses; then a machine starts with the same disk, in which
luksrotd-reconcile.service runs, or the daemon sees the disk.  On the host the disk is judged before and after that:
which keys open it.  What fails is kept.  Of what a real power cut does this has one part only, that the guest's page
cache is lost; for the rest see tests/powercut.
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
from tests.beds.qemu import MachineError
from tests.beds.roots import PROJECT
from tests.installed.vm.volumes import FILES, KEYS, kit, luksrotctl, make_volume, managed, opens

#: All that a rotation writes, with its description, is more than this many bytes of log, and less than twice that.
LOG_BYTES = 600 << 10
PATIENCE = 600.0
OTHER = {"backup": "new", "new": "backup"}
BY_UNIT = """
systemctl stop luksrotd.service
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
    """One power cut: what it left, and who mended it."""

    key: str
    left: str
    mended_by: str


def main():
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rotations", type=int, default=200)
    parser.add_argument("--release", default="bookworm")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=PROJECT / "build" / "vm-kill.json")
    parser.add_argument("--kept", type=Path, default=PROJECT / "build" / "vm-kill")
    return run(parser.parse_args())


def run(options):
    """All rotations; 1 if one has left a volume that is not as it should be."""
    chance = random.Random(options.seed)
    counts, failures, began = Counter(), [], time.time()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="luksrotd-kill-") as folder:
        disk = make_volume(Path(folder, "disk"))
        for number in range(1, options.rotations + 1):
            before = shutil.copyfile(disk, Path(folder, "before"))
            try:
                cut = cut_power(options.release, disk, chance)
                counts[f"{cut.left}, mended by the {cut.mended_by}"] += 1
            except AssertionError as error:
                failures.append({"rotation": number, "error": str(error)[:2000]})
                keep(options.kept / f"{options.seed}-{number}", (before, disk))
                shutil.copyfile(before, disk)
            summary = {
                "release": options.release,
                "seed": options.seed,
                "rotations": number,
                "seconds": round(time.time() - began),
                "left": dict(sorted(counts.items())),
                "failures": failures,
            }
            options.output.write_text(json.dumps(summary, indent=2) + "\n")
            if number % 10 == 0:
                print(json.dumps(summary), flush=True)  # noqa: T201 - what the command is for
    return 1 if failures else 0


def cut_power(release, disk, chance):
    """Begin a rotation, cut the power in its middle, start again, and judge; AssertionError if that is not right."""
    key = next(name for name in OTHER if opens(disk, KEYS[name]))
    log = disk.with_name("log")
    # Half of the cuts are among the writes of the commit, the others at any time of the job.
    by_writes, by_time = chance.randrange(LOG_BYTES), chance.random() * 3
    with restored(release, disk=disk, log=log) as machine:
        machine.check(kit(f"volume /dev/vdb; start Rotate /dev/vdb {key} {OTHER[key]} >/run/job"), FILES)
        wait_for(log, by_writes, by_time if chance.random() < 0.5 else PATIENCE, machine)
        machine.kill()
    left = judge(disk, key)
    unit = chance.random() < 0.5
    with restored(release, disk=disk, noticed=False) as machine:
        machine.check(kit(BY_UNIT if unit else BY_DAEMON), FILES)
    mended = judge(disk, key)
    assert "pending" not in mended, mended
    assert luksrotctl("reconcile", "--dry-run", disk) is not None
    return Cut(key, left, "unit" if unit else "daemon")


def wait_for(log, size, seconds, machine):
    """Until the log has grown to that, or so many seconds have passed, or the job has ended."""
    end = time.monotonic() + seconds
    looked = time.monotonic()
    while log.stat().st_size < size and time.monotonic() < end:
        time.sleep(0.0005)
        if time.monotonic() - looked > 2:
            looked = time.monotonic()
            with suppress(MachineError):
                status, _ = machine.run(kit("[[ $(of_job $(cat /run/job) State) =~ finished|failed ]]"), FILES)
                if status == 0:
                    return


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
