# SPDX-License-Identifier: GPL-2.0-or-later
"""The judge of power cuts, on recordings that need no machine: ours, and wrong ones."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.powercut import recording
from tests.powercut.disk import DISK_SIZE, MARKS, USED, VOLUMES, make_disk, volume
from tests.powercut.inside import Result, Task, judged
from tests.powercut.page import page, wrong
from tests.powercut.recording import BEGUN, Facts, Recording, cut_out
from tests.powercut.writelog import Request, parse, serialise
from tests.support.crashverbs import SECRETS, VERBS
from tests.support.realvolume import RealSimulation
from tests.support.simdisk import Write

FLUSH = Request(flush=True)
PROGRAM = (sys.executable, "-m", "luksrotd.ctl")
CONTROL = "control: rotation on a disk that ignores flushes"


def mark(step: str) -> list[Request]:
    text = json.dumps({"done": step}).encode()
    return [Request(Write(MARKS.offset, text.ljust(512, b"\0"))), FLUSH]


def rotation() -> list[list[Write]]:
    """The writes of a rotation, on the disk."""
    content = volume("rotation")
    simulation = RealSimulation(content + bytes(VOLUMES[0].size - len(content)))
    VERBS["rotation"].operate(simulation)
    at = VOLUMES[0].offset
    return [[Write(at + write.offset, write.data) for write in epoch] for epoch in simulation.disk.epochs() if epoch]


def recorded(folder: Path, epochs: Sequence[Sequence[Write]], scenario: str = "rotation") -> Path:
    """A recording of these epochs, in a folder."""
    disk = folder / "disk"
    make_disk(disk, ["rotation"])
    log = [*mark(BEGUN), *(one for epoch in epochs for one in (*map(Request, epoch), FLUSH)), *mark("rotated")]
    secrets = {name: secret.decode() for name, secret in SECRETS.items()}
    facts = Facts(scenario, "bookworm", secrets, [], ["6.1", "cryptsetup"])
    cut_out(disk.read_bytes(), parse(serialise(log)), facts).save(folder / "recording")
    return folder / "recording"


def judge(folder: Path, states: int, only: Sequence[str] = ()) -> Result:
    return judged(folder, Task([str(folder)], 2026, states, 600, 1, PROGRAM, only), deadline=float("inf"))


def test_a_rotation_bears_every_cut(tmp_path: Path) -> None:
    found = judge(recorded(tmp_path, rotation()), 24)
    assert (found.wrong, found.violations, found.distinct, found.reconciled) == (0, [], 24, 24)
    assert found.repaired
    assert found.executed == 1
    assert found.after.keys() <= {"area of a key that never was in force"}


def test_a_disk_that_ignores_flushes_is_caught(tmp_path: Path) -> None:
    found = judge(recorded(tmp_path, rotation(), CONTROL), 12)
    assert found.wrong
    assert wrong([found]) == []
    assert wrong([Result(**{**asdict(found), "wrong": 0, "violations": []})])


def test_what_is_reported_and_not_there_is_caught(tmp_path: Path) -> None:
    """The mark comes before the last flush: a state that has it, and not what it says, is wrong."""
    folder = recorded(tmp_path, rotation())
    full = recording.load(folder)
    _, area, flush, primary, _, secondary, *_, done, end = full.requests
    assert flush == end == FLUSH
    Recording(full.base, [area, flush, primary, secondary, done, end], full.facts).save(folder)
    found = judge(folder, 0, ["e1.first2", "e1.only2"])
    assert [name for name, _ in found.violations] == ["e1.only2"]


def test_the_log_of_a_machine_must_have_all_marks(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    make_disk(disk, ["rotation"])
    assert disk.stat().st_size == DISK_SIZE
    with pytest.raises(ValueError, match="the steps that were marked"):
        cut_out(disk.read_bytes()[:USED], mark(BEGUN), Facts("rotation", "bookworm", {}, [], []))


def test_the_page_tells_what_was_found(tmp_path: Path) -> None:
    found = judge(recorded(tmp_path, rotation()), 1)
    meta = {"date": "2026-01-01", "command": "make powercut", "seed": 7, "minutes": 2.0, "processors": 2}
    text = page([found], meta, [{"release": "bookworm", "rotations": 200}])
    assert "1 distinct states" in text
    assert "**no violation**" in text
    assert "| bookworm | 200 |" in text
    found.violations, found.wrong = [("e1.first0", ["B is lost"])], 1
    assert "**1 findings**: bookworm, rotation, e1.first0: B is lost" in page([found], meta, [])
