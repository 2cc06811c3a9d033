# SPDX-License-Identifier: GPL-2.0-or-later
"""12: how quickly the crash states of a rotation are judged."""

import asyncio
import time
from typing import Final

from tests.bench.figures import Finding, Result, Series
from tests.crash.cells import MUTANT, REAL, SIMULATED, Cell, cells
from tests.crash.table import campaign

CORES: Final = 2
LIMIT: Final = 30.0
METHOD: Final = f"""The whole suite for one rotation: every state in which a power cut can leave it, each changed
sector of the headers old, new or garbage, and so every order and every tear, and each key area in ten classes. On
simulated volumes with both sizes of sectors, the crashes inside reconcile included; by real libcryptsetup with headers
of 16 KiB and a key of 512 bit, on images (crashes inside reconcile included), loop devices and detached headers, with
both sizes of sectors; and every mutant of the protocol, which must be caught. Other verbs and geometries, which make
the rest of docs/crash-states.md, are not in it. {CORES} processes are started for it; time is from their start to their
end, the making of the volumes included. A state is one that differs from all others of its enumeration, those inside
reconcile not counted; mutants are in the time, but not in the states. A violation ends the measurement."""


def suite() -> list[Cell]:
    """The cells for a rotation on the plain geometry, and all mutants."""
    return [cell for cell in cells() if cell.part == MUTANT or _plain(cell)]


def _plain(cell: Cell) -> bool:
    geometry = cell.geometry
    plain = geometry.metadata == 16 and (cell.part == SIMULATED or geometry.bits == 512)
    return cell.part in (SIMULATED, REAL) and cell.name == "rotation" and plain


async def judged(rounds: int) -> Result:
    """12."""
    seconds, states = [], set()
    for _ in range(rounds):
        begun = time.perf_counter()
        results = await asyncio.to_thread(campaign, suite(), CORES, lambda line: None)
        took = time.perf_counter() - begun
        if wrong := [violation for result in results for violation in result.violations]:
            raise RuntimeError(f"crash states are wrong: {wrong[0]}")
        seconds.append(took)
        states.add(sum(result.states for result in results if result.cell.part != MUTANT))
    (count,) = states  # no round judges fewer
    whole = Series("whole suite for a rotation", "s", tuple(seconds))
    rate = Series(f"crash states judged, of {count:,}", "states/s", tuple(count / took for took in seconds))
    findings = [Finding("whole suite, most", whole.maximum, LIMIT, "s")]
    return Result(12, "Crash states", METHOD, [whole, rate], (), findings)
