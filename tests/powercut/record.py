# SPDX-License-Identifier: GPL-2.0-or-later
"""Records the scenarios: in a virtual machine, on whose disk every write and flush is logged by QEMU."""

import base64
import tempfile
from pathlib import Path
from typing import Final

from tests.beds.machine import restored
from tests.powercut.disk import USED, make_disk, volume
from tests.powercut.recording import Facts, Recording, apply, cut_out
from tests.powercut.scenarios import BUSY, SCENARIOS, script
from tests.powercut.writelog import parse
from tests.support.crashverbs import SECRETS

#: What a machine may take, if others work on this one, too.
SECONDS: Final = 600.0
TOP: Final = Path(__file__).parents[2]
FOLDER: Final = TOP / "build" / "powercut"


def folder_of(release: str, name: str) -> Path:
    """Where a recording is."""
    words = "".join(letter if letter.isalnum() else " " for letter in name).split()
    return FOLDER / release / "-".join(words)


def record(release: str, name: str) -> Recording | None:
    """Run a scenario in a machine of that release, ``None`` if that has not what it needs.

    Raises ``AssertionError`` if it fails, or is not all seen.
    """
    scenario = SCENARIOS[name]
    with tempfile.TemporaryDirectory(prefix="luksrotd-powercut-") as directory:
        disk, log = Path(directory, "disk.img"), Path(directory, "log")
        make_disk(disk, scenario.volumes)
        before = disk.read_bytes()
        files = {**SECRETS, "busy.py": BUSY.encode()}
        if scenario.broken:
            files["broken"] = volume(scenario.broken)
        with restored(release, disk=disk, log=log) as machine:
            if scenario.needs and machine.run(f"command -v {scenario.needs}")[0]:
                return None
            status, output = machine.run(script(scenario), files, seconds=SECONDS)
            machine.stand_still()  # a write that QEMU is ended in may be on the disk, and not in the log
        assert status == 0, f"{name} failed in the machine:\n{output}"
        lines = output.splitlines()
        requests = parse(log.read_bytes())
        replayed = bytearray(before[:USED])
        for one in requests:
            if one.write is not None:
                apply(replayed, one.write)
        with disk.open("rb") as file:
            assert file.read(USED) == replayed, f"what {name} wrote was not all seen"
    told = {key: base64.b64decode(value) for key, value in (line.split()[1:] for line in lines if _tells(line))}
    secrets = {key: secret.strip(b"\n").decode() for key, secret in {**SECRETS, **told}.items()}
    machine_said = [line for line in lines if line and not _tells(line)][-2:]
    return cut_out(before, requests, Facts(name, release, secrets, [], machine_said))


def _tells(line: str) -> bool:
    return line.startswith("secret ")
